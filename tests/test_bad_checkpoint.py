"""A folder that is no whole checkpoint is refused in one plain sentence; a save that fails spoils nothing."""
import contextlib
import json
import os
import resource
import shutil
import struct
import weakref
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import mamba
from mamba import PUBLISHED, Mamba, MambaConfig

NAN, INF = float("nan"), float("inf")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"
A_LOG = "backbone.layers.1.mixer.A_log"


def model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, eos_token_id=256, d_model=8, n_layer=2, d_state=3)
    return Mamba(MambaConfig(**sizes | changes))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(12)[None])[0]


@pytest.fixture
def folder(tmp_path):
    model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_sentence(error, *words):
    text = str(error.value)
    assert text.isprintable() and " " in text and len(text) < 600, text
    for word in words:
        assert str(word) in text


def assert_refused(source, *words):
    with pytest.raises(ValueError) as error:
        Mamba.from_pretrained(source)
    assert_sentence(error, *words)


# What is done to a folder.


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def config(**values):
    """Change some values of config.json; ... removes one."""
    def change(folder):
        raw = json.loads((folder / "config.json").read_text()) | values
        left = {name: value for name, value in raw.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(left))
    return change


def tensors(**values):
    """Change some tensors; None removes one. In a name here, two underscores stand for a dot."""
    def change(folder):
        changed = load_file(folder / WEIGHTS) | {k.replace("__", "."): v for k, v in values.items()}
        save_file({k: v for k, v in changed.items() if v is not None}, folder / WEIGHTS)
    return change


