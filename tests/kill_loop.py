"""Kill a training run again and again: python tests/kill_loop.py 200

Each run goes on from what the one before it left, until it is killed with SIGKILL at a random moment, or is
done. Then its losses must be those of a run that nobody touched, and the next series begins in a new folder.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sample import number

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ("--d-model 32 --n-layer 2 --d-state 8 --context 64 --batch-start 4 --batch-end 16 "
         "--total-tokens 20000 --warmup-tokens 1000 --ramp-tokens 4000 --decay-tokens 8000 "
         "--checkpoint-every 3 --eval-every 8 --device cpu").split()

def command(data: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), "--data", str(data), "--out", str(out), *SMALL, *flags]

def curve(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[name] for name in ("step", "tokens", "loss", "lr", "grad_norm")) for row in rows]

def untouched_run(data: Path, out: Path) -> float:
    """The run that the others are held against -> its seconds."""
    begin = time.perf_counter()
    subprocess.run(command(data, out, "--keep", "100"), check=True, env=ONE_THREAD, capture_output=True)
    return time.perf_counter() - begin

def check(out: Path, untouched: Path) -> None:
    assert curve(out) == curve(untouched), "the losses are not those of the run that nobody touched"
    name = "model.safetensors"
    assert (out / name).read_bytes() == (untouched / name).read_bytes(), "the weights are others"

def kill_loop(kills: int, data: Path, out: Path, untouched: Path, whole: float, seed: int = 0) -> int:
    """Returns how many of the kills landed before the run was done. AssertionError if anything was lost.

    `untouched` is the folder that untouched_run made in `whole` seconds, `out` one that is not there yet.
    """
    rng = random.Random(seed)
    landed = 0
    series = 0
    while landed < kills:
        done = max(out.glob("checkpoints/step-*[0-9]"), default=None)
        process = subprocess.Popen(command(data, out, "--resume"), env=ONE_THREAD, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True)
        # Most are killed while they train: the first step comes after about two thirds of a whole run.
        deadline = time.perf_counter() + rng.uniform(0.5, 1.05) * whole
        while process.poll() is None and time.perf_counter() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        text, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), f"the run after {done} failed:\n{text}"
        first = [line for line in text.splitlines() if line.startswith("step ")]
        if done and first:
            expected = f"step {int(done.name[5:]) + 1} "
            assert first[0].startswith(expected), f"it had {done}, but began with {first[0]}"
        if process.returncode == 0:
            check(out, untouched)
            shutil.rmtree(out)
            series += 1
        else:
            landed += 1
    if out.exists():
        subprocess.run(command(data, out, "--resume"), check=True, env=ONE_THREAD, stdout=subprocess.DEVNULL)
        check(out, untouched)
        series += 1
    print(f"{landed} kills in {series} runs; every resume succeeded, and all losses are those of an untouched run")
    return landed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a training run again and again; look what is left.")
    parser.add_argument("kills", type=number(int, 1, 10**6), help="how many must land before a run is done")
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "corpus.txt"
        untouched = folder / "untouched"
        data.write_text((ROOT / "mamba.py").read_text() * 3)
        kill_loop(kills, data, folder / "killed", untouched, untouched_run(data, untouched))
