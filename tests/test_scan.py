"""All scans are one recurrence: against a float64 loop written here, in values and every gradient."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from scan import selective_scan

BACKENDS = ["auto", "naive", "parallel", "chunked"]


def inputs(seed, b, l, d, n, step=0.0, resets=0.0):
    """Random arguments. `step` shifts dt: -12 makes steps of 1e-5, 4 steps of 4, which forget nearly all."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    return dict(x=rand(b, l, d), dt=rand(b, l, d) + step, A=-torch.exp(rand(d, n)), B=rand(b, l, n),
                C=rand(b, l, n), D=rand(d), z=rand(b, l, d), dt_bias=rand(d), h0=rand(b, d, n),
                reset=torch.rand(b, l, generator=g) < resets)


def loop(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    """The definition in float64, one number at a time in spirit: no shared code with scan.py."""
    delta, h, ys = torch.log1p(torch.exp(dt + dt_bias)), h0, []
    for t in range(x.shape[1]):
        h = torch.where(reset[:, t, None, None], 0.0, h)
        h = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A)) * h + torch.einsum(
            "bd,bn->bdn", delta[:, t] * x[:, t], B[:, t])
        ys.append((torch.einsum("bdn,bn->bd", h, C[:, t]) + D * x[:, t]) * z[:, t] * torch.sigmoid(z[:, t]))
    return torch.stack(ys, 1), h


def with_gradients(scan, args, **options):
    """y, h and the gradient of a random mix of both to every float argument."""
    leaves = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in args.items()}
    y, h = scan(**leaves, **options)
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(v.shape, generator=g).to(v.dtype) for v in (y, h)]
    mix = (y * weights[0]).sum() + (h * weights[1]).sum()
    floats = [v for v in leaves.values() if v.is_floating_point()]
    return dict(zip(["y", "h", *[k for k, v in leaves.items() if v.is_floating_point()]],
                    [y.detach(), h.detach(), *torch.autograd.grad(mix, floats)]))


def close(ours, exact, tolerance):
    for name, value in ours.items():
        # These two gradients are sums over all steps: where the terms cancel, only as exact as they are.
        terms = {"dt_bias": "dt", "D": "y"}.get(name, name)
        scale = max(exact[name].abs().max(), exact[terms].abs().max()).clamp(min=1e-3)
        assert (value.double() - exact[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6),
       st.sampled_from([-12.0, -3.0, 0.0, 4.0]), st.sampled_from([0.0, 0.2, 1.0]))
def test_every_scan_is_the_float64_loop_in_values_and_all_gradients(backend, seed, b, l, d, n, step, resets):
    args = inputs(seed, b, l, d, n, step, resets)
    exact = with_gradients(loop, {k: v.double() if v.is_floating_point() else v for k, v in args.items()})
    close(with_gradients(selective_scan, args, backend=backend), exact, 3e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs_lose_only_their_own_rounding(backend, dtype, tolerance):
    args = inputs(1, 2, 37, 4, 3, resets=0.1)
    args |= {k: args[k].to(dtype) for k in ("x", "dt", "B", "C", "z")}
    exact = with_gradients(loop, {k: v.double() if v.is_floating_point() else v for k, v in args.items()})
    ours = with_gradients(selective_scan, args, backend=backend)
    assert ours["y"].dtype == dtype and ours["h"].dtype == torch.float32
    close(ours, exact, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 13, 16, 39])
def test_splitting_the_sequence_changes_nothing(backend, cut):
    args = inputs(2, 2, 40, 3, 4, resets=0.05)
    y, h = selective_scan(**args, backend=backend)
    timed = ("x", "dt", "B", "C", "z", "reset")
    first = args | {k: args[k][:, :cut] for k in timed}
    y1, h1 = selective_scan(**first, backend=backend)
    y2, h2 = selective_scan(**(args | {k: args[k][:, cut:] for k in timed} | {"h0": h1}), backend=backend)
    assert_close(torch.cat([y1, y2], 1), y, rtol=1e-5, atol=1e-5)
    assert_close(h2, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_future_cannot_change_the_past(backend):
    args = inputs(3, 2, 40, 3, 4)
    other = {k: v.clone() for k, v in args.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name][:, 23:] += 1
    assert torch.equal(selective_scan(**args, backend=backend)[0][:, :23],
                       selective_scan(**other, backend=backend)[0][:, :23])


@pytest.mark.parametrize("fading", [1, 1e-40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_passes_a_reset(backend, fading):
    args = inputs(4, 1, 30, 3, 4)
    args["A"] = args["A"] * fading
    args["reset"][:, 17] = True
    y, h = selective_scan(**args, backend=backend)
    tail = args | {k: args[k][:, 17:] for k in ("x", "dt", "B", "C", "z")} | {"h0": None, "reset": None}
    y2, h2 = selective_scan(**tail, backend=backend)
    assert_close(y[:, 17:], y2, rtol=1e-6, atol=1e-6)
    assert_close(h, h2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "h0", "reset"])
def test_a_wrong_shape_is_named_with_both_shapes(name):
    args = inputs(6, 2, 5, 3, 4)
    args[name] = torch.cat([args[name], args[name]])
    with pytest.raises(ValueError, match=name if name != "A" else "A|dt"):
        selective_scan(**args)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'quick' is none of auto"):
        selective_scan(**inputs(7, 1, 2, 1, 1), backend="quick")


def test_training_never_holds_a_state_for_every_step():
    saved = {}
    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    args = inputs(8, 1, 512, 64, 16)
    for value in args.values():
        value.requires_grad_(value.is_floating_point())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**args)
    assert sum(saved.values()) < 0.6 * 4 * 512 * 64 * 16     # naive and parallel: several times 4 l d n bytes


def test_whole_numbers_are_refused():
    """y would have to be rounded to them."""
    x, B = torch.ones(1, 4, 2, dtype=torch.int64), torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="of floats .* of torch.int64"):
        selective_scan(x, x, -torch.rand(2, 3), B, B)


def test_a_reset_of_numbers_is_refused():
    """Taken as indices it would be silently wrong."""
    x, B = torch.randn(1, 4, 2), torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="int64, but must be torch.bool"):
        selective_scan(x, x, -torch.rand(2, 3), B, B, reset=torch.zeros(1, 4, dtype=torch.int64))
