"""All scans are one recurrence: against a float64 loop written here, in values and every gradient.

Triton's runs in its interpreter here, in chunks of 8 steps. More of it is in test_scan_triton.py.
"""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from scan import selective_scan

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU Triton's scan takes CUDA tensors")
PYTORCH = ["naive", "parallel", "chunked"]
every_backend = pytest.mark.parametrize("backend", [*PYTORCH, pytest.param("triton", marks=interpreted)])
TIMED = ["x", "dt", "B", "C", "z", "reset"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}    # in 16 bits: the last bit

@pytest.fixture(autouse=True)
def short_chunks(request, monkeypatch):
    if "triton" in request.node.name:
        monkeypatch.setattr(pytest.importorskip("scan_triton"), "CHUNK", 8)

def inputs(seed, b, l, d, n, step=0.0, resets=0.0):
    """Random arguments. `step` shifts dt: -12 makes steps of 1e-5, 4 steps of 4, which forget nearly all."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)
    return dict(x=draw(b, l, d), dt=draw(b, l, d) + step, A=-torch.exp(draw(d, n)), B=draw(b, l, n),
                C=draw(b, l, n), D=draw(d), z=draw(b, l, d), dt_bias=draw(d), h0=draw(b, d, n),
                reset=torch.rand(b, l, generator=g) < resets)

def part(args, steps):
    return args | {name: args[name][:, steps] for name in TIMED}

def loop(x, dt, A, B, C, D=0.0, z=None, dt_bias=0.0, h0=None, reset=None):
    """The definition, one step after the other, for float64. It shares no code with the scans."""
    delta = torch.log1p(torch.exp(dt + dt_bias))
    h = x.new_zeros(len(x), *A.shape) if h0 is None else h0
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0.0, h)
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A))
        h = decay * h + torch.einsum("bd,bn->bdn", delta[:, t] * x[:, t], B[:, t])
        y = torch.einsum("bdn,bn->bd", h, C[:, t]) + D * x[:, t]
        ys.append(y if z is None else y * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h

def with_gradients(scan, args, **options):
    """y, h and the gradient of a random mix of both to every float argument."""
    leaves = {k: v.detach().requires_grad_() for k, v in args.items() if v.is_floating_point()}
    y, h = scan(**args | leaves, **options)
    g = torch.Generator().manual_seed(0)
    dy, dh = (torch.randn(v.shape, generator=g).bfloat16().to(h) for v in (y, h))       # exact in any dtype
    gradients = torch.autograd.grad((y * dy).sum() + (h * dh).sum(), [*leaves.values()])
    return {"y": y.detach(), "h": h.detach()} | dict(zip(leaves, gradients))

def double(args):
    return {k: v.double() if v.is_floating_point() else v for k, v in args.items()}

def assert_exact(args, fp32=1e-5, **options):
    """As the loop is in float64, relative to each result's largest value."""
    tolerance = TOLERANCE | {torch.float32: fp32}
    exact = with_gradients(loop, double(args))
    dtypes = {k: v.dtype for k, v in args.items()} | {"y": args["x"].dtype, "h": torch.float32}
    for name, value in with_gradients(selective_scan, args, **options).items():
        assert value.dtype == dtypes[name] and value.shape == exact[name].shape
        # These two gradients are sums over all steps: where the terms cancel, only as exact as they are.
        terms = {"dt_bias": "dt", "D": "y"}.get(name, name)
        scale = max(exact[name].abs().max(), exact[terms].abs().max()).clamp(min=1e-3)
        assert (value.double() - exact[name]).abs().max() <= tolerance[value.dtype] * scale, name

@pytest.mark.parametrize("backend", PYTORCH)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6),
       st.sampled_from([-12.0, -3.0, 0.0, 4.0]), st.sampled_from([0.0, 0.2, 1.0]))
def test_every_scan_is_the_float64_loop_in_values_and_all_gradients(backend, seed, b, l, d, n, step, resets):
    assert_exact(inputs(seed, b, l, d, n, step, resets), fp32=3e-5, backend=backend)

