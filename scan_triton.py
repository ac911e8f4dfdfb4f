"""The selective scan for a GPU: the recurrence of scan.py, as Triton kernels.

    delta_t = softplus(dt_t + dt_bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t      h_{t-1} is 0 where reset_t is set
    y_t = (C_t . h_t + D x_t) SiLU(z_t)

A kernel is run by many programs. A program is one warp here: 32 threads in lockstep. They hold the
states of 32 channels in registers, mostly a channel each, and walk through time. So no (b, l, d, n)
ever lies in memory.

One sequence of the 7B has 8192 channels, or 256 warps. An H100 has registers for 1000 to 3000. So
time is cut into chunks, and all chunks are walked at once. That is possible because a chunk does
only one thing to the state that enters it, h_end = decay * h_start + local:

    pass 1   reduce_kernel   every chunk at once, from h = 0: its decay and its local
    pass 2   carry_kernel    chunk after chunk: the state that enters each
    pass 3   scan_kernel     every chunk at once, from that state: y

The backward does the same to dh, from the end of time: replay_kernel, carry_kernel, adjoint_kernel.
A single chunk takes three launches too. Only scan.step, whose one token cannot be cut, takes one:
step_kernel.

`python scan_triton.py` compiles them all, with or without a GPU. It prints their registers and
their time on an H100, and that of a whole layer: estimated, and never measured. Next: mamba.py.

Sizes: b batch, l length, d channels, n numbers of state a channel.
"""
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    error = SystemExit if __name__ == "__main__" else ImportError
    raise error('the Triton scan needs Triton: pip install triton, or use backend="auto"') from None

# In steps. One state a chunk is kept: 34 MB, not 4.3 GB, for 8192 tokens of a layer of the 7B. That
# is 16 x 4 bytes for each channel and chunk; its x has 128 x 2.
CHUNK = 128
STEPS = 4               # of a block, which is a stretch of time: loaded whole, then computed
SCRATCH = 400 << 20     # bytes at most, in the backward, for the states that enter blocks
CHANNELS = tl.constexpr(32)                 # of a program: one a thread; kernels need a constexpr
LOG2E = tl.constexpr(1.4426950408889634)    # a GPU has exp2, and exp(v) = exp2(v log2(e))

# What the kernels share. tl.load(ptr + at, mask, other) reads the numbers at the offsets `at`, or
# takes `other` where the mask is false. A constexpr is known when a kernel is compiled. A
# tl.static_range is unrolled then, and a tuple that grows in it lies in registers.
@triton.jit
def softplus(v):
    # log(1 + exp(v)) = max(v, 0) + log(1 + e) with e = exp(-|v|), which never overflows. There is
    # no tl.log1p, but log(1 + e) = 2 artanh(r) = 2 r (1 + r^2 / 3 + r^4 / 5 + ...). Here r <= 1/3,
    # and so seven terms are enough for fp32.
    e = tl.exp2(tl.abs(v) * -LOG2E)
    r = e / (2 + e)
    q = r * r
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13))
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.maximum(v, 0) + 2 * r * series

