"""The selective scan for a GPU: the recurrence of scan.py as three Triton kernels.

    delta_t = softplus(dt_t + dt_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t     h_{t-1} is 0 where reset_t is set
    y_t = (C_t . h_t + D x_t) SiLU(z_t)

A thread keeps a channel's n states in registers, in fp32, and walks through time: no (b, l, d, n) in memory.
But one sequence of the 7B gives 8192 threads, and an H100 wants six times as many at least. So time is cut in
chunks and walked twice, as a chunk does no more than h_end = decay * h_start + local:
    pass 1   every chunk at once, from h = 0: its local and its decay         scan_kernel, without y
    pass 2   a short walk over chunks: the state that enters each             carry_kernel
    pass 3   every chunk at once, from the state that enters it: y            scan_kernel
When the batch alone fills the GPU there is one chunk, and pass 3 is all. It keeps a state every 256 steps or
so. The stretches between these are the chunks of the backward, which is the same three passes from the end.

An H100 has 132 SMs. Each runs many warps, 32 threads in lockstep and here one Triton program. Values too many
for registers spill to memory, and a sum over threads takes shuffles between them. `python scan_triton.py`
compiles all for an H100, GPU or not, and estimates the time. It is not measured yet: the kernels are verified
in Triton's interpreter, on a CPU. Next: mamba.py. Sizes: b batch, l length, d channels, n states a channel.
"""
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    error = SystemExit if __name__ == "__main__" else ImportError
    raise error('the Triton scan needs Triton: pip install triton, or use backend="auto"') from None

CHANNELS = tl.constexpr(32)  # of a program; in scan_kernel a thread has one, and sums over n need no shuffles
STEPS = 4            # steps a block, loaded together ahead of use; with 8, adjoint_kernel lacks registers
KEEP = 256           # the backward starts from states this many steps apart, at most
SCRATCH = 500 << 20  # bytes of a backward's scratch, about: it takes no more chunks at a time than fit
LOG2E = tl.constexpr(1.4426950408889634)      # exp(v) = exp2(v log2(e)), and exp2 is what the hardware has
ENDLESS = 1e35       # the length of the step on which a document starts: it forgets everything
# Triton compiles a kernel anew for a number or address that is a multiple of 16, and for 1: not for these.
LENGTHS = ["l", "since", "chunk", "chunks", "keep"]


