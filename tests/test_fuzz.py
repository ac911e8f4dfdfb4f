"""Whatever a file or a command line holds, the programs work, or end in one sentence and a non-zero exit.

    python -m pytest tests/test_fuzz.py                     1,210 cases, 110 of each of eleven kinds
    FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py     as many of each kind
    python tests/test_fuzz.py resume 17                     one case alone, as a failure names it

A case is a folder with one thing in it damaged, and a program's main() that reads it. They run in a process
of their own, which tells pytest of each case before it begins: so a crash of the interpreter has a name. It
may use a gigabyte more than at its start, ends if a case takes two minutes, and sees what is opened.
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
from test_bad_input import REPO, assert_sentence, complaint, shard

CASES = int(os.environ.get("FUZZ_CASES", 110))
SHORT = ("--data text.txt --total-tokens 64 --context 16 --batch-start 1 --batch-end 1 --checkpoint-every 1 "
         "--device cpu ")
SIZES = SHORT + "--d-model 8 --n-layer 1 --d-state 2 "
SAMPLE, EVALUATE = "--max-new-tokens 2 --prompt the --model ", SHORT + "--eval-only --init-from "
LAST = "out/checkpoints/step-000000002/"
# Kind -> the files of which one is damaged, and the command lines of which one runs.
KINDS = {
    "config": (["model/config.json"], [(sample, SAMPLE + "model"), (train, EVALUATE + "model")]),
    "weights": (["model/model.safetensors"], [(sample, SAMPLE + "model"), (train, EVALUATE + "model")]),
    "shards": (["sharded/a.safetensors", "sharded/b.safetensors", "sharded/model.safetensors.index.json"],
               [(sample, SAMPLE + "sharded"), (train, EVALUATE + "sharded")]),
    "climbing": ([], [(sample, SAMPLE + "sharded"), (train, EVALUATE + "sharded")]),
    "tokenizer": (["model/tokenizer.json"], [
        (sample, SAMPLE + "model"), (train, SIZES + "--out new --tokenizer model/tokenizer.json")]),
    "state": (["state"], [(sample, "--model model --load-state state --max-new-tokens 2")]),
    "data": (["text.txt"], [(train, SIZES + "--out new")]),
    "bin": (["data.bin"], [(train, SIZES.replace("text.txt", "data.bin") + "--out new")]),
    "resume": ([LAST + "run.json", LAST + "shard-00001-model-00001-of-00001.safetensors",
                "out/metrics.jsonl", "out/model.safetensors"], [(train, SIZES + "--resume")]),
    "sample_flags": ([], [(sample, SAMPLE + "model")]),
    "train_flags": ([], [(train, SIZES + "--out new"), (train, SIZES), (train, SHORT + "--init-from model")])}
WILD = [None, True, -1, 0, 1, 7, 2**31, 2**40, 2**63, 10**400, 0.5, float("nan"), float("inf"), 1e308, "",
        "x", "9" * 400, "\ud800", "\x1b[31m\n", [], [[]], {}, [1] * 50, json.loads("[" * 200 + "]" * 200)]
WORDS = [["0", "1", "2", "7", "16", "1_6", "0.5"],
         ["-1", "٣", "1e-320", "0x10", "nan", "inf", "-inf", "1e400", "9" * 400, str(2**63), "0,16", ","],
         ["", "x", "-", "--", "caf\udce9", "~", "auto", "cpu", "cpu:7", "cuda", "meta", "fp32", "bf16",
          "fp16", "nf4", "tiny", "continue", "falcon-mamba-7b", "text:1", "text:0", "text:nan", "a:1 b:",
          "a=text.txt:0.5", "model", "sharded", "out", "state", "text.txt", "data.bin", "new", "nope",
          "model/tokenizer.json", "text.txt/sub", "no/such", "nobody/nothing"]]


def mutate(dice, value):
    """A JSON value in which one place, however deep, is changed or gone."""
    if isinstance(value, str) and value[:1] == "{":         # a safetensors' metadata holds JSON as a string
        return json.dumps(mutate(dice, json.loads(value)))
    if not value or not isinstance(value, (dict, list)) or dice.random() < 0.05:
        return dice.choice(WILD + ([-value, value + 1, value // 2] if type(value) is int else []))
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
    return dice.choice([data[:a], data[:a] + data[b:], more, bytes(flipped), bytes(flipped), other])


def damage(dice, path):
    """Do one thing to a file that suits its kind."""
    data, way = path.read_bytes(), dice.random()
    tensors = load(data) if path.suffix == ".safetensors" or path.name == "state" else {}
    if way < 0.1:
        path.unlink()
        if way < 0.03:
            path.mkdir()
    elif way < 0.15:        # two files change places
        other = dice.choice([file for file in sorted(Path.cwd().rglob("*")) if file.is_file()])
        path.write_bytes(other.read_bytes()), other.write_bytes(data)
    elif way < 0.7 and path.suffix in (".json", ".jsonl"):
        lines = [data] if path.suffix == ".json" else data.splitlines()
        i = dice.randrange(len(lines))
        lines[i] = json.dumps(mutate(dice, json.loads(lines[i]))).encode()
        path.write_bytes(b"\n".join(lines))
    elif way < 0.45 and tensors:        # a whole file, but of other tensors
        name = dice.choice(sorted(tensors))
        value = tensors.pop(name)
        tensors |= dice.choice([{}, {name + "x": value}, {name: value.flatten()[1:]}, {name: value.flatten()},
                                {name: value.double()}, {name: value.int()}, {name: value * -1e38},
                                {name: value / 0}])
        path.write_bytes(save(tensors))
    elif way < 0.8 and tensors:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.dumps(mutate(dice, json.loads(data[8:end]))).encode() if way < 0.65 else data[8:end]
        header = garble(dice, header) if 0.6 < way < 0.7 else header
        size = len(header) if way < 0.7 else dice.choice([0, 8, 2**27, 2**40, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", size) + header + data[end:])
    else:
        path.write_bytes(garble(dice, data))


def climb(dice):
    """The index names a shard outside, which is whole: a program that works has read what it must not."""
    outside = Path("../outside").resolve()
    outside.mkdir(exist_ok=True)
    Path("sharded/b.safetensors").replace(outside / "b.safetensors")
    name = dice.choice(["../../outside/", "./../../outside/", "a.safetensors/../../../outside/",
                        "../" * 40 + f"{outside}/"[1:], f"{outside}/", f"/{outside}/", f"file://{outside}/",
                        f"~/../../../../..{outside}/", "..\\..\\outside\\", "..%2f..%2foutside%2f"])
    name += "b.safetensors" + dice.choice(["", "", "", "\0", "\n", "/", " ", "\0.safetensors"])
    index = Path("sharded/model.safetensors.index.json")
    index.write_text(index.read_text().replace('"b.safetensors"', json.dumps(name)))


def run(module, line):
    """Run the program here -> its exit status, its output, and what it complained about."""
    sys.argv, out = [f"{module.__name__}.py", *line], io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")            # as Python's own
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = module.main() or 0
        except SystemExit as e:
            status = e.code or 0
            if isinstance(status, str):
                print(status, file=err)
    out, err = (stream.seek(0) or stream.read() for stream in (out, err))
    report = r"^.* GB of weights on .*\n|^seed \d.*\n"       # sample.py's two notes
    return status, out, complaint(re.sub(report, "", err, flags=re.M))


def prepare():
    """What every case begins with: texts, a run half done, its model, also in shards, a state -> flags."""
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    for module, line in [(train, SIZES + "--keep 9"), (sample, SAMPLE + "out --save-state state"),
                         (train, "--data text.txt --tokenize-to data.bin")]:
        assert run(module, line.split())[0] == 0
    for name in ("model", "sharded"):
        shutil.copytree("out", name, ignore=shutil.ignore_patterns("checkpoints", "*.jsonl"))
    shard(Path("sharded"))
    for later in sorted(Path("out/checkpoints").iterdir())[2:]:
        shutil.rmtree(later)
    return {module: sorted({*re.findall(r"--[a-z][\w-]+", run(module, ["--help"])[1])} - {"--compile"})
            for module in (sample, train)}          # compiling takes a minute


def begin(kind, dice, flags):
    """Damage what that kind damages -> the program to run, and its command line."""
    files, lines = KINDS[kind]
    module, line = dice.choice(lines)
    line = line.split()
    if files:
        damage(dice, Path(dice.choice(files)))
    elif kind == "climbing":
        climb(dice)
    else:
        for _ in range(dice.randint(1, 3)):
            line.append(dice.choice([*flags[module], "--unknown", "-x"]))
            line += dice.choices(dice.choice([*WORDS, WORDS[0]]), k=dice.choice([0, *[1] * 8, 2]))
    return module, line


def fuzz(cases):
    """Run these cases, pairs of kind and number; print a line for each, its first words before it begins."""
    work, opened = Path(tempfile.mkdtemp()).resolve(), []
    case, before = work / "case", work / "before"
    allowed = tuple(map(str, (case, before, REPO, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")))

    def watch(event, args):
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith(allowed):
                opened.append(path)
    sys.modules["matplotlib"] = None        # optional, and slow
    os.environ["HF_HUB_CACHE"] = str(before)
    before.mkdir()
    os.chdir(before)
    flags = prepare()
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    sys.addaudithook(watch)
    for kind, number in cases:
        print(kind, number, end=" ", flush=True)
        shutil.copytree(before, case)
        os.chdir(case)
        module, line = begin(kind, random.Random(f"{kind} {number}"), flags)
        faulthandler.dump_traceback_later(120, exit=True)
        opened.clear()
        try:
            status, out, complaints = run(module, line)
            assert not opened, f"it opened {opened}"
            if status == 0:
                assert complaints == "" and kind != "climbing", complaints or "it read a file outside"
                assert module is sample or not re.search(r"\b(loss|norm|perplexity) (nan|inf)", out), out
            else:
                assert_sentence(complaints)
            print("refused" if status else "worked", flush=True)
        except BaseException:
            print(f"FAULT {module.__name__} {line}: {traceback.format_exc()!r}", flush=True)
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
    outcomes = re.findall(rf"^{kind} \d+ (.*)", begun.stdout, flags=re.M)
    assert not (faults := [outcome for outcome in outcomes if outcome.startswith("FAULT")]), "\n".join(faults)
    assert len(outcomes) == CASES and "refused" in outcomes
    assert "worked" in outcomes or kind == "climbing"       # or the kind would prove nothing
    print(f"{len(outcomes)} cases, {outcomes.count('worked')} of them worked")


if __name__ == "__main__":
    if sys.argv[1] in KINDS:
        fuzz([(sys.argv[1], int(sys.argv[2]))])
    else:
        fuzz([(kind, number) for kind in KINDS for number in range(CASES)])