@triton.jit
def find_chunk(l, first, chunk, chunks, d):
    # -> k, a chunk's number among all, its sequence, its first step and its end. Programs count
    # groups of 32 channels first, then chunks, then sequences. `first` is where chunk 0 starts.
    # k is int64, because offsets are made from it and may pass 2^31.
    k = (tl.program_id(0) // tl.cdiv(d, CHANNELS)).to(tl.int64)
    start = first + (k % chunks).to(tl.int32) * chunk
    return k, k // chunks, start, tl.minimum(start + chunk, l)

@triton.jit
def find_channels(d, n):
    # c: the program's channels (not scan.py's c). i: the n numbers, padded to a power of 2. tile:
    # where they lie in a tensor (n, d), so that neighbouring threads read neighbours. inside: which
    # of them exist.
    c = tl.program_id(0) % tl.cdiv(d, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, triton.next_power_of_2(n))
    tile = i[:, None] * d + c[None, :]
    inside = (i < n)[:, None] & (c < d)[None, :]
    return c, i, tile, inside

@triton.jit
def load(ptr, at, mask, other=0.0):
    return tl.load(ptr + at, mask, other).to(tl.float32)

@triton.jit
def load_rows(ptr, row, rest, c, d, BLOCK, other=0.0):
    # A block of a tensor (b, l, d), if it is not None. A row is one step of one sequence. `rest` is
    # how many are left of the chunk. For dt `other` is -inf: past the end come steps of no time.
    # The mask is (j < rest) & (c < d), in a form that Triton's interpreter gets right.
    rows = ()
    if ptr is not None:
        for j in tl.static_range(BLOCK):
            rows += (load(ptr, (row + j) * d + c, j < tl.where(c < d, rest, 0), other),)
    return rows

@triton.jit
def store_rows(ptr, rows, row, rest, c, d, BLOCK):
    for j in tl.static_range(BLOCK):
        tl.store(ptr + (row + j) * d + c, rows[j], j < tl.where(c < d, rest, 0))

@triton.jit
def load_BC(ptr, row, j, rest, i, n):
    # Step j of a block of (b, l, n). Past the end the last row is read: delta x and ds are 0 there.
    return load(ptr + row * n, tl.minimum(j, rest - 1) * n + i, i < n)

@triton.jit
def load_forget(ptr, at, mask):
    # -inf at a reset, else 0: added to an exponent it makes the decay 0 or leaves it.
    return 0.0 if ptr is None else tl.where(tl.load(ptr + at, mask, False), float("-inf"), 0.0)

@triton.jit
def advance(h, x, dt, A2, B, forget):
    # A step: the next h, (n, CHANNELS), and `fade`, which is scan.py's decay. Here `decay` is a
    # chunk's. A2 is A log2(e).
    delta = softplus(dt)
    fade = tl.exp2(delta[None, :] * A2 + forget)
    return fade * h + (delta * x)[None, :] * B[:, None], fade

# The forward. Inputs: x, dt, z (b, l, d); B, C (b, l, n); A (n, d); D, bias (d,); reset (b, l) of
# bool. z and reset may be None. BLOCK is the steps of a block.

# Of these arguments Triton makes no variants, for a size of 1 and for multiples of 16.
LENGTHS = ["l", "first", "chunk", "chunks"]
# Told that 16 divides an address, Triton loads 16 bytes, or 4 channels, a thread. Then 8 threads
# hold all 32 channels, so n is cut among 4, which must exchange every sum over n. Not told, each
# thread has a whole channel.
STATES = ["A_ptr", "start_ptr", "h_ptr", "blocks_ptr", "local_ptr", "decay_ptr"]
thread_per_channel = triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=STATES)