def chunk_count(b: int, l: int, d: int, sm_count: int) -> int:
    """How many chunks to cut time into: one if channels alone keep the GPU busy, which takes 12 warps an SM.
    Else enough for 64, three rounds of the 20 or so that fit, so that a last, partial round is cheap. In 128
    steps or more, a chunk's kept state is at most a quarter of its x in bf16."""
    warps = max(1, b * triton.cdiv(d, CHANNELS))
    return 1 if warps >= 12 * sm_count else max(1, min(triton.cdiv(64 * sm_count, warps), l // 128))


@triton.jit
def softplus(v):
    # max(v, 0) + log1p(exp(-|v|)) never overflows, above 17 it rounds to v. log1p(e) = 2 artanh(e / (2 + e)),
    # a series that keeps all digits of a small delta, where log(1 + e) would lose them.
    e = tl.exp2(tl.abs(v) * -LOG2E)
    r = e / (2 + e)
    q = r * r
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0) + 2 * r * series


@triton.jit
def silu(z, z_ptr):
    return 1.0 if z_ptr is None else z * tl.sigmoid(z)      # without z there is no gate


@triton.jit
def load(ptr, at, mask, other: tl.constexpr = 0.0):
    return 0.0 if ptr is None else tl.load(ptr + at, mask, other).to(tl.float32)     # 0 without such a tensor


@triton.jit
def load_all(x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, left, d: tl.constexpr, STEPS: tl.constexpr):
    # A block's rows, all requested before one is used. After the end dt is -inf, so delta is 0: no change.
    xs, dts, zs, gs, resets = (), (), (), (), ()
    for s in tl.static_range(STEPS):
        at, live = (row + s) * d + c, s < tl.where(c < d, left, 0)
        xs += (load(x_ptr, at, live),)
        dts += (load(dt_ptr, at, live, float("-inf")),)
        zs += (load(z_ptr, at, live),)
        gs += (load(dy_ptr, at, live),)
        resets += (load(reset_ptr, row + s, s < left),)
    return xs, dts, zs, gs, resets


@triton.jit
def begin(l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    # A program takes CHANNELS channels, c, through one chunk, the k-th of all: each sequence has `chunks`, of
    # `chunk` steps, from step `since` on. Offsets are made from k, in int64, as b * l * d passes 2^31.
    tiles: tl.constexpr = triton.cdiv(d, CHANNELS)
    k, i = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, triton.next_power_of_2(n))
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    first = since + (k % chunks).to(tl.int32) * chunk
    end = tl.minimum(first + chunk, l)
    # States lie (n, d), so that neighbouring threads read neighbours. A single token, STEPS = 1, updates the
    # model's own state in place, and that lies (d, n).
    tile = i[:, None] * d + c[None, :] if STEPS > 1 else i[:, None] + c[None, :] * n  # (n padded, CHANNELS)
    return k, k // chunks, first, end, c, i, tile, (i < n)[:, None] & (c < d)[None, :]


# Arguments of both big kernels: x_ptr, dt_ptr, z_ptr (None: no gate) and dy_ptr are (b, l, d), A (n, d), D
# and bias (d,), B and C (b, l, n) with zeros after l up to whole blocks, reset (b, l) ENDLESS where a
# document starts and else 0 (None: none does). For the lengths and k see begin.
#
# Without dy_ptr this kernel is the forward's pass 1 or 3. With it, it is pass 1 of the backward, told below:
# skip the lines about dy, dh and decay at first. If Triton knew states to lie at multiples of 16, it would
# load four channels a thread and spread the states of each over four threads. Not told, it loads one.
@triton.jit(do_not_specialize=LENGTHS,
            do_not_specialize_on_alignment=["A_ptr", "enter_ptr", "kept_ptr", "end_ptr", "decay_ptr"])
def scan_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr,
                dy_ptr,                # the backward, which begins with this walk too; else None
                enter_ptr,             # (b, chunks, n, d): what enters each chunk; None: zero
                y_ptr,                 # (b, l, d) out: y, in the backward dz; or None
                kept_ptr,              # (b, chunks * chunk / keep, n, d) out: h every `keep` steps; or None
                end_ptr,               # (b, chunks, n, d) out: what leaves each chunk; backward: local dh
                decay_ptr,             # (b, chunks, n, d) out: each chunk's decay; or None
                l, since, chunk, chunks, keep, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, seq, first, end, c, i, tile, live = begin(l, since, chunk, chunks, d, n, STEPS)
    A, D, bias = load(A_ptr, tile, live) * LOG2E, load(D_ptr, c, c < d), load(bias_ptr, c, c < d)
    h = tl.zeros_like(A) if enter_ptr is None else load(enter_ptr, k * n * d + tile, live)
    dh, decay, time = tl.zeros_like(A), tl.full(A.shape, 1.0, tl.float32), tl.zeros_like(bias)
    due, kept = first, k * (chunk // keep)         # the step at which to keep h next, and its place
    for t in range(first, end, STEPS):
        row, padded, left = seq * l + t, seq * tl.cdiv(l, STEPS) * STEPS + t, tl.where(c < d, end - t, 0)
        if kept_ptr is not None and t == due:
            tl.store(kept_ptr + kept * n * d + tile, h, live)
            due, kept = due + keep, kept + 1
        xs, dts, zs, gs, resets = load_all(x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, end - t, d, STEPS)
        ys = ()
        for s in tl.static_range(STEPS):
            delta = softplus(dts[s] + bias)
            B, C = load(B_ptr, (padded + s) * n + i, i < n), load(C_ptr, (padded + s) * n + i, i < n)
            a = tl.exp2((delta + resets[s])[None, :] * A)
            h = a * h + (delta * xs[s])[None, :] * B[:, None]
            time += delta + resets[s]
            y = tl.sum(C[:, None] * h, 0) + D * xs[s]
            if dy_ptr is None:
                ys += (y * silu(zs[s], z_ptr),)
            else:
                decay *= a
                dh += decay * (gs[s] * silu(zs[s], z_ptr))[None, :] * C[:, None]
                if z_ptr is not None:
                    gate = tl.sigmoid(zs[s])
                    ys += (gs[s] * y * gate * (1 + zs[s] * (1 - gate)),)
        if y_ptr is not None:
            for s in tl.static_range(STEPS):
                tl.store(y_ptr + (row + s) * d + c, ys[s], s < left)
    tl.store(end_ptr + k * n * d + tile, h if dy_ptr is None else dh, live)
    if decay_ptr is not None:      # the product of all exp(delta_t A): forward, exp(A time) at an add a step
        tl.store(decay_ptr + k * n * d + tile, tl.exp2(time[None, :] * A) if dy_ptr is None else decay, live)


@triton.jit(do_not_specialize=LENGTHS)
def carry_kernel(carry_ptr,            # (b, size): what enters them all, overwritten with what leaves
                 decay_ptr,            # (b, chunks, size), size = n * d
                 local_ptr,            # (b, chunks, size): overwritten with what enters each chunk
                 chunks, size: tl.constexpr, FROM_END: tl.constexpr):
    tiles: tl.constexpr = triton.cdiv(size, CHANNELS)
    seq = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    h = load(carry_ptr, seq * size + i, i < size)
    for k in range(chunks):
        at = (seq * chunks + (chunks - 1 - k if FROM_END else k)) * size + i
        decay, local = load(decay_ptr, at, i < size), load(local_ptr, at, i < size)
        tl.store(local_ptr + at, h, i < size)
        h = decay * h + local
    tl.store(carry_ptr + seq * size + i, h, i < size)


# Backward: the equations above chunk_steps in scan.py, in their names, with u_t = exp(delta_t A) h_{t-1} and
# du = d(delta_t A) = dh_t u_t. h cannot be run back: that would divide by decays. So scan_kernel walks each
# chunk once more, leaves h every STEPS steps in scratch, and sums what the chunk adds to dh: C_t g_t times
# the decay up to t (pass 1). carry_kernel turns that into the dh that enters each chunk from its end (pass
# 2), and adjoint_kernel walks back, with the states of a block in registers (pass 3).
#
# dB and dC sum over channels: with a thread a channel, 2 x 16 sums a step in log2(32) shuffles each. Here the
# compiler knows the pointers to be aligned and gives a thread 4 states of 4 channels: 40 shuffles, not 160.
@triton.jit(do_not_specialize=LENGTHS)
def adjoint_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr, dy_ptr,
                   blocks_ptr,         # (b, chunks * chunk / STEPS, n, d): what enters each block
                   dh_ptr,             # (b, chunks, n, d): what enters each chunk from its end
                   dx_ptr, ddt_ptr,    # (b, l, d) out
                   dBC_ptr,            # (b, chunks, tiles, chunk, 2, n) out: dB and dC, of these channels
                   sums_ptr,           # (b, chunks, n + 2, d) out: dA, dD and dbias, of these steps
                   l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, seq, first, end, c, i, tile, live = begin(l, since, chunk, chunks, d, n, STEPS)
    A, D, bias = load(A_ptr, tile, live) * LOG2E, load(D_ptr, c, c < d), load(bias_ptr, c, c < d)
    dh, dA = load(dh_ptr, k * n * d + tile, live), tl.zeros_like(A)
    dD, dbias = tl.zeros_like(D), tl.zeros_like(bias)
    for back in range(0, end - first, STEPS):
        t = first + (end - first - 1) // STEPS * STEPS - back
        row, padded, left = seq * l + t, seq * tl.cdiv(l, STEPS) * STEPS + t, tl.where(c < d, end - t, 0)
        block = k * (chunk // STEPS) + (t - first) // STEPS
        xs, dts, zs, gs, resets = load_all(x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, end - t, d, STEPS)
        h = load(blocks_ptr, block * n * d + tile, live)
        deltas, ws, us = (), (), ()
        for s in tl.static_range(STEPS):
            deltas += (softplus(dts[s] + bias),)
            ws += (deltas[s] * xs[s],)
            us += (tl.exp2((deltas[s] + resets[s])[None, :] * A) * h,)
            h = us[s] + ws[s][None, :] * load(B_ptr, (padded + s) * n + i, i < n)[:, None]
        for s in tl.static_range(STEPS - 1, -1, -1):
            # After the end delta is 0 already. This mask hides from the compiler that the exp2 at the end was
            # computed in the walk above: it would keep all of those in registers, run out of them and spill.
            delta, g = tl.where(s < left, deltas[s], 0.0), gs[s] * silu(zs[s], z_ptr)
            B, C = load(B_ptr, (padded + s) * n + i, i < n), load(C_ptr, (padded + s) * n + i, i < n)
            dh += C[:, None] * g[None, :]
            dBC = dBC_ptr + (tl.program_id(0).to(tl.int64) * chunk + t - first + s) * 2 * n + i
            tl.store(dBC, tl.sum(dh * ws[s][None, :], 1), i < n)
            tl.store(dBC + n, tl.sum((us[s] + ws[s][None, :] * B[:, None]) * g[None, :], 1), i < n)
            du = dh * us[s]
            dA += du * delta[None, :]
            dw = tl.sum(dh * B[:, None], 0)
            ddt = (tl.sum(du * A, 0) / LOG2E + dw * xs[s]) * tl.sigmoid(dts[s] + bias)
            dD += g * xs[s]
            dbias += ddt
            tl.store(dx_ptr + (row + s) * d + c, delta * dw + D * g, s < left)
            tl.store(ddt_ptr + (row + s) * d + c, ddt, s < left)
            dh *= tl.exp2((delta + resets[s])[None, :] * A)
    sums = sums_ptr + k * (n + 2) * d
    tl.store(sums + tile, dA, live)
    tl.store(sums + n * d + c, dD, c < d)
    tl.store(sums + (n + 1) * d + c, dbias, c < d)


# What PyTorch sees: three operators, opaque to torch.compile, with rules for shapes and for the gradient.
# These are the last arguments of each, and the first ones of both big kernels.
INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor bias, Tensor? z, Tensor? reset"


def launch(kernel, rows: int, width: int, *args, **sizes) -> None:
    # On x's GPU, as Triton takes the current one. All in a grid's first axis: the others end at 65535.
    with torch.cuda.device_of(args[0]):
        kernel[(rows * triton.cdiv(width, CHANNELS),)](*args, **sizes, num_warps=1)


def cut_time(x: Tensor) -> tuple[int, int, int]:
    """How many chunks the forward has, the steps in one, and in one of the backward: multiples of STEPS."""
    sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    chunk = triton.cdiv(x.shape[1], chunk_count(*x.shape, sm_count))
    parts = triton.cdiv(chunk, KEEP)
    keep = triton.cdiv(chunk, parts * STEPS) * STEPS
    return triton.cdiv(x.shape[1], parts * keep), parts * keep, keep


@torch.library.custom_op("falcon_mamba::scan", mutates_args=(),
                         schema=f"(Tensor h0, {INPUTS}) -> (Tensor, Tensor, Tensor)")
def scan(h0, *inputs):
    """y, the last h, and the states from which the backward starts. h0 and h are (b, n, d); all inputs must
    be as the kernels ask, which nobody checks here."""
    inputs = [t if t is None else t.contiguous() for t in inputs]
    y, h, kept = empty_outputs(h0, *inputs)
    (b, l, d), n, (chunks, chunk, keep) = y.shape, h.shape[1], cut_time(y)
    sizes = dict(l=l, since=0, chunk=chunk, chunks=chunks, keep=keep, d=d, n=n, STEPS=STEPS)
    enter, end = h.copy_(h0), h.new_empty(b, chunks, n, d)
    if chunks > 1:
        enter, decay = h.new_empty(end.shape), h.new_empty(end.shape)
        launch(scan_kernel, b * chunks, d, *inputs, None, None, None, None, enter, decay, **sizes)
        launch(carry_kernel, b, n * d, h, decay, enter, chunks, n * d, False)
    launch(scan_kernel, b * chunks, d, *inputs, None, enter, y, kept, end, None, **sizes)
    return y, h.copy_(end[:, -1]), kept


@scan.register_fake
def empty_outputs(h0, x, *_):
    chunks, chunk, keep = cut_time(x)
    kept = h0.new_empty(len(x), chunks * chunk // keep, *h0.shape[1:])
    return x.new_empty(x.shape), h0.new_empty(h0.shape), kept


@torch.library.custom_op("falcon_mamba::scan_backward", mutates_args=(),
                         schema=f"(Tensor dy, Tensor dh, Tensor kept, {INPUTS}) -> Tensor[]")
def scan_backward(dy, dh, kept, *inputs):
    """The gradients of h0 and of the first eight inputs, or seven without z."""
    dy, *inputs = (t if t is None else t.contiguous() for t in (dy, *inputs))
    dh0, dx, ddt, dA, dB, dC, dD, dbias, *dz = grads = empty_grads(dy, dh, kept, *inputs)
    (b, l, d), n, (*_, chunk) = dy.shape, dh.shape[1], cut_time(dy)
    total, tiles = triton.cdiv(l, chunk), triton.cdiv(d, CHANNELS)
    bytes_a_chunk = 4 * b * chunk * n * (d // STEPS + 2 * tiles)           # a state a block; sums for dB, dC
    group = max(1, SCRATCH // max(1, bytes_a_chunk))
    dh0.copy_(dh)
    new, sums = kept.new_empty, 0
    for k in reversed(range(0, total, group)):
        since, chunks = k * chunk, min(group, total - k)
        sizes = dict(l=l, since=since, chunk=chunk, chunks=chunks, d=d, n=n, STEPS=STEPS)
        enter = kept[:, k:k + chunks].contiguous()                         # (b, chunks, n, d)
        blocks, local, decay = new(b, chunks * chunk // STEPS, n, d), new(enter.shape), new(enter.shape)
        dBC, part = new(b, chunks, tiles, chunk, 2, n), new(b, chunks, n + 2, d)
        launch(scan_kernel, b * chunks, d, *inputs, dy, enter, *(dz or [None]), blocks, local, decay,
               keep=STEPS, **sizes)
        launch(carry_kernel, b, n * d, dh0, decay, local, chunks, n * d, True)
        launch(adjoint_kernel, b * chunks, d, *inputs, dy, blocks, local, dx, ddt, dBC, part, **sizes)
        now = slice(since, since + chunks * chunk)
        dB[:, now], dC[:, now] = dBC.sum(2).flatten(1, 2)[:, :dB.shape[1] - since].unbind(2)
        sums = sums + part.sum((0, 1))                                     # (n + 2, d)
        del enter, blocks, local, decay, dBC, part                         # free again for the next group
    for grad, value in ((dA, sums[:n]), (dD, sums[n]), (dbias, sums[n + 1])):
        grad.copy_(value)
    return grads


@scan_backward.register_fake
def empty_grads(dy, dh, kept, *inputs):
    return [t.new_empty(t.shape) for t in (dh, *inputs[:-1]) if t is not None]


def backward(ctx, dy, dh, _):
    grads = scan_backward(dy, dh, *ctx.saved_tensors)
    return *grads, *[None] * (10 - len(grads))


scan.register_autograd(backward, setup_context=lambda ctx, inputs, output:
                       ctx.save_for_backward(output[2], *inputs[1:]))


@torch.library.custom_op("falcon_mamba::step", mutates_args=("h",),
                         schema=f"(Tensor(a!) h, {INPUTS}) -> Tensor")
def step(h, *inputs):
    """One token: returns y (b, 1, d) and overwrites the state h. Here h is (b, d, n) and A (d, n)."""
    if not h.is_contiguous() or h.dtype != torch.float32:
        raise ValueError("h is written in place: it must be fp32 and contiguous (b, d, n)")
    x, *rest = (t if t is None else t.contiguous() for t in inputs)
    (b, d, n), y = h.shape, x.new_empty(x.shape)
    launch(scan_kernel, b, d, x, *rest, None, h, y, None, h, None,
           l=1, since=0, chunk=1, chunks=1, keep=1, d=d, n=n, STEPS=1)
    return y


step.register_fake(lambda h, x, *_: x.new_empty(x.shape))


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scan.selective_scan on a GPU: y (b, l, d) in x's dtype, and the last state h (b, d, n) in fp32."""
    if not x.is_cuda and isinstance(scan_kernel, triton.JITFunction):
        raise ValueError(f'the Triton scan needs CUDA tensors and x is on {x.device}: use backend="auto", or '
                         "set TRITON_INTERPRET=1 before Python starts, which runs it on the CPU, slowly")
    D, dt_bias = (A.new_zeros(len(A)) if v is None else v for v in (D, dt_bias))
    h0 = A.new_zeros(len(x), *A.shape) if h0 is None else h0
    reset = None if reset is None else reset * ENDLESS
    if x.shape[1] == 1 and not torch.is_grad_enabled():                    # decoding
        h = h0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return step(h, x, dt, A, B, C, D, dt_bias, z, reset), h
    B, C = (torch.nn.functional.pad(v.float(), (0, 0, 0, -x.shape[1] % STEPS)) for v in (B, C))
    y, h, _ = scan(h0.float().mT, x, dt, A.mT, B, C, D, dt_bias, z, reset)     # in there states lie (n, d)
    return y, h.mT.contiguous()


if __name__ == "__main__":
    from tests.triton_report import main    # compiles the kernels above and counts their instructions
    main()
