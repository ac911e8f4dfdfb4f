"""Falcon-Mamba: the model and its checkpoint. Read scan.py first; sample.py and train.py come next.

A language model that carries a state of fixed size from token to token, where a transformer carries
a cache that grows with the text. Each of the 7B's sixty-four layers reads the residual stream, a
vector of d_model numbers for each token, and adds to it:

    x, z = in_proj(RMSNorm(stream))            (b, l, d) each: a signal, and the gate of its result
    x = SiLU(conv(x))                          each channel sees its own last d_conv inputs
    dt, B, C = x_proj(x)                       (b, l, r), (b, l, n), (b, l, n): see scan.py
    dt, B, C = norm(dt), norm(B), norm(C)      all that Falcon-Mamba adds: training stays stable
    y = scan(x, dt_proj(dt), A, B, C, D, z)    dt_proj widens dt to (b, l, d)
    stream = stream + out_proj(y)

Sources: Mamba, arXiv 2312.00752, Fig. 3 and Alg. 2; the Falcon-Mamba report, arXiv 2410.05355; the
published checkpoints, whose tensor names are our attribute names; and modeling_falcon_mamba.py in
the package transformers, which is "the reference" below. `python mamba.py` prints the 7B.

Sizes: b batch, l length, m d_model, d d_inner, n d_state, r dt_rank, k d_conv.
"""
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@dataclass
class MambaConfig:
    """The sizes of a model; by default the 7B's. ValueError for a value that no model can have."""
    vocab_size: int = 65024
    d_model: int = 4096
    n_layer: int = 64
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    d_inner: int = None                 # expand x d_model unless given
    dt_rank: int = None                 # d_model / 16, rounded up, unless given
    norm_eps: float = 1e-5              # in the RMSNorms of the residual stream
    mixer_norm_eps: float = 1e-6        # in the RMSNorms of dt, B and C
    bias: bool = False                  # of in_proj and out_proj
    conv_bias: bool = True
    tie_embeddings: bool = False        # lm_head is the embedding matrix
    initializer_range: float = 0.1      # standard deviation of fresh linear and embedding weights
    bos_token_id: int = 0               # or None; never put before a text
    eos_token_id: int = 11              # or None, or a list: a text ends at any of them
    pad_token_id: int = 0               # or None

    def __post_init__(self):
        require(self, int, 1, 2**20, "vocab_size", "d_model", "d_state", "d_conv", "expand")
        require(self, int, 1, 2**10, "n_layer")     # a broken file shall not ask for all memory
        require(self, float, 1e-30, 1, "norm_eps", "mixer_norm_eps", "initializer_range")
        require(self, bool, False, True, "bias", "conv_bias", "tie_embeddings")
        require(self, int, 0, 2**20, "bos_token_id", "eos_token_id", "pad_token_id")
        if self.d_inner is None:
            self.d_inner = self.expand * self.d_model
        if self.dt_rank is None:
            self.dt_rank = math.ceil(self.d_model / 16)
        require(self, int, 1, 2**20, "d_inner", "dt_rank")
        self.expand = max(1, self.d_inner // self.d_model)      # the 7B's file says 16, and means 2

    @classmethod
    def from_json(cls, path: Path) -> "MambaConfig":
        """From a published config.json; ValueError if it is missing, broken, or another model's."""
        return cls(**read_config(path))


class State(NamedTuple):
    """All that the model remembers of a text: 37 MB for the 7B, after one token or a million."""
    conv: list[Tensor]      # of each layer (b, k - 1, d): the convolution's last inputs
    ssm: list[Tensor]       # of each layer (b, d, n): the scan's h, in fp32


class RMSNorm(nn.RMSNorm):
    """PyTorch's, from the stream's fp32 to the dtype of its weight."""

    def forward(self, stream):
        # Rounded once, at the end. The reference also rounds before it multiplies by the weight.
        y = F.rms_norm(stream, self.normalized_shape, self.weight.float(), self.eps)
        return y.to(self.weight.dtype)


# How CPUs call their units for 16-bit products, in torch.cpu.get_capabilities(). ARM's name is last.
UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
         torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith")}
NO_UNITS = [dtype for dtype, names in UNITS.items()
            if not any(torch.cpu.get_capabilities().get(name) for name in names)]
WIDEN_FROM = 8          # tokens. For 4 of them PyTorch's own product was as fast, for 16 a third slower.
ROWS = 512              # of a weight that are widened, packed or unpacked at a time: a cache holds them


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. A CPU without units for 16 bits takes it in fp32, if tokens are many.

    PyTorch's own product would widen each number again for every few tokens, and take more than
    twice as long. Training uses it all the same: its backward would keep the wide weight.
    """
    few = x.numel() < WIDEN_FROM * x.shape[-1]
    if few or x.device.type != "cpu" or x.dtype not in NO_UNITS or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    wide = x.float()
    y = torch.cat([F.linear(wide, rows.float()) for rows in weight.split(ROWS)], dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x):
        return product(x, self.weight, self.bias)


class Mixer(nn.Module):
    """What one layer does with the normalised stream."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        d, n, r, k = config.d_inner, config.d_state, config.dt_rank, config.d_conv
        self.split = r, n, n
        self.eps = config.mixer_norm_eps
        self.in_proj = Linear(config.d_model, 2 * d, bias=config.bias)
        self.conv1d = nn.Conv1d(d, d, k, groups=d, bias=config.conv_bias)   # only holds its tensors
        self.x_proj = Linear(d, r + 2 * n, bias=False)
        self.dt_proj = Linear(r, d)
        # A = -exp(A_log) is negative, however training moves A_log. Fresh, A is -1, -2, ..., -n in
        # each channel: n numbers that fade at n speeds.
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = Linear(d, config.d_model, bias=config.bias)

    def forward(self, stream, past, h0, reset):
        """stream (b, l, m), two states, reset (b, l) or None -> (b, l, m), the states after it."""
        x, z = self.in_proj(stream).chunk(2, dim=-1)                # (b, l, d), (b, l, d)
        z = z.contiguous()      # the backward keeps it, and a view would keep x's half as well
        x, past = self.conv(x, past, reset)                         # (b, l, d), (b, k - 1, d)
        dt, B, C = self.selection(x)                                # (b, l, d), (b, l, n) twice
        A = -torch.exp(self.A_log.float())                          # (d, n)
        # dt_proj's bias is added in the scan, in fp32. At -7 a token lasts 0.001. bf16 would round
        # -7 by up to 0.016, and so change that time by 1.6 %.
        y, h = selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, h0, reset)
        return self.out_proj(y), past, h

    def conv(self, x, past, reset):
        """SiLU of the causal convolution: tap i is weight i times the input k - 1 - i tokens ago.

        A tap counts only if its input is of the same document as the token it serves. `doc` numbers
        the documents; 0 is the text before. For k = 3 and reset = [0, 1, 0] it is [0, 0, 0, 1, 1]:
        two inputs of the past, three tokens. Token 1 sees only itself: the two before it are 0.
        """
        k, l = self.conv1d.kernel_size[0], x.shape[1]
        weight = self.conv1d.weight.float().squeeze(1).T.contiguous()       # (k, d)
        bias = self.conv1d.bias
        bias = weight.new_zeros(1) if bias is None else bias.float()
        window = torch.cat([past, x], dim=1)                                # (b, k - 1 + l, d)
        past = window[:, l:].clone(memory_format=torch.contiguous_format)   # no view: all of window
        window = window.float()
        y = torch.addcmul(bias, window[:, k - 1:], weight[k - 1])           # (b, l, d), the present
        if reset is None:
            for i in range(k - 1):
                y.addcmul_(window[:, i:i + l], weight[i])
        else:
            doc = F.pad(reset.cumsum(1), (k - 1, 0))                        # (b, k - 1 + l)
            for i in range(k - 1):
                tap = window[:, i:i + l] * weight[i]                        # (b, l, d)
                other = doc[:, i:i + l] != doc[:, k - 1:]                   # (b, l)
                y += tap.masked_fill_(other[..., None], 0)
            former = doc[:, l:] != doc[:, -1:]                              # (b, k - 1)
            past = past.masked_fill(former[..., None], 0)
        return F.silu(y).to(x.dtype), past

    def selection(self, x):
        """dt, B and C of each token. Falcon-Mamba's addition, three weightless norms, is here."""
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)         # (b, l, r), (b, l, n) twice
        # So does the reference in evaluation. Its fused training kernel normalises after dt_proj.
        dt, B, C = (F.rms_norm(v.float(), v.shape[-1:], eps=self.eps) for v in (dt, B, C))
        weight = self.dt_proj.weight.to(x.dtype)    # training in bf16 keeps it in fp32
        return product(dt.to(x.dtype), weight), B, C                # (b, l, d), (b, l, n) twice


