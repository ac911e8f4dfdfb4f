"""Weights in four bits, 16-bit products without units for them, and code that is compiled anew."""
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import python

import mamba
import sample
from mamba import Int4Linear, Linear, Mamba, block_size, unpack
from test_bad_checkpoint import model, shards

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}

def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()

small = partial(model, d_model=64)

def unpacked(layer):
    """A layer's weight as float64, by unpack, or by the kernel itself where that packs otherwise."""
    if block_size():
        return unpack(layer.packed, layer.levels, block_size())[:layer.out_features].double()
    return layer(torch.eye(2 * layer.packed.shape[1])).T.double()

@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 64), (257, 96), (1100, 128)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_four_bits_lose_eight_per_cent_of_normal_weights_and_the_product_is_that_of_what_is_left(size, dtype):
    weight, bias = torch.randn(size), torch.randn(size[0])
    layer = Int4Linear(weight, bias)
    left = unpacked(layer)
    assert 0.07 < error(left, weight.double()) < 0.085
    assert layer.packed.nbytes + layer.levels.nbytes <= 5 / 8 * weight.numel() * 1.5   # padded rows
    for tokens in 1, 3, 95, 96, 200:
        x = torch.randn(tokens, size[1]).to(dtype)
        y = layer(x[None])
        assert y.dtype == dtype and y.shape == (1, tokens, size[0])
        kernel_rounds_to_bf16 = tokens < Int4Linear.UNPACK_FROM
        tolerance = TOLERANCE[torch.bfloat16 if kernel_rounds_to_bf16 else dtype]
        assert error(y[0], x.double() @ left.T + bias.double()) < tolerance

@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_cpus_pack_otherwise_and_multiply_the_same(capability):
    """PyTorch reads the variable when it starts. A CPU that lacks one takes what it has."""
    code = ("import torch; from mamba import Int4Linear; torch.manual_seed(0); "
            "w = torch.randn(192, 64); x = torch.randn(200, 64); y = Int4Linear(w, None)(x); "
            "print(((y - x @ w.T).norm() / (x @ w.T).norm()).item())")
    done = python(code, ATEN_CPU_CAPABILITY=capability)
    assert 0.07 < float(done.stdout) < 0.085, done.stderr

@torch.no_grad()
def test_equal_weights_and_nan_are_kept():
    layer = Int4Linear(torch.full((64, 64), 0.1), None)
    assert error(layer(torch.ones(1, 64)), torch.full((1, 64), 6.4).double()) < 5e-3
    weight = torch.randn(64, 64)
    weight[3, 5] = torch.nan
    assert Int4Linear(weight, None)(torch.ones(1, 64)).isnan().nonzero().tolist() == [[0, 3]]

@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"bias": True}])
def test_a_model_in_shards_loads_in_four_bits_and_is_near_its_own(tmp_path, changes):
    whole = small(**changes)
    whole.save_pretrained(tmp_path)
    shards(tmp_path, {})
    four = Mamba.from_pretrained(tmp_path, quantize=True)
    layers = [module for module in four.modules() if isinstance(module, Int4Linear)]
    tied = "tie_embeddings" in changes
    assert len(layers) == 3 * 2 + (not tied)            # the embeddings, and a tied head, stay
    for name in "A_log", "D", "conv1d.weight", "dt_proj.weight", "dt_proj.bias":
        assert torch.equal(four.get_parameter(f"backbone.layers.1.mixer.{name}"),
                           whole.get_parameter(f"backbone.layers.1.mixer.{name}"))
    x = torch.randint(257, (2, 150))
    own = whole(x)[0].double()
    assert 1e-3 < error(four(x)[0], own) < 0.3
    assert len([*sample.generate(four, x, 5, 0)]) == 5
    with pytest.raises(ValueError, match="4 bits"):
        four.save_pretrained(tmp_path / "again")

def test_each_weight_is_let_go_before_the_next_is_read(tmp_path, monkeypatch):
    """Or a model in 4 bits would first need the memory of the whole one."""
    given = []

    class Spy(Int4Linear):
        def __init__(self, weight, bias):
            assert all(former() is None for former in given)
            given.append(weakref.ref(weight.untyped_storage()))
            super().__init__(weight.clone(), bias)
    monkeypatch.setattr(mamba, "Int4Linear", Spy)
    small().save_pretrained(tmp_path)
    Mamba.from_pretrained(tmp_path, quantize=True)
    assert len(given) == 3 * 2 + 1

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [100, 1100])
def test_a_cpu_without_units_multiplies_the_widened_weight_but_not_in_training(monkeypatch, dtype, out):
    """The backward would keep a wide copy of each weight."""
    layer = Linear(40, out).to(dtype)
    x = torch.randn(2, 20, 40).to(dtype)
    own = layer(x)
    monkeypatch.setattr(mamba, "NO_UNITS", [dtype])
    assert torch.equal(layer(x), own)
    with torch.no_grad():       # exact but for one rounding at the end: what fp32 gives, rounded
        wide = F.linear(x.float(), layer.weight.float(), layer.bias.float()).to(dtype)
        assert torch.equal(layer(x), wide)

@torch.no_grad()
def test_models_of_other_sizes_in_one_process_are_compiled_anew(graphs):
    """Also where only a constant differs. All layers of a model share one compiled block."""
    models = [small(), small(d_model=32), small(mixer_norm_eps=1e-1), small(d_inner=96), small()]
    prompt = torch.tensor([[1, 2, 3]])
    expected = [torch.stack([*sample.generate(m, prompt, 6, 0)]) for m in models]
    sample.compile_blocks()
    for model, tokens in zip(models, expected):
        assert torch.equal(torch.stack([*sample.generate(model, prompt, 6, 0)]), tokens)
    assert len(graphs) == 4
