"""Bad input to sample.py ends in one plain sentence on standard error, and with nothing half done.

The program runs inside this process where that is possible, because importing torch takes seconds.
"""
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, call, largest_file
from safetensors.torch import load_file, save
from test_sample import small_model
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

import sample
from mamba import Mamba
from train import byte_tokenizer

NAN = torch.tensor(torch.nan)

@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model and a state of it."""
    folder = tmp_path_factory.mktemp("pristine")
    state = Mamba.from_pretrained(small_model(folder / "model")).blank_state(1)
    sample.save_state(folder / "state", state, sample.Text(byte_tokenizer(), [97], [], [97]))
    return folder

@pytest.fixture
def run(pristine, tmp_path, monkeypatch):
    """run(*flags) runs the program beside a `model` and a `state`, as call does."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return lambda *flags: call(sample, "--model", "model", "--max-new-tokens", "3", *flags)

def assert_only_refused(ended, says):
    assert ended.out == ""
    assert_refused(ended, says)

def test_nothing_is_refused_without_a_reason(run):
    """Or the refusals below would prove nothing. A state may be in other floats."""
    assert run("--prompt", "def ").status == 0 and run("--load-state", "state").status == 0
    tensors = load_file("state")
    tensors["conv"] = tensors["conv"].bfloat16()
    Path("state").write_bytes(save(tensors))
    assert run("--load-state", "state").status == 0

# What is said, and what is typed after `--prompt a`.
FLAGS = {
    "is not from": ["--max-new-tokens -1", "--temperature nan", "--temperature inf", "--top-k 0",
                    "--top-p 0", "--top-p 1.1", f"--seed {2**64}", "--num-samples 0"],
    "invalid": ["--max-new-tokens 1.5", "--temperature hot", "--dtype int8", "--quantize nf4"],
    "is not usable here": [f"--device={name}" for name in ("warp9", "", "meta", "xla", "cpu:-1")],
    "expected one argument": ["--prompt", "--model"],
    "unrecognized": ["stray", "--unknown"],
    "each --prompt needs text": ["--prompt="],
    "surrogates not allowed": ["--prompt caf\udce9"],
    "nope' is not a folder; `python train.py` makes one": ["--model nope"],
    "one text, but there are 2 prompts": ["--prompt b --save-state kept",
                                          "--prompt b --load-state state"],
    "--num-samples is 2": ["--num-samples 2 --save-state kept"],
    "is not a state file": ["--load-state nope", "--load-state model",
                            "--load-state model/model.safetensors"],
    "is no file, or in no folder": ["--save-state no/kept", "--save-state model", "--save-state=",
                                    "--save-state /dev/null", "--show-steps no/a.svg"],
    "draws a single prompt, from its beginning": ["--show-steps a.svg --prompt b",
                                                  "--show-steps a.svg --load-state state"],
}

@pytest.mark.parametrize("says, typed", [(says, typed) for says in FLAGS for typed in FLAGS[says]])
def test_flags_that_cannot_be_are_refused(run, says, typed):
    assert_only_refused(run("--prompt", "a", *typed.split()), says)
    assert sorted(path.name for path in Path().iterdir()) == ["model", "state"]

def words_only(words):
    return Tokenizer(models.BPE(words, [])).to_str().encode()

TOKENIZER = "model/tokenizer.json"
GENERATION = "model/generation_config.json"
# Which file is spoilt, what is said, and what the file holds: bytes, or other tensors in a state.
FILES = [
    (TOKENIZER, "cannot read the tokenizer model/tokenizer.json",
     [b"", b"{}", b"[]", b"[" * 10**5, b"\xff", b'{"version": "9.0"}']),
    (TOKENIZER, "tokenizer has 501 tokens, its model only 257", [words_only({"a": 0, "b": 500})]),
    (TOKENIZER, "no token for any character", [words_only({"b": 0})]),
    (GENERATION, "eos_token_id", [b'{"eos_token_id": "11"}', b'{"eos_token_id": [1, true]}']),
    (GENERATION, "generation_config.json", [b"["]),
    ("state", "state is not a state file", [b"", b"text", b"\0" * 100]),
    ("state", "state is not a state file: \"'ssm'\"", [save({"conv": NAN})]),
    ("state", "[2, 1, 32, 5] in torch.float32, but this model needs [2, 1, 32, 4]",
     [{"ssm": torch.zeros(2, 1, 32, 5)}]),
    ("state", "needs [2, 1, 3, 32]",
     [{"conv": torch.zeros(2, 3, 32)}, {"conv": torch.zeros(2, 1, 3, 32, dtype=torch.int32)}]),
    ("state", "not finite: the weights or the state are damaged",
     [{"conv": NAN.expand(2, 1, 3, 32)}, {"ssm": NAN.expand(2, 1, 32, 4)}]),
    ("state", "state has a token that the model has not: ",
     [{name: torch.tensor([token])} for name in ("printed", "unprinted", "unread")
      for token in (-1, 257, 2**62, 0.5, True)]),
]

