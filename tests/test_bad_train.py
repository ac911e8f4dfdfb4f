"""Bad input to train.py ends in one plain sentence on standard error, and with nothing half done.

The program runs inside this process, because importing torch takes seconds.
"""
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_sentence
from test_train import END, trained
from tokenizers import Tokenizer, models

import train
from mamba import Mamba, MambaConfig

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
def call(pristine, tmp_path, monkeypatch, trained):
    """call(*flags) runs the program beside a copy of `pristine` -> its exit status, and its last words."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        given = " ".join(flags)
        data = [] if "--data" in given else ["--data", "text"]
        sizes = [] if re.search("--init-from|--eval-only", given) else SIZES
        status, _, err = trained(*data, *QUICK, *sizes, *flags)
        notes = "usage:", " ", "skipping "
        return status, "\n".join(line for line in err.splitlines() if not line.startswith(notes))
    return run

def test_nothing_is_refused_without_a_reason(call):
    """Or the refusals below would prove nothing."""
    for data in ("text", "corpus"):
        assert call("--data", data, "--out", f"made of {data}") == (0, "")
    assert call("--init-from", "model") == (0, "")
    assert call("--data", "text", "--tokenize-to", "another") == (0, "")

# What is typed, and what is said.
FLAGS = {
    "--unknown": "unrecognized", "stray": "unrecognized", "--data": "expected one argument",
    "--total-tokens 1.5": "invalid int value: '1.5'", "--context 0": "'0' is no", "--context 8,16": "'8,16'",
    f"--batch-start {2**60}": "1048576", "--lr nan": "'nan' is not from 0", "--lr -1": "'-1'", "--lr inf": "'inf'",
    "--decay-factor 0": "from 1", "--beta1 1": "'1'", "--seed -1": "'-1'", "--export-dtype int8": "invalid choice",
    "--recipe large": "invalid choice", "--device warp9": "'warp9' is not usable here", "--d-model -8": "-8",
    "--n-layer 5000": "num_hidden_layers is 5000", "--initializer-range -1": "'-1' is not from 0",
    f"--d-model {2**20}": "1048576", "--d-model 524288": "GB", "--lr 1e15 --warmup-tokens 0": "a lower --lr",
    "--decay-tokens 60 --warmup-tokens 5": "--total-tokens 64 has no room for 9 --warmup-tokens",
    "--vocab-size 100": "the tokenizer has 257 tokens, the model 100",
    "--data nowhere": "there is no 'nowhere'", "--data a=README": "there is no 'README'", "--data=": "there is no ''",
    "--data text=": "there is no ''", "--data a=text --data b=text": "--data names a, b, the mixture text",
    "--mixture web": "must be like 'web:9 code:1'", "--mixture text:0": "must be like",
    "--mixture text:-1": "must be like", "--mixture=text:1 text:2": "each source once",
    "--mixture other:1": "the mixture other", "--context 100000": "too few for --context 100000",
    "--data empty": "too few for --context 16", "--data folder": "too few", "--data binary": "too few",
    "--data few": "text has 10 held-out and 191 training tokens", "--data corpus/tokens.bin": "holds tokens, not text",
    "--data mixed": "mixed/corpus/tokens.bin holds tokens", "--data corpus --data text": "corpus/tokens.bin holds tokens",
    "--data corpus --tokenize-to other": "corpus/tokens.bin holds tokens", "--tokenize-to model": "model exists already",
    "--data folder --out folder/made": "lies in --data", "--data folder --tokenize-to folder/made": "lies in --data",
    "--data corpus --out text/made": "Not a directory", "--tokenizer nope.json": "cannot read the tokenizer",
    "--tokenizer model/config.json": "cannot read the tokenizer", "--tokenizer endless.json": "no token <|endoftext|>",
    "--init-from nope": "'nope' is not a folder", "--init-from=": "'' is not a folder",
    "--init-from model --d-model 8": "leave out d_model", "--init-from folder": "cannot read the tokenizer",
    "--init-from model --tokenizer large.json": "the tokenizer has 258 tokens, the model 257",
    "--init-from model --data of-large": "of-large is of another tokenizer; make it again with the model's",
    "--eval-only": "'made' is not a folder", "--out model": "model already holds a model; --resume",
    "--out model --resume": "model already holds a model",
}

@pytest.mark.parametrize("typed", FLAGS, ids=lambda typed: ascii(typed[:50]))
def test_flags_that_cannot_be_are_refused(call, tmp_path, typed):
    before = {*tmp_path.rglob("*")}
    status, words = call(*([typed] if "=text:" in typed else typed.split()))
    assert status
    assert_sentence(words, FLAGS[typed])
    made = {path.name for path in {*tmp_path.rglob("*")} - before}
    assert made <= {"made", "checkpoints", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json",
                    "generation_config.json"}

RUN = "made/checkpoints/step-*/run.json"
CORPUS = "corpus/tokens.bin"
# Which file of a run, or of its corpus, is spoilt, what it holds then, and what --resume says.
FILES = [
    *[(RUN, content, "run.json") for content in (b"", b"{", b"[]", b"{}", b'{"settings": {}}')],
    ("made/checkpoints/step-*/*.safetensors", b"", "a checkpoint in made could not be written or read"),
    ("made/checkpoints/step-*/*.safetensors", b"text", "a checkpoint in made could not be written or read"),
    ("corpus/tokenizer.json", b"{}", "cannot read the tokenizer corpus/tokenizer.json"),
    ("corpus/tokenizer.json", LARGE, "vocab_size 257, this command 258"),
    *[(CORPUS, content, f"{CORPUS} does not end like uint16 tokens with one 256; make it again")
      for content in (b"", b"a", TOKENS.tobytes()[:-2], TOKENS.tobytes() + b"a", TOKENS.astype(np.uint32).tobytes())],
    (CORPUS, np.where(TOKENS == 32, 300, TOKENS).astype(np.uint16).tobytes(), "token 300"),
    (CORPUS, np.append(TOKENS[:900], TOKENS[-1]).tobytes(), "has data {'text': "),
]

@pytest.mark.parametrize("name, content, says", FILES)
def test_files_that_are_damaged_are_refused(call, tmp_path, name, content, says):
    assert call("--data", "corpus") == (0, "")
    [path] = tmp_path.glob(name)
    path.write_bytes(content)
    flags = ["--out", "fresh"] if says == "token 300" else ["--resume"]
    status, words = call("--data", "corpus", *flags)
    assert status
    assert_sentence(words, says)

@pytest.mark.parametrize("gpus, nccl", [(0, True), (2, True), (3, False)])
def test_a_process_without_a_gpu_or_nccl_is_a_sentence(call, monkeypatch, gpus, nccl):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(train, "start_processes", lambda _, start=train.start_processes: start(torch.device("cuda")))
    assert_sentence(call()[1], "NCCL", f" {gpus} ", "--nproc-per-node", "--device cpu")

def test_closed_standard_error_changes_nothing(call, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert call() == (0, "") and Path("made/model.safetensors").exists()
