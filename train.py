"""Train a Falcon-Mamba, with Falcon-Mamba's own recipe scaled to minutes. After mamba.py and sample.py; the last file.

    python train.py                                         a byte-level model of Python's standard library, into out/
    python sample.py --model out --prompt "def "            and what it learned
    python train.py --data notes/ --out mine                the same on your own text files

The recipe (report, arXiv 2410.05355, section 3; every number of ours that it does not give says so below):
  - the learning rate warms up, stays, and in the last part of the run decays exponentially to 1/256 of its peak;
  - the batch grows linearly at first, and while it does the learning rate follows its square root ("BatchScaling"):
    Adam's steps are then equally noisy throughout, as their noise goes with lr / sqrt(batch);
  - documents are packed one after the other into rows without padding, and none sees another.
Batch size and learning rate are pure functions of the tokens seen so far, so they can be printed, plotted and tested.
"""
import argparse
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from mamba import CheckpointError, Mamba, MambaConfig, find
from sample import device, generate, number, out_of_memory, vocabulary

END = "<|endoftext|>"      # closes every document


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Recipe:
    """One training run. Lengths are in tokens. Beside each default: the 7B's value, or that it was never published."""
    total_tokens: int = flag(1_000_000, "the whole run")                                        # 5,500e9
    warmup_tokens: int = flag(30_000, "learning rate from 0 to its peak")                       # unpublished
    ramp_tokens: int = flag(200_000, "batch size from its start to its end")                    # 50e9
    decay_tokens: int = flag(300_000, "the last part, in which the learning rate decays")       # 500e9
    context: int = flag(256, "tokens in a sequence")                                            # 2048, 4096, then 8192
    batch_start: int = flag(4, "sequences in the first step")                                   # 128
    batch_end: int = flag(16, "sequences in a step after the ramp")                             # 2048
    lr: float = flag(4e-3, "the learning rate's peak")                                          # 6.4e-4
    decay_factor: float = flag(256, "by which the learning rate decays in all")                 # 256
    weight_decay: float = flag(0.1, "AdamW's, of matrices only")                                # 0.1
    beta1: float = flag(0.9, "AdamW's")                                                         # 0.9
    beta2: float = flag(0.95, "AdamW's")                                                        # 0.95
    clip: float = flag(1.0, "largest norm of the gradient")                                     # unpublished
    seed: int = flag(0, "of the weights and of the order of the data")


LIMITS = {"total_tokens": (1, 2**60), "context": (1, 2**20), "batch_start": (1, 2**20), "batch_end": (1, 2**20),
          "beta1": (0, 0.9999999), "beta2": (0, 0.9999999), "decay_factor": (1, 2**60)}     # of the flags; else from 0

# Ours: a model that learns something in minutes on two CPU cores. Fresh weights of 0.1 suit the 7B's width, not this.
TINY = {"d_model": 128, "n_layer": 4, "d_state": 16, "d_conv": 4, "initializer_range": 0.02}


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


