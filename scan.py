"""The selective scan: a recurrent network whose steps can run in parallel.

Each of d channels has a state h of n numbers, which follow h'(t) = A h(t) + B x(t). A is learned
and negative: how fast each number fades. B is where a token writes its input x. C, below, is what
it reads. A token lasts for a time delta, in which A, B and x stand still. At its end, exactly,

    h_t = exp(delta_t A) h_{t-1} + (exp(delta_t A) - 1) / A * B_t x_t

Mamba's code has delta_t where this has (exp(delta_t A) - 1) / A. That is Euler's rule, time times
slope. It may be so crude because B is learned, and training makes B absorb the difference. And
where delta_t A is small, both are nearly the same. So the scan is (Mamba, arXiv 2312.00752):

    delta_t = softplus(dt_t + dt_bias)                how long token t lasts, always > 0
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t    Eq. 2a; the exact one is Eq. 4
    y_t = (C_t . h_t + D x_t) SiLU(z_t)               Eq. 2b, the skip D, the gate z of Fig. 3

dt, B, C and z are made from the token, by mamba.py. That is what "selective" means: a long delta_t
forgets the past and takes the token in, a short one passes over it.

At one t, x_t, delta_t, z_t, D and y_t are (d,). B_t and C_t are (n,). A and h_t are (d, n), and
products with A are elementwise. delta_t B_t x_t is an outer product, (d, n). C_t . h_t sums over n.

This file says it three times: as a loop, as a tree, and in chunks, with the gradient derived by
hand. `python scan.py` prints each one's error and time. Next, scan_triton.py says it for a GPU.
Sizes: b batch, l length, d channels, n numbers of state a channel, c steps in a chunk.
"""
import importlib.util
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

# First, the definition. All three take the same arguments, in fp32. Only z and reset may be None.


def naive(x, dt, A, B, C, D, z, dt_bias, h, reset):
    """One step after the other. To differentiate it, autograd keeps every state: (b, l, d, n)."""
    delta = F.softplus(dt + dt_bias)                      # (b, l, d)
    y = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        decay = torch.exp(delta[:, t, :, None] * A)       # (b, d, n)
        w = delta[:, t] * x[:, t]                         # (b, d)
        drive = w[..., None] * B[:, t, None]              # (b, d, n)
        h = decay * h + drive                             # (b, d, n)
        y.append(h @ C[:, t, :, None])                    # (b, d, 1)
    y = torch.stack(y, dim=1)[..., 0]                     # (b, l, d)
    return skip_and_gate(y, x, D, z), h


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    """From C_t . h_t to y_t, all (b, l, d)."""
    y = y + D * x
    return y if z is None else y * F.silu(z)


# Second, the tree. Two steps in a row are one step of the same form:
#     a2 (a1 h + b1) + b2 = (a2 a1) h + (a2 b1 + b2)
# It does not matter which neighbours are merged first. So one parallel step merges all pairs, which
# halves the sequence. log2(l) of these merge it all, and as many fill in the states between.
# No machine is fastest with this tree. But merging is what makes chunks possible: a chunk, of any
# length, is one merged step. Because of that scan_triton.py can run all chunks at once.
# (Shorter forms divide by products of decays, which soon come near 0: then all digits are lost.)


