"""Falcon-Mamba: the model and its checkpoint. Read scan.py first; sample.py and train.py come next.

A language model that carries a state of fixed size from token to token, where a transformer carries
a cache that grows with the text. Each of the 7B's sixty-four layers reads the residual stream, a
vector of d_model numbers for each token, and adds to it:

    x, z = in_proj(RMSNorm(stream))            (b, l, d) each: a signal, and the gate of its result
    x = SiLU(conv(x))                          each channel sees its own last d_conv inputs
    dt, B, C = x_proj(x)                       (b, l, r), (b, l, n), (b, l, n): see scan.py
    dt, B, C = norm(dt), norm(B), norm(C)      no weights; Falcon-Mamba's addition, for stability
    y = scan(x, dt_proj(dt), A, B, C, D, z)    dt_proj widens dt to (b, l, d), and has dt_bias
    stream = stream + out_proj(y)

Sources: Mamba, arXiv 2312.00752, Fig. 3 and Alg. 2; the Falcon-Mamba report, arXiv 2410.05355; the
published checkpoints, whose tensor names are our attribute names; and modeling_falcon_mamba.py in
the package transformers, which is "the reference" below.

Sizes: b batch, l length, m d_model, d d_inner, n d_state, r dt_rank, k d_conv.
"""
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import huggingface_hub
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from scan import selective_scan
from scan import step as scan_step

