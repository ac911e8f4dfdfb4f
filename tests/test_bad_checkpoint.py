"""A folder that is no whole checkpoint is refused in one plain sentence; a save that fails spoils nothing."""
import json
import os
import struct
from dataclasses import fields
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import assert_plain, largest_file
from safetensors.torch import load_file, save_file

from mamba import PUBLISHED, Mamba, MambaConfig

NAN, INF = float("nan"), float("inf")
WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDINGS = "backbone.embeddings.weight"
IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"

def model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=257, eos_token_id=256, d_model=8, n_layer=2, d_state=3)
    return Mamba(MambaConfig(**sizes | changes))

@torch.no_grad()
def logits(model):
    return model(torch.arange(12)[None])[0]

@pytest.fixture
def folder(tmp_path):
    model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"

def assert_refused(source, *words):
    with pytest.raises(ValueError) as error:
        Mamba.from_pretrained(source)
    assert_plain(str(error.value), *words)

# What is done to a folder.

def config(folder, values):
    """Change values of config.json; ... removes one."""
    raw = json.loads((folder / "config.json").read_text()) | values
    write(folder, {"config.json": json.dumps({k: v for k, v in raw.items() if v is not ...}).encode()})

def tensors(folder, values):
    """Change tensors; ... removes one."""
    changed = load_file(folder / WEIGHTS) | values
    save_file({k: v for k, v in changed.items() if v is not ...}, folder / WEIGHTS)

def shards(folder, weight_map):
    """Cut the weights into a.safetensors and b.safetensors, with this in the index as well."""
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for i, name in enumerate(["a.safetensors", "b.safetensors"]):
        save_file({k: whole[k] for k in sorted(whole)[i::2]}, folder / name)
        weight_map = dict.fromkeys(sorted(whole)[i::2], name) | weight_map
    index(folder, json.dumps({"weight_map": weight_map}).encode())

def index(folder, content):
    (folder / WEIGHTS).unlink(missing_ok=True)
    write(folder, {"model.safetensors.index.json": content})

def write(folder, files):
    """Give files other content; None makes a folder of one."""
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)

NO_JSON = [b"", b"{", b"null", b"7", b"[" * 10**5, b"\xff\xfe", b"\0" * 99, b'{"vocab_size": 97,}']
HUGE = b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'
NO_TENSORS = [b"", b"\x80\x02ctorch._utils\n", struct.pack("<Q", 2**64 - 1) + b"{}",
              *(struct.pack("<Q", len(text)) + text for text in [b"[]", b"[" * 10**5, b"\xff" * 10, HUGE])]
OTHER_PLACES = ["c.safetensors", "../model/a.safetensors", "/etc/passwd", "..", "", "a.bin", "a.safetensors/",
                "a\0.safetensors", "\ud800.safetensors", "config.json", "x" * 10**5, 1, None, []]
WIDE = torch.ones(32, 8)

