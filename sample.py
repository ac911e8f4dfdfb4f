"""Text from a Falcon-Mamba: read a prompt, then write one token after another. After mamba.py; train.py is next.

    python sample.py --model out --prompt "def "                  what `python train.py` made
    python sample.py --prompt "Hello today" --temperature 0       the published 7B: a 15 GB download, 17 GB of memory

Reading and writing are the same call, model(tokens, state), with many tokens or with one. The state has a fixed size,
so the millionth token costs what the first did, and a file of it is the whole cache of a prompt, however long.

The text goes to standard output, everything else to standard error.
"""
import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from mamba import Block, CheckpointError, Mamba, State, find
from scan import default_backend

PIECE = 512     # tokens of a prompt read at a time: enough to keep the matrix products busy, and memory small


@torch.inference_mode()
def generate(model: Mamba, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, stop: int | None = None, generator: torch.Generator | None = None,
             state: State | None = None, reset: Tensor | None = None) -> Iterator[Tensor]:
    """Read tokens (b, l) from `state`, then yield up to max_new_tokens times the next token of each row, (b,).

    Temperature 0 takes the likeliest token. Otherwise one is drawn from softmax(logits / temperature), from the top_k
    likeliest and from the smallest set of them that holds top_p of the probability. A row that has yielded `stop`
    goes on yielding it; when all have, generation ends. reset (b, l) as in Mamba.forward; left padding is a document.
    The generator returns the state after all tokens but the last. ValueError if tokens are none or logits not finite.
    """
    if tokens.shape[1] == 0:
        raise ValueError("there is no token to read; a prompt has at least one")
    reset = torch.zeros_like(tokens, dtype=torch.bool) if reset is None else reset
    for piece, starts in zip(tokens[:, :-1].split(PIECE, 1), reset[:, :-1].split(PIECE, 1)):
        if piece.shape[1]:
            _, state = model(piece, state, starts, last_only=True)
    token, starts = tokens[:, -1], reset[:, -1:] if reset[:, -1].any() else None
    done = torch.zeros_like(token, dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits, state = model(token[:, None], state, starts)
        token, starts = choose(logits[:, 0], temperature, top_k, top_p, generator), None
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        yield token
        if done.all():
            break
    return state


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (b, vocab_size) -> (b,)."""
    best = logits.max(-1, keepdim=True)
    if not best.values.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or too large for --dtype fp16")
    if temperature == 0:
        return best.indices[:, 0]
    logits = (logits - best.values) / temperature                 # the likeliest at 0: no temperature overflows
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)       # the probability of all likelier tokens
        before[:, 0] = 0                                          # the likeliest always stays
        logits = logits.scatter(-1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def save_state(path: Path, state: State, last: Tensor) -> None:
    """Write one text's state and its last token, which the state has not read: a whole new file or none."""
    tensors = {"conv": torch.stack(state.conv), "ssm": torch.stack(state.ssm), "last": last}
    new = path.with_name(path.name + ".saving")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new)
        os.replace(new, path)
    except (OSError, SafetensorError) as e:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write the state file {path}: {e}") from e


def load_state(path: Path, model: Mamba, device: torch.device) -> tuple[State, Tensor]:
    """Read what save_state wrote -> the state, on `device`, and the last token (1,)."""
    blank = model.blank_state(1)
    wanted = {"conv": torch.stack(blank.conv), "ssm": torch.stack(blank.ssm), "last": torch.zeros(1, dtype=torch.int64)}
    try:
        with safe_open(path, framework="pt") as file:
            if {*file.keys()} != {*wanted}:
                raise CheckpointError(f"{path} is not a state file, which holds {', '.join(wanted)} and nothing else")
            found = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as e:
        raise CheckpointError(f"{path} is not a state file: {e}") from e
    for name, like in wanted.items():
        tensor = found[name]
        floats = tensor.is_floating_point() and like.is_floating_point()       # of any size: --dtype may differ
        if tensor.shape != like.shape or not (floats or tensor.dtype == like.dtype):
            raise CheckpointError(f"{path} has {name} {[*tensor.shape]} in {tensor.dtype}, but this model's state has "
                                  f"{[*like.shape]} in {like.dtype}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} has values of {name} that are not finite")
    conv, ssm, last = (found[name].to(device, like.dtype) for name, like in wanted.items())
    if not 0 <= last.item() < model.config.vocab_size:
        raise CheckpointError(f"{path} ends in token {last.item()}, but the vocabulary has {model.config.vocab_size}")
    return State([*conv], [*ssm]), last


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens; warns where the tokenizer has none for some of its bytes and leaves them out."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not UTF-8 text") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    if lost := "".join(sorted(set(prompt) - set(tokenizer.decode(tokens, skip_special_tokens=False)))):
        print(f"warning: the tokenizer has no token for some of the prompt ({lost!r:.60}) and drops it", file=sys.stderr)
    return tokens


