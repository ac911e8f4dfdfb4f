"""Bad input ends in one plain sentence on standard error and a non-zero exit, with nothing half done.

    python -m pytest tests/test_bad_input.py

The programs run inside this process wherever that is possible, since importing torch again takes seconds. A
place is made unwritable by a file where a folder should be or a limit on file sizes, as root may write to any
other. test_fuzz.py adds what nobody thought of.
"""
import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
import weakref
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers

import mamba
import sample
import train
from mamba import PUBLISHED, Mamba, MambaConfig

REPO = Path(mamba.__file__).parent
SIZES = {"d_model": 8, "n_layer": 2, "d_state": 3, "d_conv": 4}


def assert_sentence(text, *words):
    """One line of plain words that a person can read at a glance, holding all of `words`."""
    assert "Traceback" not in text and "Exception ignored" not in text, text
    assert len(text.strip().splitlines()) == 1, f"not one line: {text!r}"
    assert " " in text and len(text) < 600, f"{len(text)} characters: {text[:600]!r}"
    assert text.strip().isprintable(), f"control characters in {text!r}"
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"


def complaint(stderr):
    """What a program wrote to standard error, less argparse's usage and the notes on the way to the end."""
    lines, usage = [], False
    for line in stderr.splitlines():
        usage = line.startswith("usage:") or usage and line.startswith(" ")
        if not usage and line.strip() and not line.startswith(("warning:", "skipping ")):
            lines.append(line)
    return "\n".join(lines)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(module, *flags) runs the program -> exit status, standard output, standard error."""
    def run(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            status = module.main()
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        return (1, out, f"{err}{status}\n") if isinstance(status, str) else (status or 0, out, err)
    return run


@pytest.fixture
def refused(call):
    """refused(module, *flags, words=...) asserts that the program ends in one sentence and wrote nothing."""
    def run(module, *flags, words=()):
        status, out, err = call(module, *flags)
        assert status not in (0, None) and out == ""
        assert_sentence(complaint(err), *words)
        assert "Traceback" not in err
        return err
    return run


@contextlib.contextmanager
def full_disk(size):
    """No file can grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A model that is as small as can be, with one token a byte."""
    folder = tmp_path_factory.mktemp("pristine") / "model"
    torch.manual_seed(0)
    Mamba(MambaConfig(vocab_size=257, eos_token_id=256, **SIZES)).save_pretrained(folder)
    train.byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_tensors(folder, **values):
    """Change some tensors of the folder's model.safetensors; None removes one."""
    tensors = load_file(folder / "model.safetensors") | values
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


# Folders.


def test_a_whole_folder_loads_and_generates(folder, call):
    """Or the refusals below would prove nothing."""
    status, out, err = call(sample, "--model", folder, "--prompt", "def ", "--max-new-tokens", 5)
    assert status == 0 and out.startswith("def ") and "tokens/s" in err
    assert torch.equal(logits(Mamba.from_pretrained(folder)), logits(Mamba.from_pretrained(str(folder))))


def test_a_folder_that_does_not_exist_is_named(tmp_path, refused):
    refused(sample, "--model", tmp_path / "nope", "--prompt", "a", words=["nope", "python train.py"])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_not_finite_end_in_a_sentence(folder, value, call):
    edit_tensors(folder, **{"lm_head.weight": torch.full((257, 8), value)})
    status, _, err = call(sample, "--model", folder, "--prompt", "a")
    assert status == 1
    assert_sentence(err.splitlines()[-1], "not finite")


# The tokenizer.


def test_a_missing_tokenizer_is_named(folder, refused):
    (folder / "tokenizer.json").unlink()
    refused(sample, "--model", folder, "--prompt", "a", words=["tokenizer.json"])


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 10**5, "\xff", '{"version": "9.0"}',
                                  '{"model": null}'])
def test_a_broken_tokenizer_is_a_sentence(folder, text, refused):
    (folder / "tokenizer.json").write_bytes(text.encode("latin1"))
    refused(sample, "--model", folder, "--prompt", "a", words=["tokenizer.json"])


def test_a_folder_in_the_tokenizers_place_is_a_sentence(folder, refused):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    refused(sample, "--model", folder, "--prompt", "a", words=["tokenizer.json"])


