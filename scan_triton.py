"""The selective scan for a GPU: the recurrence of scan.py as five Triton kernels.

    delta_t = softplus(dt_t + dt_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t     (Mamba Eq. 2a; h_{t-1} is 0 where reset_t is set)
    y_t = (C_t . h_t + D x_t) * SiLU(z_t)              (Mamba Eq. 2b, with skip and gate)

Read scan.py first: it says this as a loop. mamba.py, next, calls it. Sizes: b batch, l length, d channels, n
states a channel, N: n padded to a power of two. x, dt, z (b, l, d), B, C (b, l, n), A (d, n), h (b, d, n).
States and sums are fp32 whatever comes in.

The one idea. A thread keeps a channel's n states in registers and walks through time: no (b, l, d, n) in
memory. But a sequence of the 7B gives 8192 threads, and an H100 wants ten times as many. So time is cut into
chunks and walked twice, for over a chunk the recurrence is one affine map, h_end = decay * h_start + local:
    pass 1   every chunk at once, from h = 0: its local and its decay         scan_kernel, without y
    pass 2   a short walk over chunks: the state that enters each             carry_kernel
    pass 3   every chunk at once, from the state that enters it: y            scan_kernel
When the batch alone fills the GPU there is one chunk, and passes 1 and 2 fall away: see chunk_count. Backward
keeps the states that enter the chunks, nothing else, and runs the same machine from the end.

`python scan_triton.py` compiles it all for an H100, GPU or not, and prints what it costs. These kernels are
verified in Triton's interpreter (TRITON_INTERPRET=1 runs them on the CPU) and compiled for H100, A100, MI300.
They have not been timed on one: the times printed without a GPU are estimates from counted instructions.
"""
from functools import partial

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    raise ImportError('the Triton scan needs Triton: pip install triton, or use backend="auto"') from None

CHANNELS = 32        # channels a program: one warp, one thread a channel, so sums over n stay inside a thread
STEPS = 4            # steps a block, loaded together ahead of use; with 8, adjoint_kernel lacks registers
SCRATCH = 384 << 20  # bytes of a backward's scratch, about: channels that need more are taken in slices
LOG2E = tl.constexpr(1.4426950408889634)      # exp(v) = exp2(v log2(e)), and exp2 is what the hardware has


