"""Bad input to train.py ends in one plain sentence on standard error, and with nothing half done.

The program runs inside this process, because importing torch takes seconds.
"""
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, call, complaints
from tokenizers import Tokenizer, models

import train
from mamba import Mamba, MambaConfig

END = 256       # the byte tokenizer's
QUICK = "--total-tokens 64 --context 16 --batch-start 1 --batch-end 2 --device cpu --out made".split()
SIZES = "--d-model 8 --n-layer 1 --d-state 2".split()
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 40
TOKENS = np.array([*TEXT, END], np.uint16)
tokenizer = train.byte_tokenizer()
SMALL = tokenizer.to_str().encode()
tokenizer.add_tokens(["self"])
LARGE = tokenizer.to_str().encode()

@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A text, a corpus of it, a model, and others that are none."""
    folder = tmp_path_factory.mktemp("pristine")
    config = MambaConfig(vocab_size=257, d_model=8, n_layer=1, d_state=2, eos_token_id=END)
    Mamba(config).save_pretrained(folder / "model")
    files = {"text": TEXT, "empty": b"", "few": b"x" * 200, "binary": b"\xff" * 9, "folder/empty": b"",
             "corpus/tokens.bin": TOKENS.tobytes(), "mixed/text": TEXT, "mixed/corpus/tokens.bin": b"",
             "of-large/tokens.bin": TOKENS.tobytes(), "of-large/tokenizer.json": LARGE, "large.json": LARGE,
             "corpus/tokenizer.json": SMALL, "model/tokenizer.json": SMALL,
             "endless.json": Tokenizer(models.BPE({"a": 0}, [])).to_str().encode()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder

@pytest.fixture
def run(pristine, tmp_path, monkeypatch):
    """run(*flags) runs the program beside a copy of `pristine`, as call does."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        data = [] if "--data" in " ".join(flags) else ["--data", "text"]
        sizes = [] if {"--init-from", "--init-from=", "--eval-only"} & {*flags} else SIZES
        return call(train, *data, *QUICK, *sizes, *flags)
    return run

def test_nothing_is_refused_without_a_reason(run):
    """Or the refusals below would prove nothing."""
    for flags in ("--data text --out a", "--data corpus --out b", "--init-from model", "--tokenize-to another"):
        ended = run(*flags.split())
        assert ended.status == 0 and complaints(ended.err) == []

# What is said, and what is typed.
FLAGS = {
    "unrecognized": ["--unknown", "stray"],
    "invalid": ["--total-tokens 1.5", "--context 8,16", "--export-dtype int8"],
    "is not from": [f"--batch-start {2**60}", "--lr nan", "--decay-factor 0", "--beta1 1", "--d-model -8"],
    "num_hidden_layers is 5000": ["--n-layer 5000"],
    "1048576": [f"--d-model {2**20}"],
    "GB": ["--d-model 524288"],
    "is not finite at step 2; begin again with a lower --lr": ["--lr 1e15 --warmup-tokens 0"],
    "--total-tokens 64 has no room for 9 --warmup-tokens": ["--decay-tokens 60 --warmup-tokens 5"],
    "the tokenizer has 257 tokens, the model 100": ["--vocab-size 100"],
    "there is no '": ["--data nowhere", "--data a=nowhere", "--data=", "--data text="],
    "--data names a, b, the mixture text": ["--data a=text --data b=text"],
    "the mixture other": ["--mixture other:1"],
    "must be like 'web:9 code:1', each source once": [
        "--mixture web", "--mixture text:0", "--mixture text:-1", "--mixture 'text:1 text:2'"],
    "too few for --context": ["--context 100000", "--data empty", "--data folder", "--data binary"],
    "few has 10 held-out and 191 training tokens": ["--data few=few"],
    "holds tokens, not text": ["--data corpus/tokens.bin", "--data mixed", "--data corpus --data text",
                               "--data corpus --tokenize-to other"],
    "model exists already": ["--tokenize-to model"],
    "lies in --data": ["--data folder --out folder/made", "--data folder --tokenize-to folder/made"],
    "Not a directory": ["--data corpus --out text/made"],
    "cannot read the tokenizer": ["--tokenizer nope.json", "--tokenizer model/config.json", "--init-from folder"],
    "no token <|endoftext|>": ["--tokenizer endless.json"],
    "' is not a folder": ["--init-from nope", "--init-from=", "--eval-only"],
    "leave out d_model": ["--init-from model --d-model 8"],
    "the tokenizer has 258 tokens, the model 257": ["--init-from model --tokenizer large.json"],
    "of-large is of another tokenizer; make it again": ["--init-from model --data of-large"],
    "model already holds a model; --resume": ["--out model", "--out model --resume"],
}

@pytest.mark.parametrize("says, typed", [(says, typed) for says in FLAGS for typed in FLAGS[says]])
def test_flags_that_cannot_be_are_refused(run, tmp_path, says, typed):
    before = {*tmp_path.rglob("*")}
    assert_refused(run(*shlex.split(typed)), says)
    made = {path.name for path in {*tmp_path.rglob("*")} - before}
    assert made <= {"made", "checkpoints", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json",
                    "generation_config.json"}

RUN = "made/checkpoints/step-*/run.json"
WEIGHTS = "made/checkpoints/step-*/*.safetensors"
CORPUS = "corpus/tokens.bin"
# Which file of a run, or of its corpus, is spoilt, what --resume says then, and what the file holds.
FILES = [
    (RUN, "run.json", [b"", b"{", b"[]", b"{}", b'{"settings": {}}']),
    (WEIGHTS, "a checkpoint in made could not be written or read", [b"", b"text"]),
    ("corpus/tokenizer.json", "cannot read the tokenizer corpus/tokenizer.json", [b"{}"]),
    ("corpus/tokenizer.json", "vocab_size 257, this command 258", [LARGE]),
    (CORPUS, f"{CORPUS} does not end like uint16 tokens with one 256; make it again",
     [b"", b"a", TOKENS[:-1].tobytes(), TOKENS.tobytes() + b"a", TOKENS.astype(np.uint32).tobytes()]),
    (CORPUS, "has data {'text': ", [np.append(TOKENS[:900], END).astype(np.uint16).tobytes()]),
]

@pytest.mark.parametrize("name, says, content", [
    (name, says, content) for name, says, contents in FILES for content in contents])
def test_files_that_are_damaged_are_refused(run, tmp_path, name, says, content):
    assert run("--data", "corpus").status == 0
    [path] = tmp_path.glob(name)
    path.write_bytes(content)
    assert_refused(run("--data", "corpus", "--resume"), says)

def test_a_token_that_the_model_has_not_is_refused(run):
    Path(CORPUS).write_bytes(np.where(TOKENS == 32, 300, TOKENS).astype(np.uint16).tobytes())
    assert_refused(run("--data", "corpus"), "token 300", "257")

@pytest.mark.parametrize("gpus, nccl", [(0, True), (2, True), (3, False)])
def test_a_process_without_a_gpu_or_nccl_is_a_sentence(run, monkeypatch, gpus, nccl):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(train, "start_processes", lambda _, start=train.start_processes: start(torch.device("cuda")))
    assert_refused(run(), "NCCL", f" {gpus} ", "--nproc-per-node", "--device cpu")

def test_closed_standard_error_changes_nothing(run, monkeypatch):
    monkeypatch.setattr(train, "start_processes", lambda _: setattr(sys, "stderr", None))
    assert run("--data", "binary", "--data", "text").status == 0 and Path("made/model.safetensors").exists()
