"""The selective scan for a GPU: the recurrence of scan.py, which says it as a loop, as three Triton kernels.

    delta_t = softplus(dt_t + dt_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t     (Mamba Eq. 2a; h_{t-1} is 0 where reset_t is set)
    y_t = (C_t . h_t + D x_t) * SiLU(z_t)              (Mamba Eq. 2b, with skip and gate)

An H100 has 132 SMs. Each runs many warps, 32 threads in lockstep, whose values lie in registers: values too
many for these spill to memory, and a sum over threads takes shuffles between them. A Triton program is here
one warp.

The one idea. A thread keeps a channel's n states in registers and walks through time: no (b, l, d, n) in
memory. But a sequence of the 7B gives 8192 threads, and an H100 wants six times as many at least. So time is
cut into chunks and walked twice, as a chunk does no more than h_end = decay * h_start + local:
    pass 1   every chunk at once, from h = 0: its local and its decay         scan_kernel, without y
    pass 2   a short walk over chunks: the state that enters each             carry_kernel
    pass 3   every chunk at once, from the state that enters it: y            scan_kernel
When the batch alone fills the GPU there is one chunk, and passes 1 and 2 fall away: see chunk_count. Pass 3
keeps a state every 256 steps or so. The stretches between these are the backward's chunks, in which it runs
the same three passes from the end.

`python scan_triton.py` compiles it for an H100, GPU or not, and prints what it costs, estimated from counted
instructions: verified in Triton's interpreter (TRITON_INTERPRET=1 runs it on the CPU) and compiled for H100,
A100 and MI300, these kernels are not yet timed on one. Next: mamba.py. Sizes: b batch, l length, d channels,
n states a channel, N: n padded to a power of two. States and sums are in fp32.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError('the Triton scan needs Triton: pip install triton, or use backend="auto"') from None

CHANNELS = 32        # channels a program: in scan_kernel a thread has one, and sums over n need no shuffles
STEPS = 4            # steps a block, loaded together ahead of use; with 8, adjoint_kernel lacks registers
KEEP = 256           # the backward starts from states this many steps apart, at most
SCRATCH = 500 << 20  # bytes of a backward's scratch, about: it takes no more chunks at a time than fit
LOG2E = tl.constexpr(1.4426950408889634)      # exp(v) = exp2(v log2(e)), and exp2 is what the hardware has
ENDLESS = 1e30       # the length of the step on which a document starts: it forgets everything
# Triton compiles a kernel anew for a number or address that is a multiple of 16, and for 1: not for these.
LENGTHS = ["l", "since", "chunk", "chunks", "keep"]


def chunk_count(b: int, l: int, d: int, sm_count: int) -> int:
    """How many chunks to cut time into: one if channels alone fill the GPU, else enough for 64 warps an SM.

    12 warps keep an SM busy while some of them wait for memory. About 20 fit at a time: 64 are three rounds,
    so a last, partial one is cheap. A chunk has at least 128 steps: its kept state, 4n bytes a channel, is
    then a quarter of its x in bf16."""
    warps = max(1, b * -(-d // CHANNELS))
    return 1 if warps >= 12 * sm_count else max(1, min(-(-64 * sm_count // warps), l // 128))


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
def load_block(x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, left, d: tl.constexpr, STEPS: tl.constexpr):
    # A block's rows, all requested before the first is used. After the end dt is -inf, so delta is 0, a step
    # that changes nothing.
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
def begin(l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr,
          STEPS: tl.constexpr):
    # Each sequence has `chunks` chunks of `chunk` steps, from step `since` on. A program takes CHANNELS
    # channels, c, through one chunk, the k-th of all sequences': steps first to end - 1 of sequence
    # k // chunks. Its id is k * tiles + its tile of channels. k is int64, and so is every offset made from
    # it, as b * l * d passes 2^31.
    tiles: tl.constexpr = (d + CHANNELS - 1) // CHANNELS
    k, i = (tl.program_id(0) // tiles).to(tl.int64), tl.arange(0, N)
    c = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    first = since + (k % chunks).to(tl.int32) * chunk
    end = tl.minimum(first + chunk, l)
    # States lie (n, d), so that neighbouring threads read neighbours. A single token, STEPS = 1, updates the
    # model's own state in place, and that lies (d, n).
    tile = i[:, None] * d + c[None, :] if STEPS > 1 else i[:, None] + c[None, :] * n     # (N, CHANNELS)
    return k, k // chunks, first, end, c, i, tile, (i < n)[:, None] & (c < d)[None, :]


# Arguments of both big kernels: x_ptr, dt_ptr, z_ptr (None: no gate) and dy_ptr are (b, l, d), A (n, d), D
# and bias (d,), B and C (b, l, n) with zeros after l up to whole blocks, reset (b, l) ENDLESS where a
# document starts and else 0 (None: none does). For the lengths and k see begin.
#
# Without dy_ptr this kernel is the forward's pass 1 or 3. With it, it is pass 1 of the backward, told below:
# skip the lines about dy, dh and decay at first.
#
# For states at multiples of 16 Triton would load four channels a thread, and spread the states of each over
# four threads. Kept from knowing, it gives a thread a channel.
@triton.jit(do_not_specialize=LENGTHS,
            do_not_specialize_on_alignment=["A_ptr", "enter_ptr", "kept_ptr", "end_ptr", "decay_ptr"])
def scan_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr,
                dy_ptr,                # the backward, which begins with this walk too; else None
                enter_ptr,             # (b, chunks, n, d): what enters each chunk; None: zero
                y_ptr,                 # (b, l, d) out: y, in the backward dz; or None
                kept_ptr,              # (b, chunks * chunk / keep, n, d) out: h every `keep` steps; or None
                end_ptr,               # (b, chunks, n, d) out: what leaves each chunk; backward: local dh
                decay_ptr,             # (b, chunks, n, d) out: each chunk's decay; or None
                l, since, chunk, chunks, keep, d: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
                CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    k, seq, first, end, c, i, tile, live = begin(l, since, chunk, chunks, d, n, N, CHANNELS, STEPS)
    A, D, bias = load(A_ptr, tile, live) * LOG2E, load(D_ptr, c, c < d), load(bias_ptr, c, c < d)
    h, dh = tl.zeros((N, CHANNELS), tl.float32), tl.zeros((N, CHANNELS), tl.float32)
    decay, time = tl.full((N, CHANNELS), 1.0, tl.float32), tl.zeros((CHANNELS,), tl.float32)
    if enter_ptr is not None:
        h = load(enter_ptr, k * n * d + tile, live)
    due, kept = first, k * (chunk // keep)         # the step at which to keep h next, and its place
    for t in range(first, end, STEPS):
        row, padded, left = seq * l + t, seq * tl.cdiv(l, STEPS) * STEPS + t, tl.where(c < d, end - t, 0)
        if kept_ptr is not None and t == due:
            tl.store(kept_ptr + kept * n * d + tile, h, live)
            due += keep
            kept += 1
        xs, dts, zs, gs, resets = load_block(
            x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, end - t, d, STEPS)
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
                 chunks, size: tl.constexpr, FROM_END: tl.constexpr, CHANNELS: tl.constexpr):
    tiles: tl.constexpr = (size + CHANNELS - 1) // CHANNELS
    seq = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    h = load(carry_ptr, seq * size + i, i < size)
    for k in range(chunks):
        at = (seq * chunks + (chunks - 1 - k if FROM_END else k)) * size + i
        decay, local = load(decay_ptr, at, i < size), load(local_ptr, at, i < size)
        tl.store(local_ptr + at, h, i < size)
        h = decay * h + local
    tl.store(carry_ptr + seq * size + i, h, i < size)


# Backward. Write dh_t for dL/dh_t, g_t = dy_t SiLU(z_t) for the gradient at the ungated y, a_t for
# exp(delta_t A), w_t for delta_t x_t. The adjoint of the recurrence is the same recurrence, run from the end:
#
#     dh_t = C_t g_t + a_{t+1} dh_{t+1}, and after the last step the gradient of the returned h comes in
#     dC_t = sum over d of g_t h_t                        dB_t = sum over d of w_t dh_t
#     dx_t = delta_t (sum over n of B_t dh_t) + D g_t     dA = sum over t of delta_t a_t h_{t-1} dh_t
#     ddelta_t = sum over n of (A a_t h_{t-1} + B_t x_t) dh_t,      ddt_t = ddelta_t sigmoid(dt_t + dt_bias)
#
# h runs forward, dh runs back, and h cannot be run back: that would divide by decays. So scan_kernel walks
# each chunk once more and leaves h every STEPS steps in scratch. What a chunk adds to dh, the sum over its t
# of (a_1 ... a_t) C_t g_t, takes no more than decays, so the same walk sums it (pass 1). carry_kernel turns
# that into the dh that enters each chunk from its end (pass 2), and adjoint_kernel walks back, with the
# states of a block in registers (pass 3).
#
# dB and dC are sums over channels. With a thread a channel they would take 160 shuffles a step: 2 x 16 sums
# in log2(32) moves. Here the compiler does know the pointers to be aligned and gives a thread 4 states of 4
# channels: 40 shuffles.
@triton.jit(do_not_specialize=LENGTHS)
def adjoint_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr, dy_ptr,
                   blocks_ptr,         # (b, chunks * chunk / STEPS, n, d): what enters each block
                   dh_ptr,             # (b, chunks, n, d): what enters each chunk from its end
                   dx_ptr, ddt_ptr,    # (b, l, d) out
                   dBC_ptr,            # (b, chunks, tiles, chunk, 2, n) out: dB and dC, of these channels
                   sums_ptr,           # (b, chunks, n + 2, d) out: dA, dD and dbias, of these steps
                   l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
                   CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    k, seq, first, end, c, i, tile, live = begin(l, since, chunk, chunks, d, n, N, CHANNELS, STEPS)
    A, D, bias = load(A_ptr, tile, live) * LOG2E, load(D_ptr, c, c < d), load(bias_ptr, c, c < d)
    dh, dA = load(dh_ptr, k * n * d + tile, live), tl.zeros((N, CHANNELS), tl.float32)
    dD, dbias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for back in range(0, end - first, STEPS):
        t = first + (end - first - 1) // STEPS * STEPS - back
        row, padded, left = seq * l + t, seq * tl.cdiv(l, STEPS) * STEPS + t, tl.where(c < d, end - t, 0)
        block = k * (chunk // STEPS) + (t - first) // STEPS
        xs, dts, zs, gs, resets = load_block(
            x_ptr, dt_ptr, z_ptr, dy_ptr, reset_ptr, row, c, end - t, d, STEPS)
        h = load(blocks_ptr, block * n * d + tile, live)
        deltas, ws, us = (), (), ()                                        # u_t = a_t h_{t-1}
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
            sum_B = tl.sum(dh * B[:, None], 0)
            ddt = (tl.sum(du * A, 0) / LOG2E + sum_B * xs[s]) * tl.sigmoid(dts[s] + bias)
            dD += g * xs[s]
            dbias += ddt
            tl.store(dx_ptr + (row + s) * d + c, delta * sum_B + D * g, s < left)
            tl.store(ddt_ptr + (row + s) * d + c, ddt, s < left)
            dh *= tl.exp2((delta + resets[s])[None, :] * A)
    sums = sums_ptr + k * (n + 2) * d
    tl.store(sums + tile, dA, live)
    tl.store(sums + n * d + c, dD, c < d)
    tl.store(sums + (n + 1) * d + c, dbias, c < d)


# What PyTorch sees: operators that are opaque to torch.compile, with rules for shapes and for the gradient.

Maybe = Tensor | None


def launch(kernel, programs: int, *args, **sizes) -> None:
    # On x's GPU, as Triton takes the current one. All in a grid's first axis: the others end at 65535.
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **sizes, CHANNELS=CHANNELS, num_warps=1)


def turned(t: Tensor) -> Tensor:
    """(..., d, n) -> a copy (..., n, d) in fp32."""
    return t.mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def whole(t: Tensor) -> Tensor:
    """(b, l, n) -> fp32, with zeros after l up to a whole number of blocks."""
    return F.pad(t.float(), (0, 0, 0, -t.shape[1] % STEPS))


def prepare(x, dt, z, A, B, C, D, dt_bias, reset) -> tuple[list, dict]:
    """The first nine arguments of both big kernels, and the sizes they share."""
    inputs = x, dt, z, A, B, C, D, dt_bias, reset if reset is None else reset * ENDLESS
    (_, l, d), n = x.shape, B.shape[2]
    sizes = dict(l=l, since=0, d=d, n=n, N=triton.next_power_of_2(n), STEPS=STEPS)
    return [t if t is None else t.contiguous() for t in inputs], sizes


def cut_time(x: Tensor) -> tuple[int, int]:
    """Steps in a chunk of the forward, and in one of the backward, a kept state apart: multiples of STEPS."""
    sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    chunk = triton.cdiv(x.shape[1], chunk_count(*x.shape, sm_count))
    parts = triton.cdiv(chunk, KEEP)
    keep = triton.cdiv(chunk, parts * STEPS) * STEPS
    return parts * keep, keep


@torch.library.custom_op("falcon_mamba::scan", mutates_args=())
def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, h0: Tensor,
         z: Maybe, reset: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, and the states that the backward starts from. z and reset come last, as they may be missing."""
    (b, l, d), n, (chunk, keep), enter = x.shape, A.shape[1], cut_time(x), turned(h0)
    inputs, sizes = prepare(x, dt, z, turned(A), whole(B), whole(C), D, dt_bias, reset)
    chunks, new = triton.cdiv(l, chunk), partial(torch.empty, device=x.device)
    sizes.update(chunk=chunk, chunks=chunks, keep=keep)
    programs, states = b * chunks * triton.cdiv(d, CHANNELS), (b, chunks, n, d)
    if chunks > 1:
        carry, enter, decay = enter, new(states), new(states)
        launch(scan_kernel, programs, *inputs, None, None, None, None, enter, decay, **sizes)
        launch(carry_kernel, b * triton.cdiv(n * d, CHANNELS), carry, decay, enter, chunks, n * d, False)
    y, kept, end = new(x.shape, dtype=x.dtype), new(b, chunks * chunk // keep, n, d), new(states)
    launch(scan_kernel, programs, *inputs, None, enter, y, kept, end, None, **sizes)
    return y, turned(end[:, -1]), kept


@scan.register_fake
def _(x, dt, A, B, C, D, dt_bias, h0, z, reset):
    (b, l, d), n, (chunk, keep) = x.shape, A.shape[1], cut_time(x)
    h, kept = (b, d, n), (b, triton.cdiv(l, chunk) * chunk // keep, n, d)
    return x.new_empty(x.shape), *(x.new_empty(size, dtype=torch.float32) for size in (h, kept))


@torch.library.custom_op("falcon_mamba::scan_backward", mutates_args=())
def scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
                  h0: Tensor, z: Maybe, reset: Maybe, kept: Tensor, dy: Tensor, dh: Tensor) -> list[Tensor]:
    """The gradients of the first nine, or eight without z."""
    grads = empty_grads(x, dt, A, B, C, D, dt_bias, h0, z)
    dx, ddt, dA, dB, dC, dD, dbias, dh0, *dz = grads
    inputs, sizes = prepare(x, dt, z, turned(A), whole(B), whole(C), D, dt_bias, reset)
    (b, l, d), n, (_, chunk), tiles = x.shape, A.shape[1], cut_time(x), triton.cdiv(x.shape[2], CHANNELS)
    new, dy, dh, sums = partial(torch.empty, device=x.device), dy.contiguous(), turned(dh), 0
    bytes_a_chunk = 4 * b * chunk * tiles * n * (CHANNELS // STEPS + 2)    # a state a block; sums for dB, dC
    total, group = triton.cdiv(l, chunk), max(1, SCRATCH // max(1, bytes_a_chunk))
    for k in reversed(range(0, total, group)):
        since, chunks = k * chunk, min(group, total - k)
        sizes.update(since=since, chunk=chunk, chunks=chunks)
        enter = kept[:, k:k + chunks].contiguous()                         # (b, chunks, n, d)
        blocks, local, decay = new(b, chunks * chunk // STEPS, n, d), new(enter.shape), new(enter.shape)
        dBC, part = new(b, chunks, tiles, chunk, 2, n), new(b, chunks, n + 2, d)
        launch(scan_kernel, b * chunks * tiles, *inputs, dy, enter, *(dz or [None]), blocks, local, decay,
               keep=STEPS, **sizes)
        launch(carry_kernel, b * triton.cdiv(n * d, CHANNELS), dh, decay, local, chunks, n * d, True)
        launch(adjoint_kernel, b * chunks * tiles, *inputs, dy, blocks, local, dx, ddt, dBC, part, **sizes)
        now = slice(since, since + chunks * chunk)
        dB[:, now], dC[:, now] = dBC.sum(2).flatten(1, 2)[:, :l - since].unbind(2)
        sums = sums + part.sum((0, 1))                                     # (n + 2, d)
        del enter, blocks, local, decay, dBC, part                         # free again for the next group
    for grad, value in ((dA, sums[:n].mT), (dD, sums[n]), (dbias, sums[n + 1]), (dh0, dh.mT)):
        grad.copy_(value)
    return grads


@scan_backward.register_fake
def empty_grads(*inputs):
    return [t.new_empty(t.shape) for t in inputs[:9] if t is not None]


def backward(ctx, dy, dh, _):
    grads = scan_backward(*ctx.saved_tensors, dy, dh)
    return *grads, *[None] * (10 - len(grads))


scan.register_autograd(backward, setup_context=lambda ctx, inputs, output:
                       ctx.save_for_backward(*inputs, output[2]))


@torch.library.custom_op("falcon_mamba::step", mutates_args=("h",))
def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, h: Tensor,
         z: Maybe, reset: Maybe) -> Tensor:
    """One token: returns y (b, 1, d) and overwrites the state h (b, d, n)."""
    if not h.is_contiguous() or h.dtype != torch.float32:
        raise ValueError("h is written in place: it must be fp32 and contiguous (b, d, n)")
    y, (inputs, sizes) = x.new_empty(x.shape), prepare(x, dt, z, A, B, C, D, dt_bias, reset)
    sizes.update(chunk=1, chunks=1, keep=1, STEPS=1)
    launch(scan_kernel, len(x) * triton.cdiv(len(A), CHANNELS), *inputs, None, h, y, None, h, None, **sizes)
    return y


step.register_fake(lambda x, *_: x.new_empty(x.shape))


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None, z: Maybe = None,
                   dt_bias: Maybe = None, h0: Maybe = None, reset: Maybe = None) -> tuple[Tensor, Tensor]:
    """y (b, l, d) in x's dtype, and h (b, d, n) in fp32, the last state: the equation on top."""
    if not x.is_cuda and isinstance(scan_kernel, triton.JITFunction):
        raise ValueError(f'the Triton scan needs CUDA tensors and x is on {x.device}: use backend="auto", or '
                         "set TRITON_INTERPRET=1 before Python starts, which runs it on the CPU, slowly")
    D, dt_bias = (A.new_zeros(len(A)) if v is None else v for v in (D, dt_bias))
    h0 = A.new_zeros(len(x), *A.shape, dtype=torch.float32) if h0 is None else h0
    if x.shape[1] == 1 and not torch.is_grad_enabled():                    # decoding
        h = h0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return step(x, dt, A, B, C, D, dt_bias, h, z, reset), h
    return scan(x, dt, A, B, C, D, dt_bias, h0, z, reset)[:2]


if __name__ == "__main__":
    from tests.triton_report import main    # compiles the kernels above and counts their instructions
    main()