def word_tokenizer(vocabulary):
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_with_both_sizes(folder, refused):
    word_tokenizer({chr(0x4e00 + i): i for i in range(258)}).save(str(folder / "tokenizer.json"))
    refused(sample, "--model", folder, "--prompt", "一", words=["258", "257"])


def test_a_tokenizer_of_few_tokens_with_a_large_number_is_refused(folder, refused):
    word_tokenizer({"a": 0, "b": 500}).save(str(folder / "tokenizer.json"))
    refused(sample, "--model", folder, "--prompt", "ab", words=["257"])


def test_characters_that_the_tokenizer_drops_are_warned_about(folder, call):
    word_tokenizer({"a": 0, "b": 1}).save(str(folder / "tokenizer.json"))
    status, _, err = call(sample, "--model", folder, "--prompt", "abλab", "--max-new-tokens", 1)
    warnings = [line for line in err.splitlines() if line.startswith("warning:")]
    assert status == 0 and len(warnings) == 1 and "λ" in warnings[0]


def test_nothing_is_warned_about_when_nothing_is_dropped(folder, call):
    tokenizer = word_tokenizer({"a": 0, "b": 1})
    tokenizer.normalizer = normalizers.Lowercase()      # 'A' is read as 'a': not as typed, but not dropped
    tokenizer.save(str(folder / "tokenizer.json"))
    for prompt in ("ab", "Ab"):
        status, _, err = call(sample, "--model", folder, "--prompt", prompt, "--max-new-tokens", 1)
        assert status == 0 and "''" not in err
    assert "warning" not in call(sample, "--model", folder, "--prompt", "ab", "--max-new-tokens", 1)[2]


def test_a_prompt_that_is_dropped_whole_is_a_sentence(folder, refused):
    word_tokenizer({"a": 0}).save(str(folder / "tokenizer.json"))
    refused(sample, "--model", folder, "--prompt", "λ", words=["prompt"])


def test_a_tokenizer_set_to_cut_or_pad_what_it_reads_does_neither_here(folder, call):
    tokenizer = train.byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    status, _, err = call(sample, "--model", folder, "--prompt", "abcdef", "--max-new-tokens", 1)
    assert status == 0 and "warning" not in err
    assert len(sample.encode(sample.read_tokenizer(folder / "tokenizer.json"), "abcdef")) == 6


# The command line of sample.py.


@pytest.mark.parametrize("flags", [
    ["--max-new-tokens", "-1"], ["--max-new-tokens", "1.5"], ["--max-new-tokens", "x"],
    ["--max-new-tokens", "9" * 5000],
    ["--temperature", "-1"], ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "hot"],
    ["--top-k", "0"], ["--top-k", "-3"], ["--top-p", "0"], ["--top-p", "1.1"], ["--top-p", "nan"],
    ["--seed", "-1"], ["--seed", str(2**64)], ["--num-samples", "0"], ["--num-samples", "-1"],
    ["--dtype", "int8"], ["--quantize", "int4"], ["--device", "warp9"], ["--device", ""],
    ["--device", "cuda:99"], ["--device", "cpu:-1"], ["--device", "xla"], ["--device", "mkldnn"],
    ["--device", "hpu"], ["--unknown"], ["stray"], ["--model"], ["--prompt"], ["--temperature", ""]],
    ids=lambda flags: " ".join(flags)[:30])
def test_flags_out_of_range_are_refused(folder, refused, flags):
    refused(sample, "--model", folder, "--prompt", "a", *flags)


