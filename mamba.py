"""Falcon-Mamba: the model and its checkpoint. Read scan.py first; sample.py and train.py come next.

A language model that carries a state of fixed size from token to token, where a transformer carries a cache
that grows with the text. Each of the 7B's sixty-four layers reads the residual stream, a vector of d_model
numbers for each token, and adds to it:

    x, z = in_proj(RMSNorm(stream))                 (b, l, d) each: a signal, and the gate of its result
    x = SiLU(conv(x))                               each channel sees its own last d_conv inputs
    dt, B, C = x_proj(x)                            (b, l, r), (b, l, n) twice: how this token moves the state
    dt, B, C = RMSNorm(dt), RMSNorm(B), RMSNorm(C)  all that Falcon-Mamba adds to Mamba: training stays stable
    y = scan(x, dt_proj(dt), A, B, C, D, z)         scan.py; dt_proj widens dt to (b, l, d)
    stream = stream + out_proj(y)

Sources: Mamba, arXiv 2312.00752, Fig. 3 and Alg. 2; the Falcon-Mamba report, arXiv 2410.05355; the published
checkpoints, whose tensor names are our attribute names. `python mamba.py` prints the 7B, tensor by tensor.

Sizes in the shape comments: b batch, l length, m d_model, d d_inner, n d_state, r dt_rank, k d_conv.
"""
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import huggingface_hub
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from scan import selective_scan

# Where config.json uses another name than we do.
PUBLISHED = {"d_model": "hidden_size", "n_layer": "num_hidden_layers", "d_state": "state_size",
             "d_conv": "conv_kernel", "d_inner": "intermediate_size", "dt_rank": "time_step_rank",
             "norm_eps": "layer_norm_epsilon", "mixer_norm_eps": "mixer_rms_eps", "bias": "use_bias",
             "conv_bias": "use_conv_bias", "tie_embeddings": "tie_word_embeddings"}


