"""Train a Falcon-Mamba with Falcon-Mamba's own recipe, on a laptop or on many GPUs. The last file.

    python train.py                                 a small model of Python's standard library, into out/
    python sample.py --model out --prompt "def "    what it learned
    python train.py --resume                        after Ctrl-C or a power cut: go on
    python train.py --init-from tiiuae/falcon-mamba-7b-pre-decay --data mine/ --out tuned

README.md has more. From top to bottom: the recipe, the data, the loss, many GPUs, the trainer, the
command line. The recipe is that of the Falcon-Mamba report, arXiv 2410.05355, section 3. What was never
published is marked "our choice", what we read only in summaries of the report "secondary".

Learning rate, batch size, context length and the rows of each batch depend on the recipe, on the data and
on the tokens trained on so far, and on nothing else. So the loss curve is the same on one GPU or on eight,
and with or without an interruption.

A row is a stretch of text that the model sees at once. A step is one update of the weights. A rank is one
of the processes that train together. Sizes in the shape comments: b batch, l length, m d_model.
"""
import argparse
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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import scan
from mamba import Mamba, MambaConfig, find, read_json, replace_file
from sample import device, end_tokens, number, read_tokenizer, vocabulary

GT = 10**9      # a billion tokens, the report's unit
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# The recipe

@dataclass(frozen=True)
class Stage:
    """A part of the run, from the token `start` to the next stage."""
    start: int
    context: int        # tokens per row
    mixture: str        # each source's share of the rows, as "web:9 code:1"