def parallel(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    """All steps at once, with O(l) work. Holds a few times (b, l, d, n)."""
    delta = F.softplus(dt + dt_bias)                      # (b, l, d)
    decay = torch.exp(delta[..., None] * A)               # (b, l, d, n)
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    drive = (delta * x)[..., None] * B[:, :, None, :]     # (b, l, d, n)
    drive[:, 0] += decay[:, 0] * h0                       # step 0 is taken from h0
    h = merge_pairs(decay, drive)                         # (b, l, d, n)
    y = (h @ C[..., None])[..., 0]                        # (b, l, d)
    return skip_and_gate(y, x, D, z), h[:, -1]


def merge_pairs(decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t for every t along dim 1, from h_{-1} = 0."""
    length = drive.shape[1]
    if length == 1:
        return drive
    a1, b1 = decay[:, :-1:2], drive[:, :-1:2]             # steps 0, 2, 4, ...
    a2, b2 = decay[:, 1::2], drive[:, 1::2]               # steps 1, 3, 5, ...
    odd = merge_pairs(a2 * a1, a2 * b1 + b2)              # h_1, h_3, h_5, ...
    h = drive.clone()                                     # h_0 is right already
    h[:, 1::2] = odd
    before = odd[:, :(length - 1) // 2]                   # not the last, if it ends all
    h[:, 2::2] += decay[:, 2::2] * before                 # h_2, h_4, h_6, ...
    return h


# Third, for training on a CPU: the loop, with the decays of a chunk of steps computed at once. The
# backward pass makes each chunk's states again, from the state before it. So (b, l, d, n) never
# exists. What is kept is x, dt and z, (b, l, d) each, and one state a chunk.
#
# Write dh_t for dL/dh_t, w_t for delta_t x_t, u_t for delta_t A, and g_t = dy_t SiLU(z_t) for the
# gradient at C_t . h_t + D x_t. Because y_t and h_{t+1} both read h_t, dh_t is the same recurrence,
# run from the end:
#
#     dh_t = C_t g_t + exp(u_{t+1}) dh_{t+1}              and from it
#     dC_t = sum over d of g_t h_t                        dB_t = sum over d of dh_t w_t
#     dw_t = sum over n of dh_t B_t                       du_t = dh_t exp(u_t) h_{t-1}
#     dx_t = delta_t dw_t + D g_t                         dA = sum over b and t of delta_t du_t
#     d(delta_t) = x_t dw_t + sum over n of A du_t


def cut(chunk: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v[:, chunk].contiguous() for v in tensors]


def run_chunk(decays, hs, x, delta, A, B, C, h, reset):
    """Fill in a chunk's decays and states hs, both (b, c, n, d), from the state h -> C_t . h_t."""
    # exp(v) = exp2(v log2(e)), and PyTorch's exp2 is the faster one on a CPU.
    torch.mul(delta[:, :, None], A * math.log2(math.e), out=decays).exp2_()
    if reset is not None:
        decays[reset] = 0
    torch.mul((delta * x)[:, :, None], B[..., None], out=hs)      # drives, which become states
    for decay, drive in zip(decays.unbind(1), hs.unbind(1)):
        h = drive.addcmul_(decay, h)                              # (b, n, d)
    return (C[:, :, None] @ hs)[:, :, 0]                          # (b, c, d)


class Chunked(torch.autograd.Function):
    """In here A is (n, d) and a state (b, n, d), because a long last dimension is fastest.

    xc is a chunk's part of x. All chunks share a few buffers, (b, c, n, d) each, because new memory
    is slow to touch: a plain version without them took 1.7 times as long.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, reset):
        A = A.T.contiguous()                                      # (n, d)
        h = h0.mT.contiguous()                                    # (b, n, d)
        y = torch.empty_like(x)
        starts = []                                               # the state before each chunk
        # Short chunks cost Python's time, long ones of many sequences outgrow the cache. 32 steps
        # took a tenth less time than 16 for one sequence, and a tenth more for eight.
        ctx.size = 32 if len(x) == 1 else 16
        buffers = [h.new_empty(len(x), ctx.size, *A.shape) for _ in range(2)]
        for t in range(0, x.shape[1], ctx.size):
            chunk = slice(t, t + ctx.size)
            xc, dtc, Bc, Cc, zc, resetc = cut(chunk, x, dt, B, C, z, reset)
            decays, hs = (v[:, :xc.shape[1]] for v in buffers)    # the last chunk may be shorter
            starts.append(h)
            yc = run_chunk(decays, hs, xc, F.softplus(dtc + dt_bias), A, Bc, Cc, h, resetc)
            y[:, chunk] = skip_and_gate(yc, xc, D, zc)
            h = hs[:, -1].clone()                                 # the next chunk overwrites hs
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, reset, *starts)
        return y, h.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable                  # no second derivatives
    def backward(ctx, dy, dh):
        x, dt, A, B, C, D, z, dt_bias, reset, *starts = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(v) for v in (x, dt, B, C))
        dz = None if z is None else torch.empty_like(z)
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        dh = dh.mT.contiguous()                                   # (b, n, d): asked by later chunks
        buffers = [dh.new_empty(len(x), ctx.size, *A.shape) for _ in range(3)]
        for i in reversed(range(len(starts))):
            chunk = slice(i * ctx.size, (i + 1) * ctx.size)
            xc, dtc, Bc, Cc, zc, resetc, dyc = cut(chunk, x, dt, B, C, z, reset, dy)
            decays, hs, dhs = (v[:, :xc.shape[1]] for v in buffers)
            delta = F.softplus(dtc + dt_bias)                     # (b, c, d)
            yc = run_chunk(decays, hs, xc, delta, A, Bc, Cc, starts[i], resetc)
            if z is not None:
                gate = torch.sigmoid(zc)                          # SiLU(z) = z gate
                dz[:, chunk] = dyc * torch.addcmul(yc, D, xc) * gate * (1 + zc * (1 - gate))
            g = dyc if z is None else dyc * zc * gate             # (b, c, d)

            torch.mul(Cc[..., None], g[:, :, None], out=dhs)      # (b, c, n, d)
            dhs[:, -1] += dh
            for t in reversed(range(xc.shape[1] - 1)):
                dhs[:, t].addcmul_(decays[:, t + 1], dhs[:, t + 1])
            dh = decays[:, 0] * dhs[:, 0]

            dC[:, chunk] = (hs @ g[:, :, None].mT)[..., 0]
            dB[:, chunk] = (dhs @ (delta * xc)[:, :, None].mT)[..., 0]
            dw = (Bc[:, :, None] @ dhs)[:, :, 0]                  # (b, c, d)
            # dhs and decays have been read for the last time. Their buffers serve under new names.
            du = dhs.mul_(decays)                                 # (b, c, n, d)
            du[:, 0] *= starts[i]
            du[:, 1:] *= hs[:, :-1]
            scratch = decays
            dA += torch.mul(du, delta[:, :, None], out=scratch).sum((0, 1))
            A_du = torch.mul(du, A, out=scratch).sum(2)           # (b, c, d)
            ddt[:, chunk] = torch.addcmul(A_du, xc, dw) * torch.sigmoid(dtc + dt_bias)
            dD += (g * xc).sum((0, 1))
            dx[:, chunk] = torch.addcmul(delta * dw, D, g)
        return dx, ddt, dA.T, dB, dC, dD, dz, ddt.sum((0, 1)), dh.mT, None


BACKENDS = {"naive": naive, "parallel": parallel, "chunked": Chunked.apply}


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run the scan over x from state h0 (zero if None) -> all outputs y, the last state h.

    x, dt, z (b, l, d)   B, C (b, l, n)   A (d, n), negative   D, dt_bias (d,)   in any float dtype
    y (b, l, d) in x's dtype   h0, h (b, d, n) fp32
    reset (b, l) bool: true where a document starts, which sees 0 for h_{t-1}
    All arithmetic is fp32. Gradients flow to every float argument, h0 too, so a sequence can be cut
    anywhere. ValueError for arguments that do not fit or an unknown backend.
    """
    check(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, h0=h0, reset=reset)
    if backend == "auto":
        backend = default_backend(x.device, x.shape[1])
    if backend == "triton":
        from scan_triton import selective_scan as fused     # here: without a GPU it is not needed
        return fused(x, dt, A, B, C, D, z, dt_bias, h0, reset)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of auto, triton, {', '.join(BACKENDS)}")

    d, n = A.shape
    D = A.new_zeros(d) if D is None else D
    z = None if z is None else z.float()
    dt_bias = A.new_zeros(d) if dt_bias is None else dt_bias
    h0 = A.new_zeros(len(x), d, n) if h0 is None else h0
    inputs = x.float(), dt.float(), A.float(), B.float(), C.float(), D.float(), z, dt_bias.float()
    device = x.device.type
    device = device if torch.amp.is_autocast_available(device) else "cpu"       # "meta" has none
    with torch.autocast(device, enabled=False):     # it would take the products in 16 bits
        y, h = BACKENDS[backend](*inputs, h0.float(), reset)
    return y.to(x.dtype), h


def default_backend(device: torch.device, l: int) -> str:
    """What "auto" runs: on a GPU Triton's kernels, else chunks, or the loop for a single token."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "naive" if l == 1 else "chunked"


def check(x, A, **others) -> None:
    """ValueError for arguments of a wrong shape or kind."""
    if x.dim() != 3 or x.shape[1] == 0 or A.dim() != 2:
        raise ValueError(f"x must be (b, l >= 1, d) and A (d, n), but they are {[*x.shape]} and "
                         f"{[*A.shape]}")
    (b, l, d), n = x.shape, A.shape[1]
    shapes = {"x": [b, l, d], "dt": [b, l, d], "A": [d, n], "B": [b, l, n], "C": [b, l, n],
              "D": [d], "z": [b, l, d], "dt_bias": [d], "h0": [b, d, n], "reset": [b, l]}
    for name, v in {"x": x, "A": A, **others}.items():
        if v is None:
            continue
        if [*v.shape] != shapes[name]:
            raise ValueError(f"{name} is {[*v.shape]}, but must be {shapes[name]} because x is "
                             f"{[*x.shape]} and A {[*A.shape]}")
        if name == "reset" and v.dtype != torch.bool:
            raise ValueError(f"reset is of {v.dtype}, but must be of torch.bool")
        if name != "reset" and not v.is_floating_point():
            raise ValueError(f"{name} is of {v.dtype}, but must be of floats")


if __name__ == "__main__":
    b, l, d, n = 4, 256, 256, 16
    torch.manual_seed(0)
    x, dt, z = torch.randn(3, b, l, d)
    B, C = torch.randn(2, b, l, n)
    D, dt_bias = torch.randn(2, d)
    inputs = [x, dt, -n * torch.rand(d, n), B, C, D, z, dt_bias - 3, torch.randn(b, d, n)]
    print(f"{(b, l, d, n) = }: one run each, forward and backward; largest error against the first")
    exact = None
    for name, dtype in [("naive", torch.float64), *((name, torch.float32) for name in BACKENDS)]:
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        start = time.perf_counter()
        y, h = BACKENDS[name](*leaves, None)
        gradients = torch.autograd.grad(y.square().sum() + h.square().sum(), leaves)
        ms = 1e3 * (time.perf_counter() - start)
        values = [y, h, *gradients]
        exact = exact or values
        error = max(((v - w).abs().max() / w.abs().max()).item() for v, w in zip(values, exact))
        print(f"{name:10}{str(dtype):16}{ms:8.1f} ms{error:12.1e}")
