"""Train a Falcon-Mamba with Falcon-Mamba's own recipe, on a laptop or on many GPUs. The last file.

    python train.py                                 a small model of Python's standard library
    python sample.py --model out --prompt "def "    what it learned
    python train.py --resume                        after Ctrl-C or a power cut: go on
    python train.py --init-from tiiuae/falcon-mamba-7b-pre-decay --data mine/ --out tuned

From top to bottom: the recipe, the data, the loss, many GPUs, the trainer, the command line. The
recipe is that of the Falcon-Mamba report, arXiv 2410.05355, section 3. "Secondary" is what we read
only in summaries of it, "our choice" what was never published.

Learning rate, batch size, context length and the rows of each batch depend on the recipe, the data
and the tokens trained on so far, and on nothing else. So the loss curve is the same on one GPU or on
eight, and with or without an interruption. A row is a stretch of text that the model sees at once, a
step one update of the weights, a rank one of the processes that train together.

Sizes in the shape comments: b batch, l length, m d_model.
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # before torch: see README, "It is slow"
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
from torch.distributed.fsdp import (
    CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard)
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import scan
from mamba import KEEP_FP32, Mamba, MambaConfig, find, read_json, write_file
from sample import DTYPES, device, end_tokens, keep_memory, number, read_tokenizer, vocabulary

GT = 10**9      # a billion tokens, the report's unit

# The recipe

@dataclass(frozen=True)
class Stage:
    """A part of the run, from the token `start` to the next stage."""
    start: int
    context: int        # tokens per row
    mixture: str        # each source's share of the rows, as "web:9 code:1"

def flag(default, help, low=0, high=2**60):
    """A field that is also a flag on the command line."""
    kind = number(type(default), low, high)
    return field(default=default, metadata={"help": f"{help} (default {default})", "type": kind})

@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens. The defaults are our choice, for two CPU cores."""
    total_tokens: int = flag(1_000_000, "length of the run; the next three scale with it", 1)
    warmup_tokens: int = flag(30_000, "over these the learning rate rises from 0")
    ramp_tokens: int = flag(150_000, "over these the batch grows from its first size to its last")
    decay_tokens: int = flag(300_000, "over these, the last, the learning rate decays")
    batch_start: int = flag(2, "rows in the first batch", 1, 2**20)
    batch_end: int = flag(8, "rows in a batch after the ramp", 1, 2**20)
    lr: float = flag(4e-3, "peak learning rate, for a batch of --lr-batch rows")
    lr_batch: int = flag(8, "rows that --lr is for; with --lr given, --batch-end is", 1, 2**20)
    decay_factor: float = flag(256.0, "the decay divides the learning rate by this", 1)
    weight_decay: float = flag(0.1, "AdamW's, for matrices only")
    beta1: float = flag(0.9, "AdamW's", 0, 0.9999999)
    beta2: float = flag(0.95, "AdamW's", 0, 0.9999999)
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "of fresh weights and of the order of the rows")
    init_from: str | None = field(default=None, metadata={
        "help": "folder or hub id of a model to start from (default: fresh weights)"})
    stages: tuple[Stage, ...] = (Stage(0, 256, "text:1"),)

    def __post_init__(self):
        rise = max(self.warmup_tokens, self.ramp_tokens)        # both begin with the run
        if rise + self.decay_tokens > self.total_tokens:
            raise ValueError(f"--total-tokens {self.total_tokens} has no room for {rise} --warmup-tokens "
                             f"or --ramp-tokens and then {self.decay_tokens} --decay-tokens")
        for stage in self.stages:
            shares(stage.mixture)       # raises ValueError if it cannot be read
            if self.longest % stage.context != 0:
                raise ValueError(f"a context of {stage.context} tokens does not divide the longest, "
                                 f"{self.longest}")

    @property
    def longest(self) -> int:
        return max(stage.context for stage in self.stages)

def shares(mixture: str) -> dict[str, float]:
    """Each source's share: "web:9 code:1" -> {"web": 0.9, "code": 0.1}."""
    parts = re.findall(r"(\S+):(\d+\.?\d*|\.\d+)(?:\s+|$)", mixture)
    weights = {name: float(weight) for name, weight in parts}
    total = sum(weights.values())
    if total == 0 or len(weights) < len(mixture.split()):       # one is unreadable, or comes twice
        raise ValueError(f"--mixture {mixture!r:.200} must be like 'web:9 code:1', each source once")
    return {name: weight / total for name, weight in weights.items()}

def stage_at(recipe: Recipe, tokens: int) -> Stage:
    return [stage for stage in recipe.stages if stage.start <= tokens][-1]

def context_length(recipe: Recipe, tokens: int) -> int:
    """Tokens per row of the batch that starts after `tokens` tokens."""
    return stage_at(recipe, tokens).context

def batch_size(recipe: Recipe, tokens: int) -> int:
    growth = recipe.batch_end - recipe.batch_start
    return round(recipe.batch_start + growth * progress(tokens, recipe.ramp_tokens))

def progress(tokens: int, length: int) -> float:
    """How much of the first `length` tokens is done, from 0 to 1."""
    return min(tokens / length, 1.0) if length > 0 else 1.0