def flag(default, help, low=0, high=2**60, **more):
    """A field that is also a flag on the command line; `more` goes to argparse."""
    if isinstance(default, bool):
        more["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, int | float):
        more["type"] = number(type(default), low, high)
    shown = "" if default is False or default in (None, "") else f" (default {default})"
    return field(default=default, metadata={"help": help + shown} | more)

@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens. The defaults are our choice, for two CPU cores."""
    total_tokens: int = flag(1_000_000, "length of the run; the next three scale with it", 1)
    warmup_tokens: int = flag(30_000, "over these the learning rate rises from 0")
    ramp_tokens: int = flag(150_000, "over these the batch grows from its first size to its last")
    decay_tokens: int = flag(300_000, "over these, the last of the run, the learning rate decays")
    batch_start: int = flag(2, "rows in the first batch", 1, 2**20)
    batch_end: int = flag(8, "rows in a batch after the ramp", 1, 2**20)
    lr: float = flag(4e-3, "peak learning rate, for a batch of --lr-batch rows")
    lr_batch: int = flag(8, "rows for which --lr is meant", 1, 2**20)
    decay_factor: float = flag(256.0, "the decay divides the learning rate by this", 1)
    weight_decay: float = flag(0.1, "AdamW's, for matrices only")
    beta1: float = flag(0.9, "AdamW's", 0, 0.9999999)
    beta2: float = flag(0.95, "AdamW's", 0, 0.9999999)
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "of fresh weights and of the order of the data")
    init_from: str = flag("", "folder or hub id of a model to start from (else fresh weights)")
    stages: tuple[Stage, ...] = (Stage(0, 256, "text:1"),)

    def __post_init__(self):
        before = max(self.warmup_tokens, self.ramp_tokens)
        if before + self.decay_tokens > self.total_tokens:
            raise ValueError(f"--total-tokens {self.total_tokens} has no room for {before} --warmup-tokens "
                             f"or --ramp-tokens and then {self.decay_tokens} --decay-tokens")
        for stage in self.stages:
            shares(stage.mixture)       # raises ValueError if it cannot be read
            if self.longest % stage.context != 0:
                raise ValueError(f"a context of {stage.context} tokens does not divide the longest, {self.longest}")

    @property
    def longest(self) -> int:
        return max(stage.context for stage in self.stages)

def shares(mixture: str) -> dict[str, float]:
    """Each source's share: "web:9 code:1" -> {"web": 0.9, "code": 0.1}."""
    parts = re.findall(r"(\S+):(\d+\.?\d*|\.\d+)(?:\s+|$)", mixture)
    weights = {name: float(weight) for name, weight in parts}
    total = sum(weights.values())
    if len(weights) < len(mixture.split()) or total == 0:
        raise ValueError(f"--mixture is {mixture!r:.200}, but must be like 'web:9 code:1', each source once")
    return {name: weight / total for name, weight in weights.items()}

def stage_at(recipe: Recipe, tokens: int) -> Stage:
    return [stage for stage in recipe.stages if stage.start <= tokens][-1]

def context_length(recipe: Recipe, tokens: int) -> int:
    """Tokens per row of the batch that starts after `tokens` tokens."""
    return stage_at(recipe, tokens).context

def progress(tokens: int, length: int) -> float:
    """How much of the first `length` tokens is done, from 0 to 1."""
    return min(tokens / length, 1.0) if length > 0 else 1.0

def batch_size(recipe: Recipe, tokens: int) -> int:
    """Rows in the batch that starts after `tokens` tokens."""
    growth = recipe.batch_end - recipe.batch_start
    return round(recipe.batch_start + growth * progress(tokens, recipe.ramp_tokens))

def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Warmup, stable, decay. The rate grows with sqrt(batch), which the report calls BatchScaling.

    Adam's step is about as long as the rate, whatever the batch, and its noise falls with sqrt(batch). So
    rate / sqrt(batch), the report's "noise temperature", stays constant while the batch grows.
    """
    rate = recipe.lr * math.sqrt(batch_size(recipe, tokens) / recipe.lr_batch)
    rate *= progress(tokens, recipe.warmup_tokens)
    decaying = tokens - (recipe.total_tokens - recipe.decay_tokens)
    if decaying > 0 and recipe.decay_tokens > 0:
        rate *= recipe.decay_factor ** -progress(decaying, recipe.decay_tokens)
    return rate

def scaled(recipe: Recipe, total: int, given: dict) -> Recipe:
    """The recipe over `total` tokens: each phase and stage keeps its share. `given` fields are then set."""
    def scale(tokens: int) -> int:
        return tokens * total // recipe.total_tokens

    longer = {"total_tokens": total, "warmup_tokens": scale(recipe.warmup_tokens),
              "ramp_tokens": scale(recipe.ramp_tokens), "decay_tokens": scale(recipe.decay_tokens),
              "stages": tuple(replace(stage, start=scale(stage.start)) for stage in recipe.stages)}
    recipe = replace(recipe, **longer | given)
    if "lr" in given and "lr_batch" not in given:
        recipe = replace(recipe, lr_batch=recipe.batch_end)     # --lr is then the peak itself
    return recipe

FALCON = Recipe(
    total_tokens=5500 * GT,             # model card; the report's abstract says 5.8 trillion
    warmup_tokens=1 * GT,               # secondary
    ramp_tokens=50 * GT,                # report; that the batch grows linearly is secondary
    batch_start=128, batch_end=2048,    # report
    lr=6.4e-4, lr_batch=2048,           # report and model card
    decay_tokens=500 * GT,              # report: exponential decay over 500 GT ...
    decay_factor=256.0,                 # ... to lr / 256 = 2.5e-6
    weight_decay=0.1,                   # model card
    beta1=0.9, beta2=0.95,              # secondary
    clip=1.0,                           # our choice
    # Report: the context grows from 2048 to 8192, and technical text, code and mathematics follow the
    # web's. Secondary: four stages at a constant rate, then the decay, which adds FineWeb-Edu, synthetic
    # text and instructions. Our choice: where a stage starts, all shares, and 4096 in between.
    stages=(Stage(0, 2048, "refinedweb:90 technical:4 code:4 math:2"),
            Stage(2000 * GT, 4096, "refinedweb:82 technical:7 code:7 math:4"),
            Stage(3500 * GT, 8192, "refinedweb:78 technical:9 code:8 math:5"),
            Stage(4500 * GT, 8192, "refinedweb:70 technical:11 code:12 math:7"),
            Stage(5000 * GT, 8192, "refinedweb:45 finewebedu:25 technical:10 code:12 math:8")))
# The pre-decay checkpoint is the model before that decay. Its optimizer's state was not published, so the
# rate must warm up again: over 2 GT, our choice.
CONTINUE = replace(FALCON, init_from="tiiuae/falcon-mamba-7b-pre-decay", total_tokens=502 * GT,
                   warmup_tokens=2 * GT, ramp_tokens=0, stages=(replace(FALCON.stages[-1], start=0),))
RECIPES = {"tiny": Recipe(), "falcon-mamba-7b": FALCON, "continue": CONTINUE}
# Sizes of a fresh small model, our choice. The published 0.1 of fresh weights suits the 7B's width.
TINY = {"d_model": 128, "n_layer": 4, "initializer_range": 0.02}


# The data. A source is text, in files or folders, or a corpus: a folder of tokens.bin and the
# tokenizer.json that made it.

def byte_tokenizer() -> Tokenizer:
    """One token a byte, which ByteLevel writes as a visible character; token 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer

def end_of_document(tokenizer: Tokenizer, model: Path | None) -> int:
    """The token that closes a document, by its usual names, or the one at which the model ends."""
    for name in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    ends = end_tokens(model, tokenizer) if model else []
    if not ends:
        raise ValueError("the tokenizer has no token <|endoftext|>, which must close a document")
    return ends[0]

def standard_library() -> list[Path]:
    """The sources of Python's standard library: text that every reader of this file has."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "test", "tests", "encodings", "pydoc_data"}      # the last two are tables
    return [path for path in sorted(root.rglob("*.py")) if not others & {*path.relative_to(root).parts}]

def named_paths(texts: list[str]) -> dict[str, list[Path]]:
    """Source -> its paths, from --data: each text is name=path, or a path of the source "text"."""
    paths = defaultdict(list)
    for text in texts:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            name, path = "text", text
        if not path or not Path(path).exists():         # Path("") is the folder that we are in
            raise ValueError(f"there is no {path or repr(path)}, which --data names; it takes name=path, and "
                             "--mixture takes the shares")
        if Path(path).suffix == ".bin":
            raise ValueError(f"{path} does not say which tokenizer made it; --tokenize-to writes a folder that does")
        paths[name].append(Path(path))
    return paths or {"text": standard_library()}

def text_files(paths: list[Path]) -> list[Path]:
    """These files, and the files in these folders that are not hidden, in a shuffled order."""
    files = []
    for path in paths:
        for inside in [path, *sorted(path.rglob("*"))]:
            hidden = any(part.startswith(".") for part in inside.relative_to(path).parts)
            if inside.name == "tokens.bin":
                raise ValueError(f"{inside.parent} is a corpus, not text; make it a source of its own")
            if inside.is_file() and not hidden:
                files.append(inside)
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]

def text_pieces(path: Path) -> Iterator[str]:
    """A file's text, in pieces that are small, however long its lines are."""
    with path.open(encoding="utf-8", newline="") as file:           # keeps "\r\n"
        piece = file.read(2**18)
        while piece:
            yield piece + file.readline(2**12)      # up to a line's end if possible, to cut no word
            piece = file.read(2**18)

def tokenized(paths: list[Path], tokenizer: Tokenizer, end: int) -> Iterator[np.ndarray]:
    """The tokens of all this text, piece by piece, with `end` after each file."""
    tokenizer.encode_special_tokens = True          # a text that spells <|endoftext|> does not end there
    dtype = token_dtype(tokenizer)
    files = text_files(paths)
    hidden = True if rank() > 0 else None           # None: shown on a terminal only
    for path in tqdm(files, desc="reading", unit="file", delay=2, disable=hidden):
        count = 0
        try:
            for piece in text_pieces(path):
                encoding = tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0]
                yield np.array(encoding.ids, dtype)
                count += len(encoding.ids)
        except UnicodeDecodeError:
            print(f"skipping {path} from where it is not UTF-8 text", file=sys.stderr)
        if count > 0:
            yield np.array([end], dtype)