@pytest.mark.parametrize("change, what, words", [
    *((write, {name: None}, [name]) for name in ["config.json", WEIGHTS]),
    *((write, {"config.json": text}, ["config.json"]) for text in [*NO_JSON, b"{}", b'{"model_type": "falcon_mamba"}']),
    *((config, {"model_type": kind}, ["'falcon_mamba' with 'silu'"]) for kind in [
        "mamba", "", None, ["falcon_mamba"], "a\nb", "x" * 10**5, ...]),
    *((config, {name: ...}, ["config.json"]) for name in ["vocab_size", "hidden_size", "num_hidden_layers"]),
    (config, {"hidden_act": "gelu"}, ["'falcon_mamba' with 'gelu'"]),
    (config, {"num_hidden_layers": 1025}, ["num_hidden_layers", 1025, 1024]),
    (config, {"num_hidden_layers": 200}, ["Missing", "backbone.layers.2."]),
    (config, {"intermediate_size": ..., "expand": 16}, ["[16, 3]", "[128, 3]"]),
    (config, {"hidden_size": 2**20, "intermediate_size": 2**20}, ["1048576", "257, 8"]),
    (config, {"quantization_config": {"load_in_4bit": True}}, ["quantised", "load the unquantised"]),
    (config, {"tie_word_embeddings": True}, [HEAD, EMBEDDINGS, "tie_word_embeddings"]),
    *((write, {WEIGHTS: content}, ["pickle", WEIGHTS]) for content in NO_TENSORS),
    (tensors, {IN_PROJ: ...}, [IN_PROJ, "Missing"]),
    (tensors, {"a\nTraceback \x1b[31m" + "b" * 10**4: WIDE}, ["Unexpected"]),
    (tensors, {IN_PROJ: WIDE.T.contiguous()}, [IN_PROJ, "[8, 32]", "[32, 8]"]),
    *((tensors, {IN_PROJ: WIDE.to(dtype)}, [IN_PROJ, dtype, "quantised"]) for dtype in [
        torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]),
    *((shards, {EMBEDDINGS: place}, [WEIGHTS]) for place in OTHER_PLACES),
    *((index, text, [WEIGHTS]) for text in [
        *NO_JSON, b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": "config.json"}}'])])
def test_a_folder_that_is_no_whole_checkpoint_is_refused_in_a_sentence(folder, change, what, words):
    change(folder, what)
    assert_refused(folder, *words)

ABSURD = {int: [-1, 2**40, 10**400, 1.5, NAN, "8", "", True, [-8], [8, "8"], [[8]], {}],
          float: [-1, 1, NAN, INF, 10**400, "1e-5", True, [1e-5], {}],
          bool: [0, "true", "", NAN, [], {}, 1.0]}

@pytest.mark.parametrize("f", fields(MambaConfig), ids=lambda f: f.name)
def test_an_absurd_value_in_config_json_is_refused_by_its_published_name(folder, f):
    name = PUBLISHED.get(f.name, f.name)
    for value in ABSURD[f.type]:
        config(folder, {name: value})
        assert_refused(folder, name)

@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user/model", "a\0b", "model\udcff", "../../a/b/c",
                                  "no-such-folder", "README.md", "nobody/nothing"])
def test_a_name_that_is_no_folder_is_a_sentence_whatever_the_hub_says(monkeypatch, name):
    assert_refused(name, "python train.py")

    def download(*args, **kwargs):
        raise RuntimeError("404\nRepository\tnot found\n\n" + "x" * 9999)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_refused(name, "python train.py", "404 Repository not found")

def test_shards_load_to_the_same_model_each_tensor_from_the_file_that_the_index_names(folder):
    before = logits(Mamba.from_pretrained(folder))
    shards(folder, {})
    first, second = (load_file(folder / name) for name in ("a.safetensors", "b.safetensors"))
    save_file(first | {k: v + 1 for k, v in second.items()}, folder / "a.safetensors")
    save_file(second | {k: v + 1 for k, v in first.items()}, folder / "b.safetensors")
    assert torch.equal(logits(Mamba.from_pretrained(folder)), before)
    model(seed=1).save_pretrained(folder)       # over the shards, and instead of them
    assert torch.equal(logits(Mamba.from_pretrained(folder)), logits(model(seed=1)))

def test_weights_in_float64_become_fp32(folder):
    tensors(folder, {k: v.double() for k, v in load_file(folder / WEIGHTS).items()})
    again = Mamba.from_pretrained(str(folder))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(logits(again), logits(model()))

@pytest.mark.parametrize("stored", [[EMBEDDINGS], [EMBEDDINGS, HEAD]])
def test_a_config_that_does_not_say_so_ties_the_embeddings_as_the_reference_does(folder, stored):
    config(folder, {"tie_word_embeddings": ...})
    tensors(folder, {HEAD: ...} | {name: torch.ones(257, 8) for name in stored})
    again = Mamba.from_pretrained(folder)
    assert again.lm_head.weight is again.backbone.embeddings.weight
    assert (again.lm_head.weight == 1).all()

@pytest.mark.parametrize("ids", [(None, None, None), (8, [11, 10], 11), (0, 11, None), (None, [256], 0)])
def test_the_ids_of_config_json_are_saved_as_they_were_read_and_the_dtype_as_it_is(folder, ids):
    names = ["bos_token_id", "eos_token_id", "pad_token_id"]
    config(folder, dict(zip(names, ids)) | {"dtype": "float16", "torch_dtype": "float16"})
    Mamba.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert [saved[name] for name in [*names, "dtype"]] == [*ids, "bfloat16"]

def test_a_full_disk_or_a_place_that_is_no_folder_leaves_the_old_checkpoint_whole_and_no_new_one(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for place in folder, tmp_path / "new", folder / "config.json", folder / "config.json" / "sub":
        with pytest.raises(OSError) as error, largest_file(4000):
            model(seed=1).save_pretrained(place)
        assert_plain(str(error.value), place)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not [*(tmp_path / "new").iterdir()]

@pytest.mark.parametrize("sizes", [{}, {"d_state": 5}])
@pytest.mark.parametrize("move", [1, 2])
def test_a_save_that_is_killed_leaves_one_whole_checkpoint_or_a_sentence(folder, monkeypatch, sizes, move):
    new = model(seed=1, **sizes)
    whole = [logits(each) for each in (Mamba.from_pretrained(folder), new)]
    moves = [os.replace] * (move - 1)

    def replace_or_die(*args):
        moves.pop()(*args)      # IndexError at the last, as if killed: no cleaning up
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(os, "replace", replace_or_die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        new.save_pretrained(folder)
    if sizes and move == 2:
        assert_refused(folder)
    else:
        left = logits(Mamba.from_pretrained(folder))
        assert any(torch.equal(left, each) for each in whole)
    new.save_pretrained(folder)                 # and the next save clears it all up
    assert torch.equal(logits(Mamba.from_pretrained(folder)), whole[1])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]
    assert (folder / WEIGHTS).stat().st_mode == (folder / "config.json").stat().st_mode