@dataclass
class MambaConfig:
    """The sizes of a model; by default the 7B's. ValueError for a value that no model can have."""
    vocab_size: int = 65024
    d_model: int = 4096
    n_layer: int = 64
    d_state: int = 16
    d_conv: int = 4
    d_inner: int = None                 # expand x d_model unless given
    dt_rank: int = None                 # d_model / 16, rounded up, unless given
    norm_eps: float = 1e-5              # in the RMSNorms of the residual stream
    mixer_norm_eps: float = 1e-6        # in the RMSNorms of dt, B and C
    bias: bool = False                  # of in_proj and out_proj
    conv_bias: bool = True
    tie_embeddings: bool = False        # lm_head is the embedding matrix
    initializer_range: float = 0.1      # standard deviation of fresh linear and embedding weights
    bos_token_id: int = 0               # never put before a text
    eos_token_id: int = 11
    pad_token_id: int = 0
    expand: InitVar[int] = 2            # not kept: both 7B files say 16, beside the right d_inner

    def __post_init__(self, expand):
        for f in fields(self):      # in order: d_model has been checked when these two are made from it
            if f.name == "d_inner" and self.d_inner is None:
                self.d_inner = expand * self.d_model if type(expand) is int else expand
            if f.name == "dt_rank" and self.dt_rank is None:
                self.dt_rank = -(-self.d_model // 16)
            value, low = getattr(self, f.name), 0 if f.name.endswith("_id") else 1
            high = 2**10 if f.name == "n_layer" else 2**20      # a broken file shall not ask for all memory
            low, high = {bool: (False, True), float: (1e-30, 1), int: (low, high)}[f.type]
            if type(value) is not f.type or not low <= value <= high:
                names = {f.name: 0, PUBLISHED.get(f.name, f.name): 0}      # the flag's and the file's, or one
                raise ValueError(f"{' or '.join(names)} is {value!r:.50}, but must be {f.type.__name__} from "
                                 f"{low} to {high}")

    @classmethod
    def from_json(cls, path: Path) -> "MambaConfig":
        """Read a published config.json; ValueError if missing, broken, or another architecture's."""
        raw = {"hidden_act": "silu", "tie_word_embeddings": True} | read_json(path)    # as the reference does
        for name, ours in [("model_type", "falcon_mamba"), ("hidden_act", "silu")]:
            if raw.get(name) != ours:
                raise ValueError(f"{path} has {name} {raw.get(name)!r:.50}; Falcon-Mamba's is {ours!r}")
        names = {PUBLISHED.get(f.name, f.name): f.name for f in fields(cls)} | {"expand": "expand"}
        config = {names[k]: v for k, v in raw.items() if k in names and v not in (None, "auto")}
        if missing := {"vocab_size", "d_model", "n_layer"} - config.keys():
            raise ValueError(f"{path} lacks {', '.join(sorted(PUBLISHED.get(m, m) for m in missing))}")
        if type(config.get("eos_token_id")) is list and config["eos_token_id"]:
            config["eos_token_id"] = config["eos_token_id"][0]
        return cls(**config)

    def to_json(self, path: Path) -> None:
        """Write what transformers reads as a FalconMambaConfig."""
        raw = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba",
               "hidden_act": "silu", "expand": max(1, self.d_inner // self.d_model), "residual_in_fp32": True}
        raw |= {PUBLISHED.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        path.write_text(json.dumps(raw, indent=2) + "\n")


class State(NamedTuple):
    """All that the model remembers of the text so far: 37 MB for the 7B, after one token or a million."""
    conv: list[Tensor]      # a layer: (b, k - 1, d), its convolution's last inputs, in the activations' dtype
    ssm: list[Tensor]       # a layer: (b, d, n), the scan's h; fp32, as bf16 loses what is small beside it


class RMSNorm(nn.RMSNorm):
    """PyTorch's, from the stream's fp32 to the dtype of its weight."""

    def forward(self, stream):
        # Rounded once, here; the reference rounds before it multiplies by the weight, too.
        return F.rms_norm(stream, self.normalized_shape, self.weight.float(), self.eps).to(self.weight.dtype)


class Mixer(nn.Module):
    """What one layer does with the normalised stream."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        d, n, r, k = config.d_inner, config.d_state, config.dt_rank, config.d_conv
        self.split, self.eps = (r, n, n), config.mixer_norm_eps
        self.in_proj = nn.Linear(config.d_model, 2 * d, bias=config.bias)
        self.conv1d = nn.Conv1d(d, d, k, groups=d, bias=config.conv_bias)   # holds the tensors; see conv()
        self.x_proj = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, d)
        # A = -exp(A_log) < 0, however training moves it. At first -1 to -n: n numbers that fade at n speeds.
        self.A_log = nn.Parameter(torch.arange(1.0, n + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, config.d_model, bias=config.bias)

    def forward(self, stream, past, h0, reset):
        """stream (b, l, m), two states, reset (b, l) or None -> (b, l, m), the states after it."""
        x, z = self.in_proj(stream).chunk(2, dim=-1)                        # (b, l, d), (b, l, d)
        z = z.contiguous()      # a copy in training: to keep a view for the backward would keep x's half too
        x, past = self.conv(x, past, reset)                                 # (b, l, d), (b, k - 1, d)
        dt, B, C = self.selection(x)                                        # (b, l, d), (b, l, n), (b, l, n)
        A = -torch.exp(self.A_log.float())                                  # (d, n)
        # dt_proj's bias is added in the scan, in fp32: near -7, a step of 0.001, bf16 would be 1 % off.
        y, h = selective_scan(x, dt, A, B, C, self.D, z, self.dt_proj.bias, h0, reset)
        return self.out_proj(y), past, h

    def conv(self, x, past, reset):
        """SiLU of the causal convolution, as k taps: weight i times the input of k - 1 - i tokens ago.

        `doc` numbers documents, and a tap counts only where its token has the number of the token it serves.
        With k = 3, reset = [0, 1, 0] gives doc = [0, 0 | 0, 1, 1], where 0 is the text before: token 1 sees
        only itself, as its taps at tokens -1 and 0 have another number.
        """
        k, l = self.conv1d.kernel_size[0], x.shape[1]
        weight = self.conv1d.weight.float().squeeze(1).T.contiguous()       # (k, d), the present last
        bias = weight.new_zeros(1) if self.conv1d.bias is None else self.conv1d.bias.float()
        window = torch.cat([past, x], dim=1)                                # (b, k - 1 + l, d)
        past, window = window[:, l:].clone(), window.float()                # a view would keep it all alive
        if l == 1 and reset is None:                                        # the loop below, in one product
            return F.silu(bias + (window * weight).sum(1, keepdim=True)).to(x.dtype), past
        if reset is not None:
            doc = F.pad(reset.cumsum(1), (k - 1, 0))                        # (b, k - 1 + l)
            past = past.masked_fill((doc[:, l:] != doc[:, -1:])[..., None], 0)      # of former documents
        y = torch.addcmul(bias, window[:, k - 1:], weight[k - 1])           # (b, l, d), the present
        for i in range(k - 1):
            tap = window[:, i:i + l] * weight[i]                            # (b, l, d), of k - 1 - i ago
            if reset is not None:           # autograd keeps a product's factors: masking it in place is free
                tap.masked_fill_((doc[:, i:i + l] != doc[:, k - 1:])[..., None], 0)
            y += tap
        return F.silu(y).to(x.dtype), past

    def selection(self, x):
        """dt, B and C of each token. All that is new in Falcon-Mamba, three weightless norms, is here."""
        dt, B, C = self.x_proj(x).split(self.split, dim=-1)                 # (b, l, r), (b, l, n), (b, l, n)
        # The reference in evaluation, too; its fused kernel for training normalises dt after dt_proj.
        dt, B, C = (F.rms_norm(v.float(), v.shape[-1:], eps=self.eps) for v in (dt, B, C))
        weight = self.dt_proj.weight.to(x.dtype)    # training keeps it in fp32 beside bf16 activations
        return F.linear(dt.to(x.dtype), weight), B, C                       # (b, l, d), (b, l, n), (b, l, n)


class Block(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config)

    def forward(self, stream, past, h0, reset):
        out, past, h = self.mixer(self.norm(stream), past, h0, reset)
        return stream + out, past, h                                        # the stream stays fp32


class Backbone(nn.Module):
    def __init__(self, config: MambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, tokens, state, reset=None):
        stream, after = self.embeddings(tokens).float(), State([], [])      # (b, l, m)
        for layer, past, h in zip(self.layers, *state, strict=True):
            stream, past, h = layer(stream, past, h, reset)
            after.conv.append(past)
            after.ssm.append(h)
        return self.norm_f(stream), after


class Mamba(nn.Module):
    """The language model, freshly initialised. Its state_dict has the published tensors' names and shapes."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        initialize(self)

    def forward(self, tokens: Tensor, state: State | None = None, reset: Tensor | None = None,
                last_only: bool = False) -> tuple[Tensor, State]:
        """Read tokens (b, l), any number of them, from `state` (blank if None), which is left as it was.

        reset (b, l) bool is true where a document starts: nothing before that token reaches it or later ones.
        So packed documents do not leak, and padding on the left is just another document before the prompt.
        Returns logits (b, l, vocab_size), or (b, 1, vocab_size) with last_only, in fp32, and the next state.
        """
        # On a CPU oneDNN multiplies bf16 matrices fast, but for a single row it reads weights half as fast as
        # PyTorch's own product. All threads share the switch: who turns it off turns it on, and no one else.
        mkldnn, switch = torch.backends.mkldnn, torch.backends.mkldnn.enabled and tokens.numel() == 1
        if switch:
            mkldnn.enabled = False
        try:
            x, state = self.backbone(tokens, state or self.blank_state(len(tokens)), reset)
            return self.lm_head(x[:, -1:] if last_only else x).float(), state
        finally:
            if switch:
                mkldnn.enabled = True

    def blank_state(self, batch: int) -> State:
        """The state before any text: zeros."""
        c, weight = self.config, self.backbone.norm_f.weight
        conv = weight.new_zeros(c.n_layer, batch, c.d_conv - 1, c.d_inner)
        ssm = weight.new_zeros(c.n_layer, batch, c.d_inner, c.d_state, dtype=torch.float32)
        return State([*conv], [*ssm])

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype | None = None,
                        replace: Callable[[nn.Linear], nn.Module] | None = None) -> "Mamba":
        """Load a folder, or a Hugging Face hub id, which is downloaded first.

        On a CPU in the checkpoint's own dtype (dtype None) the weights stay in the mapped files, uncopied.
        A_log, D, the convolution and dt_proj's bias are small and exact: they become fp32 whatever the dtype.
        `replace` is given each in_proj, x_proj and out_proj once loaded; what it returns takes its place.
        ValueError, in one sentence, for anything that is missing, broken, or does not fit together.
        """
        folder = find(source)
        config = MambaConfig.from_json(folder / "config.json")
        with torch.device("meta"):                         # shapes without memory
            model = cls(config).eval()
        stored = read_tensors(folder)
        if config.tie_embeddings:
            stored.pop("lm_head.weight", None)             # some writers store the embedding twice
        plain = torch.float64, torch.float32, torch.float16, torch.bfloat16     # another does not fit, either
        has = {name: [*t.shape] if t.dtype in plain else [*t.shape, t.dtype] for name, t in stored.items()}
        needs = {name: [*p.shape] for name, p in model.named_parameters()}
        wrong = [f"{name!r:.80} {has.get(name, 'missing')} where {needs.get(name, 'nothing')} belongs"
                 for name in needs | has if has.get(name) != needs.get(name)]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors of {folder} do not fit its config.json: "
                             f"{', '.join(wrong[:4])}")
        dtype = dtype or stored["backbone.embeddings.weight"].dtype
        for name in needs:
            fp32 = dtype == torch.float64 or "conv1d" in name or name.endswith(("A_log", "D", "dt_proj.bias"))
            # `replace` is used where memory is short: once copied, a tensor's part of the mapped file can go.
            value = stored.pop(name).to(device, torch.float32 if fp32 else dtype, copy=replace is not None)
            torch.utils.swap_tensors(model.get_parameter(name), nn.Parameter(value))    # wherever it is tied
            path = name.removesuffix(".weight")
            if replace and path.endswith(("in_proj", "x_proj", "out_proj")):
                model.set_submodule(path, replace(model.get_submodule(path)))
        return model

    def save_pretrained(self, folder: str | Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Write config.json and model.safetensors, which transformers loads as they are.

        `tensors`, from name to value, stand in for the model's own where those are divided among machines.
        OSError if they cannot be written; what was there before is then left as it was, unless moving
        the second file fails. (One file of weights, however large: reading maps it into memory.)
        """
        folder = Path(folder)
        new = folder / ".saving"
        tensors = tensors or {name: p.detach() for name, p in self.named_parameters()}  # a tied one once
        try:
            shutil.rmtree(new, ignore_errors=True)         # left behind if a save was killed
            new.mkdir(parents=True)
            self.config.to_json(new / "config.json")
            safetensors.torch.save_file(tensors, new / "model.safetensors", {"format": "pt"})
            shutil.copymode(new / "config.json", new / "model.safetensors")     # which safetensors hides
            with open(new / "model.safetensors", "rb+") as file:
                os.fsync(file.fileno())                    # on the disk before it replaces another
            # Two files cannot change in one move. Killed between these, it leaves the new weights under the
            # old config.json, which loading refuses where a shape is another.
            os.replace(new / "model.safetensors", folder / "model.safetensors")
            os.replace(new / "config.json", folder / "config.json")
        except (OSError, safetensors.SafetensorError) as e:
            raise OSError(f"cannot write the checkpoint {folder}: {e}") from e
        finally:
            shutil.rmtree(new, ignore_errors=True)


@torch.no_grad()
def initialize(model: Mamba) -> None:
    """Fresh weights as the reference draws them, where PyTorch does not. Steps: from 0.001 to 0.1."""
    for name, p in model.named_parameters():
        if name.endswith("dt_proj.bias"):
            step = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(1e-1)))
            p.copy_(step + torch.log(-torch.expm1(-step)))              # softplus of it is the step
        elif name.endswith(".bias"):
            nn.init.zeros_(p)
        elif name.endswith(("in_proj.weight", "x_proj.weight", "embeddings.weight", "lm_head.weight")):
            nn.init.normal_(p, std=model.config.initializer_range)


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if there is none."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, RecursionError) as e:       # TypeError: a list, say
        raise ValueError(f"{path.parent} is no checkpoint: no JSON object in {path.name} ({e})") from e


def replace_file(new: Path, path: Path) -> None:
    """Let `new`, once it is safe on the disk, take the place of `path`."""
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, path)


def find(source: str | Path) -> Path:
    """The folder of that name or, failing one, the local copy of the hub's repository of that name."""
    name, folder = str(source), Path(os.path.expanduser(source))    # leaves a ~ that it does not know
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"{name!r:.200} is not a folder; `python train.py` makes one called out")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:      # the hub's client raises many kinds, its transport's among them
        raise ValueError(f"{name} is no folder here, nor downloaded ({shorten(str(e), 200)}); "
                         "without a network, `python train.py` makes a model for `--model out`") from e


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in the folder's safetensors, one file or several with an index; on disk until used."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        weight_map = read_json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    tensors = {}
    for name in sorted({*map(str, names)}):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise ValueError(f"{index} has a weight_map to {name!r:.80}, no safetensors file beside it")
        try:
            more = safetensors.torch.load_file(folder / name)
        except (OSError, safetensors.SafetensorError) as e:
            raise ValueError(f"{folder / name} is not a whole safetensors file ({str(e)!r:.300}); "
                             "pickled weights are not read, as they can run any code") from e
        if twice := tensors.keys() & more.keys():
            raise ValueError(f"{folder / name} holds {min(twice)} a second time")
        tensors |= more
    return tensors


if __name__ == "__main__":
    with torch.device("meta"):
        model = Mamba(MambaConfig())
    print(f"{'tensor':42}{'times':>6}{'shape':>16}{'parameters':>18}{'bytes in bf16':>18}")
    for name, p in model.named_parameters():
        if not re.search(r"layers\.[1-9]", name):       # all layers have what the first one has
            times, shape = model.config.n_layer if "layers.0" in name else 1, " x ".join(map(str, p.shape))
            print(f"{name:42}{times:6}{shape:>16}{times * p.numel():18,}{2 * times * p.numel():18,}")
    count = sum(p.numel() for p in model.parameters())
    print(f"{2 * count:,} bytes in {len([*model.parameters()])} tensors; parameters: {count:,}")