def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary(tokenizer) <= 2**16 else np.uint32)

def tokenize_to(folder: Path, paths: list[Path], tokenizer: Tokenizer, end: int) -> None:
    """Write a corpus, whose tokens training maps into memory."""
    if folder.exists():
        raise ValueError(f"--tokenize-to {folder} exists already; remove it, or name another folder")
    unfinished = folder.with_name(folder.name + ".partial")
    count = 0
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(unfinished / "tokenizer.json"))
        with (unfinished / "tokens.bin").open("wb") as file:
            for part in tokenized(paths, tokenizer, end):
                file.write(part.tobytes())
                count += len(part)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)   # after an error or Ctrl-C
    print(f"{folder}: {count:,} tokens")

def read_corpus(folder: Path, tokenizer: Tokenizer, end: int) -> np.ndarray:
    """Map a corpus into memory. ValueError if another tokenizer than the model's made it."""
    other = read_tokenizer(folder / "tokenizer.json")
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the corpus {folder} is of another tokenizer, of {vocabulary(other)} tokens, than "
                         f"the model, of {vocabulary(tokenizer)}; make it again with the model's --tokenizer")
    dtype = token_dtype(tokenizer)
    file = folder / "tokens.bin"
    count = file.stat().st_size // dtype.itemsize
    tokens = np.memmap(file, dtype, "r", shape=count) if count else np.zeros(1, dtype)
    # It ends with a document and one `end`. A file that was cut, or of numbers of another width, does not.
    if file.stat().st_size != tokens.nbytes or tokens[-1] != end or tokens[-2:].tolist() == [end, end]:
        raise ValueError(f"{file} does not end like {dtype} tokens with one {end}; make it again with --tokenize-to")
    return tokens

@dataclass
class Source:
    """The tokens of a source, in memory or mapped from a file."""
    held_out: np.ndarray
    training: np.ndarray

    def row(self, position: int, context: int, longest: int, seed: int) -> np.ndarray:
        """The row, and its last target, at this position of the order in which the source is read.

        The text is cut into pieces of the longest context. They are visited in strides of about 0.6 of
        their number, so that neighbours in time lie far apart. The stride and that number have no common
        factor, so all pieces are read before any is read again. Returns (context + 1,).
        """
        pieces = (len(self.training) - 1) // longest
        stride = max(1, round(0.618 * pieces))
        while math.gcd(stride, pieces) > 1:
            stride += 1
        visited, inside = divmod(position, longest)
        first = int(np.random.default_rng(seed).integers(pieces))
        start = (first + visited * stride) % pieces * longest + inside
        return self.training[start:start + context + 1]

