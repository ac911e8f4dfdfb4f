"""Bad input to sample.py ends in one plain sentence on standard error, and with nothing half done.

The program runs inside this process wherever that is possible, because importing torch takes seconds. A
place is made unwritable by a file in a folder's place or a limit on file sizes: root may write to any other.
"""
import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save
from test_sample import byte_tokenizer, small_model
from tokenizers import Tokenizer, decoders, models

import sample
from mamba import Mamba

NAN = float("nan")

def assert_sentence(text, *words):
    """One line of plain words that a person can read at a glance, holding all of `words`."""
    assert len(text.strip().splitlines()) == 1, f"not one line: {text!r}"
    assert len(text) < 600 and text.strip().isprintable() and "Traceback" not in text, text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"

@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model and a state of it."""
    folder = tmp_path_factory.mktemp("pristine")
    small_model(folder / "model")
    model = Mamba.from_pretrained(folder / "model")
    sample.save_state(folder / "state", model.blank_state(1), sample.Text(byte_tokenizer(), [97]))
    return folder

@pytest.fixture
def call(pristine, tmp_path, monkeypatch, capsys):
    """call(*flags) runs the program beside a `model` and a `state` -> exit status, output, and last words."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "model", "--max-new-tokens", "3", *flags])
        capsys.readouterr()
        status = 0
        try:
            sample.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        notes = "loading ", "usage:", " ", "warning:"
        words = [line for line in err.splitlines() if not line.startswith(notes) and " GB of weights" not in line]
        if isinstance(status, str):         # Python would print it, and exit with 1
            words.append(status)
            status = 1
        return status, out, "\n".join(words)
    return run

@pytest.fixture
def refused(call):
    def run(*flags, says=()):
        status, out, words = call(*flags)
        assert status not in (0, None) and out == ""
        assert_sentence(words, *says)
    return run

def test_nothing_is_refused_without_a_reason(call):
    """Or the refusals below would prove nothing."""
    assert call("--prompt", "def ")[0] == 0 and call("--load-state", "state")[0] == 0

# What is typed, and what is said.
FLAGS = {
    "": "--prompt", "--prompt=": "needs text", "--prompt a --prompt=": "needs text",
    "--prompt": "expected one argument", "--model": "expected one argument", "stray": "unrecognized",
    "--prompt caf\udce9": "the prompt is not UTF-8 text", "--unknown": "unrecognized",
    "--prompt a --model nope": "nope' is not a folder; `python train.py` makes one",
    "--prompt a --max-new-tokens -1": "'-1' is not from 0 to 1000000000", "--prompt a --temperature -1": "from 0",
    "--prompt a --max-new-tokens 1.5": "invalid int value: '1.5'", "--prompt a --max-new-tokens x": "'x'",
    "--prompt a --temperature nan": "'nan' is not from 0 to 1000000.0", "--prompt a --temperature=": "''",
    "--prompt a --temperature inf": "'inf'", "--prompt a --temperature hot": "invalid float value: 'hot'",
    "--prompt a --top-k 0": "from 1", "--prompt a --top-k -3": "from 1", "--prompt a --top-p 0": "'0' is not",
    "--prompt a --top-p 1.1": "from 1e-09 to 1", "--prompt a --top-p nan": "'nan'", "--prompt a --seed -1": "'-1'",
    f"--prompt a --seed {2**64}": "from 0", "--prompt a --num-samples 0": "from 1",
    "--prompt a --dtype int8": "invalid choice", "--prompt a --quantize nf4": "choose from",
    "--prompt a --device warp9": "'warp9' is not usable here", "--prompt a --device=": "'' is not usable here",
    "--prompt a --device cuda:99": "try cpu", "--prompt a --device cpu:-1": "try cpu",
    "--prompt a --device meta": "'meta' is not usable", "--prompt a --device xla": "try cpu",
    "--prompt a --device hpu": "try cpu",
    "--prompt a --prompt b --save-state kept": "one text, but there are 2 prompts",
    "--prompt a --num-samples 2 --save-state kept": "--num-samples is 2",
    "--load-state state --prompt a --prompt b": "one text, but there are 2 prompts",
    "--load-state nope": "nope is not a state file", "--load-state model": "model is not a state file",
    "--load-state model/model.safetensors": "model.safetensors is not a state file",
    "--prompt a --save-state no/kept": "'no/kept' is no file, or in no folder",
    "--prompt a --save-state model/config.json/kept": "no folder", "--prompt a --save-state model": "no file",
    "--prompt a --save-state=": "no file", "--prompt a --save-state /dev/null": "'/dev/null' is no file",
}