def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Warmup, stable, decay. The rate grows with sqrt(batch), which the report calls BatchScaling.

    Adam divides by the gradient's own size, so the rate alone sets the length of its step. The
    step's noise falls with sqrt(batch). So rate / sqrt(batch), the report's "noise temperature",
    stays constant while the batch grows.
    """
    rate = recipe.lr * math.sqrt(batch_size(recipe, tokens) / recipe.lr_batch)
    rate *= progress(tokens, recipe.warmup_tokens)
    decaying = tokens - (recipe.total_tokens - recipe.decay_tokens)
    if decaying > 0 and recipe.decay_tokens > 0:
        rate *= recipe.decay_factor ** -progress(decaying, recipe.decay_tokens)
    return rate

def scaled(recipe: Recipe, given: dict) -> Recipe:
    """The recipe with the values `given`. Other lengths keep their share of total_tokens."""
    total = given.get("total_tokens", recipe.total_tokens)
    lengths = {}
    for name in "warmup_tokens", "ramp_tokens", "decay_tokens":
        lengths[name] = getattr(recipe, name) * total // recipe.total_tokens
    stages = tuple(replace(stage, start=stage.start * total // recipe.total_tokens)
                   for stage in recipe.stages)
    recipe = replace(recipe, stages=stages, **lengths | given)
    if "lr" in given and "lr_batch" not in given:
        recipe = replace(recipe, lr_batch=recipe.batch_end)     # --lr is then the peak of this run
    return recipe

FALCON = Recipe(
    total_tokens=5500 * GT,             # model card; the report's abstract says 5.8 trillion
    warmup_tokens=1 * GT,               # secondary
    ramp_tokens=50 * GT,                # report; that the batch grows linearly is secondary
    batch_start=128, batch_end=2048,    # report
    lr=6.4e-4, lr_batch=2048,           # report and model card
    decay_tokens=500 * GT,              # report: exponential decay ...
    decay_factor=256.0,                 # ... to lr / 256 = 2.5e-6
    weight_decay=0.1,                   # model card
    beta1=0.9, beta2=0.95,              # secondary
    clip=1.0,                           # our choice
    # Report: the context grows from 2048 to 8192, and technical text, code and mathematics follow
    # the web's. Secondary: four stages at a constant rate, then the decay, which adds FineWeb-Edu,
    # synthetic text and instructions. Our choice: where a stage starts, all shares, and 4096.
    stages=(Stage(0, 2048, "refinedweb:90 technical:4 code:4 math:2"),
            Stage(2000 * GT, 4096, "refinedweb:82 technical:7 code:7 math:4"),
            Stage(3500 * GT, 8192, "refinedweb:78 technical:9 code:8 math:5"),
            Stage(4500 * GT, 8192, "refinedweb:70 technical:11 code:12 math:7"),
            Stage(5000 * GT, 8192, "refinedweb:45 finewebedu:25 technical:10 code:12 math:8")))
# The pre-decay checkpoint is the model before that decay. Its optimizer's state was not published,
# so the rate must warm up again: over 2 GT, our choice.
CONTINUE = replace(FALCON, init_from="tiiuae/falcon-mamba-7b-pre-decay", total_tokens=502 * GT,
                   warmup_tokens=2 * GT, ramp_tokens=0,
                   stages=(replace(FALCON.stages[-1], start=0),))
RECIPES = {"tiny": Recipe(), "falcon-mamba-7b": FALCON, "continue": CONTINUE}
# Sizes of a fresh small model, our choice. The published 0.1 of fresh weights suits the 7B's width.
TINY = {"d_model": 128, "n_layer": 4, "initializer_range": 0.02}

# The data. A source is text, in files or folders, or a corpus: a folder of tokens.bin and the
# tokenizer.json that made it.

def byte_tokenizer() -> Tokenizer:
    """One token a byte, which ByteLevel writes as a visible character; 256 ends a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer

def end_of_document(tokenizer: Tokenizer, model: Path | None) -> int:
    """The token that closes a document, by its usual names, or else the first that ends a text."""
    for name in "<|endoftext|>", "<|end_of_text|>", "</s>":
        if tokenizer.token_to_id(name) is not None:
            return tokenizer.token_to_id(name)
    ends = end_tokens(model, tokenizer) if model else []
    if not ends:
        raise ValueError("the tokenizer has no token <|endoftext|>, which must close a document")
    return ends[0]