def read_source(paths: list[Path], tokenizer: Tokenizer, end: int) -> Source:
    """Read a source's text, or map its corpus. The beginning is held out for evaluation."""
    if len(paths) == 1 and (paths[0] / "tokens.bin").exists():
        tokens = read_corpus(paths[0], tokenizer, end)
    else:
        tokens = np.concatenate([*tokenized(paths, tokenizer, end)] or [np.zeros(0, int)])
    # A twentieth, at most a million tokens, and the rest of its last document if that is near. It depends
    # on the tokens alone, so that no run trains on what another evaluates.
    cut = min(len(tokens) // 20, 2**20)
    ends = np.flatnonzero(tokens[cut:2 * cut] == end)
    if len(ends) > 0:
        cut += int(ends[0]) + 1
    return Source(held_out=tokens[:cut], training=tokens[cut:])

def choose_rows(recipe: Recipe, sources: dict[str, Source], tokens: int,
                positions: dict[str, int]) -> list[np.ndarray]:
    """The rows of the batch that starts after `tokens` tokens.

    `positions` says how far each source has been read, in tokens, and is moved on.
    """
    stage = stage_at(recipe, tokens)
    share = shares(stage.mixture)
    generator = np.random.default_rng((recipe.seed, tokens))
    rows = []
    for name in generator.choice([*share], batch_size(recipe, tokens), p=[*share.values()]):
        # A stage of longer rows goes on at the next multiple of their length.
        position = math.ceil(positions[name] / stage.context) * stage.context
        rows.append(sources[name].row(position, stage.context, recipe.longest, recipe.seed))
        positions[name] = position + stage.context
    return rows

def fitted(recipe: Recipe, sources: dict[str, Source], given: dict, any_context: bool) -> Recipe:
    """The recipe for continuing, in the size of the data, but for what the command line gives.

    The run is one epoch. It takes at least 200 steps, and the held-out text has at least eight rows: with
    little text rows are shorter, a batch has fewer, and the rate follows. These numbers are our choice.
    """
    stage = recipe.stages[0]
    shortest = min(len(source.held_out) for source in sources.values())
    while any_context and stage.context > 64 and stage.context * 8 >= shortest:
        stage = replace(stage, context=stage.context // 2)
    share = shares(stage.mixture)
    lengths = [len(sources[name].training) / share[name] for name in share if share[name] > 0]
    total = given.get("total_tokens", int(min(lengths)))
    rows = max(1, total // (200 * stage.context))
    batch = {"batch_end": min(rows, recipe.batch_end)}
    return scaled(replace(recipe, stages=(stage,)), total, batch | given)


# The loss

# Activation checkpointing: only a function's arguments are kept, and the backward pass runs it again.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

class Objective(nn.Module):
    """The model with its loss. One module, because FSDP gathers weights when a module is called."""

    def __init__(self, model: Mamba, end: int):
        super().__init__()
        self.model = model
        self.end = end

    def forward(self, rows: Tensor) -> Tensor:
        """The sum of -log p over all tokens of rows (b, l + 1) but each first one, in nats.

        Targets of -100 are padding. The logits are made for 1024 tokens at a time, and once more for the
        backward pass. All at once they would be the largest tensor: 2 GB for one row of the 7B.
        """
        tokens = rows[:, :-1].clamp(min=0)                              # (b, l)
        targets = rows[:, 1:]                                           # (b, l)
        reset = F.pad(tokens[:, :-1] == self.end, (1, 0))               # (b, l): after an end
        state = self.model.blank_state(len(tokens))
        hidden, _ = self.model.backbone(tokens, state, reset)           # (b, l, m)
        parts = zip(hidden.flatten(0, 1).split(1024), targets.flatten().split(1024))
        return sum(recomputed(self.loss_of, *part) for part in parts)

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden).float()
        return F.cross_entropy(logits, targets, reduction="sum")


# Many GPUs. torchrun starts a process for each. Without it, on a CPU, there is no process group.

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def over_ranks(value: float) -> float:
    """The sum of a number over all ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item()

def shard(objective: Objective, device: str, dtype: torch.dtype, offload: bool = False) -> None:
    """FSDP2: each rank keeps its part of every tensor, in fp32, and gathers a block's as it runs.

    The large products are gathered and multiplied in `dtype`. The rest of a block is small and stays
    fp32. The rounding of A_log would be raised to the power of thousands of steps, and that of dt_proj's
    bias, about -7, would change a token's delta by 1 %.
    """
    options = {"mesh": init_device_mesh(device, (world_size(),)),
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in objective.model.backbone.layers:
        products = [block.mixer.in_proj, block.mixer.x_proj, block.mixer.out_proj]
        fully_shard(products, mp_policy=policy, **options)          # gathered together
        fully_shard(block, **options)                               # the rest of the block
    fully_shard(objective, mp_policy=policy, **options)             # embeddings, last norm, lm_head

def build(args: "Options", config: MambaConfig, end: int, whole: Mamba | None) -> Objective:
    """The objective on this rank's device, with the weights of `whole`, which only rank 0 has.

    With several ranks, no other one and no GPU ever holds all of it: weights travel tensor by tensor.
    """
    with torch.device("meta"):                                  # shapes without memory
        model = Mamba(config) if dist.is_initialized() else whole
    objective = Objective(model, end)
    if args.compile:    # the CPU's loop over time would be unrolled: minutes to compile, and no faster
        scan.BACKENDS["chunked"] = torch.compiler.disable(scan.Chunked.apply)
    for block in model.backbone.layers:
        if args.compile:
            block.forward = torch.compile(block.forward)
        if args.checkpoint_activations:
            block.forward = partial(recomputed, block.forward)
    if not dist.is_initialized():
        # To look at a model its own dtype will do. To train it, all weights are fp32.
        return objective.to(args.device, None if args.eval_only else torch.float32)
    products = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    shard(objective, args.device.type, products, args.offload)
    objective.to_empty(device="cpu" if args.offload else args.device)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole else {}, options=from_rank_0)
    return objective


# The trainer

def optimizer(model: Mamba, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear and embedding layers only.

    The others are rates and scales, which need not be near 0: A_log, D, convolution, biases, norms.
    """
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=True)

@dataclass
class Trainer:
    """A model, its optimizer and its data, and how far training has come."""
    args: "Options"
    recipe: Recipe
    objective: Objective
    tokenizer: Tokenizer
    sources: dict[str, Source]
    export_dtype: torch.dtype = torch.float32
    step: int = 0
    tokens: int = 0

    def __post_init__(self):
        self.model = self.objective.model
        self.adam = optimizer(self.model, self.recipe)
        self.positions = dict.fromkeys(self.sources, 0)         # how far each source has been read

    def passes(self, rows: list[np.ndarray]) -> tuple[Tensor, ...]:
        """This rank's share of the rows, at most --micro-batch at a time: tensors (b, l + 1).

        All ranks make the same number of passes. Missing rows are filled with -100.
        """
        mine = np.full((math.ceil(len(rows) / world_size()), len(rows[0])), -100)
        for i, row in enumerate(rows[rank()::world_size()]):
            mine[i] = row
        if mine.max() >= self.model.config.vocab_size:
            raise ValueError(f"the data holds token {mine.max()}, but the model's vocabulary has only "
                             f"{self.model.config.vocab_size}: another tokenizer made it")
        return torch.from_numpy(mine).split(self.args.micro_batch)

    def update(self) -> dict:
        """Train on one batch. Returns the step's figures, which are over all ranks."""
        begin = time.perf_counter()
        context = context_length(self.recipe, self.tokens)
        rows = choose_rows(self.recipe, self.sources, self.tokens, self.positions)
        count = len(rows) * context
        nats = torch.zeros((), device=self.args.device)
        passes = self.passes(rows)
        for part in passes:
            if dist.is_initialized():       # gradients add up on each rank, and travel after the last pass
                self.objective.set_requires_gradient_sync(part is passes[-1])
            loss = self.objective(part.to(self.args.device))
            (loss * world_size() / count).backward()        # FSDP takes the mean over ranks
            nats += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        norm = (norm.full_tensor() if dist.is_initialized() else norm).item()
        loss = over_ranks(nats.item()) / count
        self.step += 1
        self.tokens += count
        if not math.isfinite(loss + norm):
            raise ValueError(f"the loss, {loss}, or the norm of its gradient, {norm}, is not finite at step "
                             f"{self.step}; start again with a lower --lr, or go on from the model saved "
                             "last with --init-from")
        rate = learning_rate(self.recipe, self.tokens)      # at the step's end: at its start it may be 0
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": rate, "batch_size": len(rows),
                "context": context, "grad_norm": norm, "tokens_per_s": count / (time.perf_counter() - begin)}

    @torch.no_grad()
    def held_out(self, context: int) -> dict[str, tuple[float, float]]:
        """Source -> its loss in nats a token and in bits a byte, on up to 128 held-out rows."""
        losses = {}
        for name, source in self.sources.items():
            starts = range(0, len(source.held_out) - context, context)
            starts = starts[::math.ceil(len(starts) / 128)]         # spread evenly
            rows = [source.held_out[start:start + context + 1] for start in starts]
            nats = sum(self.objective(part.to(self.args.device)).item() for part in self.passes(rows))
            nats = over_ranks(nats)
            # A row's ends may cut a character. What is left of it, about a byte, is shown as U+FFFD.
            texts = self.tokenizer.decode_batch([row[1:].tolist() for row in rows])
            size = sum(len(text.replace("\ufffd", "?").encode()) for text in texts)
            per_token = nats / (len(rows) * context)
            if not per_token < 700:                 # e^710, as a perplexity, overflows
                raise ValueError(f"the held-out loss on {name} is {per_token} nats a token: the weights are "
                                 "damaged, or --lr was too high")
            losses[name] = per_token, nats / math.log(2) / max(size, 1)
        return losses

    def settings(self) -> dict:
        """What a checkpoint and the run that goes on from it must agree on."""
        lengths = {name: len(source.training) for name, source in self.sources.items()}
        everything = asdict(self.recipe) | asdict(self.model.config) | {"data": lengths}
        return json.loads(json.dumps(everything))       # as it is read again: tuples have become lists

    def state(self) -> dict[str, Tensor]:
        """All tensors that steps change: the weights, and Adam's averages and counts."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, adam = get_state_dict(self.model, self.adam, options=flat)
        tensors = {name: value for name, value in adam.items() if isinstance(value, Tensor)}
        return tensors | {name: weights[name] for name, _ in self.model.named_parameters()}     # a tied one once

    def save(self) -> None:
        """Write a checkpoint, to which every rank adds its part.

        In safetensors: PyTorch's default is a pickle, and reading a pickle can run any code. The folder
        gets its name once all is written, so half a checkpoint never has one.
        """
        folder = self.args.out / "checkpoints" / f"step-{self.step:09}"
        unfinished = folder.with_suffix(".partial")
        dcp.save(self.state(), storage_writer=dcp.HuggingFaceStorageWriter(unfinished, save_distributed=True))
        if rank() == 0:                             # dcp.save ends when all ranks have written
            run = {"settings": self.settings(), "tokens": self.tokens, "positions": self.positions}
            write_file(unfinished / "run.json", json.dumps(run, indent=1).encode())
            unfinished.rename(folder)
            for old in checkpoints(self.args.out)[:-self.args.keep]:
                shutil.rmtree(old.rename(old.with_suffix(".partial")))      # half of it has no such name

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. ValueError if it is of another recipe, model or corpus."""
        run = read_json(folder / "run.json")
        counts = [run.get("tokens"), *dict(run.get("positions") or {}).values()]
        if "settings" not in run or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{folder}/run.json is damaged; remove that folder to go on from the one before it")
        for name, now in self.settings().items():
            before = dict(run["settings"]).get(name)
            if before != now:
                raise ValueError(f"{folder} has {name} {before!r:.80}, this command {now!r:.80}; repeat the "
                                 "command that began the run, or begin another with --out")
        dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder))     # in place
        self.step = int(folder.name.removeprefix("step-"))
        self.tokens = run["tokens"]
        self.positions |= run["positions"]

    def export(self) -> None:
        """Write the model as it is published: gathered on rank 0, into one file."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(self.model, options=whole)      # all ranks give, rank 0 gets
        if rank() == 0:
            weights = {}
            for name, _ in self.model.named_parameters():               # a tied tensor once
                weights[name] = gathered.pop(name).to(self.export_dtype, copy=True)
            self.model.save_pretrained(self.args.out, weights)

def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((out / "checkpoints").glob("step-*[0-9]"))

def write_file(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(content)
    replace_file(unfinished, path)

def prepare(out: Path, steps: int) -> None:
    """Make the folder of a run that has done `steps` steps, without what a killed run did beyond them."""
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for unfinished in (out / "checkpoints").glob("*.partial"):
        shutil.rmtree(unfinished)
    metrics = out / "metrics.jsonl"
    rows = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    write_file(metrics, b"".join(row for row in rows[:steps] if row.endswith(b"\n")))

def write_tokenizer(out: Path, tokenizer: Tokenizer, end: int, source: Path | None) -> None:
    """The files with which other programs make our tokens, and end a text where we do.

    `source` is the model to start from, if its tokenizer is in use. What lies there is carried along.
    """
    word = tokenizer.id_to_token(end)
    config = {"tokenizer_class": "PreTrainedTokenizerFast",         # that is tokenizer.json, unchanged
              "bos_token": word, "eos_token": word, "pad_token": word,
              "padding_side": "left",                               # because new tokens come on the right
              "model_input_names": ["input_ids", "attention_mask"]}
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    write_file(out / "tokenizer.json", tokenizer.to_str().encode())
    write_file(out / "tokenizer_config.json", json.dumps(config, indent=1).encode())
    if source:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            if (source / name).exists():
                write_file(out / name, (source / name).read_bytes())
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
        generation["eos_token_id"] = end_tokens(source, tokenizer)  # the pre-decay model's 0 ends no text
    write_file(out / "generation_config.json", json.dumps(generation, indent=1).encode())

def train(trainer: Trainer) -> bool:
    """Train to the recipe's end, or until Ctrl-C or SIGTERM. Returns whether it is the end."""
    from tests.plan import utilization
    args = trainer.args
    total = trainer.recipe.total_tokens
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C does not wait for the save

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    begin = time.perf_counter()
    before = trainer.tokens
    stopped = False
    while trainer.tokens < total and not stopped:
        row = trainer.update()
        ended = trainer.tokens >= total
        if ended or trainer.step % args.eval_every == 0:
            row["held_out"] = trainer.held_out(row["context"])
        pace = (time.perf_counter() - begin) / (trainer.tokens - before)
        minutes = pace * max(total - trainer.tokens, 0) / 60
        line = (f"step {row['step']} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | norm {row['grad_norm']:.2f} | "
                f"batch {row['batch_size']} | {row['tokens_per_s']:.0f} tok/s | {minutes:.1f} min left")
        if args.device.type == "cuda":
            used = utilization(row["tokens_per_s"] / world_size(), trainer.model.config)
            line += f" | {used:.0%} MFU"                    # nan for a GPU that tests/plan.py does not know
        for name, (nats, _) in row.get("held_out", {}).items():
            line += f" | held-out {name} {nats:.4f}"
        print(line, flush=True)
        if rank() == 0:
            with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        stopped = over_ranks(len(signals)) > 0              # a signal may reach one rank only
        if ended or stopped or trainer.step % args.checkpoint_every == 0:
            trainer.save()
        if trainer.step % args.export_every == 0:
            trainer.export()
    trainer.export()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return trainer.tokens >= total


