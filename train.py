"""Train a Falcon-Mamba with Falcon-Mamba's own recipe, on a laptop or on 256 GPUs. After mamba.py and sample.py; the last file.

    python train.py                                     a byte-level model of Python's standard library, into out/
    python sample.py --model out --prompt "def "        and what it learned
    python train.py --resume                            after Ctrl-C, a crash or a power cut: on from the last checkpoint
    python train.py --data code=src/:0.7 --data prose=books/:0.3 --out mine --d-model 256 --total-tokens 2e7
    python train.py --data web/ --tokenizer T --tokenize-to web.bin       once, for a corpus larger than memory
    python train.py --recipe falcon-mamba-7b --plan --world-size 256      the whole run on paper: days, GB, rates
    torchrun --nproc-per-node 8 train.py --recipe continue --data finewebedu=edu.bin --data code=code.bin ...
    python train.py --eval-only --init-from tiiuae/falcon-mamba-7b --data my=texts/:1

The recipe (report, arXiv 2410.05355, section 3; a number of ours that it does not give is marked as our choice):
  - the learning rate warms up, stays, and in the last part of the run decays exponentially to 1/256 of its peak;
  - the batch grows linearly at first, and while it does the learning rate follows its square root ("BatchScaling"):
    Adam's steps are then equally noisy throughout, as their noise goes with lr / sqrt(batch);
  - the context and the mixture of sources change in stages; documents are packed end to end, and none sees another.
All of it is pure functions of the tokens seen, and so is the batch itself: which rows a step reads depends on the seed
and on the tokens before it, never on the number of GPUs, the micro-batch or a restart. A run can therefore stop anywhere,
go on elsewhere, and draw the same loss curve. The engine is PyTorch's own: torchrun starts the processes, fully_shard
(FSDP2, ZeRO's idea) divides weights, gradients and Adam's averages among them, torch.distributed.checkpoint saves them.
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from mamba import Block, CheckpointError, Mamba, MambaConfig, find
from sample import device, generate

END = "<|endoftext|>"      # closes every document


def flag(default, help, low=0):
    return field(default=default, metadata={"help": help, "low": low})


@dataclass(frozen=True)
class Recipe:
    """One training run. Lengths are in tokens. The defaults are ours: minutes on a laptop."""
    total_tokens: int = flag(1_500_000, "the whole run", 1)
    warmup_tokens: int = flag(30_000, "learning rate from 0 to its peak")
    ramp_tokens: int = flag(200_000, "batch size from its start to its end")
    decay_tokens: int = flag(500_000, "the last part, in which the learning rate decays")
    batch_start: int = flag(4, "sequences in the first step", 1)
    batch_end: int = flag(16, "sequences in a step after the ramp", 1)
    stages: tuple[int] = flag((0,), "tokens seen at which each stage begins, as 0,2.5e12,4e12")
    context: tuple[int] = flag((256,), "tokens in a sequence: one number, or one a stage", 1)
    mixture: tuple[str] = flag(("text:1",), "each source's share of the tokens, one text or one a stage, "
                               "as 'web:0.9 code:0.1,web:0.7 code:0.3'")
    lr: float = flag(4e-3, "the learning rate's peak")
    decay_factor: float = flag(256, "by which the learning rate decays in all", 1)
    weight_decay: float = flag(0.1, "AdamW's, of matrices only")
    beta1: float = flag(0.9, "AdamW's")
    beta2: float = flag(0.95, "AdamW's")
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "of the weights and of the order of the data")
    init_from: str = flag("", "folder or hub id of a model to start from (default: fresh weights)")

    def __post_init__(self):
        if self.stages[0] != 0 or list(self.stages) != sorted({*self.stages}):
            raise ValueError(f"--stages is {self.stages}, but must begin with 0 and rise")
        for name in ("context", "mixture"):
            if len(getattr(self, name)) not in (1, len(self.stages)):
                raise ValueError(f"--{name} has {len(getattr(self, name))} values, but --stages {len(self.stages)}")
        for tokens in self.stages:
            mixture(self, tokens)


def batch_size(recipe: Recipe, tokens: int) -> int:
    """Sequences in the step that starts when `tokens` have been seen."""
    done = min(tokens / recipe.ramp_tokens, 1) if recipe.ramp_tokens else 1
    return round(recipe.batch_start + done * (recipe.batch_end - recipe.batch_start))


def learning_rate(recipe: Recipe, tokens: int) -> float:
    """Warmup, stable, decay, and BatchScaling: lr / sqrt(batch) is constant while the batch ramps."""
    warm = min(tokens / recipe.warmup_tokens, 1) if recipe.warmup_tokens else 1
    decayed = min(max(tokens - (recipe.total_tokens - recipe.decay_tokens), 0) / max(recipe.decay_tokens, 1), 1)
    scaling = math.sqrt(batch_size(recipe, tokens) / recipe.batch_end)
    return recipe.lr * warm * scaling * recipe.decay_factor ** -decayed


def by_stage(recipe: Recipe, tokens: int, values: tuple):
    return values[0] if len(values) == 1 else values[bisect_right(recipe.stages, tokens) - 1]


def context_length(recipe: Recipe, tokens: int) -> int:
    """Tokens in each sequence of the step that starts when `tokens` have been seen."""
    return by_stage(recipe, tokens, recipe.context)


def mixture(recipe: Recipe, tokens: int) -> dict[str, float]:
    """Source -> its share of the tokens of that step; the shares add up to 1."""
    text = by_stage(recipe, tokens, recipe.mixture)
    try:
        shares = {name: float(share) for name, share in (part.split(":") for part in text.split())}
        return {name: share / sum(shares.values()) for name, share in shares.items()}
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"the mixture {text!r} is not a list of name:share, with shares above 0") from None


RECIPES = {
    "tiny": Recipe(),
    "falcon-mamba-7b": Recipe(
        total_tokens=5_500 * 10**9,         # model card: about 5,500 GT (1 GT = 1e9 tokens)
        warmup_tokens=500 * 10**6,          # our choice; "short" in the report
        ramp_tokens=50 * 10**9,             # report: the batch grows over the first 50 GT ...
        batch_start=128, batch_end=2048,    # ... from 128 to 2048 sequences
        decay_tokens=500 * 10**9,           # report: exponential, over 500 GT ...
        decay_factor=256,                   # ... to 1/256 of the peak
        lr=6.4e-4,                          # report and card
        weight_decay=0.1,                   # card
        beta1=0.9, beta2=0.95,              # report
        clip=1.0,                           # our choice; not published
        context=(2048, 4096, 8192, 8192),   # report: 2048 -> 4096 -> 8192. Where each stage begins is our choice, but
        stages=(0, 2_500 * 10**9, 4_000 * 10**9, 5_000 * 10**9),                    # for the decay, the last 500 GT
        # Report: mostly RefinedWeb, more technical text, code and math later, FineWeb-Edu in the decay. Shares: our choice.
        mixture=("refinedweb:90 technical:4 code:4 math:2", "refinedweb:82 technical:7 code:7 math:4",
                 "refinedweb:74 technical:10 code:10 math:6",
                 "refinedweb:45 finewebedu:25 technical:10 code:12 math:8")),
}
# The pre-decay checkpoint is the model before that decay. Its optimizer was not published, so the rate warms up again.
RECIPES["continue"] = replace(
    RECIPES["falcon-mamba-7b"], init_from="tiiuae/falcon-mamba-7b-pre-decay", total_tokens=502 * 10**9,
    warmup_tokens=2 * 10**9, ramp_tokens=0, stages=(0,), context=(8192,),            # 2 GT: our choice
    mixture=RECIPES["falcon-mamba-7b"].mixture[-1:])
# Ours: a model that learns something in minutes on two CPU cores. Fresh weights of 0.1 suit the 7B's width, not this.
SIZES = {"tiny": {"d_model": 128, "n_layer": 4, "initializer_range": 0.02},
         "falcon-mamba-7b": {"vocab_size": 65024}, "continue": {}}


# The data. A source is one long row of tokens, a step reads rows of `context` tokens from it, and which ones is a pure
# function of the seed and of the tokens seen.

def byte_tokenizer() -> Tokenizer:
    """Token i is byte i; token 256 ends a document."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # ByteLevel writes every byte as one visible character: these as themselves, the others as U+0100 and on.
    others = [byte for byte in range(256) if byte not in printable]
    names = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def standard_library() -> list[Path]:
    """The sources of Python's standard library: text that every reader of this file has at hand."""
    root = Path(sysconfig.get_path("stdlib"))
    return [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*p.relative_to(root).parts}]