def standard_library() -> list[Path]:
    """The sources of Python's standard library: text that every reader of this file has."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "test", "tests", "encodings", "pydoc_data"}      # the last two: tables
    files = sorted(root.rglob("*.py"))
    return [file for file in files if not others & {*file.relative_to(root).parts}]

def named_paths(texts: list[str]) -> dict[str, list[Path]]:
    """Source -> its paths. Each text is name=path, or a path of the source "text"."""
    paths = {}
    for text in texts:
        if "=" not in text or os.path.exists(text):
            text = "text=" + text
        name, _, path = text.partition("=")
        if not os.path.exists(path):
            raise ValueError(f"there is no {path!r}; --data takes a path, or name=path")
        paths.setdefault(name, []).append(Path(path))
    return paths or {"text": standard_library()}

def text_files(paths: list[Path]) -> list[Path]:
    """These files, and all in these folders that are not hidden, always in one shuffled order."""
    files = []
    for path in paths:
        for file in [path, *sorted(path.rglob("*"))]:
            if file.name == "tokens.bin" or path.suffix == ".bin":
                raise ValueError(f"{file} holds tokens, not text; name the folder that --tokenize-to "
                                 "wrote, as a source of its own")
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                files.append(file)
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]

def tokenized(files: list[Path], tokenizer: Tokenizer, end: int) -> Iterator[np.ndarray]:
    """The tokens of these files, piece by piece, with `end` after each file."""
    tokenizer.encode_special_tokens = True      # a text that spells <|endoftext|> does not end there
    dtype = token_dtype(tokenizer)
    quiet = rank() > 0 or None                  # None: a bar if this is a terminal
    for path in tqdm(files, desc="reading", unit="file", delay=2, disable=quiet):
        count = 0
        try:
            with path.open(encoding="utf-8", newline="") as file:       # newline="" keeps "\r\n"
                # Lines may be endless, so pieces are not lines. They end with one where they can.
                while piece := file.read(2**18) + file.readline(2**12):
                    # Only batches have a variant without offsets, which is faster.
                    [encoding] = tokenizer.encode_batch_fast([piece], add_special_tokens=False)
                    yield np.array(encoding.ids, dtype)
                    count += len(encoding.ids)
        except UnicodeDecodeError:
            print(f"skipping {path} from where it is not UTF-8 text", file=sys.stderr)
        if count > 0:
            yield np.array([end], dtype)

def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary(tokenizer) <= 2**16 else np.uint32)

def tokenize_to(folder: Path, files: list[Path], tokenizer: Tokenizer, end: int) -> None:
    """Write a corpus, whose tokens training maps into memory."""
    if folder.exists():
        raise ValueError(f"--tokenize-to {folder} exists already; remove it, or name another folder")
    unfinished = folder.with_name(folder.name + ".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    count = 0
    with (unfinished / "tokens.bin").open("wb") as file:
        for part in tokenized(files, tokenizer, end):
            file.write(part.tobytes())
            count += len(part)
    unfinished.rename(folder)
    print(f"{folder}: {count:,} tokens")

def read_corpus(folder: Path, tokenizer: Tokenizer, end: int) -> np.ndarray:
    """Map a corpus into memory. ValueError if another tokenizer than the model's made it."""
    if read_tokenizer(folder / "tokenizer.json").get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{folder} is of another tokenizer; make it again with the model's --tokenizer")
    file = folder / "tokens.bin"
    dtype = token_dtype(tokenizer)
    size = file.stat().st_size
    count = size // dtype.itemsize
    tokens = np.memmap(file, dtype, "r", shape=count) if count > 0 else np.zeros(0, dtype)
    # A whole corpus ends with one `end`. A file that was cut, or of wider numbers, hardly ever does.
    is_end = (tokens[-2:] == end).tolist()
    if tokens.nbytes != size or is_end != [False, True]:
        raise ValueError(f"{file} does not end like {dtype} tokens with one {end}; make it again")
    return tokens

@dataclass
class Source:
    """The tokens of a source, in memory or mapped from a file."""
    held_out: np.ndarray
    training: np.ndarray

    def row(self, position: int, context: int, longest: int, seed: int) -> np.ndarray:
        """The `context` + 1 tokens that come after `position` tokens of a walk over the text.

        The text is cut into pieces of the longest context. Each stride passes 0.618 of all pieces,
        round and round, so that neighbours in time lie far apart. The stride and the number of
        pieces have no common factor, so all pieces are read before any is read again.
        """
        pieces = (len(self.training) - 1) // longest        # a row's last target is one token more
        stride = max(1, round(0.618 * pieces))
        while math.gcd(stride, pieces) > 1:
            stride += 1
        first = int(np.random.default_rng(seed).integers(pieces))
        visited, inside = divmod(position, longest)
        piece = (first + visited * stride) % pieces
        start = piece * longest + inside
        return self.training[start:start + context + 1]

