"""Whatever a file or a command line holds, the programs work, or end in one sentence.

    python -m pytest tests/test_fuzz.py                     990 cases, 110 of each of nine kinds
    FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py     as many of each kind
    python tests/test_fuzz.py resume 17                     one case alone, as a failure names it

A case is a folder in which one file is damaged, or a command line with strange flags. All run in
one process, which prints each case's name before it begins: so a crash of the interpreter has a
name. A case may take a gigabyte and two minutes.
"""
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from safetensors.torch import load, save

from conftest import assert_sentence, call, complaints
import sample
import train
from test_bad_checkpoint import shards

CASES = int(os.environ.get("FUZZ_CASES", 110))
SHORT = ("train --total-tokens 64 --context 16 --batch-start 1 --batch-end 1 --checkpoint-every 1 "
         "--device cpu")
SIZES = "--d-model 8 --n-layer 1 --d-state 2"
WRITE = "sample --max-new-tokens 2 --prompt the --model"
# A kind's cases damage a file that its command names; those of the last two add flags instead.
KINDS = {
    "write": f"{WRITE} model",
    "write from shards": f"{WRITE} sharded",
    "write from a state": f"{WRITE} model --load-state state",
    "evaluate": f"{SHORT} --data text.txt --eval-only --init-from model",
    "train": f"{SHORT} {SIZES} --out new --data text.txt --tokenizer model/tokenizer.json",
    "train on a corpus": f"{SHORT} {SIZES} --out new --data corpus",
    "resume": f"{SHORT} {SIZES} --out out --data text.txt --resume",
    "write with flags": f"{WRITE} model",
    "train with flags": f"{SHORT} {SIZES} --out new --data text.txt",
}
# What a place in a JSON file may hold instead, and what may stand after a flag.
VALUES = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), 1e308,
          "", "x", "9" * 400, "\ud800", "\x1b[31m\n", [], [[]], {}, [1] * 50]
WORDS = [*"0 1 2 7 16 1_6 0.5 0 1 2 7 16 1_6 0.5 -1 ٣ 1e-320 0x10 nan inf 1e400 x -- ~".split(),
         *"text:0 text:nan a=text.txt text.txt/sub auto cpu:7 cuda meta fp16 nf4 0,16".split(),
         *"continue falcon-mamba-7b model out state text.txt corpus no/such caf\udce9".split(),
         "", "9" * 400, "a:1 b:"]

def mutate(dice, value):
    """A JSON value in which one place, however deep, is changed or gone."""
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
    other = dice.choice([b"", b"\0" * 99, b"null", b"[" * 10**5, b'{"a":' * 10**4, b"9" * 10**4])
    return dice.choice([data[:a], data[:a] + data[b:], more, flipped, flipped, other])

def other_json(dice, data):
    return json.dumps(mutate(dice, json.loads(data))).encode()

def other_tensors(dice, data):
    """A whole file, in which one tensor is gone or another."""
    tensors = load(data)
    name = dice.choice(sorted(tensors))
    value = tensors.pop(name)
    changed = dice.choice([None, value.flatten()[1:], value.flatten(), value.double(), value.int(),
                           value * -1e38, value / 0])
    return save(tensors if changed is None else tensors | {name: changed})

def damage(dice, path):
    ways = [garble]
    if path.suffix == ".json":
        ways += [other_json] * 3
    if path.suffix == ".safetensors" or path.name == "state":
        ways += [other_tensors]
    data = dice.choice(ways)(dice, path.read_bytes())
    path.unlink()
    if dice.random() > 0.1:
        path.write_bytes(data)

def run(words):
    return call({"sample": sample, "train": train}[words[0]], *words[1:])

def prepare():
    """What a case begins with: a text, half a run, its model, also in shards, a state, a corpus."""
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    for command in (f"{SHORT} {SIZES} --out out --data text.txt --keep 9",
                    f"{WRITE} out --save-state state",
                    "train --data text.txt --tokenize-to corpus"):
        status, _, told = run(command.split())
        assert status == 0, told
    for name in "model", "sharded":
        shutil.copytree("out", name, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl"))
    shards(Path("sharded"), {})
    for later in sorted(Path("out/checkpoints").iterdir())[2:]:
        shutil.rmtree(later)

def begin(kind, dice):
    """Damage what that kind damages -> the words of the command to run."""
    words = KINDS[kind].split()
    if "flags" not in kind:
        paths = [path for word in words for path in [Path(word), *sorted(Path(word).rglob("*"))]]
        damage(dice, dice.choice([path for path in paths if path.is_file()]))
        return words
    known = {*re.findall(r"--[a-z][\w-]+", run([words[0], "--help"])[1])}
    known -= {"--compile"}          # it takes a minute
    for _ in range(dice.randint(1, 3)):
        words.append(dice.choice([*sorted(known), "--unknown", "-x"]))
        words += dice.choices(WORDS, k=dice.choice([0, 1, 1, 1, 1, 2]))
    return words

def fuzz(cases):
    """Run these cases, pairs of kind and number; print a line for each, its first words before."""
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
        words = begin(kind, random.Random(f"{kind} {number}"))
        faulthandler.dump_traceback_later(120, exit=True)
        try:
            status, out, told = run(words)
            if status:
                assert_sentence(told)
            else:
                assert not complaints(told), told
                assert "sample" in words or not re.search(r"(loss|norm|perplexity) (nan|inf)", out)
            print("refused" if status else "worked", flush=True)
        except BaseException:
            print(f"FAULT {words}: {traceback.format_exc()!r}", flush=True)
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
    assert len(outcomes) == CASES
    assert {*outcomes} == {"worked", "refused"}         # or the kind would prove nothing

if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        fuzz([(sys.argv[1], int(sys.argv[2]))])
    else:
        fuzz([(kind, number) for kind in KINDS for number in range(CASES)])