# The command line

@dataclass
class Options:
    """How to run, beside the recipe and the sizes of the model."""
    recipe: str = flag(None, "where all else comes from (default tiny, or continue with --init-from)", choices=RECIPES)
    data: list[str] = flag(None, "a source: text file, folder of them, or corpus; repeat for more (default: Python's "
                           "standard library)", action="append", metavar="NAME=PATH")
    mixture: str = flag(None, "the sources' shares, as 'web:9 code:1'")
    context: int = flag(None, "tokens per row", type=number(int, 1, 2**20))
    out: Path = flag("out", "folder for all results", type=Path)
    tokenizer: Path = flag(None, "a tokenizer.json (default: the model's, the corpus's, or one token a byte)", type=Path)
    tokenize_to: Path = flag(None, "only write --data to this folder, as a corpus", type=Path)
    resume: bool = flag(False, "go on from the last checkpoint in --out, if it has one")
    eval_only: bool = flag(False, "only print the loss of --init-from, or of --out, on the held-out part of --data")
    plan: bool = flag(False, "only print the run's steps, rates, days and memory")
    world_size: int = flag(1, "GPUs, for that plan", 1, 2**20)
    mfu: float = flag(0.18, "the part of a GPU's peak that training reaches, for that plan", 1e-3, 1)
    micro_batch: int = flag(16, "rows that a GPU runs at a time", 1)
    checkpoint_activations: bool = flag(False, "a third more time, for far less memory")
    offload: bool = flag(False, "keep weights, gradients and Adam's averages in the memory of a GPU's host")
    compile: bool = flag(False, "torch.compile the blocks")
    checkpoint_every: int = flag(100, "steps", 1)
    export_every: int = flag(1000, "steps between published models; the last one is always written", 1)
    export_dtype: str = flag(None, "of the published model (default: that of --init-from, or fp32)", choices=DTYPES)
    eval_every: int = flag(200, "steps", 1)
    keep: int = flag(2, "checkpoints", 1)
    device: torch.device = flag("auto", "cpu, cuda ...; auto is cuda if there is one", type=device)
    recipe_fields: dict = field(default_factory=dict)       # those that the command line gives
    sizes: dict = field(default_factory=dict)               # of a fresh model, likewise