def chunk_count(b: int, l: int, d: int, sm_count: int) -> int:
    """How many chunks to cut time into: one if channels alone fill the GPU, else enough for 64 warps an SM.

    12 warps keep an SM's four schedulers busy; 64 are three rounds of what fits, so a last, partial one is
    cheap. A chunk has at least 128 steps: its kept state of 4n bytes is then a quarter of its x in bf16."""
    warps = b * -(-d // CHANNELS)
    return 1 if warps >= 12 * sm_count else max(1, min(-(-64 * sm_count // warps), l // 128))


# ---- Forward

@triton.jit
def softplus(v):
    # max(v, 0) + log1p(exp(-|v|)) never overflows, and above 17 it is v. log1p(e) = 2 artanh(e / (2 + e)), a
    # series that keeps all digits of a small delta, where log(1 + e) would lose them.
    e = tl.exp2(tl.abs(v) * -LOG2E)
    r = e / (2 + e)
    q = r * r
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(v, 0) + 2 * r * series


@triton.jit
def load_steps(ptr, row: tl.constexpr, left, other: tl.constexpr, STEPS: tl.constexpr):
    # A block's rows, all requested before the first is used. Past the end of the chunk they read as `other`.
    steps = ()
    for s in tl.static_range(STEPS):
        steps += (tl.load(ptr + s * row, mask=s < left, other=other).to(tl.float32),)
    return steps


@triton.jit
def load_jump(reset_ptr, at, mask):
    # Added to the exponent of the decay: -inf where a document starts makes the decay exactly 0.
    jump = 0.0
    if reset_ptr is not None:
        jump = tl.where(tl.load(reset_ptr + at, mask=mask, other=0) != 0, float("-inf"), 0.0)
    return jump


@triton.jit
def begin(A_ptr, D_ptr, bias_ptr, l, chunk, d: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr):
    # What a program works on: some channels, a chunk [first, end) of one sequence, and their A, D and
    # dt_bias. Its tile of states is at `state` in a (b, chunks, N, d) tensor. Offsets are int64: b * l * d
    # passes 2^31.
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, N).to(tl.int64)
    seq, first = tl.program_id(2).to(tl.int64), tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, l)
    until = tl.where(c < d, end, 0)                                        # where a channel's steps end
    live = (c < d)[None, :]
    tile = n[:, None] * d + c[None, :]                                     # (N, CHANNELS)
    state = (seq * tl.cdiv(l, chunk) + tl.program_id(1)) * N * d + tile    # (N, CHANNELS)
    A = tl.load(A_ptr + tile, mask=live, other=0.0)                        # (N, CHANNELS), times log2(e)
    D = tl.load(D_ptr + c, mask=c < d, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < d, other=0.0)
    return c, n, seq, first, end, until, live, tile, state, A, D, bias


# A thread a channel: that is the compiler's choice where it does not know these pointers to be aligned. If it
# knew, it would load four channels a thread and spread each channel's states over four threads.
@triton.jit(do_not_specialize_on_alignment=["A_ptr", "enter_ptr", "end_ptr", "decay_ptr"])
def scan_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr,
                enter_ptr,               # (b, chunks, N, d) what enters each chunk; pass 1: None, zero
                y_ptr,                   # (b, l, d) out; pass 1: None
                end_ptr, decay_ptr,      # out; pass 1: local, decay, like enter; pass 3: last h (b, N, d)
                l, chunk, d: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr,
                N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    c, n, seq, first, end, until, live, tile, state, A, D, bias = begin(
        A_ptr, D_ptr, bias_ptr, l, chunk, d, N, CHANNELS)
    h = tl.zeros((N, CHANNELS), tl.float32)
    if enter_ptr is not None:
        h = tl.load(enter_ptr + state, mask=live, other=0.0)
    total, jumps = tl.zeros((CHANNELS,), tl.float32), 0.0             # the decay is exp2(A total + jumps)
    for t in range(first, end, STEPS):
        at, left = seq * l + t, until - t
        at_BC = (seq * tl.cdiv(l, STEPS) * STEPS + t) * N + n
        xs = load_steps(x_ptr + at * x_row + c, x_row, left, 0.0, STEPS)
        dts = load_steps(dt_ptr + at * dt_row + c, dt_row, left, float("-inf"), STEPS)  # delta = 0: no change
        if z_ptr is not None and y_ptr is not None:
            zs = load_steps(z_ptr + at * z_row + c, z_row, left, 0.0, STEPS)
        ys = ()
        for s in tl.static_range(STEPS):
            delta = softplus(dts[s] + bias)
            jump = load_jump(reset_ptr, at + s, t + s < end)
            B = tl.load(B_ptr + at_BC + s * N)
            h = tl.exp2(delta[None, :] * A + jump) * h + (delta * xs[s])[None, :] * B[:, None]
            if y_ptr is None:
                total += delta
                jumps += jump
            else:
                y = tl.sum(tl.load(C_ptr + at_BC + s * N)[:, None] * h, 0) + D * xs[s]
                if z_ptr is not None:
                    y *= zs[s] * tl.sigmoid(zs[s])
                ys += (y,)
        if y_ptr is not None:
            for s in tl.static_range(STEPS):
                tl.store(y_ptr + (at + s) * d + c, ys[s], mask=s < left)
    if y_ptr is None:
        tl.store(end_ptr + state, h, mask=live)
        tl.store(decay_ptr + state, tl.exp2(total[None, :] * A + jumps), mask=live)
    elif end == l:
        tl.store(end_ptr + seq * N * d + tile, h, mask=live)


@triton.jit
def carry_kernel(start_ptr,            # (b, size) what enters the first chunk (from the end: the last)
                 decay_ptr,            # (b, chunks, size)
                 local_ptr,            # (b, chunks, size) read, then overwritten with what enters the chunk
                 final_ptr,            # (b, size) what leaves after all of them, or None
                 chunks, size, FROM_END: tl.constexpr, ELEMENTS: tl.constexpr):
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    seq = tl.program_id(1).to(tl.int64)
    h = tl.load(start_ptr + seq * size + i, mask=i < size, other=0.0)
    for k in range(chunks):
        at = (seq * chunks + (chunks - 1 - k if FROM_END else k)) * size + i
        decay = tl.load(decay_ptr + at, mask=i < size, other=0.0)
        local = tl.load(local_ptr + at, mask=i < size, other=0.0)
        tl.store(local_ptr + at, h, mask=i < size)
        h = decay * h + local
    if final_ptr is not None:
        tl.store(final_ptr + seq * size + i, h, mask=i < size)


# ---- Backward. Write dh_t for dL/dh_t, g_t = dy_t SiLU(z_t) for the gradient at the ungated y, a_t for
# exp(delta_t A), w_t for delta_t x_t. The adjoint of the recurrence is the same recurrence, run from the end:
#
#     dh_t = C_t g_t + a_{t+1} dh_{t+1}, and after the last step the gradient of the returned h comes in
#     dC_t = sum over d of g_t h_t                        dB_t = sum over d of w_t dh_t
#     dx_t = delta_t (sum over n of B_t dh_t) + D g_t     dA = sum over t of delta_t a_t h_{t-1} dh_t
#     ddelta_t = sum over n of (A a_t h_{t-1} + B_t x_t) dh_t,      ddt_t = ddelta_t sigmoid(dt_t + dt_bias)
#
# h runs forward, dh runs back, and h cannot be run back: that would divide by decays. So replay_kernel walks
# each chunk forward again and leaves h every STEPS steps in scratch. What a chunk adds to dh takes no more
# than decays, so the same walk sums it: (a_1 ... a_t) C_t g_t over the chunk's t. carry_kernel turns that
# into the dh that enters each chunk from its end, and adjoint_kernel walks back, with a block's states at a
# time in registers.

@triton.jit(do_not_specialize_on_alignment=["A_ptr", "enter_ptr", "blocks_ptr", "local_ptr", "decay_ptr"])
def replay_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr, dy_ptr, enter_ptr,
                  blocks_ptr,              # (b, blocks, N, d) out: the state that enters each block of steps
                  local_ptr, decay_ptr,    # (b, chunks, N, d) out: what the chunk adds to dh, and its decay
                  dz_ptr, l, chunk, d: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr,
                  z_row: tl.constexpr, dy_row: tl.constexpr,
                  N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    c, n, seq, first, end, until, live, tile, state, A, D, bias = begin(
        A_ptr, D_ptr, bias_ptr, l, chunk, d, N, CHANNELS)
    h = tl.load(enter_ptr + state, mask=live, other=0.0)          # (N, CHANNELS)
    decay = tl.full((N, CHANNELS), 1.0, tl.float32)
    local = tl.zeros((N, CHANNELS), tl.float32)
    for t in range(first, end, STEPS):
        at, left = seq * l + t, until - t
        block = seq * tl.cdiv(l, STEPS) + t // STEPS
        at_BC = block * STEPS * N + n
        tl.store(blocks_ptr + block * N * d + tile, h, mask=live)
        xs = load_steps(x_ptr + at * x_row + c, x_row, left, 0.0, STEPS)
        dts = load_steps(dt_ptr + at * dt_row + c, dt_row, left, float("-inf"), STEPS)
        gs = load_steps(dy_ptr + at * dy_row + c, dy_row, left, 0.0, STEPS)
        if z_ptr is not None:
            zs = load_steps(z_ptr + at * z_row + c, z_row, left, 0.0, STEPS)
        dzs = ()
        for s in tl.static_range(STEPS):
            delta, g = softplus(dts[s] + bias), gs[s]
            B, C = tl.load(B_ptr + at_BC + s * N), tl.load(C_ptr + at_BC + s * N)
            a = tl.exp2(delta[None, :] * A + load_jump(reset_ptr, at + s, t + s < end))
            h = a * h + (delta * xs[s])[None, :] * B[:, None]
            decay *= a
            if z_ptr is not None:
                gate = tl.sigmoid(zs[s])
                y = tl.sum(C[:, None] * h, 0) + D * xs[s]
                dzs += (g * y * gate * (1 + zs[s] * (1 - gate)),)
                g *= zs[s] * gate
            local += decay * g[None, :] * C[:, None]
        if z_ptr is not None:
            for s in tl.static_range(STEPS):
                tl.store(dz_ptr + (at + s) * dy_row + c, dzs[s], mask=s < left)
    tl.store(local_ptr + state, local, mask=live)
    tl.store(decay_ptr + state, decay, mask=live)


# dB and dC are sums over channels: with a thread a channel, 32 threads would exchange 32 sums a step, 160
# shuffles. Here the compiler does know the pointers to be aligned and gives a thread 4 states of 4 channels:
# 40 shuffles.
@triton.jit
def adjoint_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr, dy_ptr, blocks_ptr,
                   dh_ptr,                 # (b, chunks, N, d) what enters each chunk from its end
                   dx_ptr, ddt_ptr,        # (b, l, d) out
                   dB_ptr, dC_ptr,         # (programs, b, blocks * STEPS, N) out: sums over its channels
                   dA_ptr,                 # (b, chunks, N, d) out: a sum over the chunk, as are
                   dD_ptr, dbias_ptr,      # (b, chunks, d) out
                   l, chunk, d: tl.constexpr, x_row: tl.constexpr, dt_row: tl.constexpr, z_row: tl.constexpr,
                   dy_row: tl.constexpr, N: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr):
    c, n, seq, first, end, until, live, tile, state, A, D, bias = begin(
        A_ptr, D_ptr, bias_ptr, l, chunk, d, N, CHANNELS)
    dh = tl.load(dh_ptr + state, mask=live, other=0.0)
    dA = tl.zeros((N, CHANNELS), tl.float32)
    dD, dbias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for back in range(0, end - first, STEPS):
        t = first + (end - first - 1) // STEPS * STEPS - back
        at, left = seq * l + t, until - t
        blocks = tl.cdiv(l, STEPS)
        block = seq * blocks + t // STEPS
        at_BC = block * STEPS * N + n
        partial = tl.program_id(0) * tl.num_programs(2) * blocks * STEPS * N + at_BC
        xs = load_steps(x_ptr + at * x_row + c, x_row, left, 0.0, STEPS)
        dts = load_steps(dt_ptr + at * dt_row + c, dt_row, left, float("-inf"), STEPS)
        gs = load_steps(dy_ptr + at * dy_row + c, dy_row, left, 0.0, STEPS)
        if z_ptr is not None:
            zs = load_steps(z_ptr + at * z_row + c, z_row, left, 0.0, STEPS)
        h = tl.load(blocks_ptr + block * N * d + tile, mask=live, other=0.0)
        deltas, ws, us = (), (), ()                                        # u_t = a_t h_{t-1}
        for s in tl.static_range(STEPS):
            deltas += (softplus(dts[s] + bias),)
            ws += (deltas[s] * xs[s],)
            us += (tl.exp2(deltas[s][None, :] * A + load_jump(reset_ptr, at + s, t + s < end)) * h,)
            h = us[s] + ws[s][None, :] * tl.load(B_ptr + at_BC + s * N)[:, None]
        for s in tl.static_range(STEPS - 1, -1, -1):
            # The mask changes nothing, but the compiler cannot know. It would keep each a_t of the walk above
            # for the end of this step, in registers that are not there: one more exp2 is cheaper.
            delta, g = tl.where(s < left, deltas[s], 0.0), gs[s]
            if z_ptr is not None:
                g *= zs[s] * tl.sigmoid(zs[s])
            B, C = tl.load(B_ptr + at_BC + s * N), tl.load(C_ptr + at_BC + s * N)
            dh += C[:, None] * g[None, :]
            tl.store(dC_ptr + partial + s * N, tl.sum((us[s] + ws[s][None, :] * B[:, None]) * g[None, :], 1))
            tl.store(dB_ptr + partial + s * N, tl.sum(dh * ws[s][None, :], 1))
            du = dh * us[s]
            dA += du * delta[None, :]
            sum_B = tl.sum(dh * B[:, None], 0)
            ddt = (tl.sum(du * A, 0) / LOG2E + sum_B * xs[s]) * tl.sigmoid(dts[s] + bias)
            dD += g * xs[s]
            dbias += ddt
            tl.store(dx_ptr + (at + s) * dy_row + c, delta * sum_B + D * g, mask=s < left)
            tl.store(ddt_ptr + (at + s) * dy_row + c, ddt, mask=s < left)
            dh *= tl.exp2(delta[None, :] * A + load_jump(reset_ptr, at + s, t + s < end))
    tl.store(dA_ptr + state, dA, mask=live)
    k = seq * tl.num_programs(1) + tl.program_id(1)
    tl.store(dD_ptr + k * d + c, dD, mask=c < d)
    tl.store(dbias_ptr + k * d + c, dbias, mask=c < d)


# ---- One token

@triton.jit
def step_kernel(x_ptr, dt_ptr, z_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, reset_ptr,
                h0_ptr, h_ptr, y_ptr,      # (b, d, n) in, (b, d, n) out, which may be one buffer; (b, d) out
                x_row, dt_row, z_row, B_row, C_row, d, n: tl.constexpr, N: tl.constexpr,
                CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    seq = tl.program_id(1).to(tl.int64)
    state = tl.arange(0, N)
    live, some = c < d, state < n
    both = live[:, None] & some[None, :]                                   # (CHANNELS, N)
    tile = c[:, None] * n + state[None, :]                                 # (CHANNELS, N)
    h = tl.load(h0_ptr + seq * d * n + tile, mask=both, other=0.0)
    A = tl.load(A_ptr + tile, mask=both, other=0.0).to(tl.float32) * LOG2E
    B = tl.load(B_ptr + seq * B_row + state, mask=some, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + seq * C_row + state, mask=some, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + seq * x_row + c, mask=live, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + seq * dt_row + c, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + c, mask=live, other=0.0).to(tl.float32)
    delta = softplus(dt)
    h = tl.exp2(delta[:, None] * A + load_jump(reset_ptr, seq, True)) * h + (delta * x)[:, None] * B[None, :]
    y = tl.sum(C[None, :] * h, 1)
    if D_ptr is not None:
        y += tl.load(D_ptr + c, mask=live, other=0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + seq * z_row + c, mask=live, other=0.0).to(tl.float32)
        y *= z * tl.sigmoid(z)
    tl.store(h_ptr + seq * d * n + tile, h, mask=both)
    tl.store(y_ptr + seq * d + c, y, mask=live)


# ---- The operators that PyTorch sees: opaque to torch.compile, with rules for shapes and for the gradient

Maybe = Tensor | None


def prepare(chunk, x, dt, A, B, C, D, z, dt_bias, reset) -> tuple[list, dict]:
    """The first nine arguments of the kernels, and their sizes."""
    b, l, d = x.shape

    def rows(t):    # (b, l, d), channels side by side, one stride for all steps: so is a projection's slice
        fits = t is None or t.stride(2) == 1 and (b == 1 or t.stride(0) == l * t.stride(1))
        return t if fits else t.contiguous()

    def padded(t, l=0):    # n to a power of two and l to whole blocks: states whose B and C are 0 add nothing
        n = t.shape[-1]
        extra = triton.next_power_of_2(n) - n
        return torch.nn.functional.pad(t.float(), (0, extra, 0, -l % STEPS)).contiguous()

    def vector(t):
        return torch.zeros(d, device=x.device) if t is None else t.float().contiguous()

    x, dt, z, A = rows(x), rows(dt), rows(z), padded(A.float() * LOG2E.value).t().contiguous()     # A (N, d)
    sizes = dict(l=l, chunk=chunk, d=d, x_row=x.stride(1), dt_row=dt.stride(1), num_warps=1,
                 z_row=0 if z is None else z.stride(1), N=A.shape[0], CHANNELS=CHANNELS, STEPS=STEPS)
    reset = None if reset is None else reset.contiguous().byte()
    return [x, dt, z, A, padded(B, l), padded(C, l), vector(D), vector(dt_bias), reset], sizes


def chunk_length(x: Tensor) -> int:
    sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
    return triton.cdiv(x.shape[1], chunk_count(*x.shape, sm_count) * STEPS) * STEPS


def carry(start: Tensor, decay: Tensor, local: Tensor, final: Maybe, from_end: bool) -> None:
    (b, chunks), size = decay.shape[:2], decay[0, 0].numel()
    carry_kernel[triton.cdiv(size, 128), b](start, decay, local, final, chunks, size, from_end, 128)


@torch.library.custom_op("falcon_mamba::scan", mutates_args=())
def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
         h0: Maybe, reset: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, and the states that enter the chunks, which the backward keeps."""
    (b, l, d), n, chunk = x.shape, A.shape[1], chunk_length(x)
    inputs, sizes = prepare(chunk, x, dt, A, B, C, D, z, dt_bias, reset)
    N, chunks, new = sizes["N"], triton.cdiv(l, chunk), partial(torch.empty, device=x.device)
    enter, y, h = new(b, 1, N, d).zero_(), new(b, l, d, dtype=x.dtype), new(b, N, d)
    if h0 is not None:
        enter[:, 0, :n] = h0.transpose(1, 2)
    if chunks > 1:
        start, enter, decay = enter, new(b, chunks, N, d), new(b, chunks, N, d)
        scan_kernel[triton.cdiv(d, CHANNELS), chunks - 1, b](*inputs, None, None, enter, decay, **sizes)
        carry(start, decay, enter, None, False)
    scan_kernel[triton.cdiv(d, CHANNELS), chunks, b](*inputs, enter, y, h, None, **sizes)
    return y, h[:, :n].transpose(1, 2).contiguous(), enter


@scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    (b, l, d), n, new = x.shape, A.shape[1], partial(x.new_empty, dtype=torch.float32)
    enter = new((b, triton.cdiv(l, chunk_length(x)), triton.next_power_of_2(n), d))
    return x.new_empty(b, l, d), new((b, d, n)), enter


@torch.library.custom_op("falcon_mamba::scan_backward", mutates_args=())
def scan_backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, dt_bias: Maybe,
                  h0: Maybe, reset: Maybe, enter: Tensor, dy: Tensor, dh: Maybe) -> list[Tensor]:
    """The gradients of the first nine."""
    (b, l, d), n, (chunks, N), blocks = x.shape, A.shape[1], enter.shape[1:3], triton.cdiv(x.shape[1], STEPS)
    new, chunk, dy = partial(torch.empty, device=x.device), chunk_length(x), dy.contiguous()
    grads = dx, ddt, dA, dB, dC, dD, dz, dbias, dh0 = empty_grads(x, dt, A, B, C, D, z, dt_bias, h0)
    all_B, all_C = new(2, b, l, n).zero_()
    bytes_a_channel = 4 * b * blocks * N * (1 + 2 * STEPS / CHANNELS)      # a state a block; sums for dB, dC
    width = max(1, int(SCRATCH / bytes_a_channel / CHANNELS)) * CHANNELS

    def some_channels(lo):    # a function, so that its scratch is free again for the next
        def cut(t):
            return None if t is None else t[..., lo:lo + width]

        inputs, sizes = prepare(chunk, cut(x), cut(dt), A[lo:lo + width], B, C, cut(D), cut(z), cut(dt_bias),
                                reset)
        w, sizes["dy_row"] = sizes["d"], d
        programs = triton.cdiv(w, CHANNELS)
        states, start, final = new(b, blocks, N, w), new(b, N, w).zero_(), new(b, N, w)
        local, decay = new(b, chunks, N, w), new(b, chunks, N, w)
        if dh is not None:
            start[:, :n] = dh[:, lo:lo + width].transpose(1, 2)
        replay_kernel[programs, chunks, b](*inputs, cut(dy), cut(enter).contiguous(), states, local, decay,
                                           None if z is None else cut(dz), **sizes)
        carry(start, decay, local, final, True)
        sum_A, sum_D, sum_bias = decay, new(b * chunks, w), new(b * chunks, w)
        sum_B, sum_C = new(2, programs, b, blocks * STEPS, N)
        adjoint_kernel[programs, chunks, b](*inputs, cut(dy), states, local, cut(dx), cut(ddt), sum_B, sum_C,
                                            sum_A, sum_D, sum_bias, **sizes)
        all_B.add_(sum_B.sum(0)[:, :l, :n])
        all_C.add_(sum_C.sum(0)[:, :l, :n])
        cut(dD).copy_(sum_D.sum(0))
        cut(dbias).copy_(sum_bias.sum(0))
        dA[lo:lo + width] = sum_A.sum((0, 1))[:n].t()
        dh0[:, lo:lo + width] = final[:, :n].transpose(1, 2)

    for lo in range(0, d, width):
        some_channels(lo)
    dB.copy_(all_B)
    dC.copy_(all_C)
    return list(grads)


@scan_backward.register_fake
def empty_grads(x, dt, A, B, C, D, z, dt_bias, h0, *_):
    """A tensor for each gradient, and stand-ins where there is no such input."""
    D, z, dt_bias = (default if t is None else t for t, default in ((D, A[:, 0]), (z, A), (dt_bias, A[:, 0])))
    h0 = A.new_empty(x.shape[0], *A.shape) if h0 is None else h0
    return [t.new_empty(t.shape) for t in (x, dt, A, B, C, D, z, dt_bias, h0)]


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)


def backward(ctx, dy, dh, _):
    *inputs, enter = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    grads = scan_backward(*inputs, enter, dy, dh)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None


scan.register_autograd(backward, setup_context=keep)


@torch.library.custom_op("falcon_mamba::step", mutates_args=("h",))
def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, D: Maybe = None, z: Maybe = None,
         dt_bias: Maybe = None, h0: Maybe = None, reset: Maybe = None) -> Tensor:
    """One token: returns y (b, 1, d) and writes h (b, d, n), having read h0 or, without one, h itself."""
    if not h.is_contiguous():
        raise ValueError("h is written in place and must be contiguous (b, d, n): give h.contiguous()")
    (b, _, d), n, y = x.shape, A.shape[1], x.new_empty(x.shape)
    x, dt, z, B, C = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (x, dt, z, B, C))
    reset = None if reset is None else reset.contiguous().view(torch.uint8)
    step_kernel[triton.cdiv(d, CHANNELS), b](
        x, dt, z, A.contiguous(), B, C, D, dt_bias, reset, h if h0 is None else h0.contiguous(), h, y,
        x.stride(0), dt.stride(0), 0 if z is None else z.stride(0), B.stride(0), C.stride(0), d, n,
        triton.next_power_of_2(n), CHANNELS, num_warps=1)
    return y


step.register_fake(lambda x, *_: x.new_empty(x.shape))


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe = None, z: Maybe = None,
                   dt_bias: Maybe = None, h0: Maybe = None, reset: Maybe = None) -> tuple[Tensor, Tensor]:
    """y (b, l, d) in x's dtype, and h (b, d, n) in fp32, the last state: the equation on top."""
    if not x.is_cuda and isinstance(scan_kernel, triton.JITFunction):
        raise ValueError(f'the Triton scan needs CUDA tensors and x is on {x.device}: use backend="auto", or '
                         "set TRITON_INTERPRET=1 before Python starts, which runs it on the CPU, slowly")
    inputs = x, dt, A, B, C, D, z, dt_bias, h0
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if x.shape[1] == 1 and not wanted:
        h = torch.zeros(x.shape[0], *A.shape, device=x.device)
        return step(x, dt, A, B, C, h, D, z, dt_bias, h0, reset), h
    y, h, _ = scan(*inputs, reset)
    return y, h


if __name__ == "__main__":
    from tests.triton_report import main    # compiles the kernels above and counts their instructions
    main()
