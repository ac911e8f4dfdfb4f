"""The Triton scan against the float64 loop of test_scan.py, which has more tests that all scans share.

Without a GPU the kernels run in Triton's interpreter, one Python step for each GPU step, so all shapes are tiny.
With one, the same tests run compiled. Where an emulator stands beside the repository, test_scan_triton_compile.py
runs some of them compiled without a GPU. Errors are relative to the largest value compared.
"""
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings, strategies as some

import scan_triton
from scan import selective_scan as any_scan
from test_scan import loop

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
COMPILED = GPU or "ptxemu" in sys.modules                         # that is the emulator
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}    # in 16 bits: the last bit
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")           # as the operators take them
IN_TIME = ("x", "dt", "B", "C", "z")
selective_scan = partial(any_scan, backend="triton")

def problem(b, l, d, n, seed=0, dtype=torch.float32, without=()):
    """Random inputs that require gradients; x, dt, z, B and C in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    shapes = dict(x=(b, l, d), dt=(b, l, d), B=(b, l, n), C=(b, l, n), D=(d,), z=(b, l, d), dt_bias=(d,),
                  h0=(b, d, n))
    p = {k: torch.randn(s, generator=g) for k, s in shapes.items() if k not in without}
    p["A"] = -torch.rand(d, n, generator=g) * 4 - 0.01
    return {k: v.to(DEVICE, dtype if k in IN_TIME else torch.float32).requires_grad_() for k, v in p.items()}

def some_resets(b, l, seed=0, share=0.2):
    return (torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)

def resets_at(l, places):
    reset = torch.zeros(1, l, dtype=torch.bool, device=DEVICE)
    reset[:, places] = True
    return reset

def detached(p, change=lambda v: v):
    return {k: change(v.detach()) for k, v in p.items()}

def leaves(p, change=lambda v: v):
    return detached(p, lambda v: change(v).requires_grad_())

def first_token(p):
    return {k: v[:, :1] if k in IN_TIME else v for k, v in p.items()}

@pytest.fixture(autouse=True)
def short_chunks(monkeypatch, request):
    """Chunks of two blocks, or these shapes would have one chunk."""
    if "longer" not in request.node.name:
        monkeypatch.setattr(scan_triton, "CHUNK", 8)

def results(scan, p, reset=None, seed=0):
    """y, h and the gradients of a loss that weighs every y and every h."""
    g = torch.Generator().manual_seed(seed + 1)
    y, h = scan(**p, reset=reset)
    dy, dh = (torch.randn(t.shape, generator=g).bfloat16().to(DEVICE, h.dtype) for t in (y, h))  # exact
    grads = torch.autograd.grad((y.to(h.dtype) * dy).sum() + (h * dh).sum(), list(p.values()))
    return dict(y=y, h=h, **{"d" + k: v for k, v in zip(p, grads)})

def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)

def error(value, exact, scale=None):
    scale = exact.abs().max() if scale is None else scale
    return (value.double() - exact).abs().max() / scale.clamp(min=1e-6)

def check(p, reset=None, seed=0):
    ours = results(selective_scan, p, reset, seed)
    exact = results(loop, leaves(p, torch.Tensor.double), reset, seed)
    for name in exact:
        own = torch.float32
        if name == "y":
            own = p["x"].dtype
        elif name != "h":
            own = p[name[1:]].dtype
        assert ours[name].dtype == own and ours[name].shape == exact[name].shape
        # The sum of ddt may cancel: with one channel, 26 terms of 5 in all came to 0.02.
        scale = exact["ddt"].abs().sum((0, 1)).max() if name == "ddt_bias" else None
        assert error(ours[name], exact[name], scale) <= TOLERANCE[own], name

@settings(deadline=None, derandomize=True, max_examples=12,
          phases=[Phase.explicit, Phase.generate])                # to shrink takes minutes
@example(b=2, l=9, d=3, n=2, seed=0, resets=0.3, dtype=torch.bfloat16, without={"D", "z", "dt_bias", "h0"})
@given(b=some.integers(1, 2), l=some.integers(1, 20), d=some.integers(1, 40), n=some.integers(1, 6),
       seed=some.integers(0, 999), resets=some.sampled_from([None, 0.0, 0.3, 1.0]),
       dtype=some.sampled_from(list(TOLERANCE)),
       without=some.sets(some.sampled_from(["D", "z", "dt_bias", "h0"]), max_size=2))
def test_values_and_gradients_are_the_float64_loops(b, l, d, n, seed, resets, dtype, without):
    reset = None if resets is None else some_resets(b, l, seed, resets)
    check(problem(b, l, d, n, seed, dtype, without), reset, seed)

@pytest.mark.parametrize("places", [[0], [11], [3], [4], [7, 8], list(range(12))], ids=str)
def test_a_document_may_start_at_any_step_of_a_chunk(places):
    check(problem(1, 12, 2, 2), resets_at(12, places))

@pytest.mark.parametrize("shift", [-30.0, -8.0, 30.0])
def test_tiny_and_huge_steps_keep_their_digits(shift):
    p = problem(1, 10, 2, 3)
    p["dt"] = (p["dt"].detach() + shift).requires_grad_()
    check(p)

def test_two_runs_give_the_same_bits():
    p = problem(1, 9, 35, 3)
    assert same(results(selective_scan, p), results(selective_scan, p))

def test_the_backward_in_groups_of_chunks_is_the_backward(monkeypatch):
    monkeypatch.setattr(scan_triton, "SCRATCH", 1)                # one chunk at a time
    check(problem(2, 25, 35, 2), some_resets(2, 25))

def columns(v):
    """The same values, in memory the other way round, or every second one."""
    if v.dim() == 1:
        return v.repeat_interleave(2)[::2]
    return v.transpose(0, -1).contiguous().transpose(0, -1)

def test_strides_of_inputs_and_gradients_change_nothing():
    p = problem(2, 10, 4, 2)
    xz = torch.cat([p["x"], p["z"]], 2)
    rest = torch.cat([p["dt"], p["B"], p["C"]], 2)
    slices = dict(p, x=xz[..., :4], z=xz[..., 4:], dt=rest[..., :4], B=rest[..., 4:6], C=rest[..., 6:])
    for inputs in leaves(slices), leaves(p, columns):
        assert same(results(selective_scan, p), results(selective_scan, inputs))
    y, h = selective_scan(**p)
    grads = []
    for change in (torch.clone, columns, lambda v: v[:1, :1, :1].expand_as(v)):
        ones = change(torch.ones_like(y)), change(torch.ones_like(h))
        grads.append(torch.autograd.grad((y, h), list(p.values()), ones, retain_graph=True))
    for plain, *others in zip(*grads):
        assert all(torch.equal(plain, other) for other in others)

def test_one_step_of_any_strides_is_read_right():
    p = problem(3, 1, 4, 2)
    turned = {k: v.detach().flatten(1)[..., None].mT.requires_grad_() if k in ("x", "dt", "z") else v
              for k, v in p.items()}                               # as the output of a convolution lies
    assert turned["x"].is_contiguous() and turned["x"].stride() == (4, 1, 1)
    assert same(results(selective_scan, p), results(selective_scan, turned))
    results_of_step = []
    for q in detached(p), detached(p, columns):                    # decoding, which takes another operator
        h = q["h0"].contiguous().clone()
        results_of_step.append((scan_triton.step(h, *(q[k] for k in NAMES)), h))
    for one, two in zip(*results_of_step):
        assert torch.equal(one, two)

@pytest.mark.parametrize("used", ["y", "h", "y and h"])
@pytest.mark.parametrize("wanted", [["h0"], ["A"], ["z", "dt_bias"], list(problem(1, 1, 1, 1))], ids=str)
def test_a_gradient_is_right_whatever_else_needs_none(wanted, used):
    ours = problem(1, 9, 3, 2)
    exact = detached(ours, torch.Tensor.double)
    for scan, p in ((selective_scan, ours), (loop, exact)):
        for k in p:
            p[k] = p[k].detach().requires_grad_(k in wanted)
        y, h = scan(**p)
        loss = ("y" in used) * y.sum() + ("h" in used) * h.sum()
        loss.backward()
    for k in ours:
        assert (ours[k].grad is not None) == (k in wanted)
        if k in wanted:
            assert error(ours[k].grad, exact[k].grad, exact[k].grad.abs().max().clamp(min=1e-3)) <= 1e-5

def test_every_input_may_be_in_16_bits():
    check(leaves(problem(1, 9, 3, 2), torch.Tensor.bfloat16))
    p = detached(problem(1, 1, 3, 2), torch.Tensor.bfloat16)
    state = p["h0"].float()
    y = scan_triton.step(state, *(p[k] for k in NAMES))
    y_exact, h_exact = loop(**detached(p, torch.Tensor.double))
    assert error(y, y_exact) <= 8e-3 and error(state, h_exact) <= 1e-5

def test_a_second_derivative_is_refused_in_a_sentence():
    p = problem(1, 3, 2, 2)
    dx, = torch.autograd.grad(selective_scan(**p)[0].sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backward through falcon_mamba.* no autograd formula"):
        dx.sum().backward()

def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    devices = []

    @contextmanager
    def device_of(tensor):
        devices.append(tensor.device)
        yield
        devices.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    p = problem(1, 5, 2, 2)
    results(selective_scan, p)
    assert devices == [p["x"].device, "left"] * 6      # three kernels forward, three backward

def test_memory_that_was_never_written_is_never_read(monkeypatch):
    def poisoned(real):
        def empty(*args, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t
        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    check(problem(2, 11, 33, 3), some_resets(2, 11))

def test_a_sequence_of_nan_stays_alone_in_its_batch():
    p = problem(2, 9, 2, 2)
    with torch.no_grad():
        for k in IN_TIME:
            p[k][1] = float("nan")
    got = results(selective_scan, p)
    assert not any(got[k][0].isnan().any() for k in ("y", "h", "dx", "ddt", "dB", "dC", "dz", "dh0"))

@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_one_token_is_a_scan_of_one_step(dtype):
    p = problem(2, 1, 35, 3, dtype=dtype)
    for without in ({}, {"z": None}):
        p = p | without
        inputs = [p[k] for k in NAMES]
        h = p["h0"].clone()
        y = scan_triton.step(h, *inputs)
        y_scan, h_scan = selective_scan(**p)
        assert error(h, h_scan) <= 1e-6 and error(y, y_scan) <= TOLERANCE[dtype]
    with pytest.raises(ValueError, match="fp32 and contiguous"):
        scan_triton.step(h.half(), *inputs)

def test_the_operators_are_good_citizens():
    p, reset = problem(1, 9, 3, 2), some_resets(1, 9)
    inputs = [p[k] for k in NAMES] + [reset]
    whole = [p["h0"].mT, *inputs[:2], p["A"].mT, *inputs[3:]]
    plain = [t.detach() for t in whole]
    torch.library.opcheck(scan_triton.scan, whole)
    y, h, start = scan_triton.scan(*plain)
    torch.library.opcheck(scan_triton.scan_backward, (y, h, start, *plain[1:]))
    token = first_token(detached(p))
    torch.library.opcheck(scan_triton.step, (token["h0"].clone(), *(token[k] for k in NAMES)))

def test_torch_compile_and_checkpointing_go_around_it_without_a_break():
    from torch.utils.checkpoint import checkpoint

    def checkpointed(**p):
        return checkpoint(lambda: selective_scan(**p), use_reentrant=False)

    compiled = torch.compile(lambda **p: selective_scan(**p), fullgraph=True, dynamic=True,
                             backend="aot_eager")
    for b, l in ((2, 5), (3, 13)):                    # one compilation for both; the last in two chunks
        p, reset = problem(b, l, 3, 2), some_resets(b, l)
        plain = results(selective_scan, p, reset)
        for scan in (checkpointed, compiled):
            assert same(plain, results(scan, p, reset))

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
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                          cwd=Path(__file__).parent.parent)
    assert re.search(said, done.stdout) and done.stdout.count("\n") == 1

@pytest.mark.skipif(GPU, reason="with a GPU the kernels are compiled, and the report runs")
def test_in_the_interpreter_the_report_says_what_to_unset():
    import triton_report
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        triton_report.main()

@pytest.mark.skipif(not COMPILED, reason="takes minutes in Triton's interpreter")
def test_longer_sequences_in_chunks_of_128_steps():
    check(problem(1, 600, 96, 16, dtype=torch.bfloat16), some_resets(1, 600, share=0.01))

@pytest.mark.skipif(not GPU, reason="needs a CUDA GPU: its graphs have no interpreter")
def test_a_replayed_graph_decodes_as_eager_does():
    p = detached(problem(2, 1, 256, 16, dtype=torch.bfloat16))
    state, eager, inputs = p["h0"].clone(), p["h0"].clone(), [p[k] for k in NAMES]
    scan_triton.step(torch.empty_like(state), *inputs)              # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan_triton.step(state, *inputs)
    for token in range(4):
        p["x"].copy_(torch.randn(p["x"].shape))
        graph.replay()
        assert torch.equal(y, scan_triton.step(eager, *inputs)) and torch.equal(state, eager)
