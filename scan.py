"""The selective scan: a recurrent network whose steps can run in parallel.

Each of d channels has a state h of n numbers, and each number fades on its own. For one of them,
h'(t) = A h(t) + B(t) x(t). A is negative, learned, and the same at all t: how fast a number fades.
B says how the input x is written, and C, below, how h is read. One token is a time step of length
delta_t, in which B and x are constant, a zero-order hold. At its end, exactly,

    h_t = exp(delta_t A) h_{t-1} + (exp(delta_t A) - 1) / A * B_t x_t

The fraction is the integral of exp(s A) for s from 0 to delta_t. Mamba's code has delta_t in its
place, and the weights are trained so. Near delta_t A = 0 the two agree. Where it is -1.6, delta_t
is twice the fraction. So (Mamba, arXiv 2312.00752):

    delta_t = softplus(dt_t + dt_bias)                a raw number, made a positive time
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t    Eq. 2a; the exact one is Eq. 4
    y_t = (C_t . h_t + D x_t) SiLU(z_t)               Eq. 2b, the skip D, the gate z of Fig. 3

"Selective" means that mamba.py makes dt, B and C from the token. A long step lets the past fade and
writes the token. A short one changes almost nothing.

At one t, x_t, delta_t, z_t, D and y_t are (d,). B_t and C_t are (n,). A and h_t are (d, n).
delta_t B_t x_t is an outer product, (d, n). C_t . h_t sums over n.

This file says it as a loop, as a tree, and in chunks with a backward derived by hand. `python
scan.py` times each, and prints its error. Next: scan_triton.py, which says it for a GPU.
Sizes: b batch, l length, d channels, n numbers of state a channel, c steps in a chunk.
"""
import importlib.util
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

# First, the definition. All three scans take the same arguments, and only z and reset may be None.
def naive(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    """One step after the other. To differentiate it, autograd keeps every state: (b, l, d, n)."""
    delta = F.softplus(dt + dt_bias)                                 # (b, l, d)
    h = h0                                                           # (b, d, n)
    y = []
    for t in range(x.shape[1]):
        if reset is not None:       # a new document: forget, as a decay of 0 would
            h = h.masked_fill(reset[:, t, None, None], 0)
        decay = torch.exp(delta[:, t, :, None] * A)                  # (b, d, n)
        drive = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]   # (b, d, n)
        h = decay * h + drive
        y.append((h @ C[:, t, :, None])[..., 0])                     # (b, d), C_t . h_t
    return skip_and_gate(torch.stack(y, dim=1), x, D, z), h