def read_source(paths: list[Path], tokenizer: Tokenizer, end: int) -> Source:
    """Read a source's text, or map its corpus. The beginning is held out for evaluation."""
    if len(paths) == 1 and (paths[0] / "tokens.bin").exists():
        tokens = read_corpus(paths[0], tokenizer, end)
    else:
        parts = [*tokenized(text_files(paths), tokenizer, end)]
        tokens = np.concatenate(parts or [np.zeros(0, int)])
    # A twentieth, at most a million tokens, and the rest of its last document if that is near. It
    # depends on the tokens alone, so that no run trains on what another evaluates.
    cut = min(len(tokens) // 20, 2**20)
    ends = np.flatnonzero(tokens[cut:2 * cut] == end)
    if len(ends) > 0:
        cut += int(ends[0]) + 1
    return Source(held_out=tokens[:cut], training=tokens[cut:])

def choose_rows(recipe: Recipe, sources: dict[str, Source], tokens: int,
                positions: dict[str, int]) -> list[np.ndarray]:
    """The rows of a batch. Moves `positions` on: how far each source has been read, in tokens."""
    stage = stage_at(recipe, tokens)
    share = shares(stage.mixture)
    generator = np.random.default_rng((recipe.seed, tokens))
    rows = []
    for name in generator.choice([*share], batch_size(recipe, tokens), p=[*share.values()]):
        # Rounded up to whole rows, because a new stage may have longer ones. All lengths divide the
        # longest, so no row leaves its piece.
        position = math.ceil(positions[name] / stage.context) * stage.context
        rows.append(sources[name].row(position, stage.context, recipe.longest, recipe.seed))
        positions[name] = position + stage.context
    return rows

# The loss

# Activation checkpointing: only a function's arguments are kept. The backward pass runs it again.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

class Objective(nn.Module):
    """The model with its loss. One module, because FSDP gathers weights when a module is called."""

    def __init__(self, model: Mamba, end: int):
        super().__init__()
        self.model = model
        self.end = end

    def forward(self, rows: Tensor) -> Tensor:
        """The sum of -log p over the last l tokens of each row, (b, l + 1), in nats.

        Padding is -100, which cross_entropy leaves out, and which the model reads as token 0. Logits
        are made for 1024 tokens at a time, and again for the backward: a row of the 7B has 2 GB.
        """
        tokens = rows[:, :-1].clamp(min=0)                              # (b, l)
        targets = rows[:, 1:]                                           # (b, l)
        # A row may begin inside a document. All rows begin with a blank state.
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
    """FSDP2: each rank keeps its part of every tensor, in fp32, and gathers what it is about to run.

    The objective gathers embeddings, norm_f and lm_head, all in `dtype`, and so does a block all
    that is its own but KEEP_FP32. The backbone gathers that of all blocks, in fp32.
    """
    options = {"mesh": dist.init_device_mesh(device, (world_size(),)),
               "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    # No cast of what a block is given: the residual stream stays fp32.
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    backbone = objective.model.backbone

    def exact() -> set[nn.Parameter]:       # sharding makes new parameters, so they are asked for anew
        return {p for name, p in backbone.layers.named_parameters() if name.endswith(KEEP_FP32)}

    # The outside first, because fully_shard skips a sharded module, and what that ignored would stay
    # whole. None inside a block, because its hooks would cut the compiled block.
    fully_shard(objective, mp_policy=policy, ignored_params={*backbone.layers.parameters()}, **options)
    fully_shard(backbone, ignored_params={*backbone.parameters()} - exact(), **options)
    for block in backbone.layers:
        fully_shard(block, mp_policy=policy, ignored_params=exact(), **options)

def build(args: argparse.Namespace, config: MambaConfig, end: int, whole: Mamba | None) -> Objective:
    """The objective on this rank's device, with the weights of `whole`, which only rank 0 has.

    With several ranks, only rank 0's host ever holds all of it: weights travel one by one.
    """
    model = whole
    if dist.is_initialized():
        with torch.device("meta"):                                  # shapes without memory
            model = Mamba(config)
    objective = Objective(model, end)
    if args.compile:
        # The CPU's loop over time would be unrolled, for minutes and no gain.
        scan.BACKENDS["chunked"] = torch.compiler.disable(scan.Chunked.apply)
    for block in model.backbone.layers:
        if args.compile:
            # Weights are arguments of compiled code, and dynamic=True leaves b and l open. So one
            # code serves all layers and contexts. Compile first, checkpoint then: the compiler does
            # not enter checkpoint().
            block.forward = torch.compile(block.forward, dynamic=True)
        if args.checkpoint_activations:
            block.forward = partial(recomputed, block.forward)
    if not dist.is_initialized():
        # A model is evaluated in its own dtype, and trained with all weights in fp32.
        return objective.to(args.device, None if args.eval_only else torch.float32)
    products = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    shard(objective, args.device.type, products, args.offload)
    objective.to_empty(device="cpu" if args.offload else args.device)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if whole else {}, options=from_rank_0)
    return objective

# The trainer

def optimizer(model: Mamba, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW. Only matrices decay: A_log, D, convolution, biases and norms need not be near 0."""
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=True)

@dataclass
class Trainer:
    """A model, its optimizer and its data, and how far training has come."""
    args: argparse.Namespace
    recipe: Recipe
    objective: Objective
    tokenizer: Tokenizer
    sources: dict[str, Source]
    step: int = 0
    tokens: int = 0

    def __post_init__(self):
        self.model = self.objective.model
        self.adam = optimizer(self.model, self.recipe)
        self.positions = dict.fromkeys(self.sources, 0)     # how far each source has been read

    def passes(self, rows: list[np.ndarray]) -> tuple[Tensor, ...]:
        """This rank's share of the rows, about --micro-tokens at a time: tensors (b, l + 1)."""
        # All ranks make the same number of passes. A missing row is one of -100.
        missing = [np.full(len(rows[0]), -100)] * (-len(rows) % world_size())
        mine = np.array([*rows, *missing][rank()::world_size()], np.int64)
        size = self.model.config.vocab_size
        if mine.max() >= size:
            raise ValueError(f"the data has token {mine.max()}, but the model knows only {size} tokens")
        at_once = max(1, self.args.micro_tokens // (len(rows[0]) - 1))
        return torch.from_numpy(mine).to(self.args.device).split(at_once)

    def update(self) -> dict:
        """Train on one batch. Returns the step's figures, which are over all ranks."""
        begin = time.perf_counter()
        context = context_length(self.recipe, self.tokens)
        rows = choose_rows(self.recipe, self.sources, self.tokens, self.positions)
        count = len(rows) * context
        nats = 0.0
        passes = self.passes(rows)
        for part in passes:
            if dist.is_initialized():   # gradients add up on each rank, and travel after the last
                self.objective.set_requires_gradient_sync(part is passes[-1])
            loss = self.objective(part)
            (loss * world_size() / count).backward()        # FSDP takes the mean over ranks
            nats += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        norm = (norm.full_tensor() if dist.is_initialized() else norm).item()
        loss = over_ranks(nats.item()) / count
        self.step += 1
        self.tokens += count
        if not math.isfinite(loss + norm):
            raise ValueError(f"the loss, {loss}, or its gradient's norm, {norm}, is not finite at step "
                             f"{self.step}; begin again with a lower --lr")
        # The rate of the step's end, because at the start of the first one it is 0.
        rate = learning_rate(self.recipe, self.tokens)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": rate,
                "batch_size": len(rows), "context": context, "grad_norm": norm,
                "tokens_per_s": count / (time.perf_counter() - begin)}

    @torch.no_grad()
    def held_out(self, context: int) -> dict[str, tuple[float, float]]:
        """Source -> its loss in nats a token and in bits a byte, on up to 128 held-out rows."""
        losses = {}
        for name, source in self.sources.items():
            starts = range(0, len(source.held_out) - context, context)
            starts = starts[::math.ceil(len(starts) / 128)]         # spread evenly
            rows = [source.held_out[start:start + context + 1] for start in starts]
            nats = over_ranks(sum(self.objective(part).item() for part in self.passes(rows)))
            per_token = nats / (len(rows) * context)
            if not per_token < 700:                 # e^710, as a perplexity, overflows
                raise ValueError(f"the held-out loss on {name} is {per_token}: the weights are damaged, "
                                 "or --lr was too high")
            # A row's ends may cut a character. What is left, about a byte, is shown as U+FFFD.
            texts = self.tokenizer.decode_batch([row[1:].tolist() for row in rows])
            size = sum(len(text.replace("\ufffd", "?").encode()) for text in texts)
            losses[name] = per_token, nats / math.log(2) / max(size, 1)
        return losses

    def settings(self) -> dict:
        """What a checkpoint and the run that goes on from it must agree on."""
        lengths = {name: len(source.training) for name, source in self.sources.items()}
        everything = asdict(self.recipe) | asdict(self.model.config) | {"data": lengths}
        return json.loads(json.dumps(everything))       # as a file gives it: tuples become lists

    def state(self) -> dict[str, Tensor]:
        """All tensors that steps change: the weights, a tied one once, and Adam's averages."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        weights, adam = get_state_dict(self.model, self.adam, options=flat)
        tensors = {name: value for name, value in adam.items() if isinstance(value, Tensor)}
        return tensors | {name: weights[name] for name, _ in self.model.named_parameters()}

    def save(self) -> None:
        """Write a checkpoint, to which every rank adds its part.

        It holds weights, Adam's averages, the settings, and how far the data has been read. There is
        no random state, because each generator is seeded by the tokens seen. All is in safetensors:
        PyTorch's default is a pickle, and reading a pickle can run any code. The folder gets its
        name once all is written, so half a checkpoint never has one.
        """
        folder = self.args.out / "checkpoints" / f"step-{self.step:09}"
        unfinished = folder.with_suffix(".partial")
        writer = dcp.HuggingFaceStorageWriter(unfinished, save_distributed=True)
        dcp.save(self.state(), storage_writer=writer)       # ends when all ranks have written
        if rank() == 0:
            run = self.settings() | {"tokens": self.tokens, "positions": self.positions}
            write_file(unfinished / "run.json", json.dumps(run, indent=1).encode())
            unfinished.rename(folder)
            for old in checkpoints(self.args.out)[:-self.args.keep]:
                gone = old.rename(old.with_suffix(".partial"))      # half of it is no checkpoint
                shutil.rmtree(gone)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. ValueError if it is of another recipe, model or corpus."""
        run = read_json(folder / "run.json")
        for name, now in self.settings().items():
            if run.get(name) != now:
                raise ValueError(f"{folder}/run.json has {name} {run.get(name)!r:.80}, this command "
                                 f"{now!r:.80}; repeat the first command, or name another --out")
        dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder))     # in place
        self.step = int(folder.name.removeprefix("step-"))
        self.tokens = run["tokens"]
        self.positions = run["positions"]

    def export(self) -> None:
        """Write the model as it is published: gathered on rank 0, into one file."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(self.model, options=options)    # all give, rank 0 gets
        if rank() == 0:
            weights = {}
            for name, _ in self.model.named_parameters():               # a tied tensor once
                weights[name] = gathered.pop(name).to(self.args.export_dtype, copy=True)
            self.model.save_pretrained(self.args.out, weights)

def checkpoints(out: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted((out / "checkpoints").glob("step-*[0-9]"))

def prepare(out: Path, steps: int) -> None:
    """Make the folder of a run, without what a killed run did beyond these steps."""
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    for unfinished in (out / "checkpoints").glob("*.partial"):
        shutil.rmtree(unfinished)
    metrics = out / "metrics.jsonl"
    metrics.touch()
    rows = metrics.read_bytes().split(b"\n")[:-1]       # the last is half a row, or nothing
    write_file(metrics, b"".join(row + b"\n" for row in rows[:steps]))

def write_tokenizer(out: Path, tokenizer: Tokenizer, end: int, source: Path | None) -> None:
    """The files by which others make our tokens and end a text where we do, or those of `source`."""
    word = tokenizer.id_to_token(end)
    config = {"tokenizer_class": "PreTrainedTokenizerFast",         # that is tokenizer.json, unchanged
              "bos_token": word, "eos_token": word, "pad_token": word,
              "padding_side": "left",                   # because new tokens come on the right
              "model_input_names": ["input_ids", "attention_mask"]}
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    files = {"tokenizer.json": tokenizer.to_str().encode(),
             "tokenizer_config.json": json.dumps(config, indent=1).encode()}
    if source:
        for name in [*files, "special_tokens_map.json", "chat_template.jinja"]:
            if (source / name).exists():
                files[name] = (source / name).read_bytes()
        if (source / "generation_config.json").exists():
            generation = read_json(source / "generation_config.json")
        generation["eos_token_id"] = end_tokens(source, tokenizer)
    files["generation_config.json"] = json.dumps(generation, indent=1).encode()
    for name, content in files.items():
        write_file(out / name, content)

def train(trainer: Trainer) -> bool:
    """Train to the recipe's end, or until Ctrl-C or SIGTERM. Returns whether it is the end."""
    from tests.plan import count_steps
    args = trainer.args
    recipe = trainer.recipe
    total = recipe.total_tokens
    peak = learning_rate(recipe, total - recipe.decay_tokens)
    print(f"{recipe}\n{total:,} tokens in {count_steps(recipe):,} steps of up to {recipe.batch_end} rows "
          f"of {recipe.longest}; for so many rows the learning rate's peak is {peak:.2e}")
    keep_memory()
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # a second Ctrl-C does not wait for the save

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    begin = time.perf_counter()
    saved = begin
    before = trainer.tokens
    stopped = False
    while trainer.tokens < total and not stopped:
        figures = trainer.update()
        ended = trainer.tokens >= total
        if ended or trainer.step % args.eval_every == 0:
            figures["held_out"] = trainer.held_out(figures["context"])
        pace = (time.perf_counter() - begin) / (trainer.tokens - before)
        print_step(trainer, figures, pace * max(total - trainer.tokens, 0) / 60)
        if rank() == 0:
            with (args.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(figures) + "\n")
        # Ranks must agree, but a signal may reach one only, and their clocks differ.
        stopped = over_ranks(len(signals)) > 0
        late = over_ranks(time.perf_counter() - saved > 60 * args.checkpoint_minutes) > 0
        if ended or stopped or late or trainer.step % args.checkpoint_every == 0:
            trainer.save()
            saved = time.perf_counter()
        if trainer.step % args.export_every == 0:
            trainer.export()
    trainer.export()
    return trainer.tokens >= total