def parse(arguments: list[str]) -> tuple[Options, Recipe]:
    parser = argparse.ArgumentParser(description="Train a Falcon-Mamba.", allow_abbrev=False)

    def add(name: str, default, **more) -> None:
        parser.add_argument("--" + name.replace("_", "-"), default=default, **more)

    def chosen(cls: type) -> dict:
        return {f.name: given[f.name] for f in fields(cls) if f.name in given}

    for f in fields(Options)[:-2]:
        add(f.name, f.default, **f.metadata)
    for f in fields(Recipe)[:-1]:
        add(f.name, argparse.SUPPRESS, **f.metadata)
    for f in fields(MambaConfig):
        if f.type is bool:
            add(f.name, argparse.SUPPRESS, help="of a fresh model", action=argparse.BooleanOptionalAction)
        elif not f.name.endswith("_id"):                    # ids are the tokenizer's
            add(f.name, argparse.SUPPRESS, help="of a fresh model", type=number(f.type, 0, 2**60))
    given = vars(parser.parse_args(arguments))

    args = Options(**chosen(Options), recipe_fields=chosen(Recipe), sizes=chosen(MambaConfig))
    args.recipe = args.recipe or ("continue" if "init_from" in given else "tiny")
    recipe = RECIPES[args.recipe]
    stages = tuple(Stage(stage.start, args.context or stage.context, args.mixture or stage.mixture)
                   for stage in recipe.stages)
    total = given.get("total_tokens", recipe.total_tokens)
    recipe = scaled(replace(recipe, stages=stages), total, args.recipe_fields)
    if recipe.init_from and args.sizes:
        parser.error(f"--init-from brings its own sizes; leave out {', '.join(args.sizes)}")
    if args.offload and args.device.type == "cpu" and not args.plan:
        parser.error("--offload keeps in the host's memory what a GPU would, and --device is cpu")
    return args, recipe

