"""The selective scan for a GPU: the recurrence of scan.py, as Triton kernels.

    delta_t = softplus(dt_t + dt_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t      h_{t-1} is 0 where reset_t is set
    y_t = (C_t . h_t + D x_t) SiLU(z_t)

A Triton program is one warp here: 32 threads in lockstep. A thread holds the n states of one
channel in registers and walks through time. So no tensor (b, l, d, n) ever lies in memory.

One sequence of the 7B has 8192 channels, or 256 warps. An H100 has room for more than 2000. So
time is cut into chunks, and all chunks are walked at once. That is possible because a chunk does
only one thing to the state that enters it, h_end = decay * h_start + local:

    pass 1   reduce_kernel   every chunk at once, from h = 0: its decay and its local
    pass 2   carry_kernel    chunk after chunk: the state that enters each
    pass 3   scan_kernel     every chunk at once, from that state: y

A batch that fills the GPU by itself is not cut and needs pass 3 only. The backward is three such
passes from the end of time: replay_kernel, carry_kernel, adjoint_kernel. One token takes
step_kernel. `python scan_triton.py` compiles them all for an H100, with or without a GPU, and
estimates their time, which was never measured. It prints the registers, on which it depends how
many warps fit. Next: mamba.py.

Sizes: b batch, l length, d channels, n states of a channel.
"""
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    error = SystemExit if __name__ == "__main__" else ImportError
    raise error('the Triton scan needs Triton: pip install triton, or use backend="auto"') from None

CHANNELS = tl.constexpr(32)     # of a program: one for each thread
STEPS = 4                       # a block of steps is loaded at once, before the first is computed
KEEP = 256                      # the forward keeps a state at least every so many steps
SCRATCH = 500 << 20             # bytes: the backward takes as many chunks at a time as fit in here
WARPS = 21                      # about so many fit on an H100's multiprocessor in pass 3
LOG2E = tl.constexpr(1.4426950408889634)    # exp(v) = exp2(v log2(e)), and a GPU has exp2

# Triton compiles a kernel anew for an argument of 1 and for multiples of 16. Not for these.
LENGTHS = ["l", "since", "chunk", "chunks", "keep"]
# If Triton knew that these addresses are multiples of 16, it would give a thread 4 channels and
# n / 4 states of each. A sum over n would then pass between threads.
STATES = ["A_ptr", "start_ptr", "h_ptr", "kept_ptr", "blocks_ptr", "local_ptr", "decay_ptr"]
channel_a_thread = triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=STATES)


# What the kernels share.


@triton.jit
def softplus(v):
    # log(1 + exp(v)) = max(v, 0) + log(1 + e) with e = exp(-|v|), which never overflows. The
    # series of log(1 + e) = 2 artanh(e / (2 + e)) keeps the digits of a small e.
    e = tl.exp2(tl.abs(v) * -LOG2E)
    r = e / (2 + e)
    q = r * r
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(v, 0) + 2 * r * series


@triton.jit
def decay_in(time, A, reset):
    # exp(time A), (n, CHANNELS). A was multiplied by log2(e). A reset adds -inf to the exponent:
    # 2^-inf is 0, and so nothing is left of the state.
    return tl.exp2(time[None, :] * A + reset)