def print_step(trainer: Trainer, figures: dict, minutes: float) -> None:
    line = ("step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | batch {batch_size} "
            "| {tokens_per_s:.0f} tok/s | {minutes:.1f} min left").format(minutes=minutes, **figures)
    if trainer.args.device.type == "cuda":
        from tests.plan import utilization
        used = utilization(figures["tokens_per_s"] / world_size(), trainer.model.config)
        line += f" | {used:.0%} MFU"                    # nan for a GPU that tests/plan.py lacks
    for name, (nats, _) in figures.get("held_out", {}).items():
        line += f" | held-out {name} {nats:.4f}"
    print(line, flush=True)

# The command line

def parse(arguments: list[str]) -> tuple[argparse.Namespace, Recipe]:
    parser = argparse.ArgumentParser(description="Train a Falcon-Mamba.", allow_abbrev=False)
    add = parser.add_argument
    count = number(int, 1, 2**60)
    yes_no = argparse.BooleanOptionalAction
    add("--recipe", choices=RECIPES, help="all defaults: tiny, or continue if --init-from is given")
    add("--data", action="append", default=[], metavar="NAME=PATH", help="a source: text file, folder of "
        "them, or corpus; repeat for more (default: Python's standard library)")
    add("--mixture", help="the sources' shares, as 'web:9 code:1'")
    add("--context", type=number(int, 1, 2**20), help="tokens per row")
    add("--out", type=Path, default="out", help="folder for all results (default out)")
    add("--tokenizer", type=Path, help="tokenizer.json; else the model's, a corpus's, or of bytes")
    add("--tokenize-to", type=Path, help="only write --data to this folder, as a corpus")
    add("--resume", action=yes_no, help="go on from the last checkpoint in --out, if it has one")
    add("--eval-only", action=yes_no, help="only print the held-out loss of --init-from, or --out")
    add("--plan", action=yes_no, help="only print the run's steps, rates, days and memory")
    add("--world-size", type=count, default=1, help="GPUs, for that plan (default 1)")
    add("--mfu", type=number(float, 1e-3, 1), default=0.33, help="part of a GPU's peak, for --plan (default 0.33)")
    add("--micro-tokens", type=count, default=16384, help="tokens that a GPU runs at once (default 16384)")
    add("--checkpoint-activations", action=yes_no, help="recompute them: less memory, 4/3 of the time")
    add("--offload", action=yes_no, help="keep weights, gradients and Adam's state in the host's memory")
    add("--compile", action=yes_no, help="torch.compile the blocks (default on CUDA)")
    add("--checkpoint-every", type=count, default=100, help="steps (default 100)")
    add("--checkpoint-minutes", type=number(float, 0, 2**20), default=30,
        help="between checkpoints, at most (default 30)")
    add("--export-every", type=count, default=1000, help="steps between published models (default 1000)")
    add("--export-dtype", choices=DTYPES, default="auto", help="auto: that of --init-from, or fp32")
    add("--eval-every", type=count, default=200, help="steps (default 200)")
    add("--keep", type=count, default=2, help="checkpoints (default 2)")
    add("--device", type=device, default="auto", help="cpu, cuda ...; auto is cuda if there is one")
    for f in fields(Recipe)[:-1]:                       # the last, stages, has no flag
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **f.metadata)
    sizes = [f for f in fields(MambaConfig) if not f.name.endswith("_id")]      # ids: the tokenizer's
    for f in sizes:
        kind = {"action": yes_no} if f.type is bool else {"type": number(f.type, 0, 2**60)}
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help="of a fresh model", **kind)
    args = parser.parse_args(arguments)

    args.given = {f.name: getattr(args, f.name) for f in fields(Recipe) if hasattr(args, f.name)}
    args.sizes = {f.name: getattr(args, f.name) for f in sizes if hasattr(args, f.name)}
    args.recipe = args.recipe or ("continue" if "init_from" in args.given else "tiny")
    recipe = RECIPES[args.recipe]
    stages = tuple(Stage(stage.start, args.context or stage.context, args.mixture or stage.mixture)
                   for stage in recipe.stages)
    recipe = scaled(replace(recipe, stages=stages), args.given)
    if args.eval_only and recipe.init_from is None:
        recipe = replace(recipe, init_from=str(args.out))
    if recipe.init_from is not None and args.sizes:
        parser.error(f"--init-from brings its own sizes; leave out {', '.join(args.sizes)}")
    if args.compile is None:
        args.compile = args.device.type == "cuda"
    if args.offload and args.device.type == "cpu" and not args.plan:
        parser.error("--offload keeps in the host's memory what a GPU would, and --device is cpu")
    return args, recipe

