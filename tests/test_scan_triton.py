"""The Triton scan against the recurrence, written once more here as a loop in float64.

Without a GPU the kernels run in Triton's interpreter, one Python step for each GPU step, so all shapes are
tiny. With one, the same tests run compiled. Tolerances are relative to the largest value of what is compared,
per dtype.
"""
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as some
from torch.nn import functional as F
from torch.nn.functional import silu, softplus

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:    # Triton reads this when a kernel is decorated, its own library's too: before its first import
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "import this first"
    os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import scan_triton
from scan_triton import selective_scan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}    # in 16 bits: the last bit
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU: graphs and timing have no interpreter")
NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "z")            # as the operators take them, before reset


def loop(x, dt, A, B, C, D=None, z=None, dt_bias=None, h0=None, reset=None):
    """The definition. Every tensor in float64."""
    h = x.new_zeros(x.shape[0], *A.shape) if h0 is None else h0
    delta = softplus(dt if dt_bias is None else dt + dt_bias)
    ys = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = h * ~reset[:, t, None, None]
        drive = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]   # (b, d, n)
        h = torch.exp(delta[:, t, :, None] * A) * h + drive          # (b, d, n)
        ys.append((h * C[:, t, None]).sum(-1))                       # (b, d)
        if D is not None:
            ys[-1] = ys[-1] + D * x[:, t]
        if z is not None:
            ys[-1] = ys[-1] * silu(z[:, t])
    return torch.stack(ys, 1), h


def problem(b, l, d, n, seed=0, dtype=torch.float32, without=()):
    """Random inputs that require gradients; x, dt, z, B and C in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    shapes = dict(x=(b, l, d), dt=(b, l, d), B=(b, l, n), C=(b, l, n), D=(d,), z=(b, l, d), dt_bias=(d,),
                  h0=(b, d, n))
    p = {k: torch.randn(s, generator=g) for k, s in shapes.items() if k not in without}
    p["A"] = -torch.rand(d, n, generator=g) * 4 - 0.01
    low = ("x", "dt", "z", "B", "C")
    return {k: v.to(DEVICE, dtype if k in low else torch.float32).requires_grad_() for k, v in p.items()}


def some_resets(b, l, seed=0, share=0.2):
    return (torch.rand(b, l, generator=torch.Generator().manual_seed(seed)) < share).to(DEVICE)


@contextmanager
def in_chunks(k):
    """Force the number of chunks, and short ones to keep several states."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_triton, "chunk_count", lambda b, l, d, sm_count: k)
        patch.setattr(scan_triton, "KEEP", 6)
        yield patch


def results(scan, p, reset, seed=0):
    """y, h and the gradients of a loss that weighs every y and every h."""
    g = torch.Generator().manual_seed(seed + 1)
    y, h = scan(**p, reset=reset)
    dy, dh = (torch.randn(t.shape, generator=g).bfloat16().to(DEVICE, h.dtype) for t in (y, h))  # exact
    grads = torch.autograd.grad((y.to(h.dtype) * dy).sum() + (h * dh).sum(), list(p.values()))
    return dict(y=y, h=h, **{"d" + k: v for k, v in zip(p, grads)})


def check(p, reset=None, seed=0, tolerance=None):
    dtype = p["x"].dtype
    ours = results(selective_scan, p, reset, seed)
    exact = results(loop, {k: v.detach().double().requires_grad_() for k, v in p.items()}, reset, seed)
    for name in exact:
        own = p[name[1:]].dtype if name[1:] in p else dtype if name == "y" else torch.float32
        assert ours[name].dtype == own and ours[name].shape == exact[name].shape
        error = (ours[name].double() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-6)
        assert error <= (tolerance or TOLERANCE[own]), f"{name}: error {error:.1e}"
    return ours


sizes = dict(b=some.integers(1, 2), l=some.integers(1, 14), d=some.integers(1, 40), n=some.integers(1, 6),
             k=some.integers(1, 4), seed=some.integers(0, 999))

quick = settings(deadline=None, derandomize=True, phases=[Phase.generate])    # shrinking would take minutes


@settings(quick, max_examples=9)
@given(**sizes, resets=some.sampled_from([0.0, 0.3, 1.0]), dtype=some.sampled_from(list(TOLERANCE)))
def test_values_and_gradients_are_the_float64_loops(b, l, d, n, k, seed, resets, dtype):
    with in_chunks(k):
        check(problem(b, l, d, n, seed, dtype), some_resets(b, l, seed, resets), seed)