# Pass 1:   h = 0,   decay = 1
#           for t in the chunk:
#               h = exp(delta_t A) h + delta_t B_t x_t
#               decay = decay exp(delta_t A)
#           local = h
@thread_per_channel
def reduce_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, reset_ptr,
                  decay_ptr, local_ptr,     # (b, chunks, n, d) out
                  l, chunk, chunks, d: tl.constexpr, n: tl.constexpr, BLOCK: tl.constexpr):
    k, sequence, start, end = find_chunk(l, 0, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A2 = load(A_ptr, tile, inside) * LOG2E
    bias = load(bias_ptr, c, c < d)
    h = tl.zeros_like(A2)
    decay = tl.full(A2.shape, 1.0, tl.float32)
    for t in range(start, end, BLOCK):
        row = sequence * l + t
        rest = end - t
        xs = load_rows(x_ptr, row, rest, c, d, BLOCK)
        dts = load_rows(dt_ptr, row, rest, c, d, BLOCK, float("-inf"))
        for j in tl.static_range(BLOCK):
            B = load_BC(B_ptr, row, j, rest, i, n)
            forget = load_forget(reset_ptr, row + j, j < rest)
            h, fade = advance(h, xs[j], dts[j] + bias, A2, B, forget)
            decay *= fade
    tl.store(decay_ptr + k * n * d + tile, decay, inside)
    tl.store(local_ptr + k * n * d + tile, h, inside)

# Pass 2, for the backward's dh too:   for each chunk: h = decay * h + local
# A state is taken as `size` = n * d separate numbers here.
@triton.jit(do_not_specialize=LENGTHS)
def carry_kernel(h_ptr,         # (b, size): what enters the first, then what leaves the last
                 decay_ptr,     # (b, chunks, size)
                 local_ptr,     # (b, chunks, size), overwritten with what enters each chunk
                 chunks, size: tl.constexpr, FROM_END: tl.constexpr):
    sequence = (tl.program_id(0) // tl.cdiv(size, CHANNELS)).to(tl.int64)
    i = tl.program_id(0) % tl.cdiv(size, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    h = load(h_ptr, sequence * size + i, i < size)
    for done in range(chunks):
        k = sequence * chunks + (chunks - 1 - done if FROM_END else done)
        decay = load(decay_ptr, k * size + i, i < size)
        local = load(local_ptr, k * size + i, i < size)
        tl.store(local_ptr + k * size + i, h, i < size)     # in place of local: what enters
        h = decay * h + local
    tl.store(h_ptr + sequence * size + i, h, i < size)

# Pass 3:   as pass 1, but h = the state that enters the chunk, and for each t
#               y_t = (C_t . h + D x_t) SiLU(z_t)
@thread_per_channel
def scan_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                start_ptr,      # (b, chunks, n, d): what enters each chunk
                y_ptr,          # (b, l, d) out
                l, chunk, chunks, d: tl.constexpr, n: tl.constexpr, BLOCK: tl.constexpr):
    k, sequence, start, end = find_chunk(l, 0, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A2 = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    h = load(start_ptr + k * n * d, tile, inside)
    for t in range(start, end, BLOCK):
        row = sequence * l + t
        rest = end - t
        xs = load_rows(x_ptr, row, rest, c, d, BLOCK)
        dts = load_rows(dt_ptr, row, rest, c, d, BLOCK, float("-inf"))
        zs = load_rows(z_ptr, row, rest, c, d, BLOCK)
        ys = ()
        for j in tl.static_range(BLOCK):
            B = load_BC(B_ptr, row, j, rest, i, n)
            C = load_BC(C_ptr, row, j, rest, i, n)
            forget = load_forget(reset_ptr, row + j, j < rest)
            h, _ = advance(h, xs[j], dts[j] + bias, A2, B, forget)
            y = tl.sum(C[:, None] * h, 0) + D * xs[j]
            if z_ptr is not None:
                y *= zs[j] * tl.sigmoid(zs[j])
            ys += (y,)
        store_rows(y_ptr, ys, row, rest, c, d, BLOCK)     # last, because no load may pass a store

# One token, with no reset. The state is the model's own, and lies (d, n). So does A here.
@triton.jit
def step_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
                h_ptr,          # (b, d, n), overwritten
                y_ptr,          # (b, 1, d) out
                d: tl.constexpr, n: tl.constexpr):
    sequence = (tl.program_id(0) // tl.cdiv(d, CHANNELS)).to(tl.int64)
    c, i, _, inside = find_channels(d, n)
    tile = c[None, :] * n + i[:, None]      # in (d, n)
    A2 = load(A_ptr, tile, inside) * LOG2E
    h = load(h_ptr + sequence * d * n, tile, inside)
    B = load(B_ptr + sequence * n, i, i < n)
    C = load(C_ptr + sequence * n, i, i < n)
    x = load(x_ptr + sequence * d, c, c < d)
    dt = load(dt_ptr + sequence * d, c, c < d) + load(bias_ptr, c, c < d)
    h, _ = advance(h, x, dt, A2, B, 0.0)
    y = tl.sum(C[:, None] * h, 0) + load(D_ptr, c, c < d) * x
    if z_ptr is not None:
        z = load(z_ptr + sequence * d, c, c < d)
        y *= z * tl.sigmoid(z)
    tl.store(h_ptr + sequence * d * n + tile, h, inside)
    tl.store(y_ptr + sequence * d + c, y, c < d)

# The backward. scan.py derives its formulas, above run_chunk, and has the same names:
#     w_t = delta_t x_t,   u_t = delta_t A,   s_t = C_t . h_t + D x_t,   ds_t = dy_t SiLU(z_t)
#     dh_t = C_t ds_t + exp(u_{t+1}) dh_{t+1}
# To run h backwards would be to divide by decays, which are nearly 0, or 0 at a reset. So h is
# computed again, from the state that enters the chunk, which the forward kept. In all, a state is
# computed four times: by reduce, scan, replay and adjoint.
# Number a chunk's steps 1, 2, 3 and let e_t be exp(u_t). It hands e_1 dh_1 to the chunk before it:
#     e_1 (C_1 ds_1 + e_2 (C_2 ds_2 + e_3 (C_3 ds_3 + what enters at the end)))
#     = (e_1 C_1 ds_1 + e_1 e_2 C_2 ds_2 + e_1 e_2 e_3 C_3 ds_3) + e_1 e_2 e_3 (what enters)
# No term of the first bracket needs a later step. So pass 1 adds them up forwards in time, in the
# walk that computes h. For dh, the bracket is the chunk's local, and e_1 e_2 e_3 is its decay.

# Pass 1:   h = the state that enters the chunk,   local = 0,   decay = 1
#           for t in the chunk:
#               h = exp(u_t) h + w_t B_t
#               dz_t = dy_t s_t SiLU'(z_t)      here, because it needs h and no dh
#               decay = decay exp(u_t)
#               local = local + decay C_t ds_t
# The h that enters each block is stored, because pass 3 takes blocks from the last to the first.
@thread_per_channel
def replay_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                  start_ptr,        # (b, chunks, n, d): what enters each chunk
                  dy_ptr,           # (b, l, d)
                  dz_ptr,           # (b, l, d) out; empty without z
                  blocks_ptr,       # (b, chunks, chunk / BLOCK, n, d) out: what enters each block
                  decay_ptr, local_ptr,     # (b, chunks, n, d) out
                  l, first, chunk, chunks, d: tl.constexpr, n: tl.constexpr, BLOCK: tl.constexpr):
    k, sequence, start, end = find_chunk(l, first, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A2 = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    h = load(start_ptr + k * n * d, tile, inside)
    local = tl.zeros_like(A2)
    decay = tl.full(A2.shape, 1.0, tl.float32)
    for t in range(start, end, BLOCK):
        slot = (k * chunk + t - start) // BLOCK
        tl.store(blocks_ptr + slot * n * d + tile, h, inside)
        row = sequence * l + t
        rest = end - t
        xs = load_rows(x_ptr, row, rest, c, d, BLOCK)
        dts = load_rows(dt_ptr, row, rest, c, d, BLOCK, float("-inf"))
        zs = load_rows(z_ptr, row, rest, c, d, BLOCK)
        dys = load_rows(dy_ptr, row, rest, c, d, BLOCK)
        dzs = ()
        for j in tl.static_range(BLOCK):
            B = load_BC(B_ptr, row, j, rest, i, n)
            C = load_BC(C_ptr, row, j, rest, i, n)
            forget = load_forget(reset_ptr, row + j, j < rest)
            h, fade = advance(h, xs[j], dts[j] + bias, A2, B, forget)
            ds = dys[j]
            if z_ptr is not None:
                s = tl.sum(C[:, None] * h, 0) + D * xs[j]
                gate = tl.sigmoid(zs[j])
                dzs += (dys[j] * s * gate * (1 + zs[j] * (1 - gate)),)
                ds *= zs[j] * gate
            decay *= fade
            local += decay * C[:, None] * ds[None, :]
        if z_ptr is not None:
            store_rows(dz_ptr, dzs, row, rest, c, d, BLOCK)
    tl.store(decay_ptr + k * n * d + tile, decay, inside)
    tl.store(local_ptr + k * n * d + tile, local, inside)

# Pass 2:   carry_kernel, from the last chunk
# Pass 3:   dh = what enters the chunk at its end
#           for each block, from the last:
#               for t in the block:
#                   faded_t = exp(u_t) h_{t-1}, from the h that enters the block
#               for t in the block, from the last:
#                   dh = dh + C_t ds_t
#                   the other gradients of step t
#                   dh = exp(u_t) dh
# It is no thread_per_channel, because its sums over d pass between threads anyway.
@triton.jit(do_not_specialize=LENGTHS)
def adjoint_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, reset_ptr,
                   dy_ptr,             # (b, l, d)
                   blocks_ptr,         # (b, chunks, chunk / BLOCK, n, d)
                   dh_ptr,             # (b, chunks, n, d): what enters each chunk at its end
                   dx_ptr, ddt_ptr,    # (b, l, d) out
                   dB_ptr, dC_ptr,     # (b, chunks, d / 32, chunk, n) out: sums over 32 channels
                   dA_ptr,             # (b, chunks, n, d) out: sum over the chunk
                   dD_ptr, dbias_ptr,  # (b, chunks, d) out: sums over the chunk
                   l, first, chunk, chunks, d: tl.constexpr, n: tl.constexpr, BLOCK: tl.constexpr):
    k, sequence, start, end = find_chunk(l, first, chunk, chunks, d)
    c, i, tile, inside = find_channels(d, n)
    A2 = load(A_ptr, tile, inside) * LOG2E
    D = load(D_ptr, c, c < d)
    bias = load(bias_ptr, c, c < d)
    dh = load(dh_ptr + k * n * d, tile, inside)
    dA = tl.zeros_like(A2)
    dD = tl.zeros_like(D)
    dbias = tl.zeros_like(bias)
    last = start + (end - start - 1) // BLOCK * BLOCK
    for t in range(last, start - 1, -BLOCK):
        row = sequence * l + t
        rest = end - t
        xs = load_rows(x_ptr, row, rest, c, d, BLOCK)
        dts = load_rows(dt_ptr, row, rest, c, d, BLOCK, float("-inf"))
        zs = load_rows(z_ptr, row, rest, c, d, BLOCK)
        dys = load_rows(dy_ptr, row, rest, c, d, BLOCK)
        slot = (k * chunk + t - start) // BLOCK
        h = load(blocks_ptr + slot * n * d, tile, inside)
        faded = ()
        for j in tl.static_range(BLOCK):
            B = load_BC(B_ptr, row, j, rest, i, n)
            forget = load_forget(reset_ptr, row + j, j < rest)
            following, fade = advance(h, xs[j], dts[j] + bias, A2, B, forget)
            faded += (fade * h,)
            h = following
        for j in tl.static_range(BLOCK - 1, -1, -1):
            B = load_BC(B_ptr, row, j, rest, i, n)
            C = load_BC(C_ptr, row, j, rest, i, n)
            # The mask changes nothing: past the end delta is 0 anyway. But without it the compiler
            # sees the delta of above again, and keeps each `fade`, in too many registers.
            delta = tl.where(j < rest, softplus(dts[j] + bias), 0.0)
            w = delta * xs[j]
            ds = dys[j]
            if z_ptr is not None:
                ds *= zs[j] * tl.sigmoid(zs[j])
            h = faded[j] + w[None, :] * B[:, None]      # once more: cheaper than to keep it
            dh += C[:, None] * ds[None, :]
            # This writes past the end too, which backward_chunks cuts off.
            at = (tl.program_id(0).to(tl.int64) * chunk + t - start + j) * n + i
            tl.store(dB_ptr + at, tl.sum(dh * w[None, :], 1), i < n)
            tl.store(dC_ptr + at, tl.sum(h * ds[None, :], 1), i < n)
            du = dh * faded[j]
            dA += du * delta[None, :]
            dw = tl.sum(dh * B[:, None], 0)
            ddelta = dw * xs[j] + tl.sum(du * A2, 0) / LOG2E    # A2 / LOG2E is A
            ddt = ddelta * tl.sigmoid(dts[j] + bias)
            dD += xs[j] * ds
            dbias += ddt
            exists = j < tl.where(c < d, rest, 0)
            tl.store(dx_ptr + (row + j) * d + c, delta * dw + D * ds, exists)
            tl.store(ddt_ptr + (row + j) * d + c, ddt, exists)
            forget = load_forget(reset_ptr, row + j, j < rest)
            dh *= tl.exp2(delta[None, :] * A2 + forget)
    tl.store(dA_ptr + k * n * d + tile, dA, inside)
    tl.store(dD_ptr + k * d + c, dD, c < d)
    tl.store(dbias_ptr + k * d + c, dbias, c < d)

# What PyTorch sees: three operators that torch.compile does not look into, and their inputs.
INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor bias"

def launch(kernel, count: int, width: int, *args, **sizes) -> None:
    """Run a kernel in count x ceil(width / CHANNELS) programs."""
    grid = (count * triton.cdiv(width, CHANNELS),)  # one axis, because the others end at 65535
    with torch.cuda.device_of(args[0]):             # Triton would take the current GPU
        kernel[grid](*args, **sizes, num_warps=1, enable_fp_fusion=True)    # a * b + c at once

def block_steps(n: int) -> int:
    """BLOCK in the backward: registers have room for 64 numbers of `faded`. n > 32 spills."""
    return max(1, min(STEPS, 64 // triton.next_power_of_2(n)))

def contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]

@torch.library.custom_op("falcon_mamba::scan", mutates_args=(),
                         schema=f"(Tensor h0, {INPUTS}, Tensor? reset) -> (Tensor, Tensor, Tensor)")
def scan(h0, *inputs):
    """y, the last h and what enters each chunk. h0 and h are (b, n, d), A is (n, d)."""
    inputs = contiguous(*inputs)
    x, dt, A, B, C, D, z, bias, reset = inputs
    y, h, start = empty_outputs(h0, x)
    h.copy_(h0)
    decay = torch.empty_like(start)
    b, chunks, n, d = start.shape
    sizes = dict(l=x.shape[1], chunk=CHUNK, chunks=chunks, d=d, n=n, BLOCK=STEPS)
    launch(reduce_kernel, b * chunks, d, x, dt, A, B, bias, reset, decay, start, **sizes)
    launch(carry_kernel, b, n * d, h, decay, start, chunks, n * d, False)
    launch(scan_kernel, b * chunks, d, *inputs, start, y, **sizes)
    return y, h, start

@scan.register_fake     # scan allocates with it, torch.compile asks it for shapes
def empty_outputs(h0, x, *_):
    b, n, d = h0.shape
    start = h0.new_empty(b, triton.cdiv(x.shape[1], CHUNK), n, d)
    return x.new_empty(x.shape), h0.new_empty(h0.shape), start

@torch.library.custom_op("falcon_mamba::scan_backward", mutates_args=(),
                         schema="(Tensor dy, Tensor dh, Tensor start, "
                                f"{INPUTS}, Tensor? reset) -> Tensor[]")
def scan_backward(dy, dh, start, *inputs):
    """The gradients of h0 and of the inputs but reset. That of a z that is None is empty."""
    dy, *inputs = contiguous(dy, *inputs)
    grads = empty_grads(dy, dh, start, *inputs)
    dh0, dx, ddt, dA, dB, dC, dD, dz, dbias = grads
    dh0.copy_(dh)               # what enters the last chunk; carry_kernel makes dh0 of it
    for total in (dA, dD, dbias):
        total.zero_()
    b, chunks, n, d = start.shape
    chunk_bytes = 4 * b * n * d * CHUNK // block_steps(n)       # of the states that enter blocks
    at_once = max(1, SCRATCH // max(1, chunk_bytes))
    for k in reversed(range(0, chunks, at_once)):
        backward_chunks(k * CHUNK, start[:, k:k + at_once].contiguous(), dy, inputs, grads)
    return grads

def backward_chunks(first: int, start: Tensor, dy: Tensor, inputs: list, grads: list) -> None:
    """Fill in the gradients of chunks that begin at step `first`, and that `start` enters."""
    dh0, dx, ddt, dA, dB, dC, dD, dz, dbias = grads
    b, chunks, n, d = start.shape
    l = dy.shape[1]
    block = block_steps(n)
    sizes = dict(l=l, first=first, chunk=CHUNK, chunks=chunks, d=d, n=n, BLOCK=block)
    blocks = start.new_empty(b, chunks, CHUNK // block, n, d)
    decay = torch.empty_like(start)
    enter = torch.empty_like(start)         # first local, then what enters each chunk at its end
    launch(replay_kernel, b * chunks, d, *inputs, start, dy, dz, blocks, decay, enter, **sizes)
    launch(carry_kernel, b, n * d, dh0, decay, enter, chunks, n * d, True)
    dBs = start.new_empty(b, chunks, triton.cdiv(d, CHANNELS), CHUNK, n)
    dCs = torch.empty_like(dBs)
    dAs = torch.empty_like(start)
    dDs = start.new_empty(b, chunks, d)
    dbiases = torch.empty_like(dDs)
    launch(adjoint_kernel, b * chunks, d, *inputs, dy, blocks, enter,
           dx, ddt, dBs, dCs, dAs, dDs, dbiases, **sizes)
    end = min(l, first + chunks * CHUNK)
    dB[:, first:end] = dBs.sum(2).flatten(1, 2)[:, :end - first]
    dC[:, first:end] = dCs.sum(2).flatten(1, 2)[:, :end - first]
    dA += dAs.sum((0, 1))
    dD += dDs.sum((0, 1))
    dbias += dbiases.sum((0, 1))

@scan_backward.register_fake
def empty_grads(dy, dh, start, *inputs):
    return [dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in (dh, *inputs[:-1])]

def setup_context(ctx, inputs, output):
    y, h, start = output
    ctx.save_for_backward(start, *inputs[1:])       # h0 is in start

def backward(ctx, dy, dh, dstart):
    grads = scan_backward(dy, dh, *ctx.saved_tensors)
    grads = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)]
    return *grads, None     # reset has none
scan.register_autograd(backward, setup_context=setup_context)

@torch.library.custom_op("falcon_mamba::step", mutates_args=("h",),
                         schema=f"(Tensor(a!) h, {INPUTS}) -> Tensor")
def step(h, x, *inputs):
    """One token: returns y (b, 1, d) and overwrites the state h, (b, d, n). Here A is (d, n)."""
    if not h.is_contiguous() or h.dtype != torch.float32:
        raise ValueError("h is written in place: it must be fp32 and contiguous (b, d, n)")
    b, d, n = h.shape
    x, *inputs = contiguous(x, *inputs)
    y = x.new_empty(x.shape)
    launch(step_kernel, b, d, x, *inputs, h, y, d=d, n=n)
    return y

step.register_fake(lambda h, x, *_: x.new_empty(x.shape))

def selective_scan(x, dt, A, B, C, D, z, dt_bias, h0, reset) -> tuple[Tensor, Tensor]:
    """scan.selective_scan on a GPU. Only z and reset may be None."""
    if not x.is_cuda and isinstance(scan_kernel, triton.JITFunction):   # and not interpreted
        raise ValueError(f"the Triton scan needs CUDA tensors and x is on {x.device}: use "
                         'backend="auto", or set TRITON_INTERPRET=1 before Python starts (slow)')
    A, B, C, D, dt_bias, h0 = (v.float() for v in (A, B, C, D, dt_bias, h0))
    y, h, _ = scan(h0.mT, x, dt, A.mT, B, C, D, z, dt_bias, reset)
    return y, h.mT.contiguous()

if __name__ == "__main__":
    from tests.triton_report import main
    main()
