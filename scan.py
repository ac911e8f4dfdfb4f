"""The selective scan: a recurrent network whose steps can run in parallel.

Each of d channels has a state h of n numbers which follows h'(t) = A h(t) + B x(t): A < 0 lets it fade, B
writes the input into it. Let token t last for a time delta_t, and solve this over that time: exactly for the
fading and, as Mamba's code does where its paper's Eq. 4 is exact, by Euler's rule, time times slope, for B:

    delta_t = softplus(dt_t + dt_bias)                  how long token t lasts, always > 0
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t      Mamba (arXiv 2312.00752), Eq. 2a
    y_t = (C_t . h_t + D x_t) SiLU(z_t)                 Eq. 2b, then the skip D and the gate z of its Fig. 3

At one t, x_t, delta_t, z_t, D and y_t are (d,), B_t and C_t (n,), A and h_t (d, n). Products with A are of
single numbers: each of a channel's n fades at its own rate. delta_t B_t x_t is an outer product, (d, n), and
C_t . h_t sums over n. dt, B and C are computed from the token, which is what "selective" means: a long
delta_t forgets the past and takes the token in, a short one passes over it.

This file says it three times: as a loop (`naive`, the definition), in 2 log2(l) parallel steps (`parallel`),
and chunk by chunk with a backward derived by hand (`chunked`, which trains on a CPU). `python scan.py` prints
the error and the time of each. Next: scan_triton.py says it for a GPU; mamba.py builds the model around it.

Sizes in the shape comments: b batch, l length, d channels, n numbers of state a channel, c steps in a chunk.
"""
import importlib.util
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run the recurrence from state h0 (zero if None) over x; return all outputs y and the last state h.

    x, dt, z (b, l, d)   B, C (b, l, n)   A (d, n), negative   D, dt_bias (d,)   in any float dtype
    y (b, l, d) in x's dtype   h0, h (b, d, n) fp32   reset (b, l) bool: a document starts, h_{t-1} is 0
    All arithmetic is fp32. Gradients flow to every float argument and back through h, so a sequence can be
    cut anywhere. ValueError, with both values, for shapes that disagree, l = 0 or an unknown backend.
    """
    if x.dim() != 3 or x.shape[1] == 0 or A.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (b, l >= 1, d) of floats and A (d, n), but they are {[*x.shape]} of "
                         f"{x.dtype} and {[*A.shape]}")
    (b, l, d), n = x.shape, A.shape[1]
    for name, v, *shape in [("dt", dt, b, l, d), ("A", A, d, n), ("B", B, b, l, n), ("C", C, b, l, n),
                            ("D", D, d), ("z", z, b, l, d), ("dt_bias", dt_bias, d), ("h0", h0, b, d, n),
                            ("reset", reset, b, l)]:
        if v is not None and [*v.shape] != shape:
            raise ValueError(f"{name} is {[*v.shape]}, but x {[b, l, d]} and A {[*A.shape]} need {shape}")
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset is {reset.dtype}, but must be torch.bool")
    if backend == "auto":
        backend = default_backend(x.device, l)
    if backend == "triton":
        from scan_triton import selective_scan as fused     # here: a machine without a GPU needs no Triton
        return fused(x, dt, A, B, C, D, z, dt_bias, h0, reset)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of auto, triton, {', '.join(BACKENDS)}")

    D, dt_bias = (A.new_zeros(d) if v is None else v for v in (D, dt_bias))
    h0 = A.new_zeros(b, d, n) if h0 is None else h0
    floats = (v if v is None else v.float() for v in (x, dt, A, B, C, D, z, dt_bias, h0))
    kind = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"       # "meta" has none
    with torch.autocast(kind, enabled=False):       # it would take the products in 16 bits
        y, h = BACKENDS[backend](*floats, reset)
    return y.to(x.dtype), h


def default_backend(device: torch.device, l: int) -> str:
    """What "auto" runs: on a GPU Triton's kernels, on a CPU the chunks, or for one token the plain step."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        return "triton"
    return "naive" if l == 1 else "chunked"


# Each backend takes the same arguments, all floats in fp32 (or all in float64); only z and reset may still be
# None. First, the definition.


def gated(y: Tensor, x: Tensor, D: Tensor, z: Tensor | None) -> Tensor:
    """What was read from the states, with the skip and then the gate, all (b, l, d)."""
    y = y + D * x
    return y if z is None else y * F.silu(z)                         # without z there is no gate