@triton.jit
def find_chunk(l, since, chunk, chunks, d):
    # A sequence has `chunks` chunks of `chunk` steps, from step `since` on. The program's is the
    # k-th of all sequences: an int64, because offsets are made from it, and b * l * d passes 2^31.
    k = (tl.program_id(0) // tl.cdiv(d, CHANNELS)).to(tl.int64)
    start = since + (k % chunks).to(tl.int32) * chunk
    return k, k // chunks, start, tl.minimum(start + chunk, l)


@triton.jit
def find_channels(d, n):
    # The program's channels c, a power of 2 of states i, and where both lie in a tensor (n, d). In
    # this order, neighbouring threads read neighbours.
    c = tl.program_id(0) % tl.cdiv(d, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, triton.next_power_of_2(n))
    return c, i, i[:, None] * d + c[None, :], (i < n)[:, None] & (c < d)[None, :]


@triton.jit
def load(ptr, at, mask, other=0.0):
    return tl.load(ptr + at, mask, other).to(tl.float32)


@triton.jit
def load_rows(ptr, row, left, c, d, STEPS, other=0.0):
    # A block: STEPS rows of a tensor (b, l, d), if it is not None. `left` of them are in the chunk.
    rows = ()
    if ptr is not None:
        for s in tl.static_range(STEPS):
            rows += (load(ptr, (row + s) * d + c, s < tl.where(c < d, left, 0), other),)
    return rows


@triton.jit
def store_rows(ptr, rows, row, left, c, d, STEPS):
    for s in tl.static_range(STEPS):
        tl.store(ptr + (row + s) * d + c, rows[s], s < tl.where(c < d, left, 0))


@triton.jit
def load_reset(ptr, at, mask):
    return 0.0 if ptr is None else tl.where(tl.load(ptr + at, mask, False), float("-inf"), 0.0)


@triton.jit
def load_BC(ptr, row, s, left, i, n):
    # Row s of a block of (b, l, n). After the end it is the last one again, and gets multiplied by
    # 0. That is less work than a mask.
    return load(ptr + row * n, tl.minimum(s, left - 1) * n + i, i < n)


# The forward. Inputs: x, dt, z (b, l, d); B, C (b, l, n); A (n, d); D, bias (d,); reset (b, l) of
# bool. z and reset may be None.


# Pass 1:   h = 0
#           for t in the chunk:
#               h = exp(delta_t A) h + delta_t B_t x_t
#           local = h
#           decay = the product of all exp(delta_t A) = exp(A * the sum of all delta_t)
@channel_a_thread
def reduce_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, reset_ptr,
                  decay_ptr, local_ptr,     # (b, chunks, n, d) out
                  l, chunk, chunks, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, sequence, start, end = find_chunk(l, 0, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A = load(A_ptr, tile, inside) * LOG2E
    bias = load(bias_ptr, c, c < d)
    h = tl.zeros_like(A)
    time = tl.zeros_like(bias)
    resets = 0.0
    for t in range(start, end, STEPS):
        row = sequence * l + t
        left = end - t
        xs = load_rows(x_ptr, row, left, c, d, STEPS)
        # softplus(-inf) is 0: a step after the end takes no time and changes nothing.
        dts = load_rows(dt_ptr, row, left, c, d, STEPS, float("-inf"))
        for s in tl.static_range(STEPS):
            B = load_BC(B_ptr, row, s, left, i, n)
            delta = softplus(dts[s] + bias)
            reset = load_reset(reset_ptr, row + s, s < left)
            h = decay_in(delta, A, reset) * h + (delta * xs[s])[None, :] * B[:, None]
            time += delta
            resets += reset
    tl.store(decay_ptr + k * n * d + tile, decay_in(time, A, resets), inside)
    tl.store(local_ptr + k * n * d + tile, h, inside)


# Pass 2, for the backward too:   for each chunk: h = decay * h + local
# A state is a row of size = n * d numbers here.
@triton.jit(do_not_specialize=LENGTHS)
def carry_kernel(h_ptr,             # (b, size): what enters the first, then what leaves the last
                 decay_ptr,         # (b, chunks, size)
                 local_ptr,         # (b, chunks, size), overwritten with what enters each chunk
                 chunks, size: tl.constexpr, FROM_END: tl.constexpr):
    sequence = (tl.program_id(0) // tl.cdiv(size, CHANNELS)).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(size, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    h = load(h_ptr, sequence * size + i, i < size)
    for step in range(chunks):
        k = chunks - 1 - step if FROM_END else step
        at = (sequence * chunks + k) * size + i
        decay = load(decay_ptr, at, i < size)
        local = load(local_ptr, at, i < size)
        tl.store(local_ptr + at, h, i < size)
        h = decay * h + local
    tl.store(h_ptr + sequence * size + i, h, i < size)


# Pass 3:   h = the state that enters the chunk
#           for t in the chunk:
#               h = exp(delta_t A) h + delta_t B_t x_t
#               y_t = (C_t . h + D x_t) SiLU(z_t)
# For the backward, h is kept at the chunk's start and then every `keep` steps.
@channel_a_thread
def scan_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr,
                start_ptr,          # (b, chunks, n, d): what enters each chunk
                y_ptr,              # (b, l, d) out
                kept_ptr,           # (b, l / keep rounded up, n, d) out
                h_ptr,              # (b, n, d) out: the last state
                l, chunk, chunks, keep, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, sequence, start, end = find_chunk(l, 0, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    h = load(start_ptr + k * n * d, tile, inside)
    kept = sequence * tl.cdiv(l, keep) + start // keep
    for keep_start in range(start, end, keep):
        tl.store(kept_ptr + kept * n * d + tile, h, inside)
        kept += 1
        for t in range(keep_start, tl.minimum(keep_start + keep, end), STEPS):
            row = sequence * l + t
            left = end - t
            xs = load_rows(x_ptr, row, left, c, d, STEPS)
            dts = load_rows(dt_ptr, row, left, c, d, STEPS, float("-inf"))
            zs = load_rows(z_ptr, row, left, c, d, STEPS)
            ys = ()
            for s in tl.static_range(STEPS):
                B = load_BC(B_ptr, row, s, left, i, n)
                C = load_BC(C_ptr, row, s, left, i, n)
                delta = softplus(dts[s] + bias)
                reset = load_reset(reset_ptr, row + s, s < left)
                h = decay_in(delta, A, reset) * h + (delta * xs[s])[None, :] * B[:, None]
                y = tl.sum(C[:, None] * h, 0) + D * xs[s]
                if z_ptr is not None:
                    y *= zs[s] * tl.sigmoid(zs[s])
                ys += (y,)
            store_rows(y_ptr, ys, row, left, c, d, STEPS)   # last, so that no load waits for it
    if end == l:
        tl.store(h_ptr + sequence * n * d + tile, h, inside)


# One token. The state is the model's own, and lies (d, n). So does A here.
@triton.jit
def step_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr,
                h_ptr,              # (b, d, n), overwritten
                y_ptr,              # (b, 1, d) out
                d: tl.constexpr, n: tl.constexpr):
    sequence = (tl.program_id(0) // tl.cdiv(d, CHANNELS)).to(tl.int64)
    c, i, _, inside = find_channels(d, n)
    tile = c[None, :] * n + i[:, None]
    A = load(A_ptr, tile, inside) * LOG2E
    h = load(h_ptr + sequence * d * n, tile, inside)
    B = load(B_ptr + sequence * n, i, i < n)
    C = load(C_ptr + sequence * n, i, i < n)
    x = load(x_ptr + sequence * d, c, c < d)
    dt = load(dt_ptr + sequence * d, c, c < d)
    delta = softplus(dt + load(bias_ptr, c, c < d))
    reset = load_reset(reset_ptr, sequence, True)
    h = decay_in(delta, A, reset) * h + (delta * x)[None, :] * B[:, None]
    y = tl.sum(C[:, None] * h, 0) + load(D_ptr, c, c < d) * x
    if z_ptr is not None:
        z = load(z_ptr + sequence * d, c, c < d)
        y *= z * tl.sigmoid(z)
    tl.store(h_ptr + sequence * d * n + tile, h, inside)
    tl.store(y_ptr + sequence * d + c, y, c < d)


# The backward. dh_t is the loss's gradient in h_t, and so for the other names. With
#     g_t = dy_t SiLU(z_t),   w_t = delta_t x_t,   u_t = exp(delta_t A) h_{t-1}
# the forward is h_t = u_t + w_t B_t. y_t and h_{t+1} read h_t, so dh is a recurrence as well:
#     dh_t = C_t g_t + exp(delta_{t+1} A) dh_{t+1}
# The other gradients follow:
#     dC_t = sum over d of g_t h_t                    dB_t = sum over d of w_t dh_t
#     dw_t = sum over n of B_t dh_t                   du_t = u_t dh_t, the gradient in delta_t A
#     dx_t = delta_t dw_t + D g_t                     dA = sum over t of delta_t du_t
#     ddelta_t = x_t dw_t + sum over n of A du_t      ddt_t = ddelta_t sigmoid(dt_t + bias)
#     dD = sum over t of x_t g_t                      dbias = sum over t of ddt_t
# h cannot be run backwards, which would divide by decays. So it is computed once more from the
# states that the forward has kept. They are the starts of the backward's chunks.


# Pass 1:   h = the state that enters the chunk,   dh = 0,   decay = 1
#           for t in the chunk:
#               h = exp(delta_t A) h + delta_t B_t x_t
#               dz_t = dy_t (C_t . h + D x_t) SiLU'(z_t)
#               decay = decay exp(delta_t A)
#               dh = dh + decay C_t g_t
# dh is what the chunk adds to the gradient at its start. Pass 3 needs the h of every block.
@channel_a_thread
def replay_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr,
                  start_ptr,        # (b, chunks, n, d): what enters each chunk
                  dy_ptr,           # (b, l, d)
                  dz_ptr,           # (b, l, d) out; None without z
                  blocks_ptr,       # (b, chunks * chunk / STEPS, n, d) out: what enters each block
                  decay_ptr, local_ptr,     # (b, chunks, n, d) out: decay and dh
                  l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, sequence, start, end = find_chunk(l, since, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    h = load(start_ptr + k * n * d, tile, inside)
    dh = tl.zeros_like(A)
    decay = tl.full(A.shape, 1.0, tl.float32)
    block = k * (chunk // STEPS)
    for t in range(start, end, STEPS):
        tl.store(blocks_ptr + block * n * d + tile, h, inside)
        block += 1
        row = sequence * l + t
        left = end - t
        xs = load_rows(x_ptr, row, left, c, d, STEPS)
        dts = load_rows(dt_ptr, row, left, c, d, STEPS, float("-inf"))
        zs = load_rows(z_ptr, row, left, c, d, STEPS)
        dys = load_rows(dy_ptr, row, left, c, d, STEPS)
        dzs = ()
        for s in tl.static_range(STEPS):
            B = load_BC(B_ptr, row, s, left, i, n)
            C = load_BC(C_ptr, row, s, left, i, n)
            delta = softplus(dts[s] + bias)
            a = decay_in(delta, A, load_reset(reset_ptr, row + s, s < left))
            h = a * h + (delta * xs[s])[None, :] * B[:, None]
            g = dys[s]
            if z_ptr is not None:
                y = tl.sum(C[:, None] * h, 0) + D * xs[s]
                gate = tl.sigmoid(zs[s])
                dzs += (dys[s] * y * gate * (1 + zs[s] * (1 - gate)),)
                g *= zs[s] * gate
            decay *= a
            dh += decay * C[:, None] * g[None, :]
        if z_ptr is not None:
            store_rows(dz_ptr, dzs, row, left, c, d, STEPS)
    tl.store(decay_ptr + k * n * d + tile, decay, inside)
    tl.store(local_ptr + k * n * d + tile, dh, inside)


# Pass 3:   dh = what enters the chunk from its end
#           for each block, from the last:
#               for t in the block:
#                   u_t, w_t, from the h that enters the block
#               for t in the block, from the last:
#                   dh = dh + C_t g_t
#                   the other gradients of step t
#                   dh = exp(delta_t A) dh
# Sums over d pass between threads in any case. So Triton may know the addresses here.
@triton.jit(do_not_specialize=LENGTHS)
def adjoint_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, z_ptr, reset_ptr,
                   dy_ptr,                  # (b, l, d)
                   blocks_ptr,              # (b, chunks * chunk / STEPS, n, d)
                   dh_ptr,                  # (b, chunks, n, d): what enters a chunk from its end
                   dx_ptr, ddt_ptr,         # (b, l, d) out
                   dB_ptr, dC_ptr,          # (b, chunks, tiles, chunk, n) out: of these channels
                   dA_ptr,                  # (b, chunks, n, d) out: of these steps
                   dD_ptr, dbias_ptr,       # (b, chunks, d) out: of these steps
                   l, since, chunk, chunks, d: tl.constexpr, n: tl.constexpr, STEPS: tl.constexpr):
    k, sequence, start, end = find_chunk(l, since, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    dh = load(dh_ptr + k * n * d, tile, inside)
    dA = tl.zeros_like(A)
    dD = tl.zeros_like(D)
    dbias = tl.zeros_like(bias)
    blocks = tl.cdiv(end - start, STEPS)
    for done in range(blocks):
        block = blocks - 1 - done
        t = start + block * STEPS
        row = sequence * l + t
        left = end - t
        xs = load_rows(x_ptr, row, left, c, d, STEPS)
        dts = load_rows(dt_ptr, row, left, c, d, STEPS, float("-inf"))
        zs = load_rows(z_ptr, row, left, c, d, STEPS)
        dys = load_rows(dy_ptr, row, left, c, d, STEPS)
        h = load(blocks_ptr + (k * (chunk // STEPS) + block) * n * d, tile, inside)
        us = ()
        for s in tl.static_range(STEPS):
            B = load_BC(B_ptr, row, s, left, i, n)
            delta = softplus(dts[s] + bias)
            us += (decay_in(delta, A, load_reset(reset_ptr, row + s, s < left)) * h,)
            h = us[s] + (delta * xs[s])[None, :] * B[:, None]
        for s in tl.static_range(STEPS - 1, -1, -1):
            B = load_BC(B_ptr, row, s, left, i, n)
            C = load_BC(C_ptr, row, s, left, i, n)
            # After the end delta is 0 in any case. The mask hides from the compiler that the decay
            # below was computed above. It would keep all of those, and run out of registers.
            delta = tl.where(s < left, softplus(dts[s] + bias), 0.0)
            w = delta * xs[s]
            g = dys[s]
            if z_ptr is not None:
                g *= zs[s] * tl.sigmoid(zs[s])
            h = us[s] + w[None, :] * B[:, None]
            dh += C[:, None] * g[None, :]
            sums = (tl.program_id(0).to(tl.int64) * chunk + block * STEPS + s) * n + i
            tl.store(dB_ptr + sums, tl.sum(dh * w[None, :], 1), i < n)
            tl.store(dC_ptr + sums, tl.sum(h * g[None, :], 1), i < n)
            du = dh * us[s]
            dA += du * delta[None, :]
            dw = tl.sum(dh * B[:, None], 0)
            ddelta = dw * xs[s] + tl.sum(du * A, 0) / LOG2E
            ddt = ddelta * tl.sigmoid(dts[s] + bias)
            dD += xs[s] * g
            dbias += ddt
            exists = s < tl.where(c < d, left, 0)
            tl.store(dx_ptr + (row + s) * d + c, delta * dw + D * g, exists)
            tl.store(ddt_ptr + (row + s) * d + c, ddt, exists)
            dh *= decay_in(delta, A, load_reset(reset_ptr, row + s, s < left))
    tl.store(dA_ptr + k * n * d + tile, dA, inside)
    tl.store(dD_ptr + k * d + c, dD, c < d)
    tl.store(dbias_ptr + k * d + c, dbias, c < d)


# What PyTorch sees: three operators that torch.compile does not look into. Each takes these last.
INPUTS = ("Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor bias, Tensor? z, "
          "Tensor? reset")


def launch(kernel, rows: int, width: int, *args, **sizes) -> None:
    """Run a program for each row and each CHANNELS of the width."""
    grid = (rows * triton.cdiv(width, CHANNELS),)   # one axis, because the others end at 65535
    with torch.cuda.device_of(args[0]):             # Triton would take the current GPU
        kernel[grid](*args, **sizes, num_warps=1, enable_fp_fusion=True)


def chunk_count(b: int, l: int, d: int, sm_count: int) -> int:
    """How many chunks to cut time into."""
    warps = max(1, b * triton.cdiv(d, CHANNELS))
    # Chunks are walked twice. One is walked once, which is faster if it fills half of the GPU.
    if warps >= sm_count * WARPS / 2:
        return 1
    # Fill the GPU three times over. Then it matters little if the last warps do not fill it.
    wanted = triton.cdiv(3 * sm_count * WARPS, warps)
    # After 128 steps, a state of n = 16 in fp32 is a quarter of the chunk's x in bf16.
    return max(1, min(wanted, l // 128))


def cut_time(x: Tensor) -> tuple[int, int, int]:
    """How many chunks, the steps of one, and how many of these lie between two kept states."""
    b, l, d = x.shape
    sm_count = 132                                  # an H100's
    if x.is_cuda:
        sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count
    chunk = triton.cdiv(l, chunk_count(b, l, d, sm_count))
    parts = triton.cdiv(chunk, KEEP)
    keep = triton.cdiv(chunk, parts * STEPS) * STEPS
    chunk = parts * keep
    return triton.cdiv(l, chunk), chunk, keep


def block_steps(n: int) -> int:
    """Steps of a block in the backward, which holds all its states in registers. More than 32
    states of a channel go to slower memory even so."""
    if n <= 16:
        return STEPS
    return 2 if n <= 32 else 1


def contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


@torch.library.custom_op("falcon_mamba::scan", mutates_args=(),
                         schema=f"(Tensor h0, {INPUTS}) -> (Tensor, Tensor, Tensor)")
def scan(h0, *inputs):
    """y, the last h and the states kept for the backward. h0 and h are (b, n, d), A is (n, d)."""
    x, dt, A, B, C, D, bias, z, reset = inputs = contiguous(*inputs)
    b, n, d = h0.shape
    chunks, chunk, keep = cut_time(x)
    sizes = dict(l=x.shape[1], chunk=chunk, chunks=chunks, d=d, n=n, STEPS=STEPS)
    y, h, kept = empty_outputs(h0, x)
    h.copy_(h0)
    start = h
    if chunks > 1:
        start = h.new_empty(b, chunks, n, d)        # first local, then what enters each chunk
        decay = h.new_empty(b, chunks, n, d)
        launch(reduce_kernel, b * chunks, d, x, dt, A, B, bias, reset, decay, start, **sizes)
        launch(carry_kernel, b, n * d, h, decay, start, chunks, n * d, False)
    launch(scan_kernel, b * chunks, d, *inputs, start, y, kept, h, keep=keep, **sizes)
    return y, h, kept


@scan.register_fake
def empty_outputs(h0, x, *_):
    b, n, d = h0.shape
    _, _, keep = cut_time(x)
    kept = h0.new_empty(b, triton.cdiv(x.shape[1], keep), n, d)
    return x.new_empty(x.shape), h0.new_empty(h0.shape), kept


@torch.library.custom_op("falcon_mamba::scan_backward", mutates_args=(),
                         schema=f"(Tensor dy, Tensor dh, Tensor kept, {INPUTS}) -> Tensor[]")
def scan_backward(dy, dh, kept, *inputs):
    """The gradients of h0 and of the inputs, without those of reset and of a z that is None."""
    dy, *inputs = contiguous(dy, *inputs)
    grads = empty_grads(dy, dh, kept, *inputs)
    dh0, dx, ddt, dA, dB, dC, dD, dbias = grads[:8]
    dh0.copy_(dh)
    for sum_of_chunks in (dA, dD, dbias):
        sum_of_chunks.zero_()
    b, n, d = dh.shape
    _, _, chunk = cut_time(dy)
    blocks_bytes = 4 * b * chunk // block_steps(n) * n * d
    sums_bytes = 4 * b * chunk * triton.cdiv(d, CHANNELS) * n * 2
    group = max(1, SCRATCH // max(1, blocks_bytes + sums_bytes))
    for k in reversed(range(0, kept.shape[1], group)):
        backward_chunks(k * chunk, chunk, kept[:, k:k + group].contiguous(), dy, inputs, grads)
    return grads


def backward_chunks(since, chunk, start, dy, inputs, grads) -> None:
    """Fill in the gradients of chunks that begin at step `since`, with the states `start`."""
    dh0, dx, ddt, dA, dB, dC, dD, dbias = grads[:8]
    dz = grads[8] if len(grads) > 8 else None
    b, chunks, n, d = start.shape
    rows = b * chunks
    steps = block_steps(n)
    sizes = dict(l=dy.shape[1], since=since, chunk=chunk, chunks=chunks, d=d, n=n, STEPS=steps)
    blocks = start.new_empty(b, chunks * chunk // steps, n, d)
    decay = start.new_empty(b, chunks, n, d)
    local = start.new_empty(b, chunks, n, d)        # first local, then what enters each chunk
    launch(replay_kernel, rows, d, *inputs, start, dy, dz, blocks, decay, local, **sizes)
    launch(carry_kernel, b, n * d, dh0, decay, local, chunks, n * d, True)
    dBs = start.new_empty(b, chunks, triton.cdiv(d, CHANNELS), chunk, n)
    dCs = torch.empty_like(dBs)
    dAs = start.new_empty(b, chunks, n, d)
    dDs = start.new_empty(b, chunks, d)
    dbiases = start.new_empty(b, chunks, d)
    launch(adjoint_kernel, rows, d, *inputs, dy, blocks, local,
           dx, ddt, dBs, dCs, dAs, dDs, dbiases, **sizes)
    end = min(dy.shape[1], since + chunks * chunk)
    dB[:, since:end] = dBs.sum(2).flatten(1, 2)[:, :end - since]
    dC[:, since:end] = dCs.sum(2).flatten(1, 2)[:, :end - since]
    dA += dAs.sum((0, 1))
    dD += dDs.sum((0, 1))
    dbias += dbiases.sum((0, 1))


@scan_backward.register_fake
def empty_grads(dy, dh, kept, *inputs):
    return [t.new_empty(t.shape) for t in (dh, *inputs[:-1]) if t is not None]


def setup_context(ctx, inputs, output):
    y, h, kept = output
    ctx.save_for_backward(kept, *inputs[1:])        # h0 is in kept


def backward(ctx, dy, dh, dkept):
    grads = scan_backward(dy, dh, *ctx.saved_tensors)
    return *grads, *[None] * (10 - len(grads))      # of z, if it is None, and reset


scan.register_autograd(backward, setup_context=setup_context)


@torch.library.custom_op("falcon_mamba::step", mutates_args=("h",),
                         schema=f"(Tensor(a!) h, {INPUTS}) -> Tensor")
def step(h, *inputs):
    """One token: returns y (b, 1, d) and overwrites the state h, (b, d, n). Here A is (d, n)."""
    if not h.is_contiguous() or h.dtype != torch.float32:
        raise ValueError("h is written in place: it must be fp32 and contiguous (b, d, n)")
    b, d, n = h.shape
    inputs = contiguous(*inputs)
    y = empty_step(h, *inputs)
    launch(step_kernel, b, d, *inputs, h, y, d=d, n=n)
    return y


@step.register_fake
def empty_step(h, x, *_):
    return x.new_empty(x.shape)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scan.selective_scan on a GPU: y (b, l, d) in x's dtype, the last h (b, d, n) in fp32."""
    if not x.is_cuda and isinstance(scan_kernel, triton.JITFunction):
        raise ValueError(f"the Triton scan needs CUDA tensors and x is on {x.device}: use "
                         'backend="auto", or set TRITON_INTERPRET=1 before Python starts, which '
                         "runs it on the CPU, slowly")
    b, l, d = x.shape
    if D is None:
        D = A.new_zeros(d)
    if dt_bias is None:
        dt_bias = A.new_zeros(d)
    if h0 is None:
        h0 = A.new_zeros(b, *A.shape)
    if l == 1 and not torch.is_grad_enabled():      # decoding
        h = h0.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return step(h, x, dt, A, B, C, D, dt_bias, z, reset), h
    A, B, C, D, dt_bias, h0 = (v.float() for v in (A, B, C, D, dt_bias, h0))
    y, h, _ = scan(h0.mT, x, dt, A.mT, B, C, D, dt_bias, z, reset)
    return y, h.mT.contiguous()


if __name__ == "__main__":
    from tests.triton_report import main
    main()
