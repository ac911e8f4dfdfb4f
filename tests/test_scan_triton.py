"""The Triton scan against the float64 loop of test_scan.py, which has more tests that all scans share.

Without a GPU the kernels run in Triton's interpreter, one Python step for each GPU step, so all shapes are tiny.
With one, the same tests run compiled. Where an emulator stands beside the repository, test_scan_triton_compile.py
runs some of them compiled without a GPU. Errors are relative to the largest value compared.
"""
import re
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import python
from hypothesis import Phase, example, given, settings, strategies as some
from torch.utils.checkpoint import checkpoint

import scan_triton
from scan import selective_scan as any_scan
from test_scan import TOLERANCE, assert_exact, double, inputs, loop, with_gradients

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
COMPILED = GPU or "ptxemu" in sys.modules                         # that is the emulator
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")           # as the operators take them
IN_TIME = ("x", "dt", "B", "C", "z")
selective_scan = partial(any_scan, backend="triton")
results = partial(with_gradients, selective_scan)
check = partial(assert_exact, backend="triton")

def problem(b, l, d, n, seed=0, resets=0.0, dtype=torch.float32, without=()):
    """Random arguments; x, dt, z, B and C in `dtype`."""
    p = {k: v.to(DEVICE) for k, v in inputs(seed, b, l, d, n, resets=resets).items() if k not in without}
    return p | {k: p[k].to(dtype) for k in IN_TIME if k in p}

def to_bfloat16(p):
    return {k: v.bfloat16() if v.is_floating_point() else v for k, v in p.items()}

@pytest.fixture(autouse=True)
def short_chunks(monkeypatch, request):
    """Chunks of two blocks, or these shapes would have one chunk."""
    if "longer" not in request.node.name:
        monkeypatch.setattr(scan_triton, "CHUNK", 8)

def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)

def error(value, exact):
    return (value.double() - exact).abs().max() / exact.abs().max()

@settings(deadline=None, derandomize=True, max_examples=12,
          phases=[Phase.explicit, Phase.generate])                # to shrink takes minutes
@example(b=2, l=9, d=3, n=2, seed=0, resets=0.3, dtype=torch.bfloat16, without={"D", "z", "dt_bias", "h0"})
@given(b=some.integers(1, 2), l=some.integers(1, 20), d=some.integers(1, 40), n=some.integers(1, 6),
       seed=some.integers(0, 999), resets=some.sampled_from([0.0, 0.3, 1.0]),
       dtype=some.sampled_from(list(TOLERANCE)),
       without=some.sets(some.sampled_from(["D", "z", "dt_bias", "h0", "reset"]), max_size=2))
def test_values_and_gradients_are_the_float64_loops(b, l, d, n, seed, resets, dtype, without):
    check(problem(b, l, d, n, seed, resets, dtype, without))

@pytest.mark.parametrize("places", [[0], [11], [3], [4], [7, 8], list(range(12))], ids=str)
def test_a_document_may_start_at_any_step_of_a_chunk(places):
    p = problem(1, 12, 2, 2)
    p["reset"][:, places] = True
    check(p)

@pytest.mark.parametrize("shift", [-30.0, -8.0, 30.0])
def test_tiny_and_huge_steps_keep_their_digits(shift):
    p = problem(1, 10, 2, 3)
    check(p | {"dt": p["dt"] + shift})

def test_two_runs_give_the_same_bits():
    p = problem(1, 9, 35, 3)
    assert same(results(p), results(p))

def test_the_backward_in_groups_of_chunks_is_the_backward(monkeypatch):
    monkeypatch.setattr(scan_triton, "SCRATCH", 1)                # one chunk at a time
    check(problem(2, 25, 35, 2, resets=0.2))

def columns(v):
    """The same values, in memory the other way round, or every second one."""
    if v.dim() == 1:
        return v.repeat_interleave(2)[::2]
    return v.transpose(0, -1).contiguous().transpose(0, -1)