def pick_tokenizer(args: Options, folder: Path | None, paths: list[Path]) -> Tokenizer:
    """The one that is named, or the model's, or a corpus's, or one token a byte."""
    corpora = [path for path in paths if (path / "tokens.bin").exists()]
    if args.tokenizer:
        return read_tokenizer(args.tokenizer)
    for home in [folder, *corpora]:
        if home:
            return read_tokenizer(home / "tokenizer.json")
    return byte_tokenizer()

def pick_recipe(args: Options, recipe: Recipe, sources: dict[str, Source]) -> Recipe:
    """The recipe with the mixture, and if need be the size, of the sources that there are."""
    if args.eval_only or (len(sources) == 1 and not args.mixture):
        mixture = " ".join(f"{name}:1" for name in sources)
        recipe = replace(recipe, stages=tuple(replace(stage, mixture=mixture) for stage in recipe.stages))
    wanted = {name for stage in recipe.stages for name in shares(stage.mixture)}
    if wanted != sources.keys():
        raise ValueError(f"--data names {', '.join(sorted(sources))}, the mixture {', '.join(sorted(wanted))}; "
                         "name the same with --data name=path and --mixture 'name:share ...'")
    if args.recipe == "continue":
        recipe = fitted(recipe, sources, args.recipe_fields, any_context=not args.context)
    for name, source in sources.items():
        shortest = min(len(source.held_out), len(source.training))
        if shortest <= recipe.longest:                      # a row's last target is one token more
            raise ValueError(f"{name} has {len(source.held_out)} held-out and {len(source.training)} training "
                             f"tokens, too few for --context {recipe.longest}; give it more text, or a smaller one")
    return recipe

def pick_config(args: Options, folder: Path | None, tokens: int, end: int) -> MambaConfig:
    """The sizes of the model to start from, or of a fresh one for so many tokens."""
    if folder:
        config = MambaConfig.from_json(folder / "config.json")
        if config.eos_token_id == 0:        # a default, which the pre-decay file has: no end of a text
            config.eos_token_id = end
    else:
        ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        tiny = TINY if args.recipe == "tiny" else {}
        config = MambaConfig(**{"vocab_size": tokens} | ids | tiny | args.sizes)
    if tokens > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model {config.vocab_size}; name the model's own "
                         "tokenizer.json with --tokenizer")
    return config