def naive(x, dt, A, B, C, D, z, dt_bias, h, reset):
    """One step after the other. Autograd differentiates it, and to do so keeps every state: (b, l, d, n)."""
    y, delta = [], F.softplus(dt + dt_bias)                          # (b, l, d)
    for t in range(x.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        decay = torch.exp(delta[:, t, :, None] * A)                  # (b, d, n)
        drive = (delta[:, t] * x[:, t])[..., None] * B[:, t, None]   # (b, d, n)
        h = decay * h + drive                                        # (b, d, n)
        y.append(h @ C[:, t, :, None])                               # (b, d, 1)
    return gated(torch.stack(y, dim=1)[..., 0], x, D, z), h          # (b, l, d), (b, d, n)


# Second, in parallel. Two steps in a row are one step of the same form,
#     a2 (a1 h + b1) + b2 = (a2 a1) h + (a2 b1 + b2),
# and this merging is associative: it does not matter which neighbours are merged first. So one parallel step
# merges all pairs and halves the sequence. log2(l) of them merge it all, and as many more fill in the states
# between. (Shorter forms divide by cumulative products of decays, or sum their logarithms. They lose all
# digits once a product comes near 0, as it soon does.)


def parallel(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    """All steps at once, in 2 log2(l) parallel steps and O(l) work, holding a few times (b, l, d, n)."""
    delta = F.softplus(dt + dt_bias)                                 # (b, l, d)
    decay = torch.exp(delta[..., None] * A)                          # (b, l, d, n)
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    drive = (delta * x)[..., None] * B[:, :, None, :]                # (b, l, d, n)
    drive[:, 0] += decay[:, 0] * h0                                  # step 0 is taken from h0
    h = merge_pairs(decay, drive)                                    # (b, l, d, n)
    return gated((h @ C[..., None])[..., 0], x, D, z), h[:, -1]      # (b, l, d), (b, d, n)


def merge_pairs(decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t for every t along dim 1, from h_{-1} = 0, for any length."""
    if drive.shape[1] == 1:
        return drive
    a1, b1 = decay[:, :-1:2], drive[:, :-1:2]                        # steps 0, 2, 4, ... with one after it
    a2, b2 = decay[:, 1::2], drive[:, 1::2]                          # 1, 3, 5, ...: the one after it
    odd = merge_pairs(a2 * a1, a2 * b1 + b2)                         # h_1, h_3, h_5, ...: half as long
    h = drive.clone()                                                # h_0 is right already
    h[:, 1::2] = odd
    h[:, 2::2] += decay[:, 2::2] * odd[:, :(drive.shape[1] - 1) // 2]    # h_2 = a_2 h_1 + b_2, h_4, ...
    return h


# Third, for training on a CPU: the loop again, with the decays of a chunk of steps computed at once. The
# backward pass recomputes each chunk from the state at its start, so (b, l, d, n) never exists: it keeps x,
# dt and z, (b, l, d) each, and a state a chunk. Write dh_t for dL/dh_t, and g_t = dy_t SiLU(z_t) for the
# gradient at the ungated y_t. As y_t and h_{t+1} read h_t, dh_t is the same recurrence, run from the end:
#
#     dh_t = C_t g_t + exp(delta_{t+1} A) dh_{t+1}        and from it, with w_t = delta_t x_t,
#     dC_t = sum over d of g_t h_t                        dB_t = sum over d of dh_t w_t
#     dw_t = sum over n of dh_t B_t                       d(delta_t A) = dh_t exp(delta_t A) h_{t-1}
#     dx_t = delta_t dw_t + D g_t                         dA = sum over b and t of delta_t d(delta_t A)
#     d(delta_t) = x_t dw_t + sum over n of A d(delta_t A)


def chunk_steps(b: int) -> int:
    """Steps in a chunk: short ones cost Python's time, long ones of many sequences outgrow the cache."""
    return 32 if b == 1 else 16     # for one sequence 32 take a tenth less time, for eight a tenth more


def run_chunk(decay, hs, x, delta, A, B, C, h, reset):
    """Fill in a chunk's decays and states, both (b, c, n, d), from h, the state before; return C_t . h_t."""
    torch.mul((delta * x)[:, :, None], B[..., None], out=hs)         # the drives, made states one by one
    # exp(v) = exp2(v log2(e)), and PyTorch's exp2 is the faster one on a CPU.
    torch.mul(delta[:, :, None], A * math.log2(math.e), out=decay).exp2_()
    if reset is not None:
        decay[reset] = 0
    for a, now in zip(decay.unbind(1), hs.unbind(1)):
        h = now.addcmul_(a, h)                                       # (b, n, d)
    return (C[:, :, None] @ hs)[:, :, 0]                             # (b, c, d)


class Chunked(torch.autograd.Function):
    """Here A is (n, d) and a state (b, n, d): a long last dimension is fastest. x_ is one chunk of x."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h, reset):
        A, h, y, starts = A.T.contiguous(), h.mT.contiguous(), torch.empty_like(x), []
        # Two buffers (b, c, n, d) serve every chunk, as memory from the system is slow to touch first.
        size = chunk_steps(len(h))
        buffers = [h.new_empty(len(h), size, *h.shape[1:]) for _ in range(2)]
        for t in range(0, x.shape[1], size):
            now = slice(t, t + size)
            x_, dt_, B_, C_, z_, reset_ = (v if v is None else v[:, now].contiguous()
                                           for v in (x, dt, B, C, z, reset))
            decay, hs = (v[:, :x_.shape[1]] for v in buffers)
            starts.append(h)
            y_ = run_chunk(decay, hs, x_, F.softplus(dt_ + dt_bias), A, B_, C_, h, reset_)
            y[:, now] = gated(y_, x_, D, z_)
            h = hs[:, -1].clone()                                    # (b, n, d), out of the buffer
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, reset, *starts)
        return y, h.mT.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable                     # no second derivatives
    def backward(ctx, dy, dh):
        x, dt, A, B, C, D, z, dt_bias, reset, *starts = ctx.saved_tensors
        dx, d_dt, dB, dC, dz = (v if v is None else torch.empty_like(v) for v in (x, dt, B, C, z))
        dA, dD, dh = torch.zeros_like(A), torch.zeros_like(D), dh.mT.contiguous()
        size = chunk_steps(len(dh))
        buffers = [dh.new_empty(len(dh), size, *dh.shape[1:]) for _ in range(3)]
        for i, h in reversed([*enumerate(starts)]):
            now = slice(i * size, (i + 1) * size)
            x_, dt_, B_, C_, z_, reset_ = (v if v is None else v[:, now].contiguous()
                                           for v in (x, dt, B, C, z, reset))
            delta_, g_, c = F.softplus(dt_ + dt_bias), dy[:, now].contiguous(), x_.shape[1]
            decay, hs, dhs = (v[:, :c] for v in buffers)
            y_ = run_chunk(decay, hs, x_, delta_, A, B_, C_, h, reset_)
            if z is not None:
                y_, gate = torch.addcmul(y_, D, x_), z_.sigmoid()    # SiLU(z) = z gate
                dz[:, now] = g_ * y_ * gate * (1 + z_ * (1 - gate))
                g_ = g_ * z_ * gate                                  # (b, c, d): dy before, now g
            torch.mul(C_[..., None], g_[:, :, None], out=dhs)        # (b, c, n, d): what y_t asks of h_t,
            dhs[:, -1] += dh                                         # and what later chunks ask of the last
            for t in reversed(range(c - 1)):
                dhs[:, t].addcmul_(decay[:, t + 1], dhs[:, t + 1])
            dh = decay[:, 0] * dhs[:, 0]                             # (b, n, d): for the chunk before
            dC[:, now] = (hs @ g_[:, :, None].mT)[..., 0]
            dB[:, now] = (dhs @ (delta_ * x_)[:, :, None].mT)[..., 0]
            dw = (B_[:, :, None] @ dhs)[:, :, 0]                     # (b, c, d)
            dhs *= decay
            dhs[:, 0] *= h
            dhs[:, 1:] *= hs[:, :-1]                                 # now d(delta_t A)
            # From here on `decay` is only a place to put products.
            dA += torch.mul(dhs, delta_[:, :, None], out=decay).sum((0, 1))
            d_delta = torch.addcmul(torch.mul(dhs, A, out=decay).sum(2), dw, x_)    # (b, c, d)
            d_dt[:, now] = d_delta * torch.sigmoid(dt_ + dt_bias)
            dD += (g_ * x_).sum((0, 1))
            dx[:, now] = torch.addcmul(dw * delta_, D, g_)
        return dx, d_dt, dA.T, dB, dC, dD, dz, d_dt.sum((0, 1)), dh.mT, None


BACKENDS = {"naive": naive, "parallel": parallel, "chunked": Chunked.apply}


if __name__ == "__main__":
    b, l, d, n = 4, 256, 256, 16
    torch.manual_seed(0)
    inputs = [torch.randn(b, l, d), torch.randn(b, l, d), -torch.rand(d, n) * n,        # x, dt, A
              torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(d),               # B, C, D
              torch.randn(b, l, d), torch.randn(d) - 3, torch.randn(b, d, n)]           # z, dt_bias, h0

    def run(scan, dtype):
        """Two outputs and nine gradients; the milliseconds of the forward alone and of both."""
        leaves, start = [v.to(dtype).requires_grad_() for v in inputs], time.perf_counter()
        outputs = scan(*leaves, None)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(sum(v.square().sum() for v in outputs), leaves)
        return [*outputs, *gradients], 1e3 * (middle - start), 1e3 * (time.perf_counter() - start)

    print(f"{(b, l, d, n) = }, fp32: largest error against the loop in float64, median ms of 5 runs\n"
          f"{'backend':12}{'outputs':>12}{'gradients':>12}{'forward':>12}{'and backward':>16}")
    exact, _, _ = run(naive, torch.float64)
    for name, scan in BACKENDS.items():
        values, forward, both = zip(*(run(scan, torch.float32) for _ in range(5)))
        errors = [((v - w).abs().max() / w.abs().max()).item() for v, w in zip(values[0], exact)]
        print(f"{name:12}{max(errors[:2]):12.1e}{max(errors[2:]):12.1e}"
              f"{sorted(forward)[2]:12.1f}{sorted(both)[2]:16.1f}")