@dataclass
class MambaConfig:
    """The sizes of a model, by default the 7B's. ValueError for one that no model can have."""
    vocab_size: int = 65024
    d_model: int = 4096
    n_layer: int = 64
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2                     # d_inner / d_model, computed anew if d_inner is given
    d_inner: int = None                 # None: expand x d_model
    dt_rank: int = None                 # None: d_model / 16, rounded up
    norm_eps: float = 1e-5              # in the RMSNorms of the residual stream
    mixer_norm_eps: float = 1e-6        # in the RMSNorms of dt, B and C
    bias: bool = False                  # of in_proj and out_proj
    conv_bias: bool = True
    tie_embeddings: bool = False        # lm_head is the embedding matrix
    initializer_range: float = 0.1      # standard deviation of fresh weights, in initialize()
    bos_token_id: int = 0               # or None; never put before a text
    eos_token_id: int = 11              # or None, or a list: a text ends at any of them
    pad_token_id: int = 0               # or None

    def __post_init__(self):
        check(self)                     # what was given
        if self.d_inner is None:
            self.d_inner = self.expand * self.d_model
        if self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)
        check(self)                     # what follows from it
        self.expand = max(1, self.d_inner // self.d_model)      # the 7B's file says 16, wrongly

    @classmethod
    def from_json(cls, path: Path) -> "MambaConfig":
        """From a published config.json; ValueError if it is missing, broken, or another model's."""
        return cls(**read_config(path))

# Small tensors that are fp32 in all models loaded or trained. A rounding of A_log would act at each
# token. In bf16 dt_proj's bias, -7 to -2 when fresh, would change delta by up to 1.6 %.
KEEP_FP32 = "A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"

class State(NamedTuple):
    """All that the model remembers of a text: 37 MB for the 7B, after one token or a million."""
    conv: list[Tensor]      # of each layer (b, k - 1, d): `past`, the last inputs, in their dtype
    ssm: list[Tensor]       # of each layer (b, d, n): `h`, the scan's state, in fp32

    def copy(self) -> "State":
        return State([past.clone() for past in self.conv], [h.clone() for h in self.ssm])

class RMSNorm(nn.RMSNorm):
    """PyTorch's, computed in fp32, returned in its weight's dtype."""

    def forward(self, stream):
        # Rounded once, at the end. The reference also rounds before it multiplies by the weight.
        y = F.rms_norm(stream, self.normalized_shape, self.weight.float(), self.eps)
        return y.to(self.weight.dtype)

class Mixer(nn.Module):
    """What one layer does with the normalised stream."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        d, n, r, k = config.d_inner, config.d_state, config.dt_rank, config.d_conv
        self.widths = r, n                                          # of dt, and of B and C
        self.eps = config.mixer_norm_eps
        self.in_proj = Linear(config.d_model, 2 * d, bias=config.bias)
        self.conv1d = nn.Conv1d(d, d, k, groups=d, bias=config.conv_bias)   # see conv()
        self.x_proj = Linear(d, r + 2 * n, bias=False)
        self.dt_proj = Linear(r, d)
        # A = -exp(A_log) is negative, however training moves A_log. Fresh, A is -1, -2, ..., -n in
        # each channel: n numbers that fade at n speeds.
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = Linear(d, config.d_model, bias=config.bias)

    def forward(self, normed, past, h, reset):
        """normed (b, l, m), two states, reset (b, l) or None -> (b, l, m), the states after it."""
        A, taps, bias = self.constants()
        x, z = self.in_proj(normed).chunk(2, dim=-1)                # (b, l, d), (b, l, d)
        z = z.contiguous()      # the backward keeps it, and a view would keep x's half as well
        x, past = self.conv(x, past, reset, taps, bias)             # (b, l, d), (b, k - 1, d)
        past = past.clone(memory_format=torch.contiguous_format)    # a view would keep it all, too
        dt, B, C = self.selection(x)                                # (b, l, d), (b, l, n) twice
        # The scan adds dt_proj's bias, in fp32.
        y, h = selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, h, reset)
        return self.out_proj(y), past, h

    def step(self, normed, past, h, constants):
        """The same for one token, normed (b, 1, m). Overwrites the states."""
        A, taps, bias = constants
        x, z = self.in_proj(normed).chunk(2, dim=-1)                # (b, 1, d), (b, 1, d)
        window = torch.cat([past.float(), x.float()], dim=1)        # (b, k, d)
        past.copy_(window[:, 1:])
        x = F.silu(bias + (window * taps).sum(1, keepdim=True)).to(x.dtype)
        dt, B, C = self.selection(x)
        y = scan_step(h, x, dt, A, B, C, self.D, z, self.dt_proj.bias)
        return self.out_proj(y)

    def constants(self):
        """What no token changes: A, and the convolution's weights and bias, all in fp32."""
        A = -torch.exp(self.A_log.float())                          # (d, n)
        taps = self.conv1d.weight.float().squeeze(1).T.contiguous()         # (k, d)
        bias = self.conv1d.bias
        return A, taps, taps.new_zeros(1) if bias is None else bias.float()

    def conv(self, x, past, reset, taps, bias):
        """SiLU of the causal convolution, a sum of k taps: weight i times the input k - 1 - i ago.

        F.conv1d cannot leave out the taps of some tokens. Here a tap counts only if its input is of
        the same document as the token that it serves.
        """
        k = len(taps)
        l = x.shape[1]
        window = torch.cat([past, x], dim=1)                                # (b, k - 1 + l, d)
        past = window[:, l:]
        if reset is not None:
            # Number the documents, the past as 0. For k = 3, reset = [0, 1, 0] gives
            # [0, 0, 0, 1, 1]: two of the past, three tokens. So token 1 sees only itself.
            doc = F.pad(reset.cumsum(1), (k - 1, 0))                        # (b, k - 1 + l)
            former = doc[:, l:] != doc[:, -1:]      # of another document than the last token
            past = past.masked_fill(former[..., None], 0)
        window = window.float()
        y = torch.addcmul(bias, window[:, k - 1:], taps[k - 1])             # (b, l, d), the present
        for i in range(k - 1):
            inputs = window[:, i:i + l]                                     # (b, l, d)
            if reset is None:
                y.addcmul_(inputs, taps[i])
            else:
                other = doc[:, i:i + l] != doc[:, k - 1:]                   # (b, l)
                y += (inputs * taps[i]).masked_fill_(other[..., None], 0)
        return F.silu(y).to(x.dtype), past

    def selection(self, x):
        """dt, B and C of each token. Falcon-Mamba's addition, three weightless norms, is here.

        They bound what the scan is given, however large x_proj's weights become.
        """
        r, n = self.widths
        dt, B, C = self.x_proj(x).float().split([r, n, n], dim=-1)
        # First the norm, then dt_proj, as in the reference. Its fused training kernel swaps them.
        dt = F.rms_norm(dt, [r], eps=self.eps)                      # (b, l, r)
        B = F.rms_norm(B, [n], eps=self.eps)                        # (b, l, n)
        C = F.rms_norm(C, [n], eps=self.eps)                        # (b, l, n)
        return product(dt.to(x.dtype), self.dt_proj.weight), B, C   # (b, l, d) and the same

class Block(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, stream, past, h, reset):
        out, past, h = self.mixer(self.norm(stream), past, h, reset)
        return stream + out, past, h                                # the stream stays fp32

    def step(self, stream, out, past, h, constants):
        """For one token. Returns the stream, and an `out` that the next layer adds to it.

        So a sum and the norm after it are in one function, which torch.compile makes one loop.
        """
        stream = stream + out
        return stream, self.mixer.step(self.norm(stream), past, h, constants)

class Backbone(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, tokens, state, reset=None):
        stream = self.embeddings(tokens).float()                    # (b, l, m)
        after = State([], [])
        for layer, past, h in zip(self.layers, *state, strict=True):
            stream, past, h = layer(stream, past, h, reset)
            after.conv.append(past)
            after.ssm.append(h)
        return self.norm_f(stream), after

class Mamba(nn.Module):
    """The language model, freshly initialised. Its tensors have the published names and shapes."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        initialize(self)

    def forward(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None,
                last_only: bool = False) -> tuple[Tensor, State]:
        """Read tokens (b, l), going on from `state` (None: blank), which is not changed.

        reset (b, l) bool is true where a document starts. Nothing before it influences it or what
        follows. With padding on the left, set it at the prompt's first token.
        Returns fp32 logits (b, l, vocab_size), with last_only (b, 1, vocab_size); the next state.
        """
        state = state or self.blank_state(len(tokens))
        if tokens.shape[1] == 1 and reset is None and not torch.is_grad_enabled():
            state = state.copy()
            return self.step(tokens, state, self.constants()), state
        hidden, state = self.backbone(tokens, state, reset)         # (b, l, m)
        hidden = hidden[:, -1:] if last_only else hidden
        return self.lm_head(hidden).float(), state

    def step(self, token: Tensor, state: State, constants: list) -> Tensor:
        """Logits (b, 1, vocab_size) after one token a text, (b, 1). Overwrites the state.

        For inference. `constants` are those of constants(), made since the weights last changed.
        """
        with without_onednn(token.numel() == 1):        # for one row, which is faster so
            out = self.backbone.embeddings(token)       # (b, 1, m): layer 0 adds it to the stream
            stream = torch.zeros_like(out, dtype=torch.float32)
            layers = self.backbone.layers
            for layer, past, h, own in zip(layers, *state, constants, strict=True):
                stream, out = layer.step(stream, out, past, h, own)
            return self.lm_head(self.backbone.norm_f(stream + out)).float()

    def constants(self) -> list:
        """Each layer's constants(), to be made once for a text."""
        return [layer.mixer.constants() for layer in self.backbone.layers]

    def blank_state(self, batch: int) -> State:
        """The state before any text: zeros."""
        c = self.config
        weight = self.backbone.norm_f.weight
        conv = weight.new_zeros(c.n_layer, batch, c.d_conv - 1, c.d_inner)
        ssm = weight.new_zeros(c.n_layer, batch, c.d_inner, c.d_state, dtype=torch.float32)
        return State([*conv], [*ssm])

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None, quantize: bool = False) -> "Mamba":
        """Load a folder, or a Hugging Face hub id, which is downloaded first.

        Weights become `dtype`, or stay as stored if it is None: on a CPU in the mapped files,
        uncopied. What KEEP_FP32 names is always fp32.
        `quantize` makes an Int4Linear of each in_proj, x_proj and out_proj and of lm_head.
        ValueError, in one sentence, for what is missing, broken, or does not fit together.
        """
        folder = find(source)
        config = MambaConfig.from_json(folder / "config.json")
        with torch.device("meta"):                                  # shapes without memory
            model = cls(config).eval()
        tensors = read_tensors(folder)
        if config.tie_embeddings:
            tensors.setdefault("lm_head.weight", tensors.get("backbone.embeddings.weight"))
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as e:       # names what is missing, unexpected or of another shape
            why = shorten(str(e), 400)
            raise ValueError(f"{folder} does not fit its config.json: {why!r:.450}") from e
        del tensors                     # or none would be let go, once it is in 4 bits
        embeddings = model.backbone.embeddings.weight
        if config.tie_embeddings:       # assign=True has made them two
            if not torch.equal(model.lm_head.weight.to(embeddings.dtype), embeddings):
                raise ValueError(f"{folder} has an lm_head.weight and other backbone.embeddings."
                                 "weight, but its config.json says tie_word_embeddings")
            model.lm_head.weight = embeddings

        dtype = dtype or embeddings.dtype
        dtype = torch.float32 if dtype == torch.float64 else dtype
        in_4_bits = "in_proj.weight", "x_proj.weight", "out_proj.weight", "lm_head.weight"
        names = [name for name, _ in model.named_parameters()]
        for name in tqdm(names, "to 4 bits", disable=not quantize):
            p = model.get_parameter(name)
            if quantize and name.endswith(in_4_bits) and p.shape[1] % Int4Linear.GROUP == 0:
                path = name.removesuffix(".weight")
                bias = model.get_submodule(path).bias
                model.set_submodule(path, Int4Linear(p.data.to(device), bias))
            else:
                kind = torch.float32 if name.endswith(KEEP_FP32) else dtype
                p.data = p.data.to(device, kind, copy=quantize)
        return model

    def save_pretrained(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors, which transformers loads as they are.

        `tensors`, from name to value, stand in for the model's own where those are sharded (FSDP)
        over GPUs. OSError if it fails, and then the files that were there are left as they were,
        but for a disk that fails between the two renames.
        """
        if any(isinstance(module, Int4Linear) for module in self.modules()):
            raise ValueError("a model in 4 bits cannot be saved; load it without quantize")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = tensors or {name: p.detach() for name, p in self.named_parameters()}
        dtype = tensors["backbone.embeddings.weight"].dtype
        config = replacing(folder / "config.json")
        weights = replacing(folder / "model.safetensors")
        try:
            # Both are written, then renamed. Killed between, this leaves new weights with the old
            # config.json. Loading refuses them if a shape differs.
            with config as new_config, weights as new_weights:
                new_config.write_bytes(config_json(self.config, dtype))
                safetensors.torch.save_file(tensors, new_weights, {"format": "pt"})
                shutil.copymode(new_config, new_weights)    # else only its owner could read it
        except (OSError, safetensors.SafetensorError) as e:
            raise OSError(f"cannot write the checkpoint {folder}: {e}") from e

@torch.no_grad()
def initialize(model: Mamba) -> None:
    """Redraw the weights that the reference draws otherwise than PyTorch."""
    for name, p in model.named_parameters():
        if name.endswith("dt_proj.bias"):       # so that a token lasts from 0.001 to 0.1
            delta = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1)))
            p.copy_(delta + torch.log(-torch.expm1(-delta)))        # softplus of it is delta
        elif name.endswith(".bias"):
            nn.init.zeros_(p)
        elif name.endswith(("in_proj.weight", "x_proj.weight", "embeddings.weight",
                            "lm_head.weight")):
            nn.init.normal_(p, std=model.config.initializer_range)

# Matrix products, for which a CPU has faster ways than PyTorch's own.

# What CPUs call their units for 16-bit products (torch.cpu.get_capabilities); ARM's name is last.
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
         torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith")}
NO_UNITS = [dtype for dtype, names in UNITS.items()
            if not any(torch.cpu.get_capabilities().get(name) for name in names)]
WIDEN_FROM = 8      # tokens: for 4 a widened product is no faster, for 256 2.4 times as fast
FUSE_BELOW = 2**19  # numbers in a weight: fusing smaller ones made the 190M write 5 % faster
ROWS = 512          # of a weight that are taken at a time, so that they stay in a cache

def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by what is fastest for so many tokens."""
    tokens = x.numel() // x.shape[-1]
    if tokens == 1 and torch.compiler.is_compiling() and weight.numel() < FUSE_BELOW:
        # Written out, a small product becomes one loop with what stands around it.
        y = (x.float()[..., None, :] * weight.float()).sum(-1)
    elif (tokens >= WIDEN_FROM and x.device.type == "cpu" and x.dtype in NO_UNITS
          and not torch.is_grad_enabled()):     # because a backward would keep the wide weights
        # PyTorch's own product widens each weight again for every few tokens.
        wide = x.float()
        y = torch.cat([F.linear(wide, rows.float()) for rows in weight.split(ROWS)], dim=-1)
    else:
        return F.linear(x, weight, bias)
    return (y if bias is None else y + bias).to(x.dtype)

class Linear(nn.Linear):
    def forward(self, x):
        return product(x, self.weight, self.bias)

@contextmanager
def without_onednn(if_true: bool) -> Iterator[None]:
    """For one row of bf16, but not for two, oneDNN takes twice as long as PyTorch's own product.

    All threads share its switch, so only a call that turned it off turns it on.
    """
    onednn = torch.backends.mkldnn
    turn_off = if_true and onednn.enabled
    if turn_off:
        onednn.enabled = False
    try:
        yield
    finally:
        if turn_off:
            onednn.enabled = True

# Four bits a weight, five with the levels: a third of bf16's. To write a token is to read them all.

class Int4Linear(nn.Module):
    """A linear layer whose weight is kept in groups: 32 neighbours in a row.

    Sixteen levels, evenly apart, reach from a group's least number to its greatest. Of each number
    only the nearest level is kept, as a code from 0 to 15, and of the group, in bf16, `scale`, the
    distance of two levels, and `zero`, the level of code 8:

        weight = (code - 8) scale + zero

    So a number near 0 is off by half of `scale` at most. For normally distributed ones that is 8 %
    (root mean square), and in groups of 64 9 %. dt_proj and the embeddings stay as they are.
    PyTorch's kernels unpack as they multiply, take bf16 and are made for few tokens. Those for
    CUDA are untried.
    """
    GROUP = 32
    UNPACK_FROM = 96    # tokens: a CPU's kernel is slower from here on than unpack and a product

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features = len(weight)
        self.bias = bias
        # Room for all rows at once: small results between large ones would scatter free memory.
        count = len(weight) + -len(weight) % 64                     # as pack pads them
        packed, levels = pack(weight[:64].float())
        packed = packed.new_empty(count // 64 * len(packed), *packed.shape[1:])
        levels = levels.new_empty(len(levels), count, 2)
        pieces = zip(weight.split(ROWS), packed.split(ROWS * len(packed) // count),
                     levels.split(ROWS, dim=1))
        for rows, packed_rows, levels_rows in pieces:
            results = pack(rows.float())
            packed_rows.copy_(results[0])
            levels_rows.copy_(results[1])
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.levels = nn.Parameter(levels, requires_grad=False)

    def forward(self, x):
        rows = x.flatten(0, -2)                                     # (b l, in)
        if x.is_cuda or len(rows) < self.UNPACK_FROM or not block_size():
            y = multiply(rows.bfloat16().contiguous(), self.packed, self.levels)
        else:
            rows = rows.float() if x.dtype in NO_UNITS else rows
            pieces = zip(self.packed.split(ROWS), self.levels.split(ROWS, dim=1))
            weights = (unpack(*piece, block_size()).to(rows.dtype) for piece in pieces)
            y = torch.cat([F.linear(rows, weight) for weight in weights], dim=1)
        y = y[:, :self.out_features].contiguous()                   # without rows that pack added
        y = y.unflatten(0, x.shape[:-1])                            # (b, l, out)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

def pack(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a weight -> codes, as the device's kernel wants them; levels (in / 32, rows, 2)."""
    rows = F.pad(rows, (0, 0, 0, -len(rows) % 64))                  # a kernel's block has 64 rows
    groups = rows.unflatten(1, (-1, Int4Linear.GROUP))              # (rows, in / 32, 32)
    low = groups.amin(-1, keepdim=True)
    high = groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-9).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    codes = ((groups - zero.float()) / scale.float() + 8).round_().clamp_(0, 15)
    codes = codes.view(rows.shape)
    if rows.is_cuda:
        pairs = 16 * codes[:, ::2] + codes[:, 1::2]                 # two codes a byte
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.byte(), 2)
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    return packed, torch.cat([scale, zero], dim=-1).transpose(0, 1)

def multiply(rows: Tensor, packed: Tensor, levels: Tensor) -> Tensor:
    if rows.is_cuda:
        return torch.ops.aten._weight_int4pack_mm(rows, packed, Int4Linear.GROUP, levels)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, Int4Linear.GROUP, levels)

def unpack(packed: Tensor, levels: Tensor, block: int) -> Tensor:
    """Some rows of a weight, (rows, in) in bf16: what a CPU's kernel makes of the identity.

    In memory a block of rows is its groups in turn. So a group of a block can pass for a weight
    with 32 inputs, and one identity (32, 32) unpacks them all.
    """
    groups, size = len(levels), Int4Linear.GROUP
    levels = levels.unflatten(1, (-1, block)).transpose(0, 1)       # (blocks, groups, block, 2)
    identity = torch.eye(size, dtype=torch.bfloat16)
    weight = multiply(identity, packed.view(-1, size // 2), levels.reshape(1, -1, 2))
    weight = weight.view(size, -1, groups, block)                   # (32, blocks, groups, block)
    weight = weight.permute(2, 0, 1, 3)                             # (groups, 32, blocks, block)
    return weight.reshape(groups * size, -1).T

@functools.cache
def block_size() -> int:
    """How many rows a block of this CPU's kernel has; 0 if unpack is wrong here."""
    size = torch.arange(1.0, 65)[:, None]                           # of each row another
    weight = size * torch.arange(64.0 * 64).sin().view(64, 64)      # levels are 2 / 15 size apart
    for block in 64, 32, 16:
        if ((unpack(*pack(weight), block) - weight) / size).abs().max() < 0.08:
            return block
    return 0

# From here on: files, and what is wrong with them.

# What config.json calls each field of MambaConfig.
PUBLISHED = {f.name: f.name for f in fields(MambaConfig)}
PUBLISHED |= {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size",
              "d_conv": "conv_kernel", "d_inner": "intermediate_size", "dt_rank": "time_step_rank",
              "norm_eps": "layer_norm_epsilon", "mixer_norm_eps": "mixer_rms_eps",
              "bias": "use_bias", "conv_bias": "use_conv_bias",
              "tie_embeddings": "tie_word_embeddings"}
UNQUANTISED = "is quantised; load the unquantised one, which sample.py --quantize can make small"

def check(config: MambaConfig) -> None:
    """ValueError for a value that no model can have."""
    for f in fields(config):
        is_id = f.name.endswith("_id")
        least = 1 if f.type is int and not is_id else 0
        most = 1024 if f.name == "n_layer" else 2**20           # or it would ask for all memory
        value = getattr(config, f.name)
        several = f.name == "eos_token_id" and type(value) is list
        for v in value if several else [value]:
            if v is None and (is_id or f.default is None):
                continue
            if type(v) is not f.type or not least <= v <= most:
                raise ValueError(f"{PUBLISHED[f.name]} is {value!r:.50}, but must be "
                                 f"{f.type.__name__}, from {least} to {most} if it is a number")

def read_config(path: Path) -> dict:
    """MambaConfig's arguments, from a published config.json; where keys miss, as transformers."""
    raw = {"hidden_act": "silu", "tie_word_embeddings": True} | read_json(path)
    kind = raw.get("model_type"), raw["hidden_act"]
    if kind != ("falcon_mamba", "silu"):
        raise ValueError(f"{path} is of a {kind[0]!r:.50} with {kind[1]!r:.50}, "
                         "not of a 'falcon_mamba' with 'silu'")
    if raw.get("quantization_config"):
        raise ValueError(f"{path.parent} {UNQUANTISED}")
    if raw.get("time_step_rank") == "auto":
        raw["time_step_rank"] = None
    return {ours: raw[name] for ours, name in PUBLISHED.items() if name in raw}

def config_json(config: MambaConfig, dtype: torch.dtype) -> bytes:
    """What transformers reads as a FalconMambaConfig."""
    raw = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba",
           "dtype": str(dtype).removeprefix("torch."), "hidden_act": "silu",
           "residual_in_fp32": True,
           "pad_vocab_size_multiple": 1}    # else llama.cpp's converter rounds vocab_size up
    for ours, name in PUBLISHED.items():
        raw[name] = getattr(config, ours)
    return json.dumps(raw, indent=2).encode() + b"\n"

def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path.parent} is no checkpoint, its {path.name} no JSON: {e}") from e
    return value

def find(source: str | Path) -> Path:
    """The folder of that name, or else the local copy of the hub's repository of that name."""
    name = str(source)
    folder = os.path.expanduser(name)       # leaves a ~ that it does not know
    if os.path.isdir(folder):
        return Path(folder)
    try:
        files = ["*.json", "*.jinja", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as e:          # the hub's client raises many kinds
        why = shorten(str(e), 200)
        raise ValueError(f"{name!r:.200} is not a folder; `python train.py` makes one, for "
                         f"`--model out`; nor could it be downloaded ({why!r})") from e

def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the folder's safetensors, one file or several, only mapped."""
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    tensors = {}
    try:
        if whole.exists() or not index.exists():
            with safetensors.safe_open(whole, "pt") as file:
                places = dict.fromkeys(file.keys(), whole.name)
        else:
            places = read_json(index)["weight_map"]                 # name -> file
        for name, place in places.items():
            if Path(place).name != place:
                raise ValueError(f"{index.name} names a file that is not beside it")
            # What is read of a mapped file stays in memory, until all that is mapped with it goes.
            # So each tensor is mapped by itself.
            with safetensors.safe_open(folder / place, "pt") as file:
                tensors[name] = file.get_tensor(name)
    except Exception as e:          # a broken file raises many kinds
        raise ValueError(f"{folder} has no whole model.safetensors ({str(e)!r:.300}); pickled "
                         "weights are not read, because they can run code") from e
    for name, v in tensors.items():
        if v.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder}, with {name!r:.80} in {v.dtype}, {UNQUANTISED}")
    return tensors

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path`; after a crash there is one or the other."""
    new = path.with_name(path.name + ".partial")
    try:
        yield new
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)     # a full disk leaves half of it

def write_file(path: Path, content: bytes) -> None:
    with replacing(path) as new:
        new.write_bytes(content)
