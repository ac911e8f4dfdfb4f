"""Whatever a file or a command line holds, the programs work, or end in one sentence and a non-zero exit.

    python -m pytest tests/test_fuzz.py                     990 cases, 110 of each of nine kinds
    FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py     as many of each kind
    python tests/test_fuzz.py resume 17                     one case alone, as a failure names it

A case is a folder in which one file is damaged, or a command line with strange flags, and a program's main().
All run in one process, which prints each case's name before it begins: so a crash of the interpreter has a
name. A case may take a gigabyte and two minutes.
"""
import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load, save

import conftest     # it finds the programs, also for a case alone
import sample
import train
from test_bad_checkpoint import shards
from test_bad_sample import assert_sentence

REPO = Path(train.__file__).parent
CASES = int(os.environ.get("FUZZ_CASES", 110))
SHORT = "--total-tokens 64 --context 16 --batch-start 1 --batch-end 1 --checkpoint-every 1 --device cpu"
WRITE = "sample --max-new-tokens 2 --prompt the --model"
FRESH = f"train {SHORT} --d-model 8 --n-layer 1 --d-state 2 --out new --data"
EVALUATE = f"train {SHORT} --data text.txt --eval-only --init-from"
# Kind -> a command. Its cases damage a file that the command names; the last two kinds add flags instead.
KINDS = {
    "write": f"{WRITE} model",
    "write from shards": f"{WRITE} sharded",
    "write from a state": f"{WRITE} model --load-state state",
    "evaluate": f"{EVALUATE} model",
    "train": f"{FRESH} text.txt --tokenizer model/tokenizer.json",
    "train on a corpus": f"{FRESH} corpus",
    "resume": f"{FRESH.replace('new', 'out')} text.txt --resume",
    "write with flags": f"{WRITE} model",
    "train with flags": f"{FRESH} text.txt",
}
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**40, 2**63, 10**400, 0.5, float("nan"), float("inf"), 1e308, "",
          "x", "9" * 400, "\ud800", "\x1b[31m\n", [], [[]], {}, [1] * 50, json.loads("[" * 200 + "]" * 200)]
WORDS = [*"0 1 2 7 16 1_6 0.5".split() * 3, "-1", "٣", "1e-320", "0x10", "nan", "inf", "1e400", "9" * 400,
         "", "x", "--", "caf\udce9", "~", "0,16", "text:0", "text:nan", "a:1 b:", "a=text.txt", "text.txt/sub",
         *"auto cpu:7 cuda meta fp16 nf4 continue falcon-mamba-7b model out state text.txt corpus no/such".split()]

# What the programs and argparse tell on the way, which is no complaint.
NOTES = r"loading |reading |compiling |warning: |skipping |usage: | |\d+ steps|.* GB of weights|$"

