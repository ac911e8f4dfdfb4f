"""The README is true: its commands run, what it names exists, and its figures and pictures are the code's."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call

import bench
import draw
import sample
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
CLAIMS = (ROOT / "tests" / "__init__.py").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
FILES = ["scan.py", "scan_triton.py", "mamba.py", "sample.py", "train.py"]

# What runs in place of a command that would take a network, hundreds of GPUs or minutes. A key that
# begins with -- is a part of a line, any other is a whole line.
SHORT = "--context 16 --total-tokens 400 --batch-start 1 --batch-end 2 --device cpu"
TINY = f"{SHORT} --d-model 16 --n-layer 1"
LITTLE = "--model out --max-new-tokens 4"
RUNS = {
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt":
        "python -m pip install --dry-run --no-index --quiet -r requirements.txt",   # .ci/run installs
    "python train.py": f"python train.py {TINY}",
    'python sample.py --model out --prompt "def "': f'python sample.py --prompt "def " {LITTLE}',
    "python -m pytest": "python -m pytest -q tests/test_scan.py -k nothing_passes_a_reset",
    "python tests/bench.py": "python tests/bench.py training --quick",
    "--init-from tiiuae/falcon-mamba-7b-pre-decay": f"--init-from out {SHORT}",
    "--nproc-per-node 8 train.py": "--nproc-per-node 2 train.py",
    "--offload": "",                                # which needs a GPU
    "--lr 1e-3": f"--lr 1e-3 {SHORT}",
    '--prompt "Hello today"': f'--prompt "Hello today" {LITTLE}',
    "--model tiiuae/falcon-mamba-7b-instruct": LITTLE,
    "--max-new-tokens 0": "--max-new-tokens 0 --model out",
    "--num-samples 3": f"--num-samples 3 {LITTLE}",
    "--total-tokens 20_000_000 --d-model 256": TINY,
    "--tokenizer tokenizer.json": "",
    "--eval-only": "--eval-only --device cpu",
    "--nnodes 32 --nproc-per-node 8": "--nnodes 1 --nproc-per-node 1",
    "--rdzv-endpoint host:29500": "--rdzv-endpoint localhost:0",
    "--recipe falcon-mamba-7b --data": f"--recipe falcon-mamba-7b {TINY} --data",
}

def at_a_small_size(command: str) -> str:
    if command in RUNS:
        return RUNS[command]
    for part, small in RUNS.items():
        if part.startswith("--"):
            command = command.replace(part, small)
    return command

def ahead(place: Path) -> dict[str, subprocess.CompletedProcess]:
    """How each command and block of Python ended, in a copy of the project with a reader's texts."""
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in [*FILES, "README.md", "requirements.txt"]:
        shutil.copy(ROOT / name, place)
    for folder in ("src", "books", "mine", "web", "edu", "technical", "code", "math"):
        (place / folder).mkdir()
        for i in range(8):
            (place / folder / f"{i}.txt").write_text(f"Text number {i}, one of several. " * 60)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    ended = {}
    for text in COMMANDS + PYTHON:      # in the README's order, because some need what others make
        (place / "block.py").write_text(text)
        command = "python block.py" if text in PYTHON else at_a_small_size(text)
        ended[text] = subprocess.run(["bash", "-c", command], cwd=place, env=environment,
                                     capture_output=True, text=True)
    return ended

@pytest.mark.parametrize("text", COMMANDS + PYTHON)
def test_what_it_shows_runs(begun, text):
    assert begun[text].returncode == 0, begun[text]

def test_the_table_counts_the_lines_of_each_file():
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M))
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert table == {name: str(count) for name, count in lines.items()}

def test_what_it_and_the_table_of_claims_name_exists():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`(?:python )?((?:tests/)?\w+\.(?:py|yaml))", README + CLAIMS):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README + CLAIMS):
        assert f"def {name}(" in tests, name

def test_the_flags_in_its_prose_exist():
    known = re.findall(r"--[a-z-]+", call(train, "--help").out + call(sample, "--help").out)
    flags = re.findall(r"`(?:[\w. ]+ )?(--[a-z][a-z0-9-]*)", README)
    assert {*flags} <= {*known, "--shutdown-timeout"}           # torchrun's

@pytest.mark.parametrize("name", draw.PICTURES)
def test_the_picture_is_what_draw_py_draws(name):
    assert (ROOT / "assets" / name).read_text(encoding="utf-8") == draw.PICTURES[name]()
    assert f"(assets/{name})" in README

def test_the_speed_table_is_the_figures_that_bench_py_kept():
    found = json.loads((ROOT / "assets" / "bench.json").read_text())
    table = bench.table(found["generate"])
    assert table in README and found["machine"] in README, table

def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 220 and len(README.encode()) <= 16_000