def skip_and_gate(y: Tensor, x: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    """From C_t . h_t to y_t, all (b, l, d)."""
    y = y + D * x
    return y if z is None else y * F.silu(z)

# Second, the tree. Two steps in a row are one step of the same form. A reset is an a of 0:
#     a2 (a1 h + b1) + b2 = (a2 a1) h + (a2 b1 + b2)
# Merge steps 0 and 1, 2 and 3, ..., all at once. The scan of these merged steps is h_1, h_3, ...:
# the same problem, half as long. Then take the rest, all at once: h_2 = a_2 h_1 + b_2. In all that
# is 2 log2(l) - 1 parallel moves, nineteen for l = 1024. assets/tree.svg shows them.
def parallel(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    """O(l) work. Holds a few times (b, l, d, n)."""
    delta = F.softplus(dt + dt_bias)                                 # (b, l, d)
    decay = torch.exp(delta[..., None] * A)                          # (b, l, d, n)
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    drive = (delta * x)[..., None] * B[:, :, None, :]                # (b, l, d, n)
    drive[:, 0] += decay[:, 0] * h0                                  # the first step, from h0
    h = merge_pairs(decay, drive)                                    # (b, l, d, n)
    y = (h @ C[..., None])[..., 0]                                   # (b, l, d), C_t . h_t
    return skip_and_gate(y, x, D, z), h[:, -1]

def merge_pairs(decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t for every t along dim 1, from h_{-1} = 0."""
    if drive.shape[1] == 1:
        return drive
    a1, b1 = decay[:, :-1:2], drive[:, :-1:2]       # steps 0, 2, 4, ... that have a successor
    a2, b2 = decay[:, 1::2], drive[:, 1::2]                          # steps 1, 3, 5, ...
    odd = merge_pairs(a2 * a1, a2 * b1 + b2)                         # h_1, h_3, h_5, ...
    h = drive.clone()                                                # the first is done
    h[:, 1::2] = odd
    n_even = (h.shape[1] - 1) // 2                                   # how many: h_2, h_4, ...
    h[:, 2::2] += decay[:, 2::2] * odd[:, :n_even]
    return h

# Third, for training on a CPU: the loop, with the decays of a chunk of steps computed at once.
# Beyond the inputs, only the state before each chunk is kept. So (b, l, d, n) never exists: of 8192
# tokens of a layer of the 7B 134 MB are kept, not 4.3 GB. From them the backward makes a
# chunk's states again. To run h backwards in time would be to divide by decays that are near 0.
# Here dv is the gradient dL/dv of any v. But dt is an input, and its gradient is ddt. That of the
# last h is given. The forward's parts come first, then gradients, from y back to the inputs:
#     w_t = delta_t x_t,   u_t = delta_t A,   s_t = C_t . h_t + D x_t
#     ds_t = dy_t SiLU(z_t)
#     dh_t = C_t ds_t + exp(u_{t+1}) dh_{t+1}       because s_t and h_{t+1} both read h_t
#     dC_t = sum over d of ds_t h_t
#     dB_t = sum over d of w_t dh_t
#     dw_t = sum over n of B_t dh_t
#     du_t = dh_t exp(u_t) h_{t-1}
#     dA = sum over b, t of delta_t du_t
#     ddelta_t = sum over n of A du_t + x_t dw_t
#     ddt_t = ddelta_t sigmoid(dt_t + dt_bias)      the softplus has this slope
#     dx_t = delta_t dw_t + D ds_t
#     dz_t = dy_t s_t SiLU'(z_t)
#     dD = sum over b, t of x_t ds_t,   ddt_bias = sum over b, t of ddt_t
def run_chunk(chunk: slice, w, delta, A, B, reset, h, buffers: list[Tensor]):
    """A chunk's decays and states, (b, c, n, d) in two buffers, from the state h before it."""
    delta = delta[:, chunk, None]                                    # (b, c, 1, d)
    decays = buffers[0][:, :delta.shape[1]]                          # the last chunk may be shorter
    hs = buffers[1][:, :delta.shape[1]]
    torch.mul(delta, A * math.log2(math.e), out=decays).exp2_()      # exp(v) = 2^(v log2(e)): fast
    if reset is not None:
        decays[reset[:, chunk]] = 0
    drives = torch.mul(w[:, chunk, None], B[:, chunk, :, None], out=hs)
    for decay, drive in zip(decays.unbind(1), drives.unbind(1)):
        drive.addcmul_(decay, h)        # decay h + drive, written over the drive: the state
        h = drive
    return decays, hs

class Chunked(torch.autograd.Function):
    """NOTE: in here A is (n, d) and a state (b, n, d), because a long last dimension is fastest.
    The chunks share buffers: with fresh memory (page faults) a step took 1.7 times as long."""
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, reset):
        A = A.T.contiguous()                                         # (n, d)
        h = h0.mT.contiguous()                                       # (b, n, d)
        delta = F.softplus(dt + dt_bias)                             # (b, l, d)
        w = delta * x
        y = torch.empty_like(x)
        starts = []                                                  # the state before each chunk
        ctx.steps = 32 if len(x) == 1 else 16                        # c: these were fastest
        buffers = [h.new_empty(len(x), ctx.steps, *A.shape) for _ in range(2)]
        for t in range(0, x.shape[1], ctx.steps):
            chunk = slice(t, t + ctx.steps)
            starts.append(h)
            _, hs = run_chunk(chunk, w, delta, A, B, reset, h, buffers)
            y[:, chunk] = (C[:, chunk, None] @ hs)[:, :, 0]
            h = hs[:, -1].clone()                                    # the next chunk overwrites hs
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, reset, *starts)
        return skip_and_gate(y, x, D, z), h.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable                     # no second derivatives
    def backward(ctx, dy, dh_last):
        x, dt, A, B, C, D, z, dt_bias, reset, *starts = ctx.saved_tensors
        delta = F.softplus(dt + dt_bias)                             # (b, l, d)
        w = delta * x
        ds = dy if z is None else dy * F.silu(z)
        s = D * x                                                    # ... + C . h, below
        dw, ddelta = torch.empty_like(x), torch.empty_like(x)
        dB, dC, dA = torch.empty_like(B), torch.empty_like(C), torch.zeros_like(A)
        carry = dh_last.mT.contiguous()     # what later steps add to a chunk's dh; in the end dh0
        buffers = [carry.new_empty(len(x), ctx.steps, *A.shape) for _ in range(3)]
        for i in reversed(range(len(starts))):
            chunk = slice(i * ctx.steps, (i + 1) * ctx.steps)
            decays, hs = run_chunk(chunk, w, delta, A, B, reset, starts[i], buffers)
            dhs = buffers[2][:, :hs.shape[1]]                        # (b, c, n, d)
            torch.mul(C[:, chunk, :, None], ds[:, chunk, None], out=dhs)
            dhs[:, -1] += carry
            for t in reversed(range(hs.shape[1] - 1)):
                dhs[:, t].addcmul_(decays[:, t + 1], dhs[:, t + 1])
            carry = decays[:, 0] * dhs[:, 0]
            s[:, chunk] += (C[:, chunk, None] @ hs)[:, :, 0]
            dC[:, chunk] = (ds[:, chunk, None] @ hs.mT)[:, :, 0]
            dB[:, chunk] = (w[:, chunk, None] @ dhs.mT)[:, :, 0]
            dw[:, chunk] = (B[:, chunk, None] @ dhs)[:, :, 0]
            du = dhs.mul_(decays)           # dh_t exp(u_t) h_{t-1}, written over dhs
            du[:, 0] *= starts[i]
            du[:, 1:] *= hs[:, :-1]
            ddelta[:, chunk] = torch.mul(A, du, out=decays).sum(2)   # A du, written over decays
            dA += du.mul_(delta[:, chunk, None]).sum((0, 1))
        # Each result takes the memory of its first term, or training would need more of it.
        ddelta.addcmul_(x, dw)                                       # ... + x dw
        ddt = ddelta.mul_(torch.sigmoid(dt + dt_bias))
        dx = dw.mul_(delta).addcmul_(D, ds)                          # delta dw + D ds
        dz = None if z is None else torch.ops.aten.silu_backward(s.mul_(dy), z)     # dy s SiLU'(z)
        dD = (x * ds).sum((0, 1))
        return dx, ddt, dA.T, dB, dC, dD, dz, ddt.sum((0, 1)), carry.mT, None

BACKENDS = {"naive": naive, "parallel": parallel, "chunked": Chunked.apply}      # not "triton"

def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run the recurrence over x from state h0, zero if None -> all outputs y, the last state h.

    x, dt, z (b, l, d)   B, C (b, l, n)   A (d, n), negative   D, dt_bias (d,)   in any float dtype
    y (b, l, d) in x's dtype   h0, h (b, d, n) fp32
    reset (b, l) bool: true where a document starts, which sees 0 for h_{t-1}
    All arithmetic is fp32. Gradients flow to every float argument and back through h, so a sequence
    can be cut anywhere. ValueError for arguments that do not fit.
    """
    check(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, h0=h0, reset=reset)
    if backend == "auto":
        backend = default_backend(x.device, x.shape[1])
    D = A.new_zeros(len(A)) if D is None else D
    dt_bias = A.new_zeros(len(A)) if dt_bias is None else dt_bias
    h0 = A.new_zeros(len(x), *A.shape) if h0 is None else h0
    if backend == "triton":
        from scan_triton import selective_scan as fused     # here: without a GPU it is not needed
        return fused(x, dt, A, B, C, D, z, dt_bias, h0, reset)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of auto, triton, {', '.join(BACKENDS)}")
    inputs = [x, dt, A, B, C, D, z, dt_bias, h0]
    inputs = [None if v is None else v.float().contiguous() for v in inputs]
    casts = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type if casts else "cpu", enabled=False):      # no 16-bit products
        y, h = BACKENDS[backend](*inputs, reset)
    return y.to(x.dtype), h

def step(h, x, dt, A, B, C, D, z, dt_bias) -> Tensor:
    """The scan of one token, x, dt, z (b, 1, d), without gradients: y. Overwrites the state h."""
    if default_backend(x.device, 1) == "triton":
        from scan_triton import step as fused
        return fused(h, x, dt, A, B, C, D, z, dt_bias)
    delta = F.softplus(dt + dt_bias)                                 # (b, 1, d)
    h.mul_(torch.exp(delta.mT * A))                                  # (b, d, n)
    h.addcmul_((delta * x).mT, B)                                    # (b, d, 1) times (b, 1, n)
    y = (h @ C.mT).mT                                                # (b, 1, d), C . h
    return skip_and_gate(y, x, D, z.float()).to(x.dtype)

def default_backend(device: torch.device, l: int) -> str:
    """What "auto" runs: on a GPU Triton's kernels, else chunks, or the loop for a single token."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "naive" if l == 1 else "chunked"

def check(**given) -> None:
    """ValueError for arguments of a wrong shape or kind."""
    x, A = given["x"], given["A"]
    if x.dim() != 3 or x.shape[1] == 0 or A.dim() != 2:
        raise ValueError(f"x is {[*x.shape]} and A {[*A.shape]}, not [b, l > 0, d] and [d, n]")
    b, l, d = x.shape
    n = A.shape[1]
    needed = {"x": [b, l, d], "dt": [b, l, d], "A": [d, n], "B": [b, l, n], "C": [b, l, n],
              "D": [d], "z": [b, l, d], "dt_bias": [d], "h0": [b, d, n], "reset": [b, l]}
    for name, v in given.items():
        if v is None:
            continue
        kind = "bool" if name == "reset" else "float"
        if [*v.shape] != needed[name] or kind not in str(v.dtype):
            raise ValueError(f"{name} is {[*v.shape]} of {v.dtype}, but must be "
                             f"{needed[name]} of {kind}")

if __name__ == "__main__":
    b, l, d, n = 4, 256, 256, 16
    x, dt, z = torch.randn(3, b, l, d)
    B, C = torch.randn(2, b, l, n)
    D, dt_bias = torch.randn(2, d)
    inputs = [x, dt, -torch.randn(d, n).abs(), B, C, D, z, dt_bias, torch.randn(b, d, n)]
    print(f"{(b, l, d, n) = }: one run each, forward and backward; largest error")
    runs = [("naive", torch.float64)] + [(name, torch.float32) for name in BACKENDS]
    for name, dtype in runs:
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        start = time.perf_counter()
        y, h = BACKENDS[name](*leaves, None)
        found = y, h, *torch.autograd.grad(y.square().sum() + h.square().sum(), leaves)
        ms = 1e3 * (time.perf_counter() - start)
        if dtype == torch.float64:
            exact = found
        errors = [(v - e).abs().max() / e.abs().max() for v, e in zip(found, exact)]
        print(f"{name:10}{str(dtype):16}{ms:8.1f} ms{max(errors).item():12.1e}")
