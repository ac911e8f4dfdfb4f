"""The README is true: its commands run, what it names exists, and its figures and pictures are the code's."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import draw
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
FILES = ["scan.py", "scan_triton.py", "mamba.py", "sample.py", "train.py"]

# Every command of the README, and what runs here in its place where it would take a network, hundreds of GPUs
# or minutes: the same files and flags at a small size.
SHORT = "--context 16 --total-tokens 400 --batch-start 1 --batch-end 2 --device cpu"
TINY = f"{SHORT} --d-model 16 --n-layer 1"
RUNS = {
    "--nnodes 32 --nproc-per-node 8": "--nnodes 1 --nproc-per-node 1",
    "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt":
        "python -m pip install --dry-run --no-index --quiet -r requirements.txt",       # .ci/run installs
    "python train.py": f"python train.py {TINY}",
    'python sample.py --model out --prompt "def "':
        'python sample.py --model out --prompt "def " --max-new-tokens 4',
    "python -m pytest": "python -m pytest -q tests/test_scan.py -k nothing_passes_a_reset",
    "--init-from tiiuae/falcon-mamba-7b-pre-decay": f"--init-from out {SHORT}",
    "--nproc-per-node 8": "--nproc-per-node 2",
    " --offload": "",                               # which needs a GPU
    "--recipe tiny --lr 1e-3": f"--recipe tiny --lr 1e-3 {SHORT}",
    'python sample.py --prompt "Hello today" --temperature 0':
        'python sample.py --prompt "Hello today" --temperature 0 --model out --max-new-tokens 4',
    "--model tiiuae/falcon-mamba-7b-instruct": "--model out --max-new-tokens 4",
    "--quantize int4": "--quantize int4 --model out --max-new-tokens 4",
    "--max-new-tokens 0 --save-state story.state": "--max-new-tokens 0 --save-state story.state --model out",
    "--num-samples 3": "--num-samples 3 --model out --max-new-tokens 4",
    "python tests/bench.py": "python tests/bench.py training --quick",
    "--total-tokens 20_000_000 --d-model 256": TINY,
    "--tokenizer tokenizer.json --tokenize-to": "--tokenize-to",
    "--eval-only --init-from mine --data books/": "--eval-only --init-from mine --data books/ --device cpu",
    "--rdzv-endpoint host:29500": "--rdzv-endpoint localhost:0",
    "--recipe falcon-mamba-7b --data": f"--recipe falcon-mamba-7b {TINY} --data",
}

def at_a_small_size(command: str) -> str:
    """A whole line of RUNS, or the line with those parts replaced that RUNS has."""
    if command in RUNS:
        return RUNS[command]
    for text, small in RUNS.items():
        if text.lstrip().startswith("-"):
            command = command.replace(text, small)
    return command

def ahead(place: Path) -> dict[str, subprocess.CompletedProcess]:
    """How each command and block of Python ended, in a copy of the project with the reader's own texts."""
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in [*FILES, "README.md", "requirements.txt"]:
        shutil.copy(ROOT / name, place)
    for folder in ("src", "books", "mine", "web", "edu", "technical", "code", "math"):
        (place / folder).mkdir()
        for i in range(8):
            (place / folder / f"{i}.txt").write_text(f"Text number {i}, one of several. " * 60)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                                "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    ended = {}
    for text in COMMANDS + PYTHON:      # in the README's order, as some need what others make
        (place / "block.py").write_text(text)
        command = "python block.py" if text in PYTHON else at_a_small_size(text)
        ended[text] = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True,
                                     text=True)
    return ended

def test_every_change_of_size_is_of_a_command_on_the_page():
    for text in RUNS:
        assert any(text in command for command in COMMANDS), text

@pytest.mark.parametrize("text", COMMANDS + PYTHON)
def test_what_it_shows_runs(begun, text):
    assert begun[text].returncode == 0, begun[text]

def test_ci_runs_the_readmes_own_lines():
    script = (ROOT / ".ci" / "run").read_text()
    assert "python -m pytest" in script and "-r requirements.txt" in script

def test_the_table_counts_the_lines_of_each_file():
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.M))
    assert table == {name: str(len((ROOT / name).read_text(encoding="utf-8").splitlines())) for name in FILES}

def test_what_it_names_exists():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`(?:python )?((?:tests/)?\w+\.py)", README):
        assert (ROOT / name).exists(), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name

def test_its_flags_exist(capsys, monkeypatch):
    """Those that the prose names; the commands are run."""
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    for program in (train, sample):
        with pytest.raises(SystemExit):
            program.main()
    help = capsys.readouterr().out
    for flag in re.findall(r"`(?:[\w. ]+ )?(--[a-z][a-z0-9-]*)", README):
        assert f"{flag} " in help or f"{flag}," in help or f"{flag}\n" in help, flag

@pytest.mark.parametrize("tool, flags, word", [
    (bench, "--threads 0", "is 0"), (bench, "--device tpu", "'tpu'"), (bench, "nonsense", "nonsense"),
    (bench, "--save nowhere/bench.json", "nowhere"), (draw, "nowhere", "nowhere")])
def test_what_a_tool_cannot_do_it_says_at_once(capsys, monkeypatch, tool, flags, word):
    monkeypatch.setattr(sys, "argv", ["", *flags.split()])
    with pytest.raises(SystemExit) as e:
        tool.main()
    assert e.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]

@pytest.mark.parametrize("name", draw.PICTURES)
def test_the_picture_is_what_draw_py_draws(name):
    assert (ROOT / "assets" / name).read_text(encoding="utf-8") == draw.PICTURES[name]()
    assert f"(assets/{name})" in README

def test_the_speed_tables_are_the_figures_that_bench_py_kept():
    found = json.loads((ROOT / "assets" / "bench.json").read_text())
    assert found["machine"] in README
    for name in ("generate", "training"):
        assert bench.tables(found)[name] in README, bench.tables(found)[name]

def test_it_can_be_read_in_an_evening():
    assert len(README.splitlines()) < 350
