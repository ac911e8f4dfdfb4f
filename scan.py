"""The selective scan: a recurrent network whose steps can run in parallel.

    delta_t = softplus(dt_t + dt_bias)                     how long step t lasts, always > 0
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t         Mamba (arXiv 2312.00752), Eq. 2a made discrete by Eq. 4
    y_t = (C_t . h_t + D x_t) SiLU(z_t)                    Eq. 2b, then the skip D and the gate z of its Fig. 3

Each of d channels owns a state h of n numbers. A < 0 makes the state fade, B_t writes x_t into it, C_t reads it out.
dt, B and C depend on the token, which is what "selective" means: a long step (large delta) forgets the past and takes
the token in, a short one passes over it. Eq. 4 would also scale B; Mamba's own code takes Euler's delta_t B_t, so do we.

This file says the recurrence three times, with one signature and the same numbers: as a loop (`naive`, the
definition), in log2(l) parallel steps (`parallel`), and chunk by chunk with a backward derived by hand (`chunked`,
the one to train with on a CPU). `python scan.py` prints the error and the time of each; pytest tests/test_scan.py
holds them to a float64 loop. Next: mamba.py, which wraps a model around it.

Sizes in the shape comments: b batch, l length, d channels (the model's d_inner), n numbers of state a channel (d_state).
"""
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, dt_bias: Tensor | None = None, h0: Tensor | None = None,
                   reset: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Run the recurrence from state h0 (zero if None) over x; return all outputs y and the state h after the last.

    x, dt, z (b, l, d)   B, C (b, l, n)   A (d, n), negative   D, dt_bias (d,)   in any float dtype
    h0, h (b, d, n) fp32    y (b, l, d) in x's dtype    reset (b, l) bool: a document starts at t, h_{t-1} counts as 0
    All arithmetic is fp32. Gradients flow to every float argument and back through h, so a sequence can be cut
    anywhere. Raises ValueError, with both values, for shapes that disagree, l = 0 or an unknown backend.
    """
    if x.dim() != 3 or x.shape[1] == 0 or A.dim() != 2:
        raise ValueError(f"x must be (b, l, d) with l >= 1 and A (d, n), but they are {[*x.shape]} and {[*A.shape]}")
    (b, l, d), n = x.shape, A.shape[1]
    expected = {"dt": (dt, (b, l, d)), "A": (A, (d, n)), "B": (B, (b, l, n)), "C": (C, (b, l, n)), "D": (D, (d,)),
                "z": (z, (b, l, d)), "dt_bias": (dt_bias, (d,)), "h0": (h0, (b, d, n)), "reset": (reset, (b, l))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}, but x {[b, l, d]} and A {[d, n]} ask for {[*shape]}")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")

    u = x.float()
    delta = F.softplus(dt.float() if dt_bias is None else dt.float() + dt_bias.float())
    h0 = u.new_zeros(b, d, n) if h0 is None else h0.float()
    y, h = BACKENDS[backend](delta, delta * u, A.float(), B.float(), C.float(), h0, reset)
    if D is not None:
        y = y + D.float() * u
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), h


# The backends take (delta, u, A, B, C, h0, reset), with u = delta x and every float tensor in fp32 (or all in float64,
# which the tests use), and return (y, h) without skip and gate. First the definition.


def exp(v: Tensor) -> Tensor:
    """e^v as 2^(v log2 e): on our EPYC, torch.exp2 takes 0.17 ns a number and torch.exp 0.6 (a GPU has only exp2)."""
    return torch.exp2(v * math.log2(math.e))


def naive(delta, u, A, B, C, h0, reset):
    """One step after the other. Autograd differentiates it, and to do so keeps every state: (b, l, d, n)."""
    h, y = h0, []
    for t in range(u.shape[1]):
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        decay = exp(delta[:, t, :, None] * A)                            # (b, d, n)
        drive = u[:, t, :, None] * B[:, t, None, :]                      # (b, d, n)
        h = torch.addcmul(drive, decay, h)                               # (b, d, n)
        y.append((h @ C[:, t, :, None])[..., 0])                         # (b, d)
    return torch.stack(y, dim=1), h                                      # (b, l, d), (b, d, n)


# Second, in parallel. Two steps in a row are one step of the same form,
#     a2 (a1 h + b1) + b2 = (a2 a1) h + (a2 b1 + b2),
# and merging pairs this way is associative, so a sequence halves in one parallel move. No product is ever divided out
# and no logarithm summed: both are shorter, and both lose all digits once a long product of decays nears 0.


def parallel(delta, u, A, B, C, h0, reset):
    """All steps at once, in 2 log2(l) moves and O(l) work, holding a few times (b, l, d, n)."""
    decay = exp(delta[..., None] * A)                                    # (b, l, d, n)
    if reset is not None:
        decay = decay.masked_fill(reset[..., None, None], 0)
    drive = u[..., None] * B[:, :, None, :]                              # (b, l, d, n)
    first = torch.addcmul(drive[:, :1], decay[:, :1], h0[:, None])       # (b, 1, d, n): h0 enters with step 0
    h = merge_pairs(decay, torch.cat([first, drive[:, 1:]], dim=1))      # (b, l, d, n)
    return (h @ C[..., None])[..., 0], h[:, -1]                          # (b, l, d), (b, d, n)


def merge_pairs(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for every t along dim 1, from h_{-1} = 0, for any length."""
    if b.shape[1] == 1:
        return b
    a1, b1, a2, b2 = a[:, 0:-1:2], b[:, 0:-1:2], a[:, 1::2], b[:, 1::2]  # steps 0, 2, 4, ... and 1, 3, 5, ...
    odd = merge_pairs(a2 * a1, torch.addcmul(b2, a2, b1))                # h_1, h_3, h_5, ...: half the problem
    h = b.clone()                                                        # h_0 is right already
    h[:, 1::2] = odd
    h[:, 2::2] += a[:, 2::2] * odd[:, :h[:, 2::2].shape[1]]              # h_2 = a_2 h_1 + b_2, h_4, ...
    return h


