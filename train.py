"""Train a Falcon-Mamba with Falcon-Mamba's own recipe, on a laptop or on 256 GPUs. The last file.

    python train.py                                 a byte-level model of Python's standard library, into out/
    python sample.py --model out --prompt "def "    and what it learned
    python train.py --resume                        after Ctrl-C or a power cut: on from the last checkpoint
    python train.py --data code=src/:0.7 --data prose=books/:0.3 --out mine --total-tokens 20_000_000
    python train.py --data web/ --tokenizer tokenizer.json --tokenize-to web.bin     a corpus beyond memory
    python train.py --recipe falcon-mamba-7b --plan --world-size 256                 the run on paper
    torchrun --nproc-per-node 8 train.py --recipe continue --data my.bin             on 8 GPUs: see README.md
    python train.py --eval-only --init-from tiiuae/falcon-mamba-7b --data texts/     its loss on part of yours

The recipe is that of the report, arXiv 2410.05355, section 3; what it does not give is marked as our choice.
All of it, and which rows a step reads, is a pure function of the seed and the tokens seen: a run can stop
anywhere, go on with other GPUs or another --micro-batch, and draw the same loss curve. The engine is
PyTorch's own. torchrun starts a process, a rank, for each of `world` GPUs. fully_shard (FSDP2, after ZeRO)
leaves each rank its part of the weights, gradients and Adam's averages; it gathers a block's whole weights
just before it runs, and adds up gradients over ranks. torch.distributed.checkpoint (dcp) saves and loads what
is so divided. A step is one update of the weights; each rank makes its rows of the batch in passes, forward
and backward, of at most --micro-batch rows.

Sizes in the shape comments: b batch, l length, m d_model.
"""
import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sample
import scan
from mamba import Mamba, MambaConfig, find, read_json

END = "<|endoftext|>"      # closes every document
GT = 10**9                 # tokens; the report's unit
GROUP = 2**20              # pieces of a source that are shuffled together: a table of all may be too long


def flag(default, help, low=0, high=2**60):
    """A field that is also a flag: a text, a number from low to high, or several of them with commas."""
    kind = type(default[0] if type(default) is tuple else default)
    one = str if kind is str else sample.number(kind, low, high)
    several = lambda text: tuple(one(part) for part in text.split(","))
    return field(default=default, metadata={"help": help, "type": several if type(default) is tuple else one})


@dataclass(frozen=True)
class Recipe:
    """One training run; lengths are in tokens. The defaults are ours: three minutes on two CPU cores."""
    total_tokens: int = flag(1_000_000, "the run; its phases and stages, unless given, scale with it", 1)
    warmup_tokens: int = flag(30_000, "learning rate from 0 to its peak")
    ramp_tokens: int = flag(150_000, "batch size from its start to its end")
    decay_tokens: int = flag(300_000, "the last part, in which the learning rate decays")
    batch_start: int = flag(2, "sequences in the first step", 1, 2**20)
    batch_end: int = flag(8, "sequences in a step after the ramp", 1, 2**20)
    stages: tuple[int, ...] = flag((0,), "tokens seen at which each stage begins, as 0,400000")
    context: tuple[int, ...] = flag((256,), "tokens in a sequence: one number, or one a stage", 1, 2**20)
    mixture: tuple[str, ...] = flag(("text:1",), "sources' shares, as 'web:9 code:1', or one text a stage")
    lr: float = flag(4e-3, "the learning rate's peak, which suits --batch-end sequences")
    decay_factor: float = flag(256.0, "by which the learning rate decays in all", 1)
    weight_decay: float = flag(0.1, "AdamW's, of matrices only")
    beta1: float = flag(0.9, "AdamW's", 0, 0.9999999)
    beta2: float = flag(0.95, "AdamW's", 0, 0.9999999)
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "of the weights and of the order of the data")
    init_from: str = flag("", "folder or hub id of a model to start from (else fresh weights)")

    def __post_init__(self):
        if [*self.stages] != sorted({0, *self.stages}):
            raise ValueError(f"--stages is {self.stages}, but must begin with 0 and rise (--total-tokens is "
                             f"{self.total_tokens})")
        for name, values in {"context": self.context, "mixture": self.mixture}.items():
            if len(values) not in (1, len(self.stages)):
                raise ValueError(f"--{name} has {len(values)} values, but --stages {len(self.stages)}")
        before = max(self.warmup_tokens, self.ramp_tokens)
        if before + self.decay_tokens > self.total_tokens:
            raise ValueError(f"--total-tokens {self.total_tokens} has no room for {before} --warmup-tokens "
                             f"or --ramp-tokens and then {self.decay_tokens} --decay-tokens")
        for start in self.stages:
            mixture(self, start)        # raises where one cannot be read