def pick_tokenizer(args: argparse.Namespace, folder: Path | None, paths: list[Path]) -> Tokenizer:
    """The one that is named, or the model's, or a corpus's, or one token a byte."""
    corpora = [path for path in paths if (path / "tokens.bin").exists()]
    if args.tokenizer:
        return read_tokenizer(args.tokenizer)
    if folder or corpora:
        return read_tokenizer((folder or corpora[0]) / "tokenizer.json")
    return byte_tokenizer()

def pick_recipe(args: argparse.Namespace, recipe: Recipe, sources: dict[str, Source]) -> Recipe:
    """The recipe for these sources. ValueError if they are not its own, or too small for it."""
    if not args.mixture and (args.eval_only or len(sources) == 1):
        mixture = " ".join(f"{name}:1" for name in sources)
        stages = tuple(replace(stage, mixture=mixture) for stage in recipe.stages)
        recipe = replace(recipe, stages=stages)
    wanted = {name for stage in recipe.stages for name in shares(stage.mixture)}
    if wanted != sources.keys():
        raise ValueError(f"--data names {', '.join(sorted(sources))}, the mixture "
                         f"{', '.join(sorted(wanted))}; give --data name=path and --mixture 'name:share'")
    if args.recipe == "continue":
        recipe = fitted(args, recipe, sources)
    for name, source in sources.items():
        held_out = len(source.held_out)
        training = len(source.training)
        if min(held_out, training) <= recipe.longest:       # a row's last target is one token more
            raise ValueError(f"{name} has {held_out} held-out and {training} training tokens, too few "
                             f"for --context {recipe.longest}; give it more text, or a smaller one")
    return recipe