def check_folders(args: Options, paths: list[Path]) -> None:
    """ValueError if the results would become part of the data, or overwrite a model."""
    made = args.tokenize_to or args.out
    if any(made.resolve().is_relative_to(path.resolve()) for path in paths):
        raise ValueError(f"{made} lies in --data, whose files are read as text; name a folder outside")
    resumed = args.resume and checkpoints(args.out)
    if not args.tokenize_to and not resumed and (checkpoints(args.out) or (args.out / "config.json").exists()):
        raise ValueError(f"{args.out} already holds a model; --resume goes on with the run that made it, if its "
                         "checkpoints are there; another --out begins a new one")

def set_up(args: Options, recipe: Recipe) -> Trainer | None:
    """Read the data and the model, which must fit each other. None if the data were to be tokenized only."""
    paths = named_paths(args.data or [])
    every = sum(paths.values(), [])
    folder = None
    if recipe.init_from or args.recipe == "continue":
        folder = find(recipe.init_from)
    elif args.eval_only:
        folder = find(args.out)
    tokenizer = pick_tokenizer(args, folder, every)
    end = end_of_document(tokenizer, folder)
    if not args.eval_only:
        check_folders(args, every)
    if args.tokenize_to:
        tokenize_to(args.tokenize_to, every, tokenizer, end)
        return None
    sources = {name: read_source(group, tokenizer, end) for name, group in paths.items()}
    recipe = pick_recipe(args, recipe, sources)
    config = pick_config(args, folder, vocabulary(tokenizer), end)
    if not args.eval_only:
        from tests.plan import check_memory                 # here, because that file imports this one
        check_memory(args, recipe, config, world_size())
    torch.manual_seed(recipe.seed)
    whole = None
    dtype = None
    if rank() == 0:
        whole = Mamba.from_pretrained(folder) if folder else Mamba(config)
        dtype = DTYPES.get(args.export_dtype, whole.lm_head.weight.dtype)
    trainer = Trainer(args, recipe, build(args, config, end, whole), tokenizer, sources, dtype)
    if args.resume and not args.eval_only and checkpoints(args.out):
        trainer.resume(checkpoints(args.out)[-1])
    if rank() == 0 and not args.eval_only:
        prepare(args.out, trainer.step)
        write_tokenizer(args.out, tokenizer, end, None if args.tokenizer else folder)
    return trainer

def run(args: Options, recipe: Recipe) -> None:
    begin = time.perf_counter()
    trainer = set_up(args, recipe)
    if not trainer:
        return
    from tests.plan import count_steps
    recipe = trainer.recipe
    peak = recipe.lr * math.sqrt(recipe.batch_end / recipe.lr_batch)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters on {world_size()} x {args.device}, "
          f"scan: {scan.default_backend(args.device, 2)}\n{recipe}\n{trainer.model.config}\n"
          f"{recipe.total_tokens:,} tokens in {count_steps(recipe):,} steps of up to {recipe.batch_end} rows of "
          f"{recipe.longest}; for so many rows the learning rate's peak is {peak:.2e}")
    if args.eval_only:
        for name, (nats, bits) in trainer.held_out(recipe.longest).items():
            print(f"{name}: {nats:.4f} nats per token, perplexity {math.exp(nats):.3f}, {bits:.4f} bits per byte")
    elif train(trainer):
        print(f"{time.perf_counter() - begin:.0f} s; {args.out} now holds the model: python sample.py --model "
              f"{args.out}\nits losses as a picture: python tests/draw.py {args.out}")
    else:
        print(f"stopped and saved at step {trainer.step}; the same command with --resume goes on")

def start_processes(device: torch.device) -> None:
    """Join the other ranks, if torchrun started us. A GPU alone joins a group of one: FSDP brings bf16."""
    alone = "RANK" not in os.environ
    if device.type == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK", 0))          # torchrun counts from 0
        if gpu >= torch.cuda.device_count() or not dist.is_nccl_available():
            raise ValueError(f"GPUs need a PyTorch with NCCL, and each process one of the "
                             f"{torch.cuda.device_count()} here; lower --nproc-per-node, or try --device cpu")
        torch.cuda.set_device(gpu)
    elif alone:
        return
    group = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")                  # rank 0 speaks for all

def main() -> None:
    # FSDP warns of views of a state that we drop, dcp of running without processes. dcp also logs errors,
    # which become a sentence below.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view|torch.distributed is disabled")
    logging.getLogger().setLevel(logging.ERROR)
    try:
        args, recipe = parse(sys.argv[1:])
        if args.plan:
            from tests.plan import print_plan
            return print_plan(args, recipe)
        start_processes(args.device)
        run(args, recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except dcp.CheckpointException as error:
        why, _ = next(iter(error.failures.values()))
        sys.exit(f"train.py: a checkpoint in {args.out} could not be written or read: {str(why)!r:.300}")
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(f"train.py: out of memory ({str(error).splitlines()[0]}); try a smaller --micro-batch")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