def read_documents(paths: list[Path], seed: int) -> tuple[list[str], list[str]]:
    """The texts of these files and folders, shuffled -> (for training, held out): every 20th, or the end of a few."""
    files = []
    for path in paths:          # in a folder lie pipes and dangling links too
        files += [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            print(f"skipping {file}: it is not UTF-8 text", file=sys.stderr)
    texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts)) if texts[i]]
    if len(texts) >= 20:
        return [text for i, text in enumerate(texts) if i % 20], texts[::20]
    return [text[:len(text) * 19 // 20] for text in texts], [text[len(text) * 19 // 20:] for text in texts]


class Rows:
    """Documents packed end to end and cut into rows of `context` tokens, in a random order that the seed fixes."""

    def __init__(self, what: str, texts: list[str], tokenizer: Tokenizer, recipe: Recipe, wanted: int):
        """Tokenizes as many documents as `wanted` tokens take."""
        tokens, starts, end = [], [], tokenizer.token_to_id(END)
        for i in range(0, len(texts), 32):
            for encoded in tokenizer.encode_batch_fast(texts[i:i + 32], add_special_tokens=False):
                tokens += [*encoded.ids, end]
                starts += [True] + [False] * len(encoded.ids)
            if len(tokens) > wanted:
                break
        self.context, count = recipe.context, (len(tokens) - 1) // recipe.context
        if count < 1:
            raise ValueError(f"the text {what} has {len(tokens)} tokens, "
                             f"fewer than one row of --context {recipe.context}")
        self.tokens, self.starts = torch.tensor(tokens), torch.tensor(starts)
        self.order = np.random.default_rng(recipe.seed).permutation(count)

    def __getitem__(self, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, the tokens that follow them, and where documents start: three times (b, l). Wraps around."""
        at = torch.tensor([self.order[i % len(self.order)] for i in rows])[:, None] * self.context
        at = at + torch.arange(self.context)
        return self.tokens[at], self.tokens[at + 1], self.starts[at]


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


def loss_of(model: Mamba, rows: tuple[Tensor, Tensor, Tensor], device: torch.device) -> Tensor:
    """Mean cross-entropy in nats per token; bf16 in the matrix products on a GPU, fp32 weights everywhere."""
    tokens, targets, starts = (v.to(device) for v in rows)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits, _ = model(tokens, reset=starts)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model: Mamba, rows: Rows, device: torch.device) -> float:
    """The loss on up to 128 held-out rows."""
    count = min(len(rows.order), 128)
    parts = [range(i, min(i + 16, count)) for i in range(0, count, 16)]
    return sum(loss_of(model, rows[part], device).item() * len(part) for part in parts) / count


def train(model: Mamba, recipe: Recipe, data: Rows, device: torch.device) -> Iterator[dict]:
    """Run the recipe; yields the figures of each step."""
    adam, tokens, step = optimizer(model, recipe), 0, 0
    while tokens < recipe.total_tokens:
        start, size = time.perf_counter(), batch_size(recipe, tokens)
        first = tokens // recipe.context
        loss = loss_of(model, data[range(first, first + size)], device)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip).item()
        if not math.isfinite(norm):
            raise ValueError(f"the loss is {loss.item()} and its gradient {norm} at step {step + 1}; try a lower --lr")
        tokens, step = tokens + size * recipe.context, step + 1
        for group in adam.param_groups:
            group["lr"] = learning_rate(recipe, tokens)
        adam.step()
        adam.zero_grad()
        yield {"step": step, "tokens": tokens, "loss": loss.item(), "lr": group["lr"], "grad_norm": norm,
               "batch_size": size, "tokens_per_s": size * recipe.context / (time.perf_counter() - start)}


def save(model: Mamba, tokenizer: Tokenizer, folder: Path) -> None:
    """Write both, or neither."""
    new = folder / ".tokenizer.json"
    try:
        new.write_text(tokenizer.to_str(), encoding="utf-8")
        model.save_pretrained(folder)
        os.replace(new, folder / "tokenizer.json")
    finally:
        new.unlink(missing_ok=True)


def run(args: argparse.Namespace, recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    folder = find(args.init_from) if args.init_from else None
    path = args.tokenizer or (folder / "tokenizer.json" if folder else None)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path else byte_tokenizer()
    except Exception as e:      # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {e}") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id(END) is None:
        raise ValueError(f"{path} has no token {END}, which closes a document")
    if folder:
        model = Mamba.from_pretrained(folder, args.device, torch.float32)
        if vocabulary(tokenizer) > model.config.vocab_size:
            raise ValueError(f"{path} has {vocabulary(tokenizer)} tokens, but {folder} only "
                             f"{model.config.vocab_size}; leave --tokenizer out to keep the checkpoint's own")
    else:
        sizes = TINY | {name: getattr(args, name) for name in TINY if getattr(args, name) is not None}
        model = Mamba(MambaConfig(**sizes, vocab_size=vocabulary(tokenizer),
                                  eos_token_id=tokenizer.token_to_id(END))).to(args.device)
    texts, held_out = read_documents(args.data or standard_library(), recipe.seed)
    data = Rows("to train on", texts, tokenizer, recipe, recipe.total_tokens)
    validation = Rows("held out", held_out, tokenizer, recipe, 128 * recipe.context)
    args.out.mkdir(parents=True, exist_ok=True)     # what cannot be written is found out now, not after the training
    with tempfile.TemporaryFile(dir=args.out):
        pass
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        if (args.out / name).is_dir():
            raise ValueError(f"{args.out / name} is a folder, where the model's file of that name belongs")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, d_model {model.config.d_model}, "
          f"{model.config.n_layer} layers; {len(data.tokens):,} tokens of text, on {args.device}; {recipe}")

    begin = time.perf_counter()
    try:
        for row in train(model, recipe, data, args.device):
            print("step {step} | loss {loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | batch {batch_size} | "
                  "{tokens_per_s:.0f} tok/s".format(**row), f"| {row['tokens'] / recipe.total_tokens:.0%}")
    except KeyboardInterrupt:
        print("interrupted: saving the model as it is", file=sys.stderr)
    save(model, tokenizer, args.out)
    print(f"held-out loss {held_out_loss(model, validation, args.device):.4f} nats per token, "
          f"{time.perf_counter() - begin:.0f} s; {args.out} now holds the model. It continues 'def ' with:\n")
    prompt = tokenizer.encode("def ", add_special_tokens=False).ids
    text = list(prompt)
    for token in generate(model, torch.tensor([prompt], device=args.device), 300, 0.6, stop=tokenizer.token_to_id(END)):
        text += token.tolist()
    print(tokenizer.decode(text))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Falcon-Mamba.")
    add = parser.add_argument
    add("--data", type=Path, action="append", help="a text file or a folder of them; repeat for more (default: "
        "the sources of Python's standard library)")
    add("--out", type=Path, default=Path("out"), help="folder for the model (default %(default)s)")
    add("--tokenizer", type=Path, help="a tokenizer.json (default: the checkpoint's, or one token a byte)")
    add("--init-from", metavar="MODEL", help="folder or hub id to start from (default: fresh weights)")
    add("--device", type=device, default="auto", help="cpu, cuda ... (default: cuda if there is one)")
    for f in fields(Recipe):
        low, high = LIMITS.get(f.name, (0, 2**60))
        kind = number(f.type, low, high)
        add("--" + f.name.replace("_", "-"), type=kind, default=f.default, help=f.metadata["help"] + " (default %(default)s)")
    for name, default in TINY.items():
        add("--" + name.replace("_", "-"), type=number(type(default), 0, 2**20), help=f"of a fresh model (default {default})")
    args = parser.parse_args()
    if given := [name for name in TINY if getattr(args, name) is not None and args.init_from]:
        parser.error(f"--init-from brings its own sizes; leave out {', '.join(given)}")
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    try:
        run(args, recipe)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        sys.exit(f"train.py: {args.device} is out of memory ({str(e).splitlines()[0]}); try a smaller --batch-end")
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