@pytest.mark.parametrize("name, says, content", [
    (name, says, content) for name, says, contents in FILES for content in contents])
def test_files_that_cannot_be_read_are_refused(run, name, says, content):
    path = Path(name)
    if isinstance(content, dict):
        tensors = load_file(path) | content
        content = save({name: value.contiguous() for name, value in tensors.items()})
    path.write_bytes(content)
    flags = ["--load-state", "state"] if name == "state" else ["--prompt", "a"]
    assert_only_refused(run(*flags), says)

def test_a_tokenizer_set_to_cut_pad_or_begin_what_it_reads_does_not_here(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    begin = ("<|endoftext|>", 256)
    tokenizer.post_processor = TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(sample.read_tokenizer(tmp_path / "tokenizer.json").encode("abcdef")) == 6

def test_a_prompt_is_shown_as_the_tokenizer_reads_it(run):
    Path(TOKENIZER).write_bytes(words_only({"a": 0, "b": 1}))
    assert run("--prompt", "abλab", "--max-new-tokens", "0").out == "a b a b\n"

@pytest.mark.parametrize("words, says", [
    ("[enforce fail] DefaultCPUAllocator: can't allocate memory\nstack", "--quantize int4"),
    ("CUDA out of memory. Tried to allocate 9 GiB", "--quantize int4"),
    ("Failed to find C compiler. Please\n\nSet X=1", "sample.py: Failed to find C compiler."),
    ("InvalidCxxCompiler: No working C++ compiler found\n\nSet X=1", "sample.py: InvalidCxx"),
    ("size mismatch", None)])
def test_what_this_machine_lacks_is_a_sentence_and_a_fault_of_ours_is_not(run, monkeypatch,
                                                                         words, says):
    def fail(*_, **__):
        raise RuntimeError(words)
    monkeypatch.setattr(Mamba, "forward", fail)
    if says:
        assert_refused(run("--prompt", "ab"), says)
    else:
        with pytest.raises(RuntimeError, match=words):
            run("--prompt", "ab")

# Standard input, output and error.

@pytest.mark.parametrize("data, errors, says", [
    (b"caf\xe9\n", "strict", "utf-8"), (b"caf\xe9\n", "surrogateescape", "surrogates"),
    (b"", "strict", "so does standard input"), (None, None, "so does standard input")])
def test_standard_input_must_be_text(run, monkeypatch, data, errors, says):
    stdin = data and io.TextIOWrapper(io.BytesIO(data), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert_only_refused(run("--prompt", "-"), says)

@pytest.mark.parametrize("flags, after, status, says", [
    ("--max-new-tokens 0", "<<< $'a\\nb'", 0, "loaded in"),
    ("--max-new-tokens 3000", "<<< a | head -c 1", 0, "loaded in"),
    ("--max-new-tokens 3000 --save-state kept", "<<< a | head -c 1", 1, "sample.py: [Errno 32]"),
    ("--max-new-tokens 0", "<<< a > /dev/full", 1, "sample.py: [Errno 28]"),
    ("--max-new-tokens 0", "<<< a >&-", 0, "steps"), ("--max-new-tokens 0", "<<< a 2>&-", 0, "")])
def test_who_reads_the_text_may_leave(pristine, tmp_path, flags, after, status, says):
    line = f"{sys.executable} {sample.__file__} --model {pristine}/model --device cpu --prompt -"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {flags} {after}"],
                           capture_output=True, text=True, cwd=tmp_path, env=buffered)
    assert ended.returncode == status and not [*tmp_path.iterdir()]
    assert says in ended.stderr and ended.stdout in ("", "a", "a\n", "a\nb\n")
    assert "Exception" not in ended.stderr and "Traceback" not in ended.stderr

def test_a_state_that_cannot_be_written_leaves_the_old_one_whole(run):
    before = Path("state").read_bytes()
    with largest_file(500):
        assert_refused(run("--prompt", "other", "--save-state", "state"), "too large")
    assert Path("state").read_bytes() == before and not Path("state.partial").exists()