def tokenized(paths: list[Path], tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """The tokens of all files there, in an order that the seed fixes, END after each: a mebibyte of whole lines at a time."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    kind = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    for i in np.random.RandomState(seed % 2**32).permutation(len(files)):
        if files[i].is_dir():
            continue
        try:
            with files[i].open(encoding="utf-8") as file:
                while lines := file.readlines(2**20):
                    yield np.array(tokenizer.encode_batch_fast(["".join(lines)], add_special_tokens=False)[0].ids, kind)
                yield np.array([tokenizer.token_to_id(END)], kind)
        except UnicodeDecodeError:
            print(f"leaving {files[i]}: it is not UTF-8 text", file=sys.stderr)


class Source:
    """One corpus: its tokens, in memory or mapped from a .bin, of which the end is held out."""

    def __init__(self, name: str, paths: list[Path], tokenizer: Tokenizer, recipe: Recipe):
        self.name, self.end = name, tokenizer.token_to_id(END)
        self.bin = paths[0] if paths[0].suffix == ".bin" else None
        if self.bin:
            if self.bin.stat().st_size < 4:
                raise ValueError(f"{self.bin} is empty; --tokenize-to makes such files")
            tokens = np.memmap(self.bin, np.uint16, "r")
        else:
            parts, wanted = [], recipe.total_tokens * 20 // 19
            for part in tokenized(paths, tokenizer, recipe.seed):
                parts.append(part)
                wanted -= len(part)
                if wanted < 0:
                    break
            tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
        self.size = len(tokens)
        held = min(len(tokens) // 20, 2**20)                  # the last twentieth, of a large source a million tokens,
        tail = tokens[len(tokens) - held:]                    # from the first document that begins there
        first = int(np.argmax(tail == self.end)) + 1 if self.end in tail[:-1] else 0
        self.parts = {"train": tokens[:len(tokens) - held + first], "held-out": tail[first:]}

    def rows(self, part: str, length: int) -> int:
        """How many rows of `length` tokens, and the one after each, a part has."""
        count = (len(self.parts[part]) - 1) // length
        if count < 1:
            raise ValueError(f"the {part} part of source {self.name} has {len(self.parts[part])} tokens, fewer than one "
                             f"row of --context {length}; give it more text, or a smaller --context")
        return count

    def row(self, part: str, index: int, length: int) -> np.ndarray:
        if self.bin and self.bin.stat().st_size // 2 != self.size:
            raise ValueError(f"{self.bin} had {self.size} tokens and now {self.bin.stat().st_size // 2}: it changed")
        return self.parts[part][index * length:index * length + length + 1]


def shuffled(k: int, n: int, key: tuple) -> int:
    """Where a shuffle of range(n), one for each key, puts k. It needs no table, so n may be billions.

    A Feistel network is a permutation of 2^(2 half) numbers whatever its rounds compute. Numbers of n or more are sent
    round again until they land below n: Black & Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 3.
    """
    half = max((n - 1).bit_length() + 1, 2) // 2
    while True:
        left, right = k >> half, k & (1 << half) - 1
        for turn in range(4):
            digest = hashlib.blake2b(f"{key} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest) & (1 << half) - 1
        k = left << half | right
        if k < n:
            return k


def place(recipe: Recipe, tokens: int, i: int) -> tuple[str, int]:
    """Row i of the step that starts after `tokens`: its source, and how many rows of that source come before it.

    Each 1000 rows hold the sources in the shares of their stage, in shuffled order.
    """
    stage, length = bisect_right(recipe.stages, tokens) - 1, context_length(recipe, tokens)
    block, slot = divmod((tokens - recipe.stages[stage]) // length + i, 1000)
    slot, end, shares = shuffled(slot, 1000, (recipe.seed, stage, block)), 0.0, mixture(recipe, tokens)
    for name, share in shares.items():
        first, end = round(1000 * end), end + share
        if slot < round(1000 * end):
            break
    before = sum((b - a) * mixture(recipe, a).get(name, 0) for a, b in pairwise(recipe.stages[:stage + 1]))
    return name, int(before // length) + block * (round(1000 * end) - first) + slot - first


def training_row(recipe: Recipe, sources: dict[str, Source], tokens: int, i: int) -> np.ndarray:
    """Row i of the step that starts after `tokens`. A source is read in shuffled order, then again in another."""
    (name, before), length = place(recipe, tokens, i), context_length(recipe, tokens)
    epoch, k = divmod(before, sources[name].rows("train", length))
    return sources[name].row("train", shuffled(k, sources[name].rows("train", length), (recipe.seed, name, epoch)), length)


# The model on its devices.

class Objective(nn.Module):
    """Model and loss in one module, as FSDP gathers weights when a module is called."""

    def __init__(self, model: Mamba):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """The sum of -log p(target) in nats over all (b, l); targets of -100 count for nothing.

        Logits of 1024 tokens at a time, computed again in the backward pass: all of them in fp32 would be the largest
        tensor of the run, 2 GB for one row of the 7B.
        """
        hidden, _ = self.model.backbone(tokens, self.model.blank_state(len(tokens)), starts)    # (b, l, m)
        pieces = zip(hidden.flatten(0, 1).split(1024), targets.flatten().split(1024))
        return sum(checkpoint(self.piece, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in pieces)

    def piece(self, hidden, targets):
        return F.cross_entropy(self.model.lm_head(hidden).float(), targets, reduction="sum")


def shard(objective: Objective, mesh, dtype: torch.dtype) -> None:
    """Give each rank its part of every tensor, in fp32; a block is gathered when it runs and let go after.

    In the large products the gathered weights and the activations are in `dtype`. What is small and exact stays in
    fp32, gathered beside them: A_log sets how fast a channel forgets, and exp(delta A), multiplied up over thousands of
    steps, would magnify the rounding of 8 bits; D, the convolution, dt_proj with its bias of 0.001 to 0.1, and the norms.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in objective.model.backbone.layers:
        fully_shard([block.mixer.in_proj, block.mixer.x_proj, block.mixer.out_proj], mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh, mp_policy=policy)       # what is left: embeddings, norm_f, lm_head


def optimizer(model: Mamba, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear and embedding layers, and nothing else.

    Not A_log, D, the convolution, biases or norms: they are rates and scales, whose natural size is not 0. A rule by
    the number of dimensions would decay A_log and the convolution too.
    """
    matrices = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    matrices = list(dict.fromkeys(matrices))        # a tied lm_head is the embedding
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=1e-8)


def over_ranks(*numbers: float) -> list[float]:
    """Their sums over all ranks."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


# Checkpoints. PyTorch's default format describes them in a pickle, which can run any code when it is read. Its writer of
# safetensors needs none: each rank's file says in JSON which part of each tensor it holds, so any number of ranks can
# read what any other number wrote.

class Writer(dcp.HuggingFaceStorageWriter):
    """Writes beside `folder`; when the last rank has written, the checkpoint gets its name and old ones go."""

    def __init__(self, folder: Path, about: dict, keep: int):
        super().__init__(f"{folder}.partial", save_distributed=True)
        self.folder, self.about, self.keep = folder, about, keep

    def finish(self, metadata, results):                      # DCP calls this on rank 0, after every rank has written
        with (self.path / "run.json").open("w") as file:
            json.dump(self.about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path, self.folder)
        for old in checkpoints(self.folder.parent)[:-self.keep]:
            shutil.rmtree(old.rename(f"{old}.partial"))       # never half a checkpoint under a checkpoint's name


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


class Trainer:
    """A model, its optimizer and its data on this rank."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, model: Mamba, tokenizer: Tokenizer, settings: dict,
                 sources: dict[str, Source]):
        self.args, self.recipe, self.model, self.tokenizer = args, recipe, model, tokenizer
        self.settings, self.sources, self.step, self.tokens, self.saving = settings, sources, 0, 0, None
        self.group = None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for block in model.backbone.layers:
            if args.checkpoint_activations:     # keep a block's input, and run the block again in the backward pass
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            if args.compile:
                block.compile()
        self.objective = Objective(model)
        if dist.is_initialized():
            # bf16 on a GPU; most CPUs have no faster products for it.
            dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
            shard(self.objective, init_device_mesh(args.device.type, (self.world,)), dtype)
            self.group = dist.new_group(backend="gloo")       # for the thread that writes checkpoints
        model.to(args.device)
        self.adam = optimizer(model, recipe)

    def passes(self, count: int) -> list[np.ndarray]:
        """Which of `count` rows this rank reads, pass by pass: on every rank as many passes of as many rows.

        Numbers of `count` or more are padding; thus any batch fits any number of ranks.
        """
        mine = range(self.rank, math.ceil(count / self.world) * self.world, self.world)
        return np.array_split(mine, math.ceil(len(mine) / self.args.micro_batch))

    def loss(self, rows: list[np.ndarray | None], length: int) -> Tensor:
        """The loss in nats, summed over these rows; None is padding and counts for nothing."""
        rows = [np.full(length + 1, -100) if row is None else row.astype(np.int64) for row in rows]
        rows = torch.from_numpy(np.stack(rows))                                     # (b, l + 1)
        if rows.max() >= self.model.config.vocab_size:
            raise ValueError(f"the data holds token {rows.max()}, but the model's vocabulary has only "
                             f"{self.model.config.vocab_size}: it was made with another tokenizer")
        tokens, targets = rows[:, :-1].clamp(min=0), rows[:, 1:]
        starts = F.pad(tokens[:, :-1] == self.tokenizer.token_to_id(END), (1, 0), value=True)
        return self.objective(*(v.to(self.args.device) for v in (tokens, targets, starts)))

    def update(self) -> dict:
        """One step; returns its figures, which are over all ranks."""
        begin, recipe = time.perf_counter(), self.recipe
        size, length = batch_size(recipe, self.tokens), context_length(recipe, self.tokens)
        passes, nats = self.passes(size), 0.0
        for numbers in passes:
            rows = [training_row(recipe, self.sources, self.tokens, int(i)) if i < size else None for i in numbers]
            if dist.is_initialized():       # gradients add up on each rank, and travel after the last pass
                self.objective.set_requires_gradient_sync(numbers is passes[-1])
            loss = self.loss(rows, length)
            (loss * self.world / (size * length)).backward()                        # FSDP takes the mean over ranks
            nats += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        loss = over_ranks(nats)[0] / (size * length)
        self.step, self.tokens = self.step + 1, self.tokens + size * length
        if not math.isfinite(loss + norm):
            raise ValueError(f"the loss is {loss} and the norm of its gradient {norm} at step {self.step}; "
                             "go on from the last checkpoint with a lower --lr, as a new run")
        for group in self.adam.param_groups:
            group["lr"] = learning_rate(recipe, self.tokens)        # at the step's end, as it is 0 at the first's start
        self.adam.step()
        self.adam.zero_grad()
        return {"step": self.step, "tokens": self.tokens, "loss": loss, "lr": group["lr"], "batch_size": size,
                "context": length, "grad_norm": norm, "tokens_per_s": size * length / (time.perf_counter() - begin)}

    @torch.no_grad()
    def held_out(self, length: int) -> dict[str, tuple[float, float]]:
        """Source -> its loss in nats per token and bits per byte, on up to 128 held-out rows."""
        losses = {}
        for name, source in self.sources.items():
            count, nats, text = min(source.rows("held-out", length), 128), 0.0, 0
            for numbers in self.passes(count):
                rows = [source.row("held-out", int(i), length) if i < count else None for i in numbers]
                nats += self.loss(rows, length).item()
                text += sum(len(self.tokenizer.decode(row[1:].tolist()).encode()) for row in rows if row is not None)
            nats, text = over_ranks(nats, text)
            losses[name] = nats / (count * length), nats / math.log(2) / max(text, 1)
        return losses

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, by name: the weights and Adam's two averages."""
        state = {}
        for name, p in self.model.named_parameters():
            averages = self.adam.state[p]
            if not averages:
                averages |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state |= {f"weight.{name}": p.detach(), f"exp_avg.{name}": averages["exp_avg"],
                      f"exp_avg_sq.{name}": averages["exp_avg_sq"]}
        return state

    def save(self) -> None:
        """A checkpoint, written in a thread while training goes on, and the model in the published format."""
        self.wait()
        folder = self.args.out / "checkpoints" / f"step-{self.step:09}"
        if not folder.exists():
            about = {"step": self.step, "tokens": self.tokens, "settings": self.settings}
            self.saving = dcp.async_save(self.state(), storage_writer=Writer(folder, about, self.args.keep),
                                         process_group=self.group)
        whole = {}
        for name, p in self.model.named_parameters():           # every rank takes part in gathering, rank 0 keeps
            p = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
            if self.rank == 0:
                whole[name] = p.cpu()
        if self.rank == 0:
            with torch.device("meta"):
                copy = Mamba(self.model.config)
            copy.load_state_dict(whole, strict=False, assign=True)      # a tied lm_head is not among them
            if self.model.config.tie_embeddings:
                copy.lm_head.weight = copy.backbone.embeddings.weight
            copy.save_pretrained(self.args.out)

    def wait(self) -> None:
        """Until the last checkpoint is written; raises what went wrong with it."""
        if self.saving:
            self.saving.result()
            self.saving = None

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint; refuse one of another model, vocabulary, recipe or corpus."""
        about = json.loads((folder / "run.json").read_text())
        for name, now in self.settings.items():
            if about["settings"].get(name) != now:
                raise ValueError(f"{folder} was written with {name} {about['settings'].get(name)}, but now it is {now}; "
                                 "--resume needs the same command, or give another --out for a new run")
        dcp.load(self.state(), storage_reader=dcp.HuggingFaceStorageReader(folder))
        self.step, self.tokens = about["step"], about["tokens"]
        for averages in self.adam.state.values():
            averages["step"] = torch.tensor(float(self.step))

    def run(self, stopping: list) -> bool:
        """Train until the recipe's end, or until `stopping` holds something on any rank; returns whether it is the end."""
        args, recipe, path, held = self.args, self.recipe, self.args.out / "metrics.jsonl", {}
        rows = path.read_text().splitlines(keepends=True) if self.step else []
        rows = [row for row in rows[:self.step] if row.endswith("\n")]      # a killed run may have gone on from here
        if self.rank == 0:
            write_whole(path, "".join(rows))
        peak = next((peak for name, peak in PEAKS.items() if args.device.type == "cuda"
                     and name in torch.cuda.get_device_name()), 0) * self.world
        flops, stop = flops_per_token(self.model.config), False
        with tqdm(total=recipe.total_tokens, initial=self.tokens, unit="tok", unit_scale=True,
                  disable=self.rank > 0 or not sys.stderr.isatty()) as bar:
            while self.tokens < recipe.total_tokens and not stop:
                row = self.update()
                stop, end = over_ranks(len(stopping))[0] > 0, self.tokens >= recipe.total_tokens
                if self.step % args.eval_every == 0 or end:
                    row["held_out"] = held = {name: nats for name, (nats, _) in self.held_out(row["context"]).items()}
                if self.rank == 0:
                    line = ("step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | batch {batch_size} | "
                            "{tokens_per_s:.0f} tok/s").format(**row)
                    line += f" | {row['tokens_per_s'] * flops / peak:.0%} MFU" if peak else ""
                    line += "".join(f" | held-out {name} {nats:.4f}" for name, nats in row.get("held_out", {}).items())
                    tqdm.write(line)
                    bar.update(row["batch_size"] * row["context"])
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                if self.step % args.checkpoint_every == 0 or end or stop:
                    self.save()
        self.wait()
        return self.tokens >= recipe.total_tokens


def write_whole(path: Path, text: str) -> None:
    """The file with this text, or as it was."""
    new = path.with_name(path.name + ".partial")
    new.write_text(text)
    os.replace(new, path)


def picture(path: Path, panels: dict[str, tuple[list, list]], log: bool = False) -> None:
    """A small plot for each title: x in tokens, y. Nothing without matplotlib, which is optional."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, (title, (x, y)) in zip(axes[0], panels.items()):
        axis.plot(x, y)
        axis.set(title=title, xlabel="tokens", yscale="log" if log else "linear")
    figure.savefig(path)
    pyplot.close(figure)


# The plan: a run on paper, from the same functions.

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}       # NVIDIA's dense bf16 FLOP/s


def flops_per_token(config: MambaConfig) -> float:
    """Of a training step: 6 a weight of each product (2 forward, 4 backward), and the scan, 8 a state and 16 backward."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    return config.n_layer * (6 * (3 * m * d + d * (2 * r + 2 * n)) + 24 * d * n) + 6 * m * config.vocab_size


def kept_by_a_block(config: MambaConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of a row of `length` until a block's backward pass.

    The block itself tells, run where tensors have no memory. It is the count of scan.py's chunked scan.
    """
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block, (d, n) = Block(config).to(dtype), (config.d_inner, config.d_state)
        block(torch.empty(1, length, config.d_model, requires_grad=True), torch.empty(1, config.d_conv - 1, d, dtype=dtype),
              torch.empty(1, d, n), torch.empty(1, length, dtype=torch.bool))
    for p in block.parameters():
        kept.pop(p.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def memory(config: MambaConfig, world: int, dtype: torch.dtype, sharded: bool = True) -> dict[str, float]:
    """Bytes on each of `world` GPUs, by part, but for the activations."""
    with torch.device("meta"):
        model = Mamba(config)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.backbone.layers[0].parameters())
    shard = sum(math.ceil(len(p) / world) * (p.numel() // len(p)) for p in model.parameters())      # rank 0's, the most
    parts = {"weights, fp32": 4 * shard, "gradients, fp32": 4 * shard, "Adam's two averages, fp32": 8 * shard,
             "logits of 1024 tokens and their gradients": 3 * 4 * 1024 * config.vocab_size}
    if sharded:
        root = whole - config.n_layer * block
        parts["gathered weights: embeddings, head, 3 blocks"] = (root + 3 * block) * dtype.itemsize
        parts["gathered gradients on their way"] = max(root, 2 * block) * (dtype.itemsize + 4)
    return parts


def plan(args: argparse.Namespace, recipe: Recipe, config: MambaConfig) -> None:
    """Print the whole run, and draw its schedule."""
    decay = recipe.total_tokens - recipe.decay_tokens
    marks = {0, recipe.warmup_tokens, recipe.ramp_tokens, *recipe.stages, decay, recipe.total_tokens}
    marks = sorted(mark for mark in marks if mark <= recipe.total_tokens)
    tokens = steps = 0
    print(f"{'phase':8}{'tokens':>11}{'to':>11}{'steps':>9}{'context':>9}{'batch':>14}{'learning rate':>22}"
          f"{'lr / sqrt(batch)':>24}  mixture")
    for a, b in pairwise(marks):
        phase = "decay" if a >= decay else "warmup" if a < recipe.warmup_tokens else "ramp" if a < recipe.ramp_tokens else "stable"
        before = steps
        while tokens < b:
            tokens, steps = tokens + batch_size(recipe, tokens) * context_length(recipe, tokens), steps + 1
        ends = [(batch_size(recipe, t), learning_rate(recipe, t)) for t in (a, b)]
        batch, rate, noise = (" -> ".join(texts) for texts in zip(*(
            (str(size), f"{lr:.2e}", f"{lr / math.sqrt(size):.2e}") for size, lr in ends)))
        shares = " ".join(f"{name} {share:.0%}" for name, share in mixture(recipe, a).items())
        print(f"{phase:8}{a:11.4g}{b:11.4g}{steps - before:9,}{context_length(recipe, a):9}{batch:>14}{rate:>22}{noise:>24}"
              f"  {shares}")
    flops = flops_per_token(config) * recipe.total_tokens
    ideal = flops / (args.world_size * PEAKS["H100"]) / 86400
    print(f"\n{steps:,} steps, {tokens:.5g} tokens, {flops:.3g} FLOPs ({flops_per_token(config):.3g} a token); on "
          f"{args.world_size} H100 {ideal / args.mfu:.1f} days at {args.mfu:.0%} MFU, the published two months at {ideal / 61:.0%}")
    parts = memory(config, args.world_size, torch.bfloat16) | {"CUDA, NCCL, fragmentation (our guess)": 5e9}
    print(f"\nmemory of each of {args.world_size} GPUs, bf16 in the products, in GB:")
    for name, size in [*parts.items(), ("all of these", sum(parts.values()))]:
        print(f"  {name:48}{size / 1e9:8.2f}")
    with torch.device("meta"):
        whole = 4 * sum(p.numel() for p in Mamba(config).parameters())
    print(f"  {'if a step takes more than one pass: gradients':48}{whole / 1e9:8.2f}")
    for length in dict.fromkeys(recipe.context):
        kept = kept_by_a_block(config, 256, torch.bfloat16) * length / 256
        stream = 4 * length * config.d_model
        for name, row in (("without", config.n_layer * kept + kept), ("with", config.n_layer * stream + 2 * kept)):
            for many, fixed in (("1 pass", sum(parts.values())), ("more", sum(parts.values()) + whole)):
                print(f"  context {length}, {name} --checkpoint-activations: {row / 1e9:.2f} a row, "
                      f"--micro-batch {max(0, int((80e9 - fixed) // row))} fits 80 GB ({many})")
    args.out.mkdir(parents=True, exist_ok=True)
    x = [recipe.total_tokens * i / 1000 for i in range(1001)]
    picture(args.out / "plan.png", {"learning rate": (x, [learning_rate(recipe, t) for t in x]), "batch": (
        x, [batch_size(recipe, t) for t in x]), "context": (x, [context_length(recipe, t) for t in x])})


def named_data(args: argparse.Namespace, recipe: Recipe) -> tuple[dict[str, list[Path]], Recipe]:
    """What --data names, and the recipe with the shares it gives."""
    paths, shares = {}, {}
    for text in args.data or []:
        name, path, share = re.fullmatch(r"(?:([\w-]+)=)?(.*?)(?::([\d.]+))?", text, re.DOTALL).groups()
        if name is None:
            name, path, share = "text", text, None              # bare paths are one source
        elif name in paths:
            raise ValueError(f"--data names {name} twice, {paths[name][0]} and {path}; give each source its own name")
        paths.setdefault(name, []).append(Path(path))
        if share:
            shares[name] = share
    paths = paths or {"text": standard_library()}
    wanted = {name for tokens in recipe.stages for name in mixture(recipe, tokens)}
    if len(paths) == 1:
        shares = {name: 1 for name in paths}
    if shares.keys() == paths.keys():
        recipe = replace(recipe, mixture=(" ".join(f"{name}:{share}" for name, share in shares.items()),))
    elif shares or wanted != paths.keys():
        raise ValueError(f"--data names {', '.join(sorted(paths))}, but the recipe mixes {', '.join(sorted(wanted))}; "
                         "name these, or give each its own share as name=path:share")
    for path in (path for group in paths.values() for path in group):
        if not path.exists():
            raise ValueError(f"there is no {path}, which --data names")
    return paths, recipe


def run(args: argparse.Namespace, recipe: Recipe, sizes: dict, stopping: list) -> None:
    paths, recipe = named_data(args, recipe)
    source = recipe.init_from or (args.out if args.eval_only else None)
    folder = find(source) if source else None
    path = args.tokenizer or (folder / "tokenizer.json" if folder else None)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path else byte_tokenizer()
    except Exception as e:      # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {e}") from e
    vocabulary = tokenizer.get_vocab_size()
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{path} has no token {END}, which closes a document")
    if args.tokenize_to:
        return tokenize_to(args.tokenize_to, [path for group in paths.values() for path in group], tokenizer, recipe)
    torch.manual_seed(recipe.seed)
    if folder:
        model = Mamba.from_pretrained(folder, "cpu", None if args.eval_only else torch.float32)
    else:
        model = Mamba(MambaConfig(**{"vocab_size": vocabulary, "eos_token_id": tokenizer.token_to_id(END)} | sizes))
    if vocabulary > model.config.vocab_size:
        raise ValueError(f"{path or 'the byte tokenizer'} has {vocabulary} tokens, but the model only "
                         f"{model.config.vocab_size}; give the tokenizer that belongs to it")
    sources = {name: Source(name, group, tokenizer, recipe) for name, group in paths.items()}
    settings = json.loads(json.dumps(asdict(recipe) | asdict(model.config) | {
        "vocabulary": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16],
        "data": {name: source.size for name, source in sources.items()}}))
    trainer = Trainer(args, recipe, model, tokenizer, settings, sources)
    say = print if trainer.rank == 0 else lambda *_: None
    if args.eval_only:
        for name, (nats, bits) in trainer.held_out(context_length(recipe, recipe.total_tokens)).items():
            say(f"{name}: {nats:.4f} nats per token, perplexity {math.exp(nats):.3f}, {bits:.4f} bits per byte")
        return
    done = checkpoints(args.out / "checkpoints")
    if done and not args.resume:
        raise ValueError(f"{args.out} already holds a run, at {done[-1].name}; --resume goes on with it, another --out "
                         "starts a new one")
    if trainer.rank == 0:
        (args.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        for left in (args.out / "checkpoints").glob("*.partial"):
            shutil.rmtree(left)
        write_whole(args.out / "tokenizer.json", tokenizer.to_str())
    if done:
        trainer.resume(done[-1])
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, d_model {model.config.d_model}, "
        f"{model.config.n_layer} layers, {sum(s.size for s in sources.values()):,} tokens of text; {trainer.world} x "
        f"{args.device}, scan: chunked; {recipe}")
    begin, end = time.perf_counter(), trainer.run(stopping)
    if not end:
        say(f"stopped and saved at step {trainer.step}; the same command with --resume goes on")
    elif trainer.rank == 0:
        rows = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
        x = [row["tokens"] for row in rows]
        picture(args.out / "loss.png", {name: (x, [row[name] for row in rows]) for name in ("loss", "lr", "grad_norm")})
        say(f"{time.perf_counter() - begin:.0f} s; {args.out} now holds the model. It continues 'def ' with:\n")
        model, text = Mamba.from_pretrained(args.out, args.device), tokenizer.encode("def ", add_special_tokens=False).ids
        for token in generate(model, torch.tensor([text], device=args.device), 300, 0.6, stop=tokenizer.token_to_id(END)):
            text += token.tolist()
        say(tokenizer.decode(text))


def tokenize_to(path: Path, paths: list[Path], tokenizer: Tokenizer, recipe: Recipe) -> None:
    """A corpus as a file of uint16 tokens, which training maps instead of reading."""
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError(f"a .bin holds tokens up to {2**16 - 1}, but the tokenizer has {tokenizer.get_vocab_size()}")
    new, count = path.with_name(path.name + ".partial"), 0
    with new.open("wb") as file:
        for part in tokenized(paths, tokenizer, recipe.seed):
            file.write(part.tobytes())
            count += len(part)
    os.replace(new, path)
    print(f"{path}: {count:,} tokens")


def add_fields(parser: argparse.ArgumentParser, cls: type, defaults: dict) -> None:
    """A flag for every field of a dataclass."""
    for f in fields(cls):
        default, name = defaults.get(f.name), "--" + f.name.replace("_", "-")
        help, low = f.metadata.get("help", "of a fresh model"), f.metadata.get("low", 0)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        help += f" (default {shown})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=help, default=default)
        else:
            parser.add_argument(name, type=value_of(f.type, low), help=help, default=default, metavar="X")


def value_of(kind, low: float):
    """An argparse type: text, a number of at least `low` (whole ones may be written 2.5e12), or several with commas."""
    def parse(text):
        if kind in (tuple[int], tuple[str]):
            return tuple(value_of(*kind.__args__, low)(part) for part in text.split(","))
        if kind is str:
            return text.strip()
        value = float(text)
        if not low <= value < math.inf or kind is int and value != int(value):
            raise argparse.ArgumentTypeError(f"{text} is not a {'whole ' * (kind is int)}number of {low} or more")
        return int(text) if text.isdigit() else kind(value)
    return parse


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", choices=RECIPES, default="tiny", help="whose values are the defaults (default tiny)")
    name = first.parse_known_args()[0].recipe
    parser = argparse.ArgumentParser(description="Train a Falcon-Mamba.", parents=[first], allow_abbrev=False)
    add = parser.add_argument
    add("--data", action="append", metavar="[NAME=]PATH[:SHARE]", help="text file, folder of them, or .bin of tokens; "
        "repeat for more (default: the sources of Python's standard library)")
    add("--out", type=Path, default=Path("out"), help="folder for all results (default %(default)s)")
    add("--tokenizer", type=Path, help="a tokenizer.json (default: that of --init-from, or one token a byte)")
    add("--tokenize-to", type=Path, metavar="FILE.bin", help="only write the tokens of --data there")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out, if it has one")
    add("--eval-only", action="store_true", help="only print the held-out loss of --init-from, or of --out")
    add("--plan", action="store_true", help="only print the run's steps, rates, days and memory")
    add("--world-size", type=value_of(int, 1), default=1, metavar="X", help="GPUs of that plan (default 1)")
    add("--mfu", type=value_of(float, 0.001), default=0.18, metavar="X", help="share of the GPUs' peak, for that plan "
        "(default %(default)s)")
    add("--micro-batch", type=value_of(int, 1), default=16, metavar="X", help="sequences on a GPU at a time (default 16)")
    add("--checkpoint-activations", action="store_true", help="a third more time, for far less memory")
    add("--compile", action="store_true", help="torch.compile the blocks")
    add("--checkpoint-every", type=value_of(int, 1), default=100, metavar="X", help="steps (default %(default)s)")
    add("--eval-every", type=value_of(int, 1), default=100, metavar="X", help="steps (default %(default)s)")
    add("--keep", type=value_of(int, 1), default=2, metavar="X", help="checkpoints (default %(default)s)")
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    add("--device", type=device, default="auto", help="cpu, cuda ... (default: cuda if there is one)")
    add_fields(parser, Recipe, asdict(RECIPES[name]))
    add_fields(parser, MambaConfig, SIZES[name])
    args = parser.parse_args()
    sizes = {f.name: getattr(args, f.name) for f in fields(MambaConfig) if getattr(args, f.name) is not None}
    stopping = []

    def on_signal(number, frame):
        stopping.append(number)
        signal.signal(number, signal.SIG_DFL)                   # a second one does not wait
    try:
        recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
        if args.plan:
            return plan(args, recipe, MambaConfig(**sizes))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo")
        elif args.device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        run(args, recipe, sizes, stopping)
    except torch.OutOfMemoryError as e:
        sys.exit(f"train.py: {args.device} is out of memory ({str(e).splitlines()[0]}); try a smaller --micro-batch")
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except dcp.CheckpointException as e:
        sys.exit(f"train.py: cannot write or read a checkpoint in {args.out}: {[*e.failures.values()][0][0]}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