def mutate(dice, value):
    """A JSON value in which one place, however deep, is changed or gone."""
    if isinstance(value, str) and value[:1] == "{":         # a safetensors' metadata holds JSON as a string
        return json.dumps(mutate(dice, json.loads(value)))
    if not value or not isinstance(value, (dict, list)) or dice.random() < 0.05:
        near = [-value, value + 1, value // 2] if type(value) is int else []
        return dice.choice(VALUES + near)
    value = value.copy()
    key = dice.choice([*value] if isinstance(value, dict) else range(len(value)))
    if dice.random() < 0.1:
        del value[key]
    else:
        value[key] = mutate(dice, value[key])
    return value

def garble(dice, data):
    """Bytes of which some are cut off, cut out, put in or flipped, or all are others."""
    a, b = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    flipped = bytearray(data)
    for i in dice.choices(range(len(data)), k=dice.choice([1, 20])):
        flipped[i] ^= 1 << dice.randrange(8)
    more = data[:a] + dice.randbytes(dice.choice([1, 8, 999])) + data[a:]
    other = dice.choice([b"", b"\0" * 99, b"null", b"[" * 10**5, b'{"a":' * 10**4, b"\xff\xfe", b"9" * 10**4])
    return dice.choice([data[:a], data[:a] + data[b:], more, flipped, flipped, other])

def other_json(dice, data):
    return json.dumps(mutate(dice, json.loads(data))).encode()

def other_tensors(dice, data):
    """A whole file, in which one tensor is gone or another."""
    tensors = load(data)
    name = dice.choice(sorted(tensors))
    value = tensors.pop(name)
    changed = [value.flatten()[1:], value.flatten(), value.double(), value.int(), value * -1e38, value / 0]
    return save(tensors | dice.choice([{}, {name + "x": value}, *({name: each} for each in changed)]))

def other_header(dice, data):
    """A file whose JSON header is another, or lies about its length, which stands before it."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = other_json(dice, data[8:end])
    size = dice.choice([*[len(header)] * 4, 0, 2**27, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + header + data[end:]

def damage(dice, path):
    data = path.read_bytes()
    ways = [garble]
    if path.suffix == ".json":
        ways += [other_json] * 3
    if path.suffix == ".safetensors" or path.name == "state":
        ways += [other_tensors, other_header]
    path.unlink()
    gone = dice.random()
    if gone > 0.1:
        path.write_bytes(dice.choice(ways)(dice, data))
    elif gone > 0.07:
        path.mkdir()

def run(program, *flags):
    """Run the program here -> its exit status, its output, and what it complained about."""
    sys.argv = [f"{program}.py", *flags]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")            # as Python's own
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = sys.modules[program].main() or 0
        except SystemExit as e:
            status = e.code or 0
            if isinstance(status, str):
                print(status, file=err)
    out.seek(0)
    err.seek(0)
    lines = [line for line in err.read().splitlines() if not re.match(NOTES, line)]
    return status, out.read(), "\n".join(lines)

def prepare():
    """What every case begins with: a text, a run half done, its model, also in shards, a state, a corpus."""
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    for command in [f"{FRESH.replace('new', 'out')} text.txt --keep 9", f"{WRITE} out --save-state state",
                    "train --data text.txt --tokenize-to corpus"]:
        status, _, complaints = run(*command.split())
        assert status == 0, complaints
    for name in ("model", "sharded"):
        shutil.copytree("out", name, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl"))
    shards(Path("sharded"), {})
    for later in sorted(Path("out/checkpoints").iterdir())[2:]:
        shutil.rmtree(later)

def begin(kind, dice):
    """Damage what that kind damages -> the command to run."""
    command = KINDS[kind].split()
    if "flags" in kind:
        known = {*re.findall(r"--[a-z][\w-]+", run(command[0], "--help")[1])} - {"--compile"}   # takes a minute
        for _ in range(dice.randint(1, 3)):
            command.append(dice.choice([*sorted(known), "--unknown", "-x"]))
            command += dice.choices(WORDS, k=dice.choice([0, 1, 1, 1, 1, 2]))
    else:
        named = [path for word in command for path in [Path(word), *sorted(Path(word).rglob("*"))]]
        damage(dice, dice.choice([path for path in named if path.is_file()]))
    return command

def fuzz(cases):
    """Run these cases, pairs of kind and number; print a line for each, its first words before it begins."""
    work = Path(tempfile.mkdtemp()).resolve()
    case = work / "case"
    before = work / "before"
    os.environ["HF_HUB_CACHE"] = str(before)
    before.mkdir()
    os.chdir(before)
    prepare()
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    for kind, number in cases:
        print(kind, number, end=": ", flush=True)
        shutil.copytree(before, case)
        os.chdir(case)
        command = begin(kind, random.Random(f"{kind} {number}"))
        faulthandler.dump_traceback_later(120, exit=True)
        try:
            status, out, complaints = run(*command)
            if status == 0:
                assert complaints == "", complaints
                assert not re.search(r"\b(loss|norm|perplexity) (nan|inf)", out) or "sample" in command, out
            else:
                assert_sentence(complaints)
            print("refused" if status else "worked", flush=True)
        except BaseException:
            print(f"FAULT {command}: {traceback.format_exc()!r}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        os.chdir(work)
        shutil.rmtree(case)
    shutil.rmtree(work)

def ahead(folder):
    """All cases."""
    command = [sys.executable, "-X", "faulthandler", __file__, "all"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})

def test_no_case_kills_the_interpreter_or_hangs(begun):
    assert begun.returncode == 0 and begun.stderr == "", begun.stdout[-300:] + begun.stderr[-3000:]

@pytest.mark.parametrize("kind", KINDS)
def test_damage_does_no_harm_or_ends_in_one_sentence(begun, kind):
    outcomes = re.findall(rf"^{kind} \d+: (.*)", begun.stdout, flags=re.M)
    faults = [outcome for outcome in outcomes if outcome.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    assert len(outcomes) == CASES and "refused" in outcomes
    assert "worked" in outcomes         # or the kind would prove nothing
    print(f"{len(outcomes)} cases, {outcomes.count('worked')} of them worked")

if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        fuzz([(sys.argv[1], int(sys.argv[2]))])
    else:
        fuzz([(kind, number) for kind in KINDS for number in range(CASES)])