# Third, the one that trains on a CPU: the loop again, but the decays of 16 steps are computed together, and the backward
# pass recomputes each chunk of 16 from the state at its start, so (b, l, d, n) never exists. Write g_t for dL/dh_t. h_t
# is read by y_t and by h_{t+1}, so
#     g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}:
# the same recurrence, run from the end. The other gradients are products of g_t with what multiplied it on the way up.

CHUNK = 16     # steps; 8 to 32 time alike here: fewer pay Python per step, more fall out of the processor's cache


@torch.compiler.disable     # a Python loop over time: unrolled, it would compile for minutes and run no faster
def chunked(delta, u, A, B, C, h0, reset):
    """The loop over chunks. Inside, time comes first and d last: each step is one block, with long inner loops."""
    delta, u, B, C = (v.transpose(0, 1).contiguous() for v in (delta, u, B, C))        # (l, b, d), (l, b, n)
    reset = None if reset is None else reset.T                                         # (l, b)
    y, h = Chunked.apply(delta, u, A.T.contiguous(), B, C, h0.mT.contiguous(), reset)  # (l, b, d), (b, n, d)
    return y.transpose(0, 1), h.mT                                                     # (b, l, d), (b, d, n)


def chunk_states(delta, u, A, B, h, reset):
    """One chunk's decays (c, b, n, d), and its states (c + 1, b, n, d) with the one before it, h, in front."""
    decay = exp(delta[:, :, None] * A)                                   # (c, b, n, d)
    if reset is not None:
        decay.masked_fill_(reset[:, :, None, None], 0)
    hs = h.new_empty(len(u) + 1, *h.shape)                               # (c + 1, b, n, d)
    hs[0] = h
    torch.mul(u[:, :, None], B[..., None], out=hs[1:])                   # the drive, which becomes the state in place
    for t in range(len(u)):
        hs[t + 1].addcmul_(decay[t], hs[t])
    return decay, hs