def batch_size(recipe: Recipe, tokens: int) -> int:
    """Sequences in the step that starts when `tokens` have been seen."""
    done = min(tokens / recipe.ramp_tokens, 1) if recipe.ramp_tokens else 1
    return round(recipe.batch_start + done * (recipe.batch_end - recipe.batch_start))


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Warmup, stable, decay; while the batch ramps, times sqrt(batch / last batch): "BatchScaling"."""
    warm = min(tokens / recipe.warmup_tokens, 1) if recipe.warmup_tokens else 1
    since = max(tokens - (recipe.total_tokens - recipe.decay_tokens), 0)
    # So lr / sqrt(batch), to which the noise of Adam's steps is proportional, stays the same.
    scaling = math.sqrt(batch_size(recipe, tokens) / recipe.batch_end)
    decayed = min(since / recipe.decay_tokens, 1) if recipe.decay_tokens else 0
    return recipe.lr * warm * scaling * recipe.decay_factor ** -decayed


def stage(recipe: Recipe, tokens: int) -> int:
    return sum(start <= tokens for start in recipe.stages) - 1


def context_length(recipe: Recipe, tokens: int) -> int:
    """Tokens in each sequence of that step."""
    return recipe.context[stage(recipe, tokens) % len(recipe.context)]     # % 1 is 0: one for all stages


def mixture(recipe: Recipe, tokens: int) -> dict[str, float]:
    """Source -> its share of that step's tokens; the shares add up to 1."""
    text = recipe.mixture[stage(recipe, tokens) % len(recipe.mixture)]
    try:
        shares = {name: float(share) for name, share in (part.split(":") for part in text.split())}
        total = sum(shares.values())
        fine = all(share == 0 or total / 1000 <= share < math.inf for share in shares.values())
        if not fine or len(shares) < len(text.split()):
            raise ValueError
        return {name: share / total for name, share in shares.items()}
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--mixture has {text!r}, but needs name:share, each name once, shares above 0 and "
                         "none below a thousandth of all") from None