def load(args: argparse.Namespace) -> tuple[Mamba, Tokenizer]:
    """The model and the tokenizer that --model names, as the flags ask for them."""
    folder = find(args.model)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no tokenizer.json; copy the one its model was trained with into it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:      # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer: {e}") from e
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    model = Mamba.from_pretrained(folder, args.device, dtype, replace=nf4(args.device) if args.quantize else None)
    if (size := vocabulary(tokenizer)) > model.config.vocab_size:
        raise CheckpointError(f"{path} has {size} tokens, but the model {model.config.vocab_size}")
    return model, tokenizer


def vocabulary(tokenizer: Tokenizer) -> int:
    """The size a model needs for all its tokens: they may be numbered with gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def nf4(device: torch.device):
    """What turns a linear layer into one of 4-bit "normal floats" (QLoRA, arXiv 2305.14314), a quarter of bf16."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise CheckpointError("--quantize needs the package bitsandbytes: pip install bitsandbytes") from None

    def quantized(linear):
        small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                                  compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
        small.bias = linear.bias
        return small
    return quantized


def compile_blocks() -> None:
    """Let torch.compile fuse what a block does to one token: once, for all layers. Prompts run as before."""
    eager, fused = Block.forward, torch.compile(Block.forward, dynamic=False)
    Block.forward = lambda self, stream, *rest: (fused if stream.shape[1] == 1 else eager)(self, stream, *rest)


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of GPU memory"
    try:
        import resource     # not on Windows
    except ImportError:
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / 1e9:.2f} GB of memory"


def run(args: argparse.Namespace) -> None:
    device = args.device
    if "-" in (args.prompt or []) and sys.stdin is None:
        raise ValueError("standard input is closed, so --prompt - has nothing to read")
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompt or [""]]
    if not args.load_state and not all(prompts):
        raise ValueError("a prompt is empty: give at least one character with --prompt")
    start = time.perf_counter()
    model, tokenizer = load(args)
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    state = None
    if args.load_state:
        state, last = load_state(args.load_state, model, device)
        state = State(*([v.expand(args.num_samples, -1, -1) for v in part] for part in state))
        rows[0].insert(0, last)
    if not all(rows):
        raise ValueError("the tokenizer has no token for any character of a prompt")
    if args.compile:
        compile_blocks()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{args.model}: {weights / 1e9:.2f} GB of weights on {device}, {model.lm_head.weight.dtype}, scan: "
          f"{default_backend(device, 2)}; loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)

    prompts, rows = prompts * args.num_samples, rows * args.num_samples
    longest, reset = max(map(len, rows)), None
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)    # padded on the left
    if not args.load_state:     # each prompt is a document, which does not see the padding before it
        first = torch.tensor([[longest - len(row)] for row in rows], device=device)
        reset = torch.arange(longest, device=device) == first
    stop = tokenizer.token_to_id("<|endoftext|>")
    stop = model.config.eos_token_id if stop is None else stop
    steps = generate(model, tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p, stop,
                     torch.Generator(device).manual_seed(args.seed), state, reset)

    decoders, texts, made, times = [DecodeStream() for _ in rows], list(prompts), 0, [time.perf_counter()]
    print(prompts[0], end="", flush=True)
    while True:
        try:
            token = next(steps).tolist()
        except StopIteration as end:
            state = end.value
            break
        times.append(time.perf_counter())
        for i, (decoder, t) in enumerate(zip(decoders, token)):
            if t != stop:
                made += 1
                piece = decoder.step(tokenizer, t) or ""    # nothing while a character is not whole
                texts[i] += piece
                if i == 0:
                    print(piece, end="", flush=True)
        last = token[0]
    for text in ["", *texts[1:]]:
        print(text)
    if args.save_state:
        save_state(args.save_state, state or model.blank_state(1), torch.tensor([last if len(times) > 1 else rows[0][-1]]))
    head = sum(p.numel() * p.element_size() for p in model.backbone.embeddings.parameters())
    read = weights if model.config.tie_embeddings else weights - head       # of the embeddings a token reads one row
    report = f"seed {args.seed}"
    if len(times) > 1:
        report += f"; prefill {tokens.numel() / (times[1] - times[0]):.1f} tokens/s"
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        report += f"; decode {rate * len(rows):.1f} tokens/s, {rate * read / 1e9:.1f} GB/s of weights"
    print(f"{report}; {made} tokens made; at most {peak_memory(device)}", file=sys.stderr)