@pytest.mark.parametrize("typed", FLAGS, ids=lambda typed: ascii(typed[:40]))
def test_flags_that_cannot_be_are_refused(refused, typed):
    refused(*typed.split(), says=[FLAGS[typed]])
    assert sorted(path.name for path in Path().iterdir()) == ["model", "state"]

def words_only(*words, numbers=range(1000)):
    tokenizer = Tokenizer(models.BPE(dict(zip(words, numbers)), []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer

TOKENIZER = "model/tokenizer.json"
GENERATION = "model/generation_config.json"
# Which file is spoilt, what it holds then (None: a folder is in its place), and what is said.
FILES = [
    *[(TOKENIZER, content, "cannot read the tokenizer model/tokenizer.json")
      for content in (None, b"", b"{}", b"[]", b"null", b"[" * 10**5, b"\xff", b'{"version": "9.0"}')],
    (TOKENIZER, words_only(*map(chr, range(0x4e00, 0x4f02))), "tokenizer has 258 tokens, its model 257"),
    (TOKENIZER, words_only("a", "b", numbers=[0, 500]), "tokenizer has 501 tokens, its model 257"),
    (TOKENIZER, words_only("b"), "no token for any character"),
    *[(GENERATION, b'{"eos_token_id": %s}' % value, "eos_token_id")
      for value in (b'"11"', b"1.5", b"true", b"[1, null]", b"{}")],
    (GENERATION, b"[", "generation_config.json"),
    *[("state", content, "state is not a state file") for content in (b"", b"text", b"\0" * 100)],
    ("state", slice(-1), "state is not a state file"), ("state", slice(50), "state is not a state file"),
    ("state", {"ssm": torch.zeros(2, 1, 32, 5)}, "[2, 1, 32, 5] in torch.float32, but this model needs [2, 1, 32, 4]"),
    ("state", {"conv": torch.zeros(2, 3, 32)}, "needs [2, 1, 3, 32]"),
    *[("state", {"conv": torch.zeros(2, 1, 3, 32).to(dtype)}, f"in {dtype}, but this model needs")
      for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)],
    *[("state", {name: torch.full(shape, NAN)}, "not finite: the weights or the state are damaged")
      for name, shape in (("conv", (2, 1, 3, 32)), ("ssm", (2, 1, 32, 4)))],
    *[("state", {name: torch.tensor([token])}, f"state has tokens that the model has not: [{token}]")
      for name in ("shown", "waiting") for token in (-1, 257, 2**62, -2**63)],
    *[("state", {name: tokens}, f"state has tokens of {[*tokens.shape]} in") for name in ("shown", "waiting")
      for tokens in (torch.zeros(1), torch.tensor(1), torch.tensor([True]), torch.tensor([[1]]))],
    ("state", {"shown": torch.zeros(0, dtype=torch.int64)}, "no token"),
]

@pytest.mark.parametrize("name, content, says", FILES)
def test_files_that_cannot_be_read_are_refused(refused, name, content, says):
    path = Path(name)
    if content is None:
        path.unlink()
        path.mkdir()
    elif isinstance(content, Tokenizer):
        content.save(name)
    elif isinstance(content, slice):
        path.write_bytes(path.read_bytes()[content])
    else:
        path.write_bytes(save(load_file(path) | content) if isinstance(content, dict) else content)
    refused(*(["--load-state", "state"] if name == "state" else ["--prompt", "a"]), says=[says])

def test_a_state_in_other_floats_goes_on_and_one_without_its_tokens_does_not(call, refused):
    tensors = load_file("state")
    other = {"conv": tensors["conv"].to(torch.bfloat16), "ssm": tensors["ssm"].to(torch.float16)}
    Path("state").write_bytes(save(tensors | other))
    assert call("--load-state", "state")[0] == 0
    Path("state").write_bytes(save(other))
    refused("--load-state", "state", says=["state is not a state file", "shown"])

def test_characters_that_the_tokenizer_drops_are_told_and_no_others(call, capsys):
    words_only("a", "b").save(TOKENIZER)
    for prompt, warning in [("abλab", "no token for 'λ'"), ("ab", "")]:
        sample.encode(sample.read_tokenizer(Path(TOKENIZER)), prompt)
        err = capsys.readouterr().err
        assert warning in err and bool(err) == bool(warning)

def test_a_tokenizer_set_to_cut_or_pad_what_it_reads_does_neither_here(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(sample.encode(sample.read_tokenizer(tmp_path / "tokenizer.json"), "abcdef")) == 6

def test_what_this_machine_lacks_is_named(call, refused, monkeypatch):

    def download(*_, **__):
        raise RuntimeError("404\nRepository\tnot found\n\n" + "x" * 9999)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("--model", "nobody/nothing", "--prompt", "a", says=["nobody/nothing", "--model out"])
    monkeypatch.setattr(Mamba, "forward", lambda *_: torch.empty(2**45))    # a plain RuntimeError on a CPU
    assert_sentence(call("--prompt", "a")[2], "sample.py: out of memory", "--quantize int4")

@pytest.mark.parametrize("words", ["Failed to find C compiler. Please", "InvalidCxxCompiler: No working C++ compiler found"])
def test_a_missing_compiler_is_a_sentence_and_a_fault_of_ours_is_not(call, monkeypatch, words):
    def forward(*_):
        raise RuntimeError(f"{words}\n\nSet TORCHDYNAMO_VERBOSE=1")
    monkeypatch.setattr(Mamba, "forward", forward)
    assert_sentence(call("--prompt", "a")[2], f"sample.py: {words}")
    words = "size mismatch"
    with pytest.raises(RuntimeError, match=words):
        call("--prompt", "a")

# Standard input, output and error.

@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])    # Python's way in UTF-8 locales, and in C
def test_standard_input_must_be_text(call, refused, errors, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    refused("--prompt", "-")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused("--prompt", "-", says=["standard input"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert call("--prompt", "-", "--max-new-tokens", "0")[:2] == (0, "a\nb\n")

@pytest.mark.parametrize("flags, after, status, says", [
    ("", "| head -c 1", 0, "loaded in"),
    ("--save-state kept", "| head -c 1", 1, "sample.py: the text's reader left early; "),
    ("", "> /dev/full", 1, "sample.py: [Errno 28]")])
def test_who_reads_the_text_may_leave(pristine, tmp_path, flags, after, status, says):
    line = f"{sys.executable} {sample.__file__} --model {pristine}/model --device cpu --prompt a {flags}"
    command = ["bash", "-o", "pipefail", "-c", f"{line} --max-new-tokens 3000 {after}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == status and says in last and not [*tmp_path.iterdir()]
    assert "Exception" not in ended.stderr and "Traceback" not in ended.stderr

# Writing a state.

def test_a_state_that_cannot_be_written_leaves_the_old_one_whole(call):
    before = Path("state").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    status, _, words = call("--prompt", "other", "--save-state", "state")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert status == 1 and Path("state").read_bytes() == before
    assert_sentence(words, "sample.py: ")