def scaled(recipe: Recipe, total: int) -> Recipe:
    """The same recipe over another number of tokens: each phase and stage keeps its part of the whole."""
    part = {f.name: getattr(recipe, f.name) * total // recipe.total_tokens
            for f in fields(recipe) if f.name.endswith("_tokens")}
    stages = tuple(start * total // recipe.total_tokens for start in recipe.stages)
    return replace(recipe, stages=stages, **part)


RECIPES = {"tiny": Recipe(), "falcon-mamba-7b": Recipe(
    total_tokens=5500 * GT,             # model card: "~ 5,500 GT"
    warmup_tokens=GT // 2,              # our choice; the report only says that it is short
    ramp_tokens=50 * GT,                # report: the batch grows over the first 50 GT ...
    batch_start=128, batch_end=2048,    # ... from 128 to 2048 sequences
    lr=6.4e-4,                          # report and card
    decay_tokens=500 * GT,              # report: exponential decay over 500 GT ...
    decay_factor=256,                   # ... to lr / 256 = 2.5e-6
    weight_decay=0.1,                   # card
    beta1=0.9, beta2=0.95,              # report, as read in a summary of it
    clip=1.0,                           # our choice, never published
    context=(2048, 4096, 8192, 8192),   # report: 2048 -> 4096 -> 8192. When each begins is our choice:
    stages=(0, 2500 * GT, 4000 * GT, 5000 * GT),
    # Report: mostly RefinedWeb, more technical text, code and math in later stages, FineWeb-Edu in the decay.
    # The shares are our choice, never published.
    mixture=("refinedweb:90 technical:4 code:4 math:2", "refinedweb:82 technical:7 code:7 math:4",
             "refinedweb:74 technical:10 code:10 math:6",
             "refinedweb:45 finewebedu:25 technical:10 code:12 math:8"))}
# The pre-decay checkpoint is the model before that decay. Its optimizer was not published: warm up again.
RECIPES["continue"] = replace(
    RECIPES["falcon-mamba-7b"], init_from="tiiuae/falcon-mamba-7b-pre-decay", total_tokens=502 * GT,
    warmup_tokens=2 * GT, ramp_tokens=0, stages=(0,), context=(8192,),              # 2 GT: our choice
    mixture=RECIPES["falcon-mamba-7b"].mixture[-1:])
# Our choice: it learns something in minutes on two CPU cores. Fresh weights of 0.1 suit the 7B's width.
SIZES = {"tiny": {"d_model": 128, "n_layer": 4, "initializer_range": 0.02},
         "falcon-mamba-7b": {"vocab_size": 65024}, "continue": {"vocab_size": 65024}}


def byte_tokenizer() -> Tokenizer:
    """One token a byte, which ByteLevel writes as a visible character; token 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def open_tokenizer(path: Path | None) -> Tokenizer:
    tokenizer = sample.read_tokenizer(path) if path else byte_tokenizer()
    tokenizer.encode_special_tokens = True      # a text that names <|endoftext|> does not end there
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{path} has no token {END}, which closes a document")
    return tokenizer


def standard_library() -> list[Path]:
    """The sources of Python's standard library: text that every reader of this file has at hand."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "test", "tests", "encodings", "pydoc_data"}      # the last two are tables
    return [path for path in sorted(root.rglob("*.py")) if not others & {*path.relative_to(root).parts}]


def named_data(texts: list[str]) -> tuple[dict[str, list[Path]], dict[str, float]]:
    """What the --data flags name: source -> its paths, and source -> its share, if it has one."""
    paths, shares = defaultdict(list), Counter()
    for text in texts:
        named = re.fullmatch(r"([\w-]+)=(.*?)(?::(\d*\.?\d+))?", text, re.DOTALL)
        if Path(text).exists() or not named:    # bare paths are one source
            name, path, share = "text", text, None
        else:
            name, path, share = named.groups()
        if not path or not Path(path).exists():     # Path("") is the folder that we are in
            raise ValueError(f"there is no {path or repr(path)}, which --data names; it takes path, "
                             "name=path or name=path:share")
        paths[name].append(Path(path))
        if share:
            shares[name] += float(share)        # its paths may bring a part each
    return paths or {"text": standard_library()}, shares


def with_shares(recipe: Recipe, paths: dict, shares: dict, mixed: bool) -> Recipe:
    """The recipe with the shares that --data gives, unless --mixture did; all its sources must be there."""
    if not mixed and (len(paths) == 1 or shares.keys() == paths.keys()):
        return replace(recipe, mixture=(" ".join(f"{name}:{shares.get(name, 1)}" for name in paths),))
    wanted = {name for start in recipe.stages for name in mixture(recipe, start)}
    if shares or wanted != paths.keys():
        raise ValueError(f"--data names {', '.join(sorted(paths))}, the recipe {', '.join(sorted(wanted))}; "
                         "name the same, or give each a share as name=path:share and leave out --mixture")
    return recipe


@lru_cache(maxsize=32)
def order(n: int, *key: int) -> np.ndarray:
    """The numbers below n in an order that the key fixes."""
    return np.random.default_rng(key).permutation(n)


def tokenized(paths: list[Path], tokenizer: Tokenizer, enough: int = 2**60) -> Iterator:
    """Arrays of the files' tokens, END after each file, in one shuffled order, until it is enough."""
    # A path that is a file holds no others. In a folder lie other folders, pipes and dangling links too, and
    # the .bin that --tokenize-to writes there.
    files = [file for path in paths for file in [path, *sorted(path.rglob("*"))]
             if file.is_file() and file.suffix not in (".bin", ".partial")]
    for i in order(len(files), 0):
        try:
            with files[i].open(encoding="utf-8", newline="") as file:       # "\r\n" stays as it is
                while lines := file.readlines(2**20):
                    text = tokenizer.encode_batch_fast(["".join(lines)], add_special_tokens=False)[0]
                    yield np.array(text.ids, np.uint32)
                    enough -= len(text.ids)
                    if enough < 0:
                        return
        except UnicodeDecodeError:
            print(f"skipping {files[i]} from where it is not UTF-8 text", file=sys.stderr)
        yield np.array([tokenizer.token_to_id(END)], np.uint32)


def tokenize_to(path: Path, paths: list[Path], tokenizer: Tokenizer) -> None:
    """A corpus as a file of uint16 tokens, which training maps into memory."""
    if (size := sample.vocabulary(tokenizer)) > 2**16:
        raise ValueError(f"a .bin holds 65536 different tokens, the tokenizer {size}")
    if path.resolve() in [source.resolve() for source in paths]:
        raise ValueError(f"--tokenize-to {path} would overwrite what --data names; name another file")
    with sample.new_file(path) as file:
        for part in tokenized(paths, tokenizer):
            file.write(part.astype(np.uint16).tobytes())
        if not file.tell():
            raise ValueError(f"there is no text in {', '.join(map(str, paths))}")
    print(f"{path}: {path.stat().st_size // 2:,} tokens")


class Source:
    """One corpus: a row of tokens, in memory or mapped from a .bin, the beginning of which is held out."""

    def __init__(self, name: str, paths: list[Path], tokenizer: Tokenizer, recipe: Recipe):
        self.bin = next((path for path in paths if path.suffix == ".bin"), None)
        if self.bin:
            size = self.bin.stat().st_size
            if len(paths) > 1 or size % 2 or not size:
                raise ValueError(f"{name} is {len(paths)} paths, with {self.bin} of {size} bytes; a .bin is "
                                 "a source of its own, with two bytes for each token")
            tokens = np.memmap(self.bin, np.uint16, "r")
        else:       # all that the run reads, and 2**25 tokens more: then its held-out part is at its longest,
            # and so the same for every run of this text, however short
            enough = recipe.total_tokens + 2**25
            tokens = np.concatenate([*tokenized(paths, tokenizer, enough)] or [np.zeros(0)])
        self.size = len(tokens)
        some = tokens[::self.size // 4096 + 1].astype(np.uint32)
        self.about = f"{self.size} tokens, {hashlib.sha256(some.tobytes()).hexdigest()[:16]}"
        # Held out are a twentieth, at most a million tokens, and the rest of its last document if it is near.
        # At the front it is the same for all recipes: what one trains on, no other evaluates.
        cut = min(self.size // 20, 2**20)
        ends = np.flatnonzero(tokens[cut:2 * cut] == tokenizer.token_to_id(END))
        cut += int(ends[0]) + 1 if len(ends) else 0
        self.parts = {"training": tokens[cut:], "held out": tokens[:cut]}
        for part, found in self.parts.items():
            if len(found) <= max(recipe.context):           # a row needs the token after it too
                raise ValueError(f"{name} has {len(found)} tokens for the {part} part, too few for --context "
                                 f"{max(recipe.context)}; give it more text, or a smaller --context")

    def rows(self, part: str, length: int) -> int:
        return (len(self.parts[part]) - 1) // length

    def row(self, part: str, start: int, length: int) -> np.ndarray:
        """(length + 1,): each token's target is the one after it."""
        # Reading what has gone from a mapped file would kill the process.
        if self.bin and self.bin.stat().st_size // 2 != self.size:
            raise ValueError(f"{self.bin} had {self.size} tokens and now has {self.bin.stat().st_size // 2}")
        return self.parts[part][start:start + length + 1]


def training_row(recipe: Recipe, sources: dict[str, Source], tokens: int, i: int) -> np.ndarray:
    """Row i of the step that starts after `tokens`, (l + 1,).

    A run reads pieces as long as the longest context, each cut into rows of the context of now.
    Which source a piece comes from: a stage deals its pieces from decks of 1000 cards, of which each source
    has as many as its share is worth; every deck is shuffled anew. Which of that source's pieces it is: the
    one after those of former stages (their shares tell how many), of former decks, and of the source's cards
    with lower numbers in this deck. An epoch is once through the source's pieces, shuffled group by group.
    (What is left of a piece that its context does not divide is not read.)
    """
    now, length, longest = stage(recipe, tokens), context_length(recipe, tokens), max(recipe.context)
    rows, shares = longest // length, mixture(recipe, tokens)                   # rows in a piece
    piece, j = divmod(tokens // length + i, rows)
    deck, drawn = divmod(piece - recipe.stages[now] // length // rows, 1000)
    card = order(1000, recipe.seed, now, deck)[drawn]
    edges = np.rint(1000 * np.cumsum([0, *shares.values()]))
    name, first, after = next(own for own in zip(shares, edges, edges[1:]) if card < own[2])
    former = sum((b - a) * mixture(recipe, a).get(name, 0) for a, b in pairwise(recipe.stages[:now + 1]))
    number = int(former // longest + deck * (after - first) + card - first)
    epoch, k = divmod(number, pieces := sources[name].rows("training", longest))
    start = k - k % GROUP
    k = start + order(min(GROUP, pieces - start), recipe.seed, *name.encode(), epoch, start)[k - start]
    return sources[name].row("training", k * longest + j * length, length)


# PyTorch has a second "checkpoint", for activations: it keeps only args, and the backward pass runs the
# function again.
rerun = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Objective(nn.Module):
    """Model and loss in one module, as FSDP gathers weights when a module is called, and both use lm_head."""

    def __init__(self, model: Mamba, end: int):
        super().__init__()
        self.model, self.end = model, end

    def forward(self, rows: Tensor) -> Tensor:
        """-log p of every token of rows (b, l + 1) but each first, in nats, summed; -100 counts nothing.

        Logits of 1024 tokens at a time, computed again for the backward pass: together they would be the
        largest tensor of the run, 2 GB for one row of the 7B.
        """
        tokens, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]    # (b, l) both; any token will do for -100
        starts = F.pad(tokens[:, :-1] == self.end, (1, 0))                                      # (b, l)
        hidden, _ = self.model.backbone(tokens, self.model.blank_state(len(tokens)), starts)    # (b, l, m)
        pieces = zip(hidden.flatten(0, 1).split(1024), targets.flatten().split(1024))
        return sum(rerun(self.piece, *piece) for piece in pieces)

    def piece(self, hidden, targets):
        return F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="sum")


def shard(objective: Objective, device: str, world: int, dtype: torch.dtype) -> None:
    """Leave each rank its part of every tensor, in fp32.

    The weights of the large products are gathered, and multiplied, in `dtype`. The rest of a block is small
    and exact, and gathered in fp32: A_log, whose rounding exp(delta A) would raise to the power of thousands
    of steps, D, the convolution, dt_proj, whose bias of about -7 bf16 would round by 1 % of a step, the norm.
    """
    mesh = init_device_mesh(device, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in objective.model.backbone.layers:
        products = [block.mixer.in_proj, block.mixer.x_proj, block.mixer.out_proj]
        fully_shard(products, mesh=mesh, mp_policy=policy)      # gathered together
        fully_shard(block, mesh=mesh)                           # the rest of the block
    fully_shard(objective, mesh=mesh, mp_policy=policy)         # the rest: embeddings, norm_f and lm_head


def optimizer(model: Mamba, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear and embedding layers.

    The others are rates and scales, whose natural size is not 0: A_log, D, the convolution, biases and norms.
    """
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0}]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=1e-8)


def over_ranks(number: float) -> float:
    """Its sum over all ranks."""
    total = torch.tensor(number, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()


def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((out / "checkpoints").glob("step-*[0-9]"))


def prepare(out: Path, steps: int, tokenizer: Tokenizer) -> None:
    """Make the folder, or cut its metrics back to `steps` steps. What cannot be written is found out now."""
    metrics = out / "metrics.jsonl"
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    with sample.new_file(out / "tokenizer.json") as file:
        file.write(tokenizer.to_str().encode())
    for left in (out / "checkpoints").glob("*.partial"):        # by a run that was killed
        shutil.rmtree(left)
    # The whole rows up to the checkpoint: a run that was killed had gone on from there.
    rows = re.findall(rb'^(\{"step": (\d+),.*\}\n)', metrics.read_bytes(), re.M) if metrics.exists() else []
    with sample.new_file(metrics) as file:
        file.writelines(row for row, step in rows if int(step) <= steps)


class Writer(dcp.HuggingFaceStorageWriter):
    """Writes beside out/checkpoints/step-N; when all ranks have written, the checkpoint gets its name.

    By default PyTorch describes a checkpoint in a pickle, and reading a pickle can run any code. Here each
    rank's safetensors say in JSON which part of each tensor they hold, for any number of ranks to read.
    """

    def __init__(self, out: Path, step: int, settings: dict, keep: int):
        self.out, self.settings, self.keep = out, settings, keep
        super().__init__(out / "checkpoints" / f"step-{step:09}.partial", save_distributed=True)

    def finish(self, metadata, results):            # dcp calls it on rank 0, after the last rank has written
        with sample.new_file(self.path / "run.json") as file:
            file.write(json.dumps(self.settings, indent=1).encode())
        os.replace(self.path, self.path.with_suffix(""))
        for old in checkpoints(self.out)[:-self.keep]:
            shutil.rmtree(old.rename(f"{old}.partial"))     # half a checkpoint never has a checkpoint's name


PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}   # NVIDIA's dense bf16 FLOP/s


def flops_per_token(config: MambaConfig) -> float:
    """Of training. A product takes 2 a weight forward and 4 backward, the scan about 8 and 16 a state."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    return config.n_layer * (6 * d * (3 * m + 2 * r + 2 * n) + 24 * d * n) + 6 * m * config.vocab_size


class Trainer:
    """A model, its optimizer and its data, on one of the ranks."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, model: Mamba, tokenizer: Tokenizer,
                 sources: dict[str, Source]):
        self.args, self.recipe, self.model, self.tokenizer = args, recipe, model, tokenizer
        self.sources, self.step, self.tokens = sources, 0, 0
        self.group = None                       # of the processes that write checkpoints; alone there is none
        self.await_saved = lambda: None         # waits for the checkpoint that is being written
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if args.compile:    # unrolled, this loop over time would compile for minutes and run no faster
            scan.BACKENDS["chunked"] = torch.compiler.disable(scan.Chunked.apply)
        for block in model.backbone.layers:
            if args.checkpoint_activations:
                block.forward = partial(rerun, block.forward)
            if args.compile:
                block.compile()
        self.objective = Objective(model, tokenizer.token_to_id(END))
        if dist.is_initialized():               # bf16 on a GPU; few CPUs multiply it faster
            dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
            shard(self.objective, args.device.type, self.world, dtype)
            self.group = dist.new_group(backend="gloo")     # its own, as a thread writes while others train
        # To look at a model its own dtype will do; to train it, or where it is divided, all weights are fp32.
        model.to(args.device, None if args.eval_only and not dist.is_initialized() else torch.float32)
        self.adam = optimizer(model, recipe)
        # What a checkpoint and the run that goes on from it must agree on, as JSON gives it back.
        self.settings = json.loads(json.dumps(asdict(recipe) | asdict(model.config) | {
            "vocabulary": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16],
            "data": {name: source.about for name, source in sources.items()}}))

    def passes(self, count: int, row: Callable[[int], np.ndarray]) -> tuple[Tensor, ...]:
        """This rank's part of row(0) to row(count - 1), each (l + 1,), as one (b, l + 1) a pass."""
        # All ranks make as many passes of as many rows: rows of -100 fill the last ones up.
        mine = range(self.rank, self.world * math.ceil(count / self.world), self.world)
        rows = [row(i).astype(np.int64) if i < count else np.full_like(row(0), -100, np.int64) for i in mine]
        rows = torch.from_numpy(np.stack(rows))
        if rows.max() >= self.model.config.vocab_size:
            raise ValueError(f"the data holds token {rows.max()}, but the model's vocabulary has only "
                             f"{self.model.config.vocab_size}: another tokenizer made it")
        return rows.tensor_split(math.ceil(len(rows) / self.args.micro_batch))

    def update(self) -> dict:
        """One step. Returns its figures, which are over all ranks."""
        begin, recipe, losses = time.perf_counter(), self.recipe, []
        size, length = batch_size(recipe, self.tokens), context_length(recipe, self.tokens)
        count = size * length
        passes = self.passes(size, lambda i: training_row(recipe, self.sources, self.tokens, i))
        for rows in passes:
            if dist.is_initialized():           # gradients add up on each rank and travel after the last pass
                self.objective.set_requires_gradient_sync(rows is passes[-1])
            loss = self.objective(rows.to(self.args.device))
            (loss * self.world / count).backward()        # FSDP takes the mean over ranks
            losses.append(loss.detach())        # read below: to read it here would let a GPU wait for us
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        norm = (norm.full_tensor() if dist.is_initialized() else norm).item()
        loss = over_ranks(sum(loss.item() for loss in losses)) / count
        self.step, self.tokens = self.step + 1, self.tokens + count
        if not math.isfinite(loss + norm):
            raise ValueError(f"the loss, {loss}, or the norm of its gradient, {norm}, is not finite at step "
                             f"{self.step}; start again with a lower --lr, or from the model saved last with "
                             "--init-from")
        lr = learning_rate(recipe, self.tokens)     # of the step's end: at its start, 0 tokens, it may be 0
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": lr, "batch_size": size,
                "context": length, "grad_norm": norm, "tokens_per_s": count / (time.perf_counter() - begin)}

    @torch.no_grad()
    def held_out(self, length: int) -> dict[str, tuple[float, float]]:
        """Source -> its loss in nats per token and in bits per byte, on up to 128 held-out rows."""
        losses = {}
        for name, source in self.sources.items():
            chosen, nats, size = length * order(source.rows("held out", length), 0)[:128], 0.0, 0
            for rows in self.passes(len(chosen), lambda i: source.row("held out", chosen[i], length)):
                nats += self.objective(rows.to(self.args.device)).item()
                texts = self.tokenizer.decode_batch([row[1:].tolist() for row in rows if row[0] >= 0])
                # Each end of a row may cut a character, of which about a byte is left, shown as U+FFFD.
                size += sum(len(text.replace("\ufffd", "?").encode()) for text in texts)
            nats, size = over_ranks(nats), over_ranks(size)
            losses[name] = nats / (len(chosen) * length), nats / math.log(2) / max(size, 1)
            if not losses[name][0] < 700:       # e^710, as a perplexity, overflows
                raise ValueError(f"the held-out loss on {name} is {losses[name][0]} nats per token: the "
                                 "weights are damaged, or --lr was too high")
        return losses

    def state(self) -> dict[str, Tensor]:
        """All that steps change: the weights, and Adam's two averages of each and its count of steps."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, adam = get_state_dict(self.model, self.adam, options=flat)
        return weights | {name: value for name, value in adam.items() if isinstance(value, Tensor)}

    def save(self) -> None:
        """A checkpoint, and the model as it is published."""
        self.await_saved()      # the checkpoint before this one is written, or this raises why not
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(self.model, options=whole)      # all ranks give, rank 0 gets
        if self.rank == 0:      # copies, as what is gathered is part of a larger buffer; a tied tensor once
            weights = {name: gathered.pop(name).clone() for name, _ in self.model.named_parameters()}
            self.model.save_pretrained(self.args.out, weights)
        # After it, so that a run whose last checkpoint is complete has written its model too.
        writer = Writer(self.args.out, self.step, self.settings, self.args.keep)
        # This copies to the CPU's memory before it returns; a thread writes while training goes on.
        saving = dcp.async_save(self.state(), storage_writer=writer, process_group=self.group)
        self.await_saved = saving.result

    def resume(self, folder: Path) -> None:
        """Go on from this checkpoint. ValueError if it is of another model, vocabulary, recipe or corpus."""
        settings = read_json(folder / "run.json")
        for name, now in self.settings.items():
            if settings.get(name) != now:
                raise ValueError(f"{folder} has {name} {settings.get(name)!r:.80}, this command {now!r:.80}; "
                                 "repeat the command that began the run, or begin another with --out")
        dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder), process_group=self.group)
        self.step = int(folder.name.removeprefix("step-"))
        for _ in range(self.step):
            self.tokens += batch_size(self.recipe, self.tokens) * context_length(self.recipe, self.tokens)

    def run(self) -> bool:
        """Train to the recipe's end, or until a signal asks a rank to stop. Returns whether it is the end."""
        args, total, signals, stop = self.args, self.recipe.total_tokens, [], False

        def on_signal(number, frame):
            signals.append(number)
            signal.signal(signal.SIGINT, signal.SIG_DFL)    # the next Ctrl-C does not wait for the save
        former = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else ""
        peak = self.world * next((PEAKS[name] for name in PEAKS if name in gpu), 0)
        with tqdm(total=total, initial=self.tokens, unit="tok", unit_scale=True,
                  disable=self.rank > 0 or None) as bar:    # None: only a terminal has one
            while self.tokens < total and not stop:
                row = self.update()
                bar.update(self.tokens - bar.n)
                stop, end = over_ranks(len(signals)) > 0, self.tokens >= total
                line = ("step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | "
                        "batch {batch_size} | {tokens_per_s:.0f} tok/s").format(**row)
                if peak:
                    line += f" | {row['tokens_per_s'] * flops_per_token(self.model.config) / peak:.0%} MFU"
                if self.step % args.eval_every == 0 or end:
                    losses = {name: nats for name, (nats, _) in self.held_out(row["context"]).items()}
                    line += "".join(f" | held-out {name} {nats:.4f}" for name, nats in losses.items())
                    row["held_out"] = losses
                tqdm.write(line)
                if self.rank == 0:
                    with (args.out / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
                if self.step % args.checkpoint_every == 0 or end or stop:
                    self.save()
        self.await_saved()
        for number, handler in former.items():
            signal.signal(number, handler)
        return self.tokens >= total


def picture(path: Path, x: list, panels: dict[str, list]) -> None:
    """Each panel over x, in tokens. Nothing without matplotlib, which is optional."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axis, (title, y) in zip(figure.subplots(1, len(panels)), panels.items()):
        axis.plot(x, y)
        axis.set(title=title, xlabel="tokens")
    figure.savefig(path)


# The plan: the same functions, on paper.

def memory(config: MambaConfig, world: int, dtype: torch.dtype) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes on one of `world` GPUs, by part; and bytes a token of the rows it runs at a time."""
    with torch.device("meta"):
        model = Mamba(config)
    block, whole = (sum(p.numel() for p in v.parameters()) for v in (model.backbone.layers[0], model))
    root = whole - config.n_layer * block
    # FSDP deals out rows of each tensor; rank 0 has the most.
    mine = sum(math.ceil(len(p) / world) * p.numel() // len(p) for p in model.parameters())
    fixed = {"parameters": 4 * mine, "gradients": 4 * mine, "optimizer: Adam's two averages": 8 * mine,
             "logits of 1024 tokens, with gradients": 12 * 1024 * config.vocab_size}
    if world > 1:
        fixed |= {"gathered: embeddings, head, 3 blocks": (root + 3 * block) * dtype.itemsize,
                  "their gradients on the way": max(root, 2 * block) * (dtype.itemsize + 4),
                  "whole gradients, where a step takes several passes": 4 * whole}
    # What a block keeps of a token. Of width m: its stream and normed stream in fp32, and that in dtype. Of
    # width d: the convolution's input and output in fp32, and x, dt, z and y in dtype. dt, B and C before
    # their norms and after. States: one in 16 by the CPU's scan, in fp32, and one in 256 by the GPU's.
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    apart, width = 16 if dtype == torch.float32 else 256, dtype.itemsize
    kept = (8 + width) * m + (8 + 4 * width + 4 * n / apart) * d + (4 + width) * r + 16 * n
    return fixed, {"without": config.n_layer * kept, "with": 4 * config.n_layer * m + kept}


def plan(args: argparse.Namespace, recipe: Recipe, config: MambaConfig) -> None:
    """Print the whole run and draw its schedule."""
    decay, world, tokens, steps = recipe.total_tokens - recipe.decay_tokens, args.world_size, 0, 0
    marks = {0, recipe.warmup_tokens, recipe.ramp_tokens, *recipe.stages, decay, recipe.total_tokens}
    print("stage      tokens       to     steps  context         batch         learning rate"
          "     noise temperature  mixture")
    for a, b in pairwise(sorted(mark for mark in marks if mark <= recipe.total_tokens)):
        phase = ("warmup" if a < recipe.warmup_tokens else "ramp" if a < recipe.ramp_tokens else
                 "decay" if a >= decay else "stable")
        before = steps
        while tokens < b:
            tokens, steps = tokens + batch_size(recipe, tokens) * context_length(recipe, tokens), steps + 1
        size, last = batch_size(recipe, a), batch_size(recipe, b)
        lr, after = learning_rate(recipe, a), learning_rate(recipe, b)
        print(f"{phase:8}{a:9.4g}{b:9.4g}{steps - before:10,}{context_length(recipe, a):9}"
              f"{size:6} -> {last:4}{lr:10.2e} -> {after:.2e}"
              f"{lr / size**.5:10.2e} -> {after / last**.5:.2e}  "
              + " ".join(f"{name} {share:.0%}" for name, share in mixture(recipe, a).items()))
    flops = flops_per_token(config) * tokens
    days = flops / (world * PEAKS["H100"]) / 86400
    print("noise temperature: learning rate / sqrt(batch)\n\n"
          f"{steps:,} steps, {tokens:.5g} tokens, {flops:.3g} FLOPs ({flops / tokens:.3g} a token): on "
          f"{world} H100 {days / args.mfu:.3g} days at {args.mfu:.0%} MFU, two months at {days / 61:.1%}\n\n"
          "memory of each GPU in GB, with fp32 parameters and bf16 products:")
    fixed, rows = memory(config, world, torch.bfloat16)
    fixed["CUDA, NCCL and fragments (our guess)"] = 5e9
    fixed["together"] = used = sum(fixed.values())
    for name, size in fixed.items():
        print(f"  {name:54}{size / 1e9:8.2f}")
    for length in dict.fromkeys(recipe.context):
        for name, row in rows.items():
            print(f"  activations, context {length} {name:>7} --checkpoint-activations"
                  f"{row * length / 1e9:7.2f} GB a row; "
                  f"80 GB hold --micro-batch {max(80e9 - used, 0) // (row * length):.0f}")
    args.out.mkdir(parents=True, exist_ok=True)
    x = [recipe.total_tokens * i // 1000 for i in range(1001)]
    picture(args.out / "plan.png", x, {f.__name__.replace("_", " "): [f(recipe, t) for t in x]
                                       for f in (learning_rate, batch_size, context_length)})


def run(args: argparse.Namespace, recipe: Recipe, sizes: dict) -> None:
    paths, shares = named_data(args.data)
    folder = find(recipe.init_from or args.out) if recipe.init_from or args.eval_only else None
    tokenizer = open_tokenizer(args.tokenizer or (folder and folder / "tokenizer.json"))
    every = sum(paths.values(), [])
    if args.tokenize_to:
        return tokenize_to(args.tokenize_to, every, tokenizer)
    if not args.eval_only:
        recipe = with_shares(recipe, paths, shares, "mixture" in args)
    done = [] if args.eval_only else checkpoints(args.out)
    held, ours = (done or (args.out / name).exists() for name in ("config.json", "metrics.jsonl"))
    if held and not args.eval_only and not (args.resume and ours):
        raise ValueError(f"{args.out} already holds a model; --resume goes on with the run that made it, "
                         "if its metrics.jsonl is there; another --out begins a new one")
    if not args.eval_only and any(args.out.resolve().is_relative_to(path.resolve()) for path in every):
        raise ValueError(f"--out {args.out} lies in --data, whose files are read as text; name one outside")
    torch.manual_seed(recipe.seed)
    size, end = sample.vocabulary(tokenizer), tokenizer.token_to_id(END)
    if folder:      # mapped from its files: FSDP copies each rank's part out of them
        model = Mamba.from_pretrained(folder)
        model.config.eos_token_id = end         # the pre-decay file's is not this
    else:
        model = Mamba(MambaConfig(**{"vocab_size": size, "eos_token_id": end} | sizes))
    # A .bin does not say whose numbers it holds. They are taken for bytes only where the model's are.
    guessed = not (args.tokenizer or folder) and any(path.suffix == ".bin" for path in every)
    if size > model.config.vocab_size or guessed and size != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {size} tokens, the model {model.config.vocab_size}; name the "
                         "tokenizer.json that belongs to the model and the data with --tokenizer")
    sources = {name: Source(name, group, tokenizer, recipe) for name, group in paths.items()}
    trainer = Trainer(args, recipe, model, tokenizer, sources)
    if done:
        trainer.resume(done[-1])
    if trainer.rank == 0 and not args.eval_only:
        prepare(args.out, trainer.step, tokenizer)
    products = torch.bfloat16 if args.device.type == "cuda" else model.lm_head.weight.dtype     # see shard()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, products in {products}, "
          f"{sum(source.size for source in sources.values()):,} tokens of text, "
          f"{trainer.world} x {args.device}, scan: {scan.default_backend(args.device, 2)}\n"
          f"{recipe}\n{model.config}")
    if args.eval_only:
        for name, (nats, bits) in trainer.held_out(context_length(recipe, recipe.total_tokens)).items():
            print(f"{name}: {nats:.4f} nats per token, perplexity {math.exp(nats):.3f}, "
                  f"{bits:.4f} bits per byte")
        return
    begin, finished = time.perf_counter(), trainer.run()
    if trainer.rank > 0:
        return
    try:
        rows = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
        picture(args.out / "loss.png", [row["tokens"] for row in rows],
                {name: [row[name] for row in rows] for name in ("loss", "lr", "grad_norm")})
    except (ValueError, LookupError, TypeError, RecursionError):    # rows of a run that was resumed
        print(f"no picture of the losses: {args.out / 'metrics.jsonl'} is damaged")
    if not finished:
        return print(f"stopped and saved at step {trainer.step}; the same command with --resume goes on")
    print(f"{time.perf_counter() - begin:.0f} s; {args.out} now holds the model.", end=" ")
    if trainer.world > 1:       # a model for many GPUs need not fit beside its parts on one
        return print(f"python sample.py --model {args.out} runs it")
    print("It continues 'def ' with:\n")
    model, prompt = Mamba.from_pretrained(args.out, args.device), sample.encode(tokenizer, "def ") or [end]
    tokens = torch.tensor([prompt], device=args.device)
    sample.write(sample.generate(model, tokens, 300, 0.8, stop=end), tokenizer, ["def "], end)


def flags(arguments: list[str]) -> tuple[argparse.Namespace, Recipe, dict]:
    """What the command line asks for: how to run, the recipe, and the sizes of a fresh model."""
    parser = argparse.ArgumentParser(description="Train a Falcon-Mamba.", allow_abbrev=False)
    add, switch, count = parser.add_argument, argparse.BooleanOptionalAction, sample.number(int, 1, 2**60)
    add("--recipe", choices=RECIPES, default="tiny", help="where all that is not given comes from")
    add("--data", action="append", default=[], help="text file, folder of them, or .bin of tokens, as path, "
        "name=path or name=path:share; repeat for more (else the sources of Python's standard library)")
    add("--out", type=Path, default="out", help="folder for all results (default %(default)s)")
    add("--tokenizer", type=Path, help="a tokenizer.json (else that of --init-from, or one token a byte)")
    add("--tokenize-to", type=Path, help="only write the tokens of --data to this .bin")
    add("--resume", action=switch, help="go on from the last checkpoint in --out, if it has one")
    add("--eval-only", action=switch, help="only print the held-out loss of --init-from, or of --out")
    add("--plan", action=switch, help="only print the run's steps, rates, days and memory")
    add("--world-size", type=sample.number(int, 1, 2**20), default=1, help="GPUs, for that plan (default 1)")
    add("--mfu", type=sample.number(float, 1e-3, 1), default=0.18,
        help="the part of the GPUs' peak that training reaches, for that plan (default %(default)s)")
    add("--micro-batch", type=count, default=16, help="sequences a GPU runs at a time (default %(default)s)")
    add("--checkpoint-activations", action=switch, help="a third more time, for far less memory")
    add("--compile", action=switch, help="torch.compile the blocks")
    add("--checkpoint-every", type=count, default=100, help="steps (default %(default)s)")
    add("--eval-every", type=count, default=200, help="steps (default %(default)s)")
    add("--keep", type=count, default=2, help="checkpoints (default %(default)s)")
    add("--device", type=sample.device, default="auto", help="cpu, cuda ...; auto is cuda if there is one")
    for cls, title in (Recipe, "the recipe"), (MambaConfig, "the sizes of a fresh model"):
        group = parser.add_argument_group(title, "with the defaults of --recipe tiny")
        for f in fields(cls):
            default = SIZES["tiny"].get(f.name, f.default)
            kind = {"action": switch} if f.type is bool else {"type": sample.number(f.type, 0, 2**60)}
            shown = ",".join(map(str, default)) if type(default) is tuple else default
            about = f" (default {shown})" if shown not in ("", None) else ""
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                               **kind | f.metadata | {"help": f.metadata.get("help", "") + about})
    args = parser.parse_args(arguments)
    given, recipe = vars(args), RECIPES[args.recipe]
    recipe = scaled(recipe, given.get("total_tokens", recipe.total_tokens))
    recipe = replace(recipe, **{f.name: given[f.name] for f in fields(Recipe) if f.name in given})
    sizes = {f.name: given[f.name] for f in fields(MambaConfig) if f.name in given}
    if sizes and recipe.init_from:
        named = ", ".join("--" + name.replace("_", "-") for name in sizes)
        parser.error(f"--init-from brings its own sizes; leave out {named}")
    return args, recipe, SIZES["continue" if recipe.init_from else args.recipe] | sizes


@sample.plainly("train.py", "a smaller --micro-batch")
def main() -> None:
    # Harmless: FSDP's warning of views, which are of a state that we drop; dcp's that it runs without
    # torch.distributed, and its log of a traceback, which becomes a sentence below.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view|torch.distributed is disabled")
    logging.getLogger().setLevel(logging.ERROR)
    gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()     # torchrun counts from 0
    try:
        if gpu < gpus:
            torch.cuda.set_device(gpu)
        args, recipe, sizes = flags(sys.argv[1:])
        if args.plan:
            vocabulary = {"vocab_size": sample.vocabulary(open_tokenizer(args.tokenizer))}
            local = recipe.init_from and not recipe.init_from.startswith("tiiuae/falcon-mamba-7b")
            return plan(args, recipe, MambaConfig.from_json(Path(recipe.init_from) / "config.json") if local
                        else MambaConfig(**vocabulary | sizes))
        cuda = args.device.type == "cuda"
        if cuda and not (gpu < gpus and dist.is_nccl_available()):
            raise ValueError(f"GPUs need a PyTorch with NCCL, and each process one of the {gpus} here; lower "
                             "--nproc-per-node, or try --device cpu")
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if cuda or not alone:       # torchrun started us; and fully_shard brings bf16 also to a single GPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
        if dist.is_initialized() and dist.get_rank() > 0:   # rank 0 speaks for all
            sys.stdout = open(os.devnull, "w")
        run(args, recipe, sizes)
    except dcp.CheckpointException as e:
        why, _ = next(iter(e.failures.values()))
        raise OSError(f"no checkpoint written or read in {args.out}: {str(why)!r:.300}") from e
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