class Block(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, stream, past, h0, reset):
        out, past, h = self.mixer(self.norm(stream), past, h0, reset)
        return stream + out, past, h                                # the stream stays fp32


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
        """Read tokens (b, l) from `state`, blank if None, which is left as it was.

        reset (b, l) bool is true where a document starts: no token before it reaches it or later
        ones. So packed documents do not leak. Padding on the left is a document before the prompt.
        Returns fp32 logits (b, l, vocab_size), with last_only (b, 1, vocab_size); the next state.
        """
        state = state or self.blank_state(len(tokens))
        with onednn_off(tokens.numel() == 1):
            hidden, state = self.backbone(tokens, state, reset)     # (b, l, m)
            hidden = hidden[:, -1:] if last_only else hidden
            return self.lm_head(hidden).float(), state

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
        uncopied. A_log, D, the convolution and dt_proj's bias, small and exact, are always fp32.
        With `quantize` each in_proj, x_proj, out_proj and lm_head becomes an Int4Linear.
        ValueError, in one sentence, for what is missing, broken, or does not fit together.
        """
        folder = find(source)
        config = MambaConfig.from_json(folder / "config.json")
        with torch.device("meta"):                                  # shapes without memory
            model = cls(config).eval()
        tensors, files = read_tensors(folder)
        if config.tie_embeddings:
            tie(tensors, folder)
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as e:       # names what is missing, unexpected or of another shape
            why = shorten(str(e), 400)
            raise ValueError(f"{folder} does not fit its config.json: {why!r:.450}") from e
        del tensors
        if config.tie_embeddings:
            model.lm_head.weight = model.backbone.embeddings.weight

        dtype = dtype or model.backbone.embeddings.weight.dtype
        dtype = torch.float32 if dtype == torch.float64 else dtype
        exact = "A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"
        names = [name for name, _ in model.named_parameters()]
        for name in tqdm(names, "to four bits", disable=not quantize):
            p = model.get_parameter(name)
            kind = torch.float32 if name.endswith(exact) else dtype
            if not quantize:
                p.data = p.data.to(device, kind)
                continue
            # What was read of a mapped file stays in memory. So each tensor has a map of its own.
            with safetensors.safe_open(files[name], "pt") as file:
                value = file.get_tensor(name)
            path = name.removesuffix(".weight")
            if (path.endswith(("in_proj", "x_proj", "out_proj", "lm_head"))
                    and value.shape[1] % Int4Linear.GROUP == 0):
                bias = model.get_submodule(path).bias
                model.set_submodule(path, Int4Linear(value.to(device), bias))
            else:
                p.data = value.to(device, kind, copy=True)
        return model

    def save_pretrained(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors, which transformers loads as they are.

        `tensors`, from name to value, stand in for the model's own where those are divided among
        machines. OSError if that fails. What was there before is then left as it was.
        """
        if any(isinstance(module, Int4Linear) for module in self.modules()):
            raise ValueError("a model in four bits cannot be saved; load it without quantize")
        folder = Path(folder)
        tensors = tensors or {name: p.detach() for name, p in self.named_parameters()}
        config = folder / "config.json.partial"
        weights = folder / "model.safetensors.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(self.config, tensors["backbone.embeddings.weight"].dtype, config)
            safetensors.torch.save_file(tensors, weights, {"format": "pt"})
            shutil.copymode(config, weights)    # safetensors lets only its owner read a file
            # Two files cannot change in one move. Killed in between, it leaves new weights with the
            # old config.json, and loading refuses them if any shape is another.
            replace_file(weights, folder / "model.safetensors")
            replace_file(config, folder / "config.json")
        except (OSError, safetensors.SafetensorError) as e:
            raise OSError(f"cannot write the checkpoint {folder}: {e}") from e
        finally:
            for path in (config, weights):
                with suppress(OSError):
                    path.unlink()