def test_a_run_without_a_prompt_is_told_which_flag_to_give(folder, refused):
    refused(sample, "--model", folder, words=["--prompt"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_cuda_is_a_sentence_that_names_the_cpu(folder, refused):
    refused(sample, "--model", folder, "--prompt", "a", "--device", "cuda", words=["cuda", "cpu"])


def test_tokenizing_a_text_into_itself_is_refused(refused, tmp_path):
    text = tmp_path / "my.txt"
    text.write_text("some words")
    refused(train, "--data", text, "--tokenize-to", text, words=["overwrite", "another file"])
    assert text.read_text() == "some words"


def test_a_gpu_without_the_compiler_that_triton_starts_with_is_a_sentence(monkeypatch):
    triton = pytest.importorskip("triton")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")
    number = SimpleNamespace(item=float, is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: number)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    with pytest.raises(argparse.ArgumentTypeError) as e:
        sample.device("cuda")
    assert_sentence(str(e.value), "C compiler", "try cpu")


def test_a_device_without_memory_is_refused(folder, refused):
    refused(sample, "--model", folder, "--prompt", "a", "--device", "meta", words=["meta"])
    refused(train, "--out", folder, "--device", "meta", words=["meta"])


def test_no_bitsandbytes_is_a_sentence_that_names_the_pip_command(folder, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)       # import then raises ImportError
    refused(sample, "--model", folder, "--prompt", "a", "--quantize", "nf4",
            words=["pip install bitsandbytes"])


def test_no_compiler_is_a_sentence(folder, refused, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(sample, "--model", folder, "--prompt", "a", "--compile", words=["--compile"])


def test_an_empty_prompt_is_refused(folder, refused):
    refused(sample, "--model", folder, "--prompt", "", words=["prompt"])
    refused(sample, "--model", folder, "--prompt", "a", "--prompt", "", words=["prompt"])


def test_a_prompt_of_bytes_that_are_no_text_is_refused(folder, refused):
    refused(sample, "--model", folder, "--prompt", "caf\udce9", words=["prompt", "UTF-8"])


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])    # Python's way in UTF-8 locales, and in C
def test_standard_input_that_is_no_text_is_refused(folder, refused, errors, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
    refused(sample, "--model", folder, "--prompt", "-")


def test_standard_input_that_is_empty_or_closed_is_refused(folder, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    refused(sample, "--model", folder, "--prompt", "-", words=["prompt"])
    monkeypatch.setattr(sys, "stdin", None)
    refused(sample, "--model", folder, "--prompt", "-", words=["standard input"])


def test_standard_input_is_read_without_its_last_newline(folder, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert call(sample, "--model", folder, "--prompt", "-", "--max-new-tokens", 0)[:2] == (0, "a\nb\n")


def test_running_out_of_memory_is_a_sentence(folder, call, monkeypatch):
    def full(*args, **kwargs):
        return torch.empty(2**45)       # what the CPU's allocator says: a plain RuntimeError
    monkeypatch.setattr(Mamba, "forward", full)
    status, _, err = call(sample, "--model", folder, "--prompt", "a")
    assert status == 1
    assert_sentence(err.splitlines()[-1], "memory")


def subprocess_run(*command, stdout=subprocess.PIPE, **env):
    return subprocess.run([sys.executable, *map(str, command)], cwd=REPO, env=os.environ | env, text=True,
                          stdout=stdout, stderr=subprocess.PIPE, timeout=60)


def test_without_a_network_the_published_model_is_a_sentence_that_names_the_way_on(tmp_path):
    done = subprocess_run("sample.py", "--prompt", "a", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert_sentence(done.stderr, "tiiuae/falcon-mamba-7b-pre-decay", "python train.py", "--model out")


def test_standard_output_that_takes_no_more_is_a_sentence(folder):
    with open("/dev/full", "w") as full:
        done = subprocess_run("sample.py", "--model", folder, "--prompt", "a", "--max-new-tokens", "3",
                              stdout=full)
    assert done.returncode not in (0, 120)
    notes = [line for line in done.stderr.splitlines() if not line.startswith(str(folder))]
    assert_sentence("\n".join(notes), "sample.py")


# State files.


@pytest.fixture
def state(folder, call, tmp_path):
    """A state file of the model in `folder`."""
    path = tmp_path / "state"
    flags = ["--prompt", "def", "--max-new-tokens", 3, "--save-state", path]
    assert call(sample, "--model", folder, *flags)[0] == 0
    return path


def test_a_kept_state_continues(folder, state, call):
    assert call(sample, "--model", folder, "--load-state", state, "--max-new-tokens", 3)[0] == 0
    assert not state.with_name("state.partial").exists()


def test_a_file_that_is_no_state_is_refused(folder, refused, tmp_path, state):
    whole = state.read_bytes()
    half = whole[:len(whole) // 2]
    for content in [b"", b"text", b"\0" * 100, whole[:-1], half, whole[:50], whole + b"\0" * 8]:
        state.write_bytes(content)
        refused(sample, "--model", folder, "--load-state", state, words=[state])
    refused(sample, "--model", folder, "--load-state", tmp_path / "nope", words=["nope"])
    refused(sample, "--model", folder, "--load-state", tmp_path, words=[tmp_path])


def test_a_checkpoint_given_as_a_state_is_refused(folder, refused):
    """Its sentence must not list the checkpoint's tensors: the 7B has 643."""
    refused(sample, "--model", folder, "--load-state", folder / "model.safetensors", words=["state"])


def test_a_state_of_another_models_sizes_is_refused_with_both(folder, refused, state):
    tensors = load_file(state)
    save_file(tensors | {"ssm": torch.zeros(2, 1, 16, 4)}, state)
    refused(sample, "--model", folder, "--load-state", state, words=["[2, 1, 16, 4]", "[2, 1, 16, 3]"])
    save_file(tensors | {"more": torch.zeros(2)}, state)
    refused(sample, "--model", folder, "--load-state", state)
    save_file({"conv": tensors["conv"]}, state)
    refused(sample, "--model", folder, "--load-state", state)


@pytest.mark.parametrize("name, dtype", [
    ("conv", torch.int32), ("conv", torch.complex64), ("conv", torch.float8_e4m3fn), ("ssm", torch.int64),
    ("ssm", torch.bool), ("last", torch.float32), ("last", torch.bool)])
def test_a_state_of_the_wrong_kind_of_numbers_is_refused(folder, refused, state, name, dtype):
    tensors = load_file(state)
    save_file(tensors | {name: tensors[name].to(dtype)}, state)
    refused(sample, "--model", folder, "--load-state", state,
            words=[name, "floats" if dtype == torch.float32 else dtype])


@pytest.mark.parametrize("token", [-1, 257, 2**62, -2**63])
def test_a_state_whose_token_is_out_of_range_is_refused(folder, refused, state, token):
    save_file(load_file(state) | {"last": torch.tensor([token])}, state)
    refused(sample, "--model", folder, "--load-state", state, words=[token, "257"])


@pytest.mark.parametrize("name", ["conv", "ssm"])
def test_a_state_that_is_not_finite_is_not_blamed_on_the_model(folder, refused, state, name):
    tensors = load_file(state)
    save_file(tensors | {name: torch.full_like(tensors[name], NAN)}, state)
    refused(sample, "--model", folder, "--load-state", state, words=[state])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_state_in_floats_of_another_size_continues(folder, call, state, dtype):
    tensors = load_file(state)
    save_file(tensors | {"conv": tensors["conv"].to(dtype), "ssm": tensors["ssm"].to(dtype)}, state)
    assert call(sample, "--model", folder, "--load-state", state, "--max-new-tokens", 3)[0] == 0


def test_a_state_that_cannot_be_kept_is_refused_before_anything_is_written(folder, refused, tmp_path):
    for path in (tmp_path / "no" / "state", folder / "config.json" / "state", tmp_path, ""):
        refused(sample, "--model", folder, "--prompt", "a", "--max-new-tokens", 2, "--save-state", path,
                words=[path])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    os.mkfifo(tmp_path / "pipe")        # as little a file as /dev/null, which a root's run must not replace
    refused(sample, "--model", folder, "--prompt", "a", "--save-state", tmp_path / "pipe", words=["pipe"])
    with pytest.raises(OSError, match="no file"), sample.new_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_one_when_a_file_is_written_through_it(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for text in (b"new", b"newer"):
        with sample.new_file(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "there" / "file").read_bytes() == text and (tmp_path / "link").is_symlink()
    assert len([*(tmp_path / "there").iterdir()]) == 1


@pytest.mark.parametrize("module, flags", [(sample, ["--prompt", "a", "--max-new-tokens", 2]), (train, [])])
def test_closed_standard_error_changes_neither_text_nor_training(folder, call, text, tmp_path, monkeypatch,
                                                               module, flags):
    flags = ["--model", folder, *flags] if flags else ["--data", text, "--out", tmp_path / "made", *QUICK]
    monkeypatch.setattr(sys, "stderr", None)
    status, out, _ = call(module, *flags)
    assert status == 0 and "GB of weights" not in out


def test_a_full_disk_leaves_the_old_state_whole(folder, call, state):
    before = state.read_bytes()
    with full_disk(500):
        status, _, err = call(sample, "--model", folder, "--prompt", "other", "--max-new-tokens", 2,
                              "--save-state", state)
    assert status == 1 and "Traceback" not in err
    assert_sentence(err.splitlines()[-1], state)
    assert state.read_bytes() == before and not state.with_name("state.partial").exists()


@pytest.mark.parametrize("flags, word", [(["--prompt", "a", "--prompt", "b"], "2 prompts"),
                                         (["--prompt", "a", "--num-samples", "2"], "--num-samples")])
def test_a_state_file_for_more_than_one_text_is_refused(folder, refused, tmp_path, flags, word):
    refused(sample, "--model", folder, *flags, "--save-state", tmp_path / "state", words=[word])
    assert not (tmp_path / "state").exists()


def test_a_state_file_goes_on_in_one_text_alone(folder, refused, state):
    refused(sample, "--model", folder, "--load-state", state, "--prompt", "a", "--prompt", "b",
            words=["2 prompts"])


# Train.py.


@pytest.fixture
def text(tmp_path):
    """Enough text for a few small rows, also of the part held out."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return path


START = ["--total-tokens", 64, "--context", 16, "--batch-start", 1, "--batch-end", 2, "--device", "cpu"]
QUICK = [*START, "--d-model", 8, "--n-layer", 1, "--d-state", 2]


@pytest.fixture
def untrained(refused, text, tmp_path):
    """untrained(*flags) asserts that train.py refuses them in one sentence, and leaves no folder behind."""
    def run(*flags, words=()):
        flags = [*flags] if "--data" in flags else ["--data", text, *flags]
        refused(train, "--out", tmp_path / "made", *QUICK, *flags, words=words)
        assert not (tmp_path / "made").exists()
    return run


def test_a_quick_training_run_leaves_a_model_that_samples(call, text, tmp_path):
    """Or the refusals below would prove nothing."""
    assert call(train, "--data", text, "--out", tmp_path / "made", *QUICK)[0] == 0
    assert call(sample, "--model", tmp_path / "made", "--prompt", "the", "--max-new-tokens", 3)[0] == 0


def test_data_that_is_missing_is_named(untrained, tmp_path):
    untrained("--data", tmp_path / "nope", words=["nope"])


def test_data_that_is_empty_or_binary_or_too_little_is_a_sentence(untrained, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "binary").write_bytes(os.urandom(5000) + b"\xff")
    (tmp_path / "short").write_text("ab")
    (tmp_path / "folder").mkdir()
    for name in ("empty", "binary", "short", "folder"):
        untrained("--data", tmp_path / name, words=["--context 16"])


def test_text_of_which_too_little_is_held_out_is_told_so(untrained, tmp_path):
    (tmp_path / "some").write_text("x" * 200)          # 190 bytes to train on, and 10 held out
    untrained("--data", tmp_path / "some", words=["held out"])


def test_a_folder_of_text_may_hold_what_is_no_file(call, text, tmp_path):
    (tmp_path / "notes").mkdir()
    shutil.copy(text, tmp_path / "notes")
    (tmp_path / "notes" / ".#lock").symlink_to("nowhere")
    os.mkfifo(tmp_path / "notes" / "pipe")

    def write():
        with contextlib.suppress(OSError):
            (tmp_path / "notes" / "pipe").write_text("so that who reads it fails here, and does not wait")
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert call(train, "--data", tmp_path / "notes", "--out", tmp_path / "made", *QUICK)[0] == 0
    assert writer.is_alive()                            # nobody read it
    os.close(os.open(tmp_path / "notes" / "pipe", os.O_RDONLY | os.O_NONBLOCK))


def test_an_unwritable_out_is_refused_before_training(refused, text, tmp_path):
    for out in (text, text / "sub"):
        refused(train, "--data", text, "--out", out, *QUICK)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tokenizer.json").mkdir()
    refused(train, "--data", text, "--out", tmp_path / "made", *QUICK)


def test_a_new_run_does_not_touch_the_model_that_its_folder_holds(refused, folder, text):
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for flags in [], ["--resume"]:      # of which there is nothing to resume
        refused(train, "--data", text, "--out", folder, *QUICK, *flags,
                words=["already holds a model", "--resume"])
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_a_tokenizer_without_an_end_of_text_is_refused(untrained, tmp_path):
    word_tokenizer({"a": 0}).save(str(tmp_path / "tokenizer.json"))
    untrained("--tokenizer", tmp_path / "tokenizer.json", words=["<|endoftext|>"])


def test_a_tokenizer_that_is_missing_or_broken_is_named(untrained, tmp_path, folder):
    untrained("--tokenizer", tmp_path / "nope.json", words=["nope.json"])
    untrained("--tokenizer", folder / "config.json", words=["config.json"])
    untrained("--tokenizer", tmp_path, words=[tmp_path])


def test_a_tokenizer_with_gaps_trains(call, text, tmp_path):
    tokenizer = word_tokenizer({"t": 0, "h": 500})
    tokenizer.add_special_tokens([train.END])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert call(train, "--data", text, "--tokenizer", tmp_path / "tokenizer.json", "--out", tmp_path / "made",
                *QUICK, "--context", 2)[0] == 0


def test_a_start_that_is_missing_or_does_not_fit_is_refused(refused, text, tmp_path, folder):
    def start(model, *flags, words):
        refused(train, "--data", text, "--out", tmp_path / "made", *START, "--init-from", model, *flags,
                words=words)
        assert not (tmp_path / "made").exists()
    start(tmp_path / "nope", words=["nope"])
    large = {chr(0x4e00 + i): i for i in range(300)} | {train.END: 300}
    word_tokenizer(large).save(str(tmp_path / "tokenizer.json"))
    start(folder, "--tokenizer", tmp_path / "tokenizer.json", words=["257"])
    start(folder, "--d-model", "8", words=["--init-from", "--d-model"])
    (folder / "tokenizer.json").unlink()
    start(folder, words=["tokenizer.json"])


@pytest.mark.parametrize("flags", [
    ["--total-tokens", "-1"], ["--total-tokens", "1.5"], ["--total-tokens", "0"], ["--context", "0"],
    ["--context", "-1"], ["--batch-start", "0"], ["--batch-end", "0"], ["--batch-start", "-1"],
    ["--batch-start", str(2**60)], ["--lr", "nan"], ["--lr", "-1"], ["--lr", "inf"], ["--lr", "x"],
    ["--decay-factor", "0"], ["--decay-factor", "nan"], ["--beta1", "1"], ["--beta2", "1"], ["--beta1", "-1"],
    ["--beta2", "2"], ["--clip", "nan"], ["--weight-decay", "-1"], ["--seed", "-1"], ["--seed", "x"],
    ["--d-model", "0"], ["--n-layer", "0"], ["--d-state", "0"], ["--d-conv", "0"], ["--d-model", "-8"],
    ["--d-model", "x"], ["--n-layer", "5000"], ["--initializer-range", "0"], ["--initializer-range", "5"],
    ["--initializer-range", "nan"], ["--device", "warp9"], ["--unknown"], ["stray"], ["--data"],
    ["--d-model", str(2**20)]], ids=" ".join)
def test_training_flags_out_of_range_are_refused(untrained, flags):
    untrained(*flags)


def test_a_learning_rate_that_diverges_ends_in_a_sentence(call, text, tmp_path):
    status, _, err = call(train, "--data", text, "--out", tmp_path / "made", *QUICK,
                          "--lr", "1e15", "--warmup-tokens", 0)
    assert status == 1
    assert_sentence(complaint(err), "--lr")


@pytest.mark.parametrize("module", [sample, train])
def test_help_works(call, module):
    status, out, _ = call(module, "--help")
    assert status == 0 and "--device" in out