def fitted(args: argparse.Namespace, recipe: Recipe, sources: dict[str, Source]) -> Recipe:
    """One epoch, in at least 200 steps, with eight held-out rows, where no flag says otherwise.

    An epoch ends where the first source has been read once. A short text gets shorter rows, of 64
    tokens at least. All these numbers are our choice.
    """
    stage = recipe.stages[0]
    share = shares(stage.mixture)
    epoch = int(min(len(sources[name].training) / share[name] for name in share if share[name] > 0))
    held_out = min(len(source.held_out) for source in sources.values())
    fits = max(64, min(epoch // 200, (held_out - 1) // 8))
    while not args.context and stage.context > fits:
        stage = replace(stage, context=stage.context // 2)
    given = {"total_tokens": epoch} | args.given
    rows = min(max(1, given["total_tokens"] // (200 * stage.context)), recipe.batch_end)
    return scaled(replace(recipe, stages=(stage,)), {"batch_end": rows} | given)

def pick_config(args: argparse.Namespace, folder: Path | None, tokens: int, end: int) -> MambaConfig:
    """The sizes of the model to start from, or of a fresh one for so many tokens."""
    if folder:
        config = MambaConfig.from_json(folder / "config.json")
        if config.eos_token_id == 0:        # a default, which the pre-decay file has: it ends no text
            config.eos_token_id = end
    else:
        own = {"vocab_size": tokens, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
        tiny = TINY if args.recipe == "tiny" else {}
        config = MambaConfig(**own | tiny | args.sizes)
    if tokens > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model {config.vocab_size}; name the "
                         "model's own tokenizer.json with --tokenizer")
    return config

def set_up(args: argparse.Namespace, recipe: Recipe, folder: Path | None,
           paths: dict[str, list[Path]], tokenizer: Tokenizer, end: int) -> Trainer:
    """Read the data and the model, which must fit each other."""
    from tests.plan import check_memory     # here: it imports this file
    sources = {name: read_source(group, tokenizer, end) for name, group in paths.items()}
    recipe = pick_recipe(args, recipe, sources)
    config = pick_config(args, folder, vocabulary(tokenizer), end)
    if not args.eval_only:
        check_memory(args, recipe, config, world_size())
    torch.manual_seed(recipe.seed)
    whole = None
    if rank() == 0:
        whole = Mamba.from_pretrained(folder) if folder else Mamba(config)
        whole.config = config       # its eos_token_id may be mended
        args.export_dtype = DTYPES[args.export_dtype] or whole.lm_head.weight.dtype
    objective = build(args, config, end, whole)
    size = sum(p.numel() for p in objective.parameters())
    print(f"{size:,} parameters on {world_size()} x {args.device}, "
          f"scan: {scan.default_backend(args.device, 2)}\n{config}")
    return Trainer(args, recipe, objective, tokenizer, sources)

def run(args: argparse.Namespace, recipe: Recipe) -> None:
    """Evaluate a model, write a corpus, or train."""
    begin = time.perf_counter()
    paths = named_paths(args.data)
    every = sum(paths.values(), [])
    folder = None if recipe.init_from is None else find(recipe.init_from)
    tokenizer = pick_tokenizer(args, folder, every)
    end = end_of_document(tokenizer, folder)
    if args.eval_only:
        trainer = set_up(args, recipe, folder, paths, tokenizer, end)
        for name, (nats, bits) in trainer.held_out(trainer.recipe.longest).items():
            print(f"{name}: {nats:.4f} nats per token, perplexity {math.exp(nats):.3f}, "
                  f"{bits:.4f} bits per byte")
        return
    made = args.tokenize_to or args.out
    if any(made.resolve().is_relative_to(path.resolve()) for path in every):
        raise ValueError(f"{made} lies in --data, whose files are read as text; name another folder")
    if args.tokenize_to:
        return tokenize_to(made, text_files(every), tokenizer, end)
    done = checkpoints(made)
    resumes = args.resume and done
    if not resumes and (done or (made / "config.json").exists()):
        raise ValueError(f"{made} already holds a model; --resume goes on if its checkpoints are there, "
                         "another --out begins a new one")
    trainer = set_up(args, recipe, folder, paths, tokenizer, end)
    if resumes:
        trainer.resume(done[-1])
    if rank() == 0:
        prepare(made, trainer.step)
        write_tokenizer(made, tokenizer, end, None if args.tokenizer else folder)
    if train(trainer):
        print(f"{time.perf_counter() - begin:.0f} s; {made} now holds the model: python sample.py "
              f"--model {made}\nits losses as a picture: python tests/draw.py {made}")
    else:
        print(f"stopped and saved at step {trainer.step}; the same command with --resume goes on")

def start_processes(device: torch.device) -> None:
    """Join the other ranks, if torchrun started us. A GPU alone makes a group too, for FSDP's bf16."""
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        gpu = int(os.environ.get("LOCAL_RANK", 0))          # torchrun counts from 0
        gpus = torch.cuda.device_count()
        if gpu >= gpus or not dist.is_nccl_available():
            raise ValueError(f"GPUs need NCCL, and each process one of the {gpus} here; lower "
                             "--nproc-per-node, or try --device cpu")
        torch.cuda.set_device(gpu)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    elif device.type == "cuda":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")              # rank 0 speaks for all

def main() -> None:
    # Two needless warnings: on views of a state that we drop, and on there being one rank.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module|torch.distributed is disabled")
    logging.getLogger().setLevel(logging.ERROR)         # dcp logs what becomes a sentence below
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
        why = str([*error.failures.values()][0][0])
        sys.exit(f"train.py: a checkpoint in {args.out} could not be written or read: {why!r:.300}")
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        sys.exit(f"train.py: {str(error).splitlines()[0]}; try fewer --micro-tokens")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