def number(kind: type, low: float, high: float):
    """An argparse type: a number of that kind from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.50} is no {'whole ' if kind is int else ''}number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text:.50} is not from {low} to {high}")
        return value
    return parse


def device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    name = text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.zeros(1, device=name)
        found.item()            # not on "meta", which keeps no numbers
        return found.device
    except Exception as e:      # each backend raises its own
        why = " ".join(str(e).split())[:200]
        raise argparse.ArgumentTypeError(f"{name!r:.50} is not usable here ({why}); try cpu") from e


def out_of_memory(e: RuntimeError) -> bool:
    """A GPU's allocator has a class of its own for this; the CPU's raises a plain RuntimeError."""
    return isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a Falcon-Mamba.")
    add = parser.add_argument
    add("--model", default="tiiuae/falcon-mamba-7b-pre-decay", help="folder or Hugging Face hub id (default %(default)s)")
    add("--prompt", action="append", metavar="TEXT", help="text to continue, - for standard input; repeat for a batch")
    add("--max-new-tokens", type=number(int, 0, 10**9), default=200, help="default %(default)s")
    add("--temperature", type=number(float, 0, 1e6), default=0.8, help="0 takes the likeliest (default %(default)s)")
    add("--top-k", type=number(int, 1, 10**9), help="draw from the k likeliest tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from the likeliest tokens that hold this much probability")
    add("--seed", type=number(int, 0, 2**63 - 1), help="the same seed, the same text (default: a new one)")
    add("--num-samples", type=number(int, 1, 10**6), default=1, help="continuations of each prompt (default 1)")
    add("--device", type=device, default="auto", help="cpu, cuda, cuda:1, mps ... (default: cuda if there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto is the checkpoint's own")
    add("--quantize", choices=["nf4"], help="4-bit weights, through the package bitsandbytes")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster to write")
    add("--save-state", type=Path, metavar="FILE", help="where to keep the state after the text")
    add("--load-state", type=Path, metavar="FILE", help="a kept state to go on from")
    args = parser.parse_args()
    if not args.prompt and not args.load_state:
        parser.error("give a --prompt, or a --load-state to go on from")
    if (args.save_state or args.load_state) and len(args.prompt or [""]) > 1:
        parser.error(f"a state file holds one text, but there are {len(args.prompt)} prompts")
    if args.save_state and args.num_samples > 1:
        parser.error(f"a state file holds one text, but --num-samples is {args.num_samples}")
    if args.compile and args.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("--compile needs a C++ compiler for the CPU, and there is no g++ here")
    if args.save_state and (args.save_state.is_dir() or not args.save_state.parent.is_dir()):
        parser.error(f"--save-state {args.save_state} is a folder, or in a folder that does not exist")
    args.seed = torch.seed() % 2**63 if args.seed is None else args.seed
    try:
        run(args)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        sys.exit(f"sample.py: {args.device} is out of memory ({str(e).splitlines()[0]}); try --quantize nf4")
    except (ValueError, OSError) as e:
        sys.exit(f"sample.py: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