@torch.no_grad()
def initialize(model: Mamba) -> None:
    """Fresh weights as the reference draws them, where PyTorch's own draw is another."""
    for name, p in model.named_parameters():
        if name.endswith("dt_proj.bias"):       # so that a token lasts from 0.001 to 0.1
            delta = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1)))
            p.copy_(delta + torch.log(-torch.expm1(-delta)))        # softplus of it is delta
        elif name.endswith(".bias"):
            nn.init.zeros_(p)
        elif name.endswith(("in_proj.weight", "x_proj.weight", "embeddings.weight",
                            "lm_head.weight")):
            nn.init.normal_(p, std=model.config.initializer_range)


class Int4Linear(nn.Module):
    """A linear layer in four bits a weight. To write a token is to read all weights once: a third.

    32 neighbours in a row of the weight are a group. Sixteen levels, evenly apart, reach from the
    group's least number to its greatest. Of each number only the nearest level is kept, as a code
    from 0 to 15; of each group the distance of two levels and the level 8, in bf16:

        weight = (code - 8) scale + zero

    So a number is off by up to half of `scale`. Of numbers that are normally distributed 8 % are
    lost, in the root mean square; in groups of 64 it were 9 %. The kernels are PyTorch's, those for
    CUDA not tried yet. They multiply in fp32, give and take bf16, and are made for few tokens.
    """
    GROUP = 32
    UNPACK_FROM = 96    # tokens: with fewer a CPU's kernel is faster than to unpack and multiply

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.out_features = len(weight)
        packed = []
        levels = []
        for rows in weight.split(ROWS):
            rows = F.pad(rows.float(), (0, 0, 0, -len(rows) % 64))  # blocks of 64 rows, see unpack
            groups = rows.unflatten(1, (-1, self.GROUP))            # (rows, in / 32, 32)
            low = groups.amin(-1, keepdim=True)
            high = groups.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp(min=1e-9).bfloat16()
            zero = (low + 8 * scale.float()).bfloat16()
            codes = ((groups - zero.float()) / scale.float() + 8).round_().clamp_(0, 15)
            packed.append(pack(codes.view(rows.shape)))
            levels.append(torch.cat([scale, zero], dim=-1))         # (rows, in / 32, 2)
        levels = torch.cat(levels).transpose(0, 1).contiguous()     # (in / 32, out, 2)
        self.packed = nn.Parameter(torch.cat(packed), requires_grad=False)
        self.levels = nn.Parameter(levels, requires_grad=False)
        self.bias = bias

    def forward(self, x):
        rows = x.flatten(0, -2)                                     # (b l, in)
        if len(rows) < self.UNPACK_FROM or x.is_cuda or not block_size():
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
            if x.is_cuda:
                kernel = torch.ops.aten._weight_int4pack_mm
            y = kernel(rows.bfloat16().contiguous(), self.packed, self.GROUP, self.levels)
        else:
            dtype = torch.float32 if x.dtype in NO_UNITS else x.dtype
            rows = rows.to(dtype)
            pieces = zip(self.packed.split(ROWS), self.levels.split(ROWS, dim=1))
            y = torch.cat([rows @ unpack(*piece, dtype, block_size()) for piece in pieces], dim=-1)
        y = y[:, :self.out_features].unflatten(0, x.shape[:-1])     # (b, l, out)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, as the device's kernel wants them."""
    if codes.is_cuda:
        pairs = 16 * codes[:, ::2] + codes[:, 1::2]
        return torch.ops.aten._convert_weight_to_int4pack(pairs.byte(), 2)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)