def test_strides_of_inputs_and_gradients_change_nothing():
    p = problem(2, 10, 4, 2)
    xz = torch.cat([p["x"], p["z"]], 2)
    rest = torch.cat([p["dt"], p["B"], p["C"]], 2)
    slices = p | dict(x=xz[..., :4], z=xz[..., 4:], dt=rest[..., :4], B=rest[..., 4:6], C=rest[..., 6:])
    for turned in slices, {k: columns(v) for k, v in p.items()}:
        assert same(results(p), results(turned))
    floats = [v.requires_grad_() for v in p.values() if v.is_floating_point()]
    y, h = selective_scan(**p)
    grads = []
    for change in (torch.clone, columns, lambda v: v[:1, :1, :1].expand_as(v)):
        ones = change(torch.ones_like(y)), change(torch.ones_like(h))
        grads.append(torch.autograd.grad((y, h), floats, ones, retain_graph=True))
    for plain, *others in zip(*grads):
        assert all(torch.equal(plain, other) for other in others)

def test_one_step_of_any_strides_is_read_right():
    p = problem(3, 1, 4, 2)
    turned = {k: p[k].flatten(1)[..., None].mT for k in ("x", "dt", "z")}       # as a convolution's output lies
    assert turned["x"].is_contiguous() and turned["x"].stride() == (4, 1, 1)
    assert same(results(p), results(p | turned))
    plain, other = p["h0"].clone(), p["h0"].clone()                # decoding, which takes another operator
    y = scan_triton.step(plain, *(p[k] for k in NAMES))
    assert torch.equal(y, scan_triton.step(other, *(columns(p[k]) for k in NAMES))) and torch.equal(plain, other)

@pytest.mark.parametrize("used", ["y", "h", "y and h"])
@pytest.mark.parametrize("wanted", [["h0"], ["A"], ["z", "dt_bias"], ["h0", *NAMES]], ids=str)
def test_a_gradient_is_right_whatever_else_needs_none(wanted, used):
    ours = problem(1, 9, 3, 2)
    exact = double(ours)
    for scan, p in (selective_scan, ours), (loop, exact):
        for k in wanted:
            p[k].requires_grad_()
        y, h = scan(**p)
        loss = ("y" in used) * y.sum() + ("h" in used) * h.sum()
        loss.backward()
    for k in ours:
        assert (ours[k].grad is not None) == (k in wanted)
        if k in wanted:
            near = 1e-5 * exact[k].grad.abs().max().clamp(min=1e-3)
            assert (ours[k].grad - exact[k].grad).abs().max() <= near

def test_every_input_may_be_in_16_bits():
    check(to_bfloat16(problem(1, 9, 3, 2)))
    p = to_bfloat16(problem(1, 1, 3, 2))
    state = p["h0"].float()
    y = scan_triton.step(state, *(p[k] for k in NAMES))
    y_exact, h_exact = loop(**double(p))
    assert error(y, y_exact) <= 8e-3 and error(state, h_exact) <= 1e-5

def test_a_second_derivative_is_refused_in_a_sentence():
    p = problem(1, 3, 2, 2)
    p["x"].requires_grad_()
    dx, = torch.autograd.grad(selective_scan(**p)[0].sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backward through falcon_mamba.* no autograd formula"):
        dx.sum().backward()

def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext(devices.append(tensor.device)))
    p = problem(1, 5, 2, 2)
    results(p)
    assert devices == [p["x"].device] * 6       # three kernels forward, three backward