@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_only_their_own_rounding(backend, dtype):
    args = inputs(1, 2, 37, 4, 3, resets=0.1)
    assert_exact(args | {k: args[k].to(dtype) for k in TIMED[:-1]}, backend=backend)

@every_backend
@pytest.mark.parametrize("cut", [1, 13, 16, 39])
def test_splitting_the_sequence_changes_nothing(backend, cut):
    args = inputs(2, 2, 40, 3, 4, resets=0.05)
    y, h = selective_scan(**args, backend=backend)
    y1, h1 = selective_scan(**part(args, slice(cut)), backend=backend)
    y2, h2 = selective_scan(**part(args, slice(cut, None)) | {"h0": h1}, backend=backend)
    assert_close(torch.cat([y1, y2], 1), y, rtol=1e-5, atol=1e-5)
    assert_close(h2, h, rtol=1e-5, atol=1e-5)

@every_backend
def test_the_future_cannot_change_the_past(backend):
    args = inputs(3, 2, 40, 3, 4)
    other = {k: v.clone() for k, v in args.items()}
    for name in TIMED[:-1]:
        other[name][:, 23:] += 1
    y, _ = selective_scan(**args, backend=backend)
    y2, _ = selective_scan(**other, backend=backend)
    assert torch.equal(y[:, :23], y2[:, :23])

@every_backend
@pytest.mark.parametrize("fading", [1, 1e-40, 0])
def test_nothing_passes_a_reset(backend, fading):
    args = inputs(4, 1, 30, 3, 4)
    args["A"] = args["A"] * fading
    args["reset"][:, 17] = True
    y, h = selective_scan(**args, backend=backend)
    y2, h2 = selective_scan(**part(args, slice(17, None)) | {"h0": None, "reset": None}, backend=backend)
    assert_close(y[:, 17:], y2, rtol=1e-6, atol=1e-6)
    assert_close(h, h2, rtol=1e-6, atol=1e-6)

@every_backend
def test_autocast_leaves_the_arithmetic_in_fp32(backend):
    args = inputs(6, 2, 40, 4, 3, resets=0.1)
    plain = selective_scan(**args, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, exact in zip(selective_scan(**args, backend=backend), plain):
            assert torch.equal(ours, exact)
    y, h = selective_scan(**{k: v.to("meta") for k, v in args.items()}, backend=backend)    # has no autocast
    assert y.shape == (2, 40, 4) and h.shape == (2, 4, 3)

def test_options_left_out_are_neutral():
    args = inputs(5, 2, 20, 3, 4)
    bare = {k: args[k] for k in ("x", "dt", "A", "B", "C")}
    full = bare | dict(D=torch.zeros(3), dt_bias=torch.zeros(3), h0=torch.zeros(2, 3, 4),
                       reset=torch.zeros(2, 20, dtype=torch.bool))
    assert_close(selective_scan(**bare), selective_scan(**full))

def test_training_never_holds_a_state_for_every_step():
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    args = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs(8, 1, 512, 64, 16).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**args)
    assert sum(saved.values()) < 0.6 * 4 * 512 * 64 * 16     # naive and parallel: several times 4 l d n bytes

@pytest.mark.parametrize("name", inputs(0, 1, 1, 1, 1))
@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_what_does_not_fit_is_named_with_what_it_is_and_what_it_must_be(name, kind):
    """A complex A would lose its imaginary part, a reset of numbers would be taken for indices."""
    args = inputs(6, 2, 5, 3, 4)
    with pytest.raises(ValueError, match=rf"{name} is \[.*\] of {kind}, but must be \[.*\] of"):
        selective_scan(**args | {name: args[name].to(kind)})
    with pytest.raises(ValueError, match=r"is \[.*\] of torch.*, but must be \["):
        selective_scan(**args | {name: args[name][..., :-1]})
    with pytest.raises(ValueError, match="'quick' is none of auto"):
        selective_scan(**args, backend="quick")
