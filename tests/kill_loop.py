"""Kill a training run again and again: python tests/kill_loop.py 200

Each run goes on from what the one before it left, until it is killed with SIGKILL at a random moment, or is
done. Then its losses must be those of a run that nobody touched, and the next series begins in a new folder.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from conftest import ROOT
from sample import number

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ("--d-model 32 --n-layer 2 --d-state 8 --context 64 --batch-start 4 --batch-end 16 "
         "--total-tokens 20000 --warmup-tokens 1000 --ramp-tokens 4000 --decay-tokens 8000 "
         "--checkpoint-every 3 --eval-every 8 --device cpu").split()

def flags(data: Path, out: Path, *more) -> list[str]:
    """Of a run of 24 steps, which takes a second."""
    return ["--data", str(data), "--out", str(out), *SMALL, *map(str, more)]

def start(flags: list[str], stderr=subprocess.PIPE) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "train.py"), *flags]
    return subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=stderr, text=True)

def curve(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in ("step", "tokens", "loss", "lr", "grad_norm")) for row in rows]

def check(out: Path, untouched: Path) -> None:
    assert curve(out) == curve(untouched), "the losses are not those of the run that nobody touched"
    name = "model.safetensors"
    assert (out / name).read_bytes() == (untouched / name).read_bytes(), "the weights are others"

def kill_loop(kills: int, data: Path, out: Path, untouched: Path, seed: int = 0) -> None:
    """AssertionError if a kill loses anything. `untouched` is the folder of a run that nobody touched."""
    rng = random.Random(seed)
    landed = 0
    series = 0
    while landed < kills or out.exists():
        done = max(out.glob("checkpoints/step-*[0-9]"), default=None)
        process = start(flags(data, out, "--resume"), stderr=subprocess.STDOUT)
        lines = []
        if landed < kills:
            # It resumes as the first four lines come. Then there is one a step, and a checkpoint each third.
            lines += islice(process.stdout, rng.randrange(20))
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
        lines += process.stdout
        text = "".join(lines)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), f"the run after {done} failed:\n{text}"
        first = re.search(r"^step (\d+) ", text, re.M)
        if done and first:
            assert int(first[1]) == int(done.name[5:]) + 1, f"it had {done}, but began with {first[0]}"
        if status == 0:
            check(out, untouched)
            shutil.rmtree(out)
            series += 1
        else:
            landed += 1
    print(f"{landed} kills in {series} runs; every resume succeeded, and all losses are those of an untouched run")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a training run again and again; look what is left.")
    parser.add_argument("kills", type=number(int, 1, 10**6), help="how many must land before a run is done")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "corpus.txt"
        data.write_text((ROOT / "mamba.py").read_text() * 3)
        start(flags(data, folder / "untouched")).communicate()
        kill_loop(kills, data, folder / "killed", folder / "untouched")