@settings(quick, max_examples=4)
@given(**sizes, without=some.sets(some.sampled_from(["D", "z", "dt_bias", "h0"]), min_size=1))
def test_every_option_may_be_left_out(b, l, d, n, k, seed, without):
    with in_chunks(k):
        check(problem(b, l, d, n, seed, without=without), None, seed)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("places", [[0], [11], [3], [4], [5, 6], [7, 8], list(range(12))], ids=str)
def test_a_document_may_start_at_any_step_of_a_chunk(places, k):
    reset = torch.zeros(1, 12, dtype=torch.bool, device=DEVICE)
    reset[:, places] = True
    with in_chunks(k):
        check(problem(1, 12, 2, 2), reset)


@pytest.mark.parametrize("fading", [1, 1e-30])
def test_a_reset_forgets_everything(fading):
    p, reset = problem(1, 9, 2, 2), torch.zeros(1, 9, dtype=torch.bool, device=DEVICE)
    reset[:, 5] = True
    with in_chunks(2), torch.no_grad():
        p["A"] *= fading
        y, h = selective_scan(**p, reset=reset)
        late = {k: v[:, 5:] if k in ("x", "dt", "B", "C", "z") else v for k, v in p.items() if k != "h0"}
        y_alone, h_alone = selective_scan(**late)
    assert torch.equal(h, h_alone) or (h - h_alone).abs().max() < 1e-6
    assert (y[:, 5:] - y_alone).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [-30.0, -8.0, 30.0])
def test_tiny_and_huge_steps_keep_their_digits(shift):
    p = problem(1, 6, 2, 3)
    p["dt"] = (p["dt"].detach() + shift).requires_grad_()
    with in_chunks(2):
        check(p)


def test_the_number_of_chunks_changes_nothing():
    p, reset, got = problem(2, 13, 3, 3), some_resets(2, 13), []
    for k in (1, 2, 4):
        with in_chunks(k):
            got.append(results(selective_scan, p, reset))
    for name in got[0]:
        for other in got[1:]:
            assert (got[0][name] - other[name]).abs().max() <= 1e-5 * got[0][name].abs().max(), name