def shards(**index):
    """Cut the weights into a.safetensors and b.safetensors, with this in the index's weight_map too."""
    def change(folder):
        whole = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(whole)
        save_file({name: whole[name] for name in names[::2]}, folder / "a.safetensors")
        save_file({name: whole[name] for name in names[1::2]}, folder / "b.safetensors")
        weight_map = dict.fromkeys(names[::2], "a.safetensors")
        weight_map |= dict.fromkeys(names[1::2], "b.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | index}))
    return change


def directory(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def header(content):
    return write(WEIGHTS, struct.pack("<Q", len(content)) + content + b"\0" * 16)


def cut(name, length):
    return lambda folder: os.truncate(folder / name, length % (folder / name).stat().st_size)


HOSTILE = [
    (shutil.rmtree, ["model", "python train.py"]),
    (both(shutil.rmtree, os.mkdir), ["config.json", "No such file"]),
    (directory("config.json"), ["config.json"]),
    *((write("config.json", text), ["config.json"])
      for text in [b"", b"{", b"null", b"[]", b"7", b'"falcon_mamba"', b"[" * 10**5, b'{"a":' * 10**5,
                   b"\xff\xfe", b"{}", b'{"model_type": "falcon_mamba"}', b"9" * 10**4, b"\0" * 99,
                   b'{"vocab_size": 97,}']),
    *((config(model_type=kind), ["model_type", "falcon_mamba"])
      for kind in ["mamba", "mamba2", "", None, 7, ["falcon_mamba"], "a\nb", "x" * 10**5, ...]),
    (config(hidden_act="gelu"), ["hidden_act", "gelu"]),
    *((config(**{name: ...}), [name]) for name in ["vocab_size", "hidden_size", "num_hidden_layers"]),
    (config(num_hidden_layers=1025), ["num_hidden_layers", 1025, 1024]),
    *((config(intermediate_size=..., expand=value), [])
      for value in [-1, 0, NAN, INF, 1e308, 10**400, 2**40, 0.01, "2", True, [2], {}]),
    (config(hidden_size=2**20, intermediate_size=2**20, vocab_size=2**20), ["1048576", "257, 8"]),
    (config(state_size=5), ["[16, 3]", "[16, 5]"]),
    (config(num_hidden_layers=200), ["Missing", "backbone.layers.2."]),
    (both(config(tie_word_embeddings=True), tensors(backbone__embeddings__weight=None)),
     ["backbone.embeddings.weight"]),

    *((cut(WEIGHTS, length), [WEIGHTS]) for length in [0, 1, 7, 8, 9, 100, 2000, -1]),
    (lambda folder: os.truncate(folder / WEIGHTS, 10**5), [WEIGHTS]),
    *((write(WEIGHTS, struct.pack("<Q", claim) + b"{}"), [WEIGHTS])
      for claim in [2**40, 2**63, 2**64 - 1, 100_000_001]),
    *((header(content), [WEIGHTS]) for content in [
        b"[]", b"null", b"{", b'{"a": 1}', b"[" * 10**5, b'{"a":' * 10**4, b"\xff" * 10, b" " * 64,
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}']),
    (directory(WEIGHTS), [WEIGHTS]),
    (both(lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin")), ["pickle", WEIGHTS]),
    (tensors(**{A_LOG: None}), [A_LOG, "Missing"]),
    (tensors(more=torch.ones(2)), ["more", "Unexpected"]),
    (tensors(**{"a\nTraceback \x1b[31m" + "b" * 10**4: torch.ones(2)}), ["Unexpected"]),
    (tensors(**{IN_PROJ: torch.ones(8, 32)}), [IN_PROJ, "[8, 32]", "[32, 8]"]),
    *((tensors(**{IN_PROJ: torch.ones(32, 8).to(dtype)}), [IN_PROJ, dtype])
      for dtype in [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn]),

    (both(shards(), lambda folder: (folder / "b.safetensors").unlink()), ["b.safetensors"]),
    (both(shards(), cut("b.safetensors", 500)), ["b.safetensors"]),
    (both(shards(again="c.safetensors"),
          lambda folder: shutil.copy(folder / "a.safetensors", folder / "c.safetensors")),
     ["second time", "c.safetensors"]),
    *((shards(**{A_LOG: target}), ["index.json"]) for target in [
        "../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a.bin",
        "a.safetensors.bin", "./a.safetensors", "sub/../a.safetensors", "a.safetensors/",
        "a\0.safetensors", "\ud800.safetensors", "config.json", "a\n.safetensors",
        "x" * 10**5 + ".safetensors", "..\\secret.safetensors", 1, None, [], {}]),
    *((both(shards(), write(INDEX, text)), []) for text in [
        b"", b"[]", b"null", b"{}", b'{"weight_map": []}', b"[" * 10**5, b'{"weight_map": {}}',
        b'{"weight_map": "a.safetensors"}']),
]


@pytest.mark.parametrize("change, words", HOSTILE)
def test_a_folder_that_is_no_whole_checkpoint_is_refused_in_a_sentence(folder, change, words):
    change(folder)
    assert_refused(folder, *words)


ABSURD = {int: [-1, 2**40, 10**400, 1.5, 8.0, NAN, INF, 1e300, "8", "", True, [], [-8], {}, "x" * 10**5],
          float: [-1, 0, 1, 5.0, NAN, INF, 10**400, "1e-5", True, [], [1e-5], {}],
          bool: [0, 1, "true", "", NAN, [], {}, 1.0]}


@pytest.mark.parametrize("f", fields(MambaConfig), ids=lambda f: f.name)
def test_an_absurd_value_in_config_json_is_refused_by_its_published_name(folder, f):
    name = PUBLISHED.get(f.name, f.name)
    for value in ABSURD[f.type]:
        config(**{name: value})(folder)
        assert_refused(folder, name)


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/model", "a\0b", "model\udcff", "../../a/b/c",
                                  "-a/b", "no-such-folder", "README.md"])
def test_a_name_that_is_no_folder_is_a_sentence(name):
    assert_refused(name, "python train.py")


def test_a_hub_that_answers_in_many_lines_is_still_a_sentence(monkeypatch):
    def download(*args, **kwargs):
        raise RuntimeError("404\nRepository\tnot found\n\n" + "x" * 9999)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_refused("nobody/nothing", "nobody/nothing", "--model out")


# What is unusual, but right.


def test_shards_load_to_the_same_model(folder):
    before = logits(Mamba.from_pretrained(folder))
    shards()(folder)
    assert torch.equal(logits(Mamba.from_pretrained(folder)), before)


def test_weights_in_float64_become_fp32(folder):
    before = logits(Mamba.from_pretrained(folder))
    tensors(**{k: v.double() for k, v in load_file(folder / WEIGHTS).items()})(folder)
    again = Mamba.from_pretrained(str(folder))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(logits(again), before)


def test_a_config_that_does_not_say_so_ties_the_embeddings_as_the_reference_does(folder):
    both(config(tie_word_embeddings=...), tensors(lm_head__weight=None))(folder)
    again = Mamba.from_pretrained(folder)
    assert again.lm_head.weight is again.backbone.embeddings.weight


def test_what_replace_was_given_is_let_go_at_once(folder):
    """Or a model in 4 bit would first need the memory of the whole one."""
    given = []

    def replace(linear):
        assert all(weight() is None for weight in given)
        given.append(weakref.ref(linear.weight))
        return torch.nn.Identity()
    Mamba.from_pretrained(folder, replace=replace)
    assert len(given) == 6


# Saving.


@contextlib.contextmanager
def full_disk(size):
    """No file can grow past `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_not_saved(model, folder):
    with pytest.raises(OSError) as error:
        model.save_pretrained(folder)
    assert_sentence(error, folder)


def test_an_unwritable_place_for_a_checkpoint_is_a_sentence(folder):
    assert_not_saved(model(), folder / "config.json")
    assert_not_saved(model(), folder / "config.json" / "sub")


def test_a_full_disk_leaves_the_old_checkpoint_whole_and_no_new_one(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with full_disk(1000):
        assert_not_saved(model(seed=1), folder)
        assert_not_saved(model(seed=1), tmp_path / "new")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not [*(tmp_path / "new").iterdir()]


@pytest.mark.parametrize("sizes", [{}, {"d_state": 5}])
@pytest.mark.parametrize("move", [1, 2])
def test_a_save_that_is_killed_leaves_one_whole_checkpoint_or_a_sentence(folder, sizes, move):
    new = model(seed=1, **sizes)
    whole = [logits(each) for each in (Mamba.from_pretrained(folder), new)]
    child = os.fork()
    if child == 0:
        replace, moves = os.replace, []

        def die(*args):
            moves.append(args)
            if len(moves) == move:
                os._exit(9)
            replace(*args)
        os.replace = die
        new.save_pretrained(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if sizes and move == 2:
        assert_refused(folder)
    else:
        left = logits(Mamba.from_pretrained(folder))
        assert any(torch.equal(left, each) for each in whole)
    new.save_pretrained(folder)                 # and the next save clears it all up
    assert torch.equal(logits(Mamba.from_pretrained(folder)), whole[1])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_what_replaces_a_file_is_on_the_disk_first(folder, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda new, path: done.append(path))
    mamba.replace_file(folder / WEIGHTS, folder / "new")
    assert done == ["fsync", folder / "new"]


def test_a_checkpoint_in_shards_gives_way_to_the_model_saved_over_it(folder):
    shards()(folder)
    model(seed=1).save_pretrained(folder)
    assert torch.equal(logits(Mamba.from_pretrained(folder)), logits(model(seed=1)))