def unpack(packed: Tensor, levels: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    """Some rows of a weight, as a matrix (in, rows).

    x86's kernel goes through a block of rows column by column. A byte of a column holds a row of
    the block's first half, in its lower four bits, and the one that is as far down in the second.
    """
    groups, size, half = len(levels), Int4Linear.GROUP, block // 2
    pairs = packed.view(-1, groups, size, half).permute(1, 2, 0, 3)         # (g, 32, blocks, half)
    scale, zero = levels.movedim(-1, 0).to(dtype).reshape(2, groups, 1, -1, 2, half)
    weight = torch.empty(groups, size, pairs.shape[2], 2, half, dtype=dtype)
    for i, codes in enumerate([pairs & 15, pairs >> 4]):
        codes = (codes.char() - 8).to(dtype)
        torch.addcmul(zero[..., i, :], codes, scale[..., i, :], out=weight[..., i, :])
    return weight.view(groups * size, -1)


@functools.cache
def block_size() -> int:
    """How many rows are a block of this CPU's kernel; 0 if it packs in another way than unpack."""
    row = torch.arange(64)[:, None]
    codes = torch.cat([row % 16, row // 16], dim=1).repeat(1, 16)           # (64, 32)
    levels = torch.tensor([1.0, 8.0]).repeat(1, 64, 1)                      # a weight is its code
    for block in 64, 32:
        if torch.equal(unpack(pack(codes), levels, torch.float32, block), codes.mT.float()):
            return block
    return 0


@contextmanager
def onednn_off(wanted: bool) -> Iterator[None]:
    """For one row of bf16 a CPU's oneDNN takes twice as long as PyTorch's own product.

    All threads share the switch. So whoever turns it off turns it on, and no one else does.
    """
    mkldnn = torch.backends.mkldnn
    turned_off = wanted and mkldnn.enabled
    if turned_off:
        mkldnn.enabled = False
    try:
        yield
    finally:
        if turned_off:
            mkldnn.enabled = True


# From here on: files, and what is wrong with them.

# Where config.json uses another name than we do.
PUBLISHED = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size",
             "d_conv": "conv_kernel", "d_inner": "intermediate_size", "dt_rank": "time_step_rank",
             "norm_eps": "layer_norm_epsilon", "mixer_norm_eps": "mixer_rms_eps",
             "bias": "use_bias", "conv_bias": "use_conv_bias",
             "tie_embeddings": "tie_word_embeddings"}
UNQUANTISED = "load the unquantised one, from which sample.py --quantize int4 makes 4 bits"


def require(config: MambaConfig, kind: type, low: float, high: float, *names: str) -> None:
    """ValueError unless these values are of that kind and from low to high.

    A token's number may also be None. There may be a list of those that end a text.
    """
    for name in names:
        value = getattr(config, name)
        if name.endswith("_id") and value is None:
            continue
        values = value if name == "eos_token_id" and type(value) is list else [value]
        if not values or not all(type(v) is kind and low <= v <= high for v in values):
            called = f"{name} or {PUBLISHED[name]}" if name in PUBLISHED else name
            limits = f"{kind.__name__} from {low} to {high}"
            raise ValueError(f"{called} is {value!r:.50}, but must be {limits}")


def read_config(path: Path) -> dict:
    """MambaConfig's arguments, from a published config.json."""
    defaults = {"hidden_act": "silu", "tie_word_embeddings": True}      # the reference's
    raw = defaults | read_json(path)
    for name, ours in [("model_type", "falcon_mamba"), ("hidden_act", "silu")]:
        if raw.get(name) != ours:
            raise ValueError(f"{path} has {name} {raw.get(name)!r:.50}; Falcon-Mamba's is {ours!r}")
    if raw.get("quantization_config"):
        raise ValueError(f"{path.parent} is quantised; {UNQUANTISED}")
    config = {}
    for f in fields(MambaConfig):
        name = PUBLISHED.get(f.name, f.name)
        if name in raw:
            config[f.name] = None if raw[name] == "auto" else raw[name]
    for name in ("vocab_size", "d_model", "n_layer"):
        if name not in config:
            raise ValueError(f"{path} lacks {PUBLISHED.get(name, name)}")
    return config


def write_config(config: MambaConfig, dtype: torch.dtype, path: Path) -> None:
    """What transformers reads as a FalconMambaConfig."""
    raw = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba",
           "dtype": str(dtype).removeprefix("torch."), "hidden_act": "silu",
           "residual_in_fp32": True,
           "pad_vocab_size_multiple": 1}    # else llama.cpp's converter rounds vocab_size up
    for f in fields(config):
        raw[PUBLISHED.get(f.name, f.name)] = getattr(config, f.name)
    path.write_text(json.dumps(raw, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if there is none."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as e:       # TypeError: a list, say
        raise ValueError(f"{path.parent} is no checkpoint, its {path.name} no JSON: {e}") from e


def find(source: str | Path) -> Path:
    """The folder of that name, or else the local copy of the hub's repository of that name."""
    name = str(source)
    folder = os.path.expanduser(name)       # leaves a ~ that it does not know
    if os.path.isdir(folder):
        return Path(folder)
    if name.count("/") != 1:                # the hub's names are owner/model
        raise ValueError(f"{name!r:.200} is not a folder; `python train.py` makes one called out")
    try:
        files = ["*.json", "*.jinja", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as e:      # the hub's client raises many kinds, its transport's among them
        why = shorten(str(e), 200)
        raise ValueError(f"{name!r:.200} is no folder here, nor downloaded ({why!r}); without a "
                         "network, `python train.py` makes a model for `--model out`") from e


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """The tensors in the folder's safetensors, one file or several, only mapped; the file of each."""
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    tensors = {}
    files = {}
    for name in sorted({str(name) for name in names}):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise ValueError(f"{index} names {name!r:.80}, which is no safetensors file beside it")
        try:
            more = safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as e:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({str(e)!r:.300}); "
                             "pickled weights are not read, because they can run code") from e
        twice = tensors.keys() & more.keys()
        if twice:
            raise ValueError(f"{folder / name} holds {min(twice)!r:.80} a second time")
        tensors |= more
        files |= dict.fromkeys(more, folder / name)
    for name, v in tensors.items():
        if v.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{folder} has {name!r:.80} in {v.dtype}, not in floats of 16 bits or "
                             f"more; if it is quantised, {UNQUANTISED}")
    return tensors, files


def tie(tensors: dict[str, Tensor], folder: Path) -> None:
    """Let lm_head.weight be the embeddings; refuse another, because either may be meant."""
    embeddings = tensors.get("backbone.embeddings.weight")
    head = tensors.get("lm_head.weight", embeddings)
    if embeddings is not None and not torch.equal(embeddings, head.to(embeddings.dtype)):
        raise ValueError(f"{folder} has a lm_head.weight that is not backbone.embeddings.weight, but "
                         "its config.json makes them one: set tie_word_embeddings to false there, "
                         "or delete the wrong tensor")
    tensors["lm_head.weight"] = embeddings


def replace_file(new: Path, path: Path) -> None:
    """`new`, a whole file, takes the place of `path`; after a crash there is one or the other."""
    with open(new, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


if __name__ == "__main__":
    with torch.device("meta"):
        model = Mamba(MambaConfig())
    print(model)
    sizes = [p.numel() for p in model.parameters()]
    print(f"{sum(sizes):,} parameters in {len(sizes)} tensors")