def test_memory_that_was_never_written_is_never_read(monkeypatch):
    def poisoned(real):
        def empty(*args, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t
        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    check(problem(2, 11, 33, 3, resets=0.2))

def test_a_sequence_of_nan_stays_alone_in_its_batch():
    p = problem(2, 9, 2, 2)
    for k in IN_TIME:
        p[k][1] = float("nan")
    got = results(p)
    assert not any(got[k][0].isnan().any() for k in ("y", "h", "x", "dt", "B", "C", "z", "h0"))

@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_token_is_a_scan_of_one_step(dtype):
    for z in {}, {"z": None}:
        p = problem(2, 1, 35, 3, dtype=dtype, without={"reset"}) | z
        inputs = [p[k] for k in NAMES]
        h = p["h0"].clone()
        y = scan_triton.step(h, *inputs)
        y_scan, h_scan = selective_scan(**p)
        assert error(h, h_scan) <= 1e-6 and error(y, y_scan) <= TOLERANCE[dtype]
    with pytest.raises(ValueError, match="fp32 and contiguous"):
        scan_triton.step(h.half(), *inputs)

def test_the_operators_are_good_citizens():
    p = problem(1, 9, 3, 2, resets=0.2)
    inputs = [p[k] for k in NAMES]
    plain = [p["h0"].mT, *inputs[:2], p["A"].mT, *inputs[3:], p["reset"]]
    whole = [v.clone().requires_grad_(v.is_floating_point()) for v in plain]
    torch.library.opcheck(scan_triton.scan, whole)
    y, h, start = scan_triton.scan(*plain)
    torch.library.opcheck(scan_triton.scan_backward, (y, h, start, *plain[1:]))
    torch.library.opcheck(scan_triton.step, (p["h0"], *(p[k][:, :1] if k in IN_TIME else p[k] for k in NAMES)))

def test_torch_compile_and_checkpointing_go_around_it_without_a_break():
    def checkpointed(**p):
        return checkpoint(lambda: selective_scan(**p), use_reentrant=False)

    compiled = torch.compile(lambda **p: selective_scan(**p), fullgraph=True, dynamic=True,
                             backend="aot_eager")
    for b, l in ((2, 5), (3, 13)):                    # one compilation for both; the last in two chunks
        p = problem(b, l, 3, 2, resets=0.2)
        for scan in (checkpointed, compiled):
            assert same(results(p), with_gradients(scan, p))

@pytest.mark.parametrize("code, said", [
    ("import scan, torch; x = torch.ones(1, 2, 3)\n"
     "try: scan.selective_scan(x, x, -torch.ones(3, 2), x[..., :2], x[..., :2], backend='triton')\n"
     "except ValueError as e: print(e)", "needs CUDA tensors.* on cpu.* TRITON_INTERPRET=1"),
    ("import sys; sys.modules['triton'] = None\n"
     "try: import scan_triton\nexcept ImportError as e: print(e)", "pip install triton"),
    ("import runpy, sys; sys.modules['triton'] = None\n"
     "try: runpy.run_path('scan_triton.py', run_name='__main__')\n"
     "except SystemExit as e: print(e)", "pip install triton")], ids=["CPU", "import", "report"])
def test_what_is_missing_is_told_in_a_sentence(code, said):
    done = python(code)
    assert re.search(said, done.stdout) and done.stdout.count("\n") == 1

@pytest.mark.skipif(GPU, reason="with a GPU the kernels are compiled, and the report runs")
def test_in_the_interpreter_the_report_says_what_to_unset():
    import triton_report
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        triton_report.main()

@pytest.mark.skipif(not COMPILED, reason="takes minutes in Triton's interpreter")
def test_longer_sequences_in_chunks_of_128_steps():
    check(problem(1, 600, 96, 16, resets=0.01, dtype=torch.bfloat16))

@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU: its graphs have no interpreter")
def test_a_replayed_graph_decodes_as_eager_does():
    p = problem(2, 1, 256, 16, dtype=torch.bfloat16)
    state, eager, inputs = p["h0"].clone(), p["h0"].clone(), [p[k] for k in NAMES]
    scan_triton.step(torch.empty_like(state), *inputs)              # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan_triton.step(state, *inputs)
    for token in range(4):
        p["x"].copy_(torch.randn(p["x"].shape))
        graph.replay()
        assert torch.equal(y, scan_triton.step(eager, *inputs)) and torch.equal(state, eager)