def test_two_runs_give_the_same_bits():
    p = problem(1, 9, 35, 3)
    with in_chunks(2):
        first, second = (results(selective_scan, p, None) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_backward_in_groups_of_chunks_is_the_backward():
    p, reset = problem(2, 14, 35, 2), some_resets(2, 14)
    with in_chunks(2) as patch:
        patch.setattr(scan_triton, "SCRATCH", 1)      # one chunk at a time
        check(p, reset)


def test_strides_of_inputs_and_gradients_change_nothing():
    p = problem(2, 6, 4, 2)
    xz, rest = torch.cat([p["x"], p["z"]], 2), torch.cat([p["dt"], p["B"], p["C"]], 2)
    slices = dict(p, x=xz[..., :4], z=xz[..., 4:], dt=rest[..., :4], B=rest[..., 4:6], C=rest[..., 6:])
    columns = {k: v.mT.contiguous().mT if v.dim() > 1 else v.repeat_interleave(2)[::2] for k, v in p.items()}
    with in_chunks(2):
        plain = results(selective_scan, p, None)
        for inputs in (slices, columns):
            other = results(selective_scan, {k: v.detach().requires_grad_() for k, v in inputs.items()}, None)
            assert all(torch.equal(plain[k], other[k]) for k in plain)
        y, h = selective_scan(**p)
        for dy, dh in ((torch.ones(()).expand_as(y), torch.ones(()).expand_as(h)),
                       (torch.ones(6, 2, 4).transpose(0, 1), torch.ones(2, 2, 4).mT)):
            grads = torch.autograd.grad((y, h), list(p.values()), (dy.to(y), dh.to(h)), retain_graph=True)
            ones = torch.autograd.grad(y.sum() + h.sum(), list(p.values()), retain_graph=True)
            assert all(torch.equal(*pair) for pair in zip(grads, ones))


def test_one_step_of_any_strides_is_read_right():
    p = problem(3, 1, 4, 2)
    turned = {k: v.detach().flatten(1)[..., None].mT.requires_grad_() if k in ("x", "dt", "z") else v
              for k, v in p.items()}                               # as the output of a convolution lies
    assert turned["x"].is_contiguous() and turned["x"].stride() == (4, 1, 1)
    plain, other = (results(selective_scan, q, None) for q in (p, turned))
    assert all(torch.equal(plain[k], other[k]) for k in plain)
    columns = {k: v.mT.contiguous().mT if v.dim() == 2 else v.transpose(0, 2).contiguous().transpose(0, 2)
               if v.dim() == 3 else v for k, v in p.items()}
    with torch.no_grad():                                          # decoding, which takes another operator
        for one, two in zip(selective_scan(**p), selective_scan(**columns)):
            assert torch.equal(one, two)


@pytest.mark.parametrize("wanted", [["h0"], ["A"], ["z", "dt_bias"], ["x"]], ids=str)
def test_only_what_needs_a_gradient_gets_one(wanted):
    p = {k: v.detach().requires_grad_(k in wanted) for k, v in problem(1, 5, 3, 2).items()}
    exact = {k: v.detach().double().requires_grad_(k in wanted) for k, v in p.items()}
    for scan, inputs in ((selective_scan, p), (loop, exact)):
        y, h = scan(**inputs)
        (y.sum() + h.sum()).backward()
    assert all((v.grad is not None) == (k in wanted) for k, v in p.items())
    for k in wanted:
        assert (p[k].grad - exact[k].grad).abs().max() <= 1e-5 * exact[k].grad.abs().max()


@pytest.mark.parametrize("l", [1, 3])
def test_an_empty_batch_has_an_empty_result(l):
    p = problem(0, l, 3, 2)
    got = results(selective_scan, p, torch.zeros(0, l, dtype=torch.bool, device=DEVICE))
    assert got["y"].shape == (0, l, 3) and got["h"].shape == (0, 3, 2) and not got["dA"].any()
    with torch.no_grad():
        assert selective_scan(**p)[0].shape == (0, l, 3)


def test_every_input_may_be_in_16_bits():
    p = problem(1, 5, 3, 2, dtype=torch.bfloat16)
    check({k: v.detach().bfloat16().requires_grad_() for k, v in p.items()})
    with torch.no_grad():
        token = {k: v[:, :1] if v.dim() == 3 and k != "h0" else v for k, v in p.items()}
        y, h = selective_scan(**{k: v.bfloat16() for k, v in token.items()})
        exact = loop(**{k: v.bfloat16().double() for k, v in token.items()})
    assert (y - exact[0]).abs().max() <= 8e-3 * exact[0].abs().max() and h.dtype == torch.float32
    assert (h - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max()


def test_autocast_leaves_the_arithmetic_in_fp32():
    p = problem(1, 5, 3, 2)
    plain = results(selective_scan, p, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = results(selective_scan, p, None)
    assert all(torch.equal(plain[k], cast[k]) for k in plain)


def test_a_second_derivative_is_refused_in_a_sentence():
    p = problem(1, 3, 2, 2)
    dx, = torch.autograd.grad(selective_scan(**p)[0].sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backward through falcon_mamba.* no autograd formula"):
        dx.sum().backward()


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, t):
            self.device = t.device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    p = problem(1, 5, 2, 2)
    results(selective_scan, p, None)
    assert entered == [p["x"].device, "left"] * 4      # scan forward; scan, carry and adjoint backward


def test_memory_that_was_never_written_is_never_read(monkeypatch):
    def poisoned(real):
        def empty(*args, **kwargs):
            t = real(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t
        return empty

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    with in_chunks(2):
        check(problem(2, 7, 33, 3), some_resets(2, 7))


def test_a_sequence_of_nan_stays_alone_in_its_batch():
    p = problem(2, 5, 2, 2)
    with torch.no_grad():
        for k in ("x", "dt", "B", "C", "z"):
            p[k][1] = float("nan")
    with in_chunks(2):
        got = results(selective_scan, p, None)
    assert not any(got[k][0].isnan().any() for k in ("y", "h", "dx", "ddt", "dB", "dC", "dz", "dh0"))


@torch.no_grad()
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_one_token_is_a_scan_of_one_step(dtype):
    p = {k: v.detach() for k, v in problem(2, 1, 35, 3, dtype=dtype).items()}
    reset = torch.tensor([[True], [False]], device=DEVICE)
    for r in (None, reset):
        y, h = selective_scan(**p, reset=r)                        # takes the step
        with torch.enable_grad():                                  # takes the scan
            y_scan, h_scan = selective_scan(**p, reset=r)
        assert (h - h_scan).abs().max() <= 1e-6 * h_scan.abs().max()
        assert (y - y_scan).abs().max() <= TOLERANCE[dtype] * y_scan.abs().max()
        in_place = p["h0"].clone()
        y_in_place = scan_triton.step(in_place, *(p[k] for k in NAMES), r)
        assert torch.equal(in_place, h) and torch.equal(y_in_place, y)
    y, h = selective_scan(*(p[k] for k in NAMES[:5]))              # from no state, without options
    y_loop, h_loop = loop(*(p[k].double() for k in NAMES[:5]))
    assert (h - h_loop).abs().max() <= 1e-6
    assert (y - y_loop).abs().max() <= TOLERANCE[dtype] * y_loop.abs().max()


@torch.no_grad()
def test_one_token_leaves_the_state_it_was_given():
    p = {k: v.detach() for k, v in problem(1, 1, 3, 2).items()}
    before = p["h0"].clone()
    selective_scan(**p)
    assert torch.equal(p["h0"], before)
    with pytest.raises(ValueError, match="fp32 and contiguous"):
        scan_triton.step(p["h0"].half(), *(p[k] for k in NAMES), None)


def test_one_token_with_gradients_takes_the_scan():
    check(problem(2, 1, 3, 2), some_resets(2, 1, share=0.5))


def test_no_gradient_flows_through_what_was_not_used():
    p = problem(1, 5, 2, 2)
    y, h = selective_scan(**p)
    for out in (y, h):
        grads = torch.autograd.grad(out.sum(), list(p.values()), retain_graph=True, allow_unused=True)
        right = loop(**p)[0 if out is y else 1].sum()
        exact = torch.autograd.grad(right, list(p.values()), allow_unused=True)
        for mine, right in zip(grads, exact):
            right = torch.zeros_like(mine) if right is None else right
            assert (mine - right).abs().max() <= 1e-5 * max(right.abs().max(), 1e-3)


def test_the_operators_are_good_citizens():
    p = problem(1, 9, 3, 2)
    forget = some_resets(1, 9)
    inputs = [p[k] for k in NAMES] + [forget]
    blocks = [F.pad(t, (0, 0, 0, -9 % scan_triton.STEPS)) for t in (p["B"], p["C"])]
    whole = [p["h0"].mT, *inputs[:2], p["A"].mT, *blocks, *inputs[5:]]
    with in_chunks(1):                # one chunk, two kept states
        torch.library.opcheck(scan_triton.scan, whole)
        plain = [t.detach() for t in whole]
        y, h, kept = scan_triton.scan(*plain)
        torch.library.opcheck(scan_triton.scan_backward, (y, h, kept, *plain[1:]))
    token = [t.detach()[:, :1] if t.dim() == 3 or t is forget else t.detach() for t in inputs]
    torch.library.opcheck(scan_triton.step, (p["h0"].detach().clone(), *token))


def test_torch_compile_and_checkpointing_go_around_it_without_a_break():
    from torch.utils.checkpoint import checkpoint
    p = problem(1, 5, 3, 2)
    reference = results(selective_scan, p, None)

    def checkpointed(reset, **p):
        return checkpoint(lambda *a: selective_scan(**dict(zip(p, a))), *p.values(), use_reentrant=False)

    compiled = torch.compile(lambda reset, **p: selective_scan(**p), fullgraph=True, backend="aot_eager")
    for scan in (checkpointed, compiled):
        got = results(scan, p, None)
        assert all(torch.equal(got[k], reference[k]) for k in reference)
    token = {k: v.detach()[:, :1] if v.dim() == 3 and k != "h0" else v.detach() for k, v in p.items()}
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled(None, **token), selective_scan(**token)))


def test_one_compilation_serves_any_batch_and_length(monkeypatch):
    monkeypatch.setattr(scan_triton, "chunk_count", lambda b, l, d, sm_count: max(1, l // 6))    # symbolic
    compiled = torch.compile(lambda reset, **p: selective_scan(**p, reset=reset), fullgraph=True,
                             dynamic=True, backend="aot_eager")
    for b, l in ((2, 5), (3, 13)):                    # the last in two chunks
        p, reset = problem(b, l, 3, 2), some_resets(b, l)
        got, reference = results(compiled, p, reset), results(selective_scan, p, reset)
        assert all(torch.equal(got[k], reference[k]) for k in reference)


def test_fully_sharded_blocks_train_around_it(monkeypatch):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    import scan
    from mamba import Mamba, MambaConfig
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=11, d_model=4, n_layer=2, d_state=2)).to(DEVICE)
    tokens = torch.arange(6, device=DEVICE)[None]
    monkeypatch.setattr(scan, "default_backend", lambda device, l: "naive")
    model(tokens)[0].logsumexp(-1).sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(scan, "default_backend", lambda device, l: "triton")
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in model.backbone.layers:
            fully_shard(block)
        fully_shard(model)
        model(tokens)[0].logsumexp(-1).sum().backward()
        for p, gradient in zip(model.parameters(), wanted):
            torch.testing.assert_close(p.grad.full_tensor(), gradient, rtol=1e-4,
                                       atol=1e-5 * gradient.abs().max().item())
    finally:
        dist.destroy_process_group()


def test_chunks_are_counted_from_the_sizes():
    count = scan_triton.chunk_count
    assert count(1, 8192, 8192, 132) == 33                # the 7B, one sequence, H100: 64 warps an SM
    assert count(8, 8192, 8192, 132) == 1                 # eight sequences fill it alone
    assert count(1, 100, 8192, 132) == 1                  # too short to cut
    assert count(1, 10**6, 1, 132) == 10**6 // 128        # one channel: as many as may be
    for b, l, d in ((1, 8192, 8192), (1, 2048, 8192), (2, 10**6, 8192), (1, 333, 64), (4, 4096, 1536)):
        k = count(b, l, d, 132)
        assert k * 4 * 16 <= l * 2 / 4 or k == 1          # bytes kept, of x's in bf16


def test_states_are_kept_at_least_every_256_steps():
    for b, l, d in ((1, 8192, 8192), (8, 8192, 8192), (64, 300, 8192), (4, 4097, 1536), (1, 1, 1)):
        chunks, chunk, keep = scan_triton.cut_time(torch.empty(b, l, d, device="meta"))
        assert keep <= 256 and chunk % keep == 0 and keep % scan_triton.STEPS == 0
        assert chunks == -(-l // chunk) <= scan_triton.chunk_count(b, l, d, 132)


def printed(code):
    """What a Python process of its own prints, with Triton's interpreter off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent).stdout


def test_cpu_tensors_without_the_interpreter_are_refused_in_a_sentence():
    out = printed("import torch; from scan_triton import selective_scan as f; x = torch.ones(1, 2, 3)\n"
                  "try: f(x, x, -torch.ones(3, 2), x[..., :2], x[..., :2])\nexcept ValueError as e: print(e)")
    assert "needs CUDA tensors" in out and "TRITON_INTERPRET=1" in out and out.count("\n") == 1


def test_without_triton_the_reader_is_told_what_to_install():
    out = printed("import sys; sys.modules['triton'] = None\n"
                  "try: import scan_triton\nexcept ImportError as e: print(e)")
    assert "pip install triton" in out and out.count("\n") == 1
    run = printed("import runpy, sys; sys.modules['triton'] = None\n"
                  "try: runpy.run_path('scan_triton.py', run_name='__main__')\n"
                  "except SystemExit as e: print(e)")
    assert run == out


@pytest.mark.skipif(GPU, reason="with a GPU the kernels are compiled, and the report runs")
def test_in_the_interpreter_the_report_says_what_to_unset():
    import triton_report
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        triton_report.main()


@needs_gpu
def test_on_the_device_real_sizes_agree_too():
    p = problem(1, 600, 96, 16, dtype=torch.bfloat16)
    check(p, some_resets(1, 600, share=0.01), tolerance=2e-2)


@needs_gpu
def test_a_replayed_graph_decodes_as_eager_does():
    p = {k: v.detach() for k, v in problem(2, 1, 256, 16, dtype=torch.bfloat16).items()}
    state, eager, inputs = p["h0"].clone(), p["h0"].clone(), [p[k] for k in NAMES]
    scan_triton.step(torch.empty_like(state), *inputs, None)              # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan_triton.step(state, *inputs, None)
    for token in range(4):
        p["x"].copy_(torch.randn(p["x"].shape))
        graph.replay()
        assert torch.equal(y, scan_triton.step(eager, *inputs, None)) and torch.equal(state, eager)