class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta, u, A, B, C, h, reset):
        y, starts = torch.empty_like(u), []
        for t in range(0, len(u), CHUNK):
            c = slice(t, t + CHUNK)
            starts.append(h)
            _, hs = chunk_states(delta[c], u[c], A, B[c], h, None if reset is None else reset[c])
            y[c] = (C[c, :, None] @ hs[1:])[:, :, 0]                     # (c, b, d)
            h = hs[-1].clone()                                           # not a view, which would keep the chunk alive
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(delta, u, A, B, C, reset, *starts)
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        delta, u, A, B, C, reset, *starts = ctx.saved_tensors
        d_delta, du, dA, dB, dC = map(torch.zeros_like, (delta, u, A, B, C))
        for i in reversed(range(len(starts))):
            c = slice(i * CHUNK, (i + 1) * CHUNK)
            decay, hs = chunk_states(delta[c], u[c], A, B[c], starts[i], None if reset is None else reset[c])
            g = C[c, :, :, None] * dy[c, :, None]                        # (c, b, n, d): what y_t asks of h_t
            g[-1] += dh                                                  # and what all later chunks ask of the last
            for t in reversed(range(len(g) - 1)):
                g[t].addcmul_(decay[t + 1], g[t + 1])
            dh = decay[0] * g[0]                                         # (b, n, d): for the chunk before
            dC[c] = (hs[1:] @ dy[c, :, :, None])[..., 0]                 # (c, b, n)
            dB[c] = (g @ u[c, :, :, None])[..., 0]                       # (c, b, n)
            du[c] = (B[c, :, None] @ g)[:, :, 0]                         # (c, b, d)
            g *= decay
            g *= hs[:-1]                                                 # now the gradient of delta_t A
            dA += (g * delta[c, :, None]).sum((0, 1))                    # (n, d)
            d_delta[c] = (g * A).sum(2)                                  # (c, b, d)
        return d_delta, du, dA, dB, dC, dh, None


def auto(*args):
    """What runs by default: a single token needs no chunks."""
    return (naive if args[0].shape[1] == 1 else chunked)(*args)


BACKENDS = {"auto": auto, "naive": naive, "parallel": parallel, "chunked": chunked}


if __name__ == "__main__":
    b, l, d, n = 4, 256, 256, 16
    torch.manual_seed(0)
    delta, u, y_grad = F.softplus(torch.randn(b, l, d) - 3), torch.randn(b, l, d), torch.randn(b, l, d)
    A = -torch.arange(1.0, n + 1).expand(d, n)
    inputs = [delta, delta * u, A, torch.randn(b, l, n), torch.randn(b, l, n), torch.randn(b, d, n)]

    def run(scan, dtype):
        """Outputs, then gradients; and the seconds of the forward alone and of both."""
        leaves = [v.to(dtype).requires_grad_() for v in inputs]
        start = time.perf_counter()
        y, h = scan(*leaves, None)
        middle = time.perf_counter()
        grads = torch.autograd.grad((y * y_grad).sum() + h.sum(), leaves)
        return [y, h, *grads], middle - start, time.perf_counter() - start

    def worst(ours, exact):
        """The largest error of any tensor, relative to that tensor's largest value."""
        return max(((v - w).abs().max() / w.abs().max()).item() for v, w in zip(ours, exact))

    exact = run(naive, torch.float64)[0]
    print(f"(b, l, d, n) = {(b, l, d, n)}, fp32, {torch.get_num_threads()} CPU threads, torch {torch.__version__}; "
          "errors against the loop in float64, relative to the largest value; median of 5 runs")
    print(f"{'backend':10}{'error':>10}{'gradients':>12}{'forward':>12}{'with backward':>16}")
    for name in ("naive", "parallel", "chunked"):
        runs = [run(BACKENDS[name], torch.float32) for _ in range(5)]
        forward, both = (1e3 * sorted(times)[2] for times in list(zip(*runs))[1:])
        values = runs[0][0]
        print(f"{name:10}{worst(values[:2], exact[:2]):10.1e}{worst(values[2:], exact[2:]):12.1e}"
              f"{forward:9.1f} ms{both:13.1f} ms")
