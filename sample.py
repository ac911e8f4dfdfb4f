"""Text from a Falcon-Mamba: read a prompt, then write token after token. After mamba.py; train.py is next.

    python sample.py --model out --prompt "def "              what `python train.py` made
    python sample.py --prompt "Hello today" --temperature 0   the published 7B: 15 GB to download and to hold

Reading and writing are the same call, model(tokens, state), with many tokens or with one. The state has a
fixed size, so the millionth token costs what the first did, and a file of it keeps all that the model knows
of a prompt, however long. The text goes to standard output, everything else to standard error.
"""
import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from mamba import Block, Mamba, State, find
from scan import default_backend

PIECE = 512     # tokens of a prompt read at a time: enough to keep the matrix products busy, and memory small


@torch.inference_mode()
def generate(model: Mamba, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, stop: int | None = None,
             generator: torch.Generator | None = None, state: State | None = None,
             reset: Tensor | None = None) -> Iterator[Tensor]:
    """Read tokens (b, l) from `state`, then yield, up to max_new_tokens times, each row's next token, (b,).

    Temperature 0 takes the likeliest token. Otherwise one is drawn from softmax(logits / temperature), from
    the top_k likeliest and from the smallest set of them that holds top_p of the probability. A row that has
    yielded `stop` goes on yielding it; when all have, generation ends. reset (b, l) is as in Mamba.forward:
    padding on the left is a document. In the end `yield from generate(...)` gives the state after all tokens
    but the last. ValueError if there is no token to read, or if logits are not finite.
    """
    if tokens.shape[1] == 0:
        raise ValueError("there is no token to read; a prompt has at least one")
    last = tokens.shape[1] - 1      # the prompt's last token is read below, like each new token after it
    for i in range(0, last, PIECE):
        now = slice(i, min(i + PIECE, last))
        _, state = model(tokens[:, now], state, None if reset is None else reset[:, now], last_only=True)
    token, done = tokens[:, last], torch.zeros_like(tokens[:, last], dtype=torch.bool)      # (b,) each
    step = partial(model, reset=None if reset is None else reset[:, last:])     # it may start a document
    for i in range(max_new_tokens):
        if i == 1:      # no new token does, so all further steps are alike, and can be recorded
            step = replayed(model, state) if tokens.is_cuda else model
        logits, state = step(token[:, None], state)
        token = choose(logits[:, 0], temperature, top_k, top_p, generator)
        if stop is not None:
            token = token.masked_fill(done, stop)
            done |= token == stop
        yield token
        if done.all():
            break
    return state


def replayed(model: Mamba, state: State):
    """model(token, state) for one token a row, as a CUDA graph: one launch, not a thousand.

    A graph is a recording of kernels, which replays on the memory that it was recorded with. So a step reads
    its token from a buffer and overwrites `state`, whatever it is given. We have not run this on a GPU yet.
    """
    with torch.cuda.device(state.ssm[0].device):
        token = torch.zeros(len(state.ssm[0]), 1, dtype=torch.int64, device="cuda")
        side = torch.cuda.Stream()      # PyTorch asks for a warm-up on a stream of its own before a capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(token, state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = model(token, state)
            for old, new in zip([*state.conv, *state.ssm], [*after.conv, *after.ssm]):
                old.copy_(new)

    def step(new_token, _):
        token.copy_(new_token)
        graph.replay()
        return logits, state
    return step


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (b, vocab_size) -> (b,)."""
    best = logits.max(-1, keepdim=True)
    if not best.values.isfinite().all():
        raise ValueError("the logits are not finite: the weights are damaged, or too large for --dtype fp16")
    if temperature < torch.finfo(logits.dtype).tiny:          # 0, or so small that fp32 would take it for 0
        return best.indices[:, 0]
    logits = (logits - best.values) / temperature             # the likeliest at 0: no temperature overflows
    order = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if top_k is not None or top_p is not None:                # (b, k) from here on, the likeliest first
        logits, order = logits.topk(min(top_k or 2**31, logits.shape[-1]))
    # Inverse transform sampling: a uniform number falls into one token's piece of the summed distribution. It
    # takes one random number; torch.multinomial draws one for every token, and takes several times as long.
    ends = logits.softmax(-1).cumsum(-1)                      # where each token's piece ends
    total = ends[:, -1:]                                      # (b, 1): 1, but for rounding
    if top_p is not None:
        total = ends.gather(-1, torch.searchsorted(ends, total * top_p))
    uniform = total * torch.rand(total.shape, generator=generator, device=total.device)     # always < total
    drawn = torch.searchsorted(ends, uniform, right=True)     # (b, 1)
    return order.gather(-1, drawn)[:, 0]


@contextmanager
def new_file(path: Path):
    """A file to write beside `path`, which becomes `path` if the block ends well and is deleted if not."""
    whole = Path(os.path.realpath(path))        # of a link, what it stands for
    new = whole.with_name(whole.name + ".partial")
    try:
        if whole.exists() and not whole.is_file():
            raise OSError("there is something that is no file")
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, whole)
    except OSError as e:        # which does not say where, if the disk is full
        raise OSError(f"cannot write {path}: {e}") from e
    finally:
        new.unlink(missing_ok=True)


def packed(state: State, last: int) -> dict[str, Tensor]:
    """What a state file holds: one text's state, and the text's last token, which the state has not read."""
    return {"conv": torch.stack(state.conv), "ssm": torch.stack(state.ssm), "last": torch.tensor([last])}


def load_state(path: Path, model: Mamba, batch: int) -> tuple[State, int]:
    """Read a state file -> the state, on the model's device and once for each of `batch` rows, and `last`."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is not a state file: {str(e)!r:.300}") from e
    wanted = packed(model.blank_state(1), 0)
    has, needs = (      # all floats of 16 bits or more are alike, as --dtype may differ
        {name: f"{[*v.shape]} of {'floats' if v.is_floating_point() and v.itemsize > 1 else v.dtype}"
         for name, v in sorted(tensors.items())} for tensors in (found, wanted))
    if has != needs:
        raise ValueError(f"{path} holds {str(has):.200}, but a state of this model is {needs}")
    conv, ssm, last = (found[name].to(like.device, like.dtype) for name, like in wanted.items())
    if not (conv.isfinite().all() and ssm.isfinite().all() and 0 <= last < model.config.vocab_size):
        raise ValueError(f"{path} is damaged: some numbers are not finite, or its last token, "
                         f"{last.item()}, is none of the {model.config.vocab_size}")
    return State([*conv.repeat(1, batch, 1, 1)], [*ssm.repeat(1, batch, 1, 1)]), last.item()


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens; warns where the tokenizer has none for some of its bytes and leaves them out."""
    if prompt.encode(errors="ignore").decode() != prompt:       # Python keeps other bytes as lone surrogates
        raise ValueError("the prompt is not UTF-8 text")
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    if lost := "".join(sorted(set(prompt) - set(tokenizer.decode(tokens, skip_special_tokens=False)))):
        print(f"warning: the tokenizer has no token for some of the prompt ({lost!r:.60}) and drops it",
              file=sys.stderr)
    return tokens


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:      # the library raises plain Exception
        raise ValueError(f"cannot read the tokenizer {path}: {str(e)!r:.300}") from e
    tokenizer.no_truncation()   # a file may ask for these two
    tokenizer.no_padding()
    return tokenizer


def end_tokens(folder, tokenizer):
    return [11]


def vocabulary(tokenizer: Tokenizer) -> int:
    """The size a model needs for all its tokens: they may be numbered with gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def nf4(device: torch.device):
    """A function from a linear layer to the same one in 4-bit "normal floats" (QLoRA, arXiv 2305.14314)."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError("--quantize needs the package bitsandbytes: pip install bitsandbytes") from None

    def quantized(linear):
        small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                                  compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
        small.bias = linear.bias
        return small
    return quantized


def compile_blocks() -> None:
    """Let torch.compile fuse what a block does to one token: once, for all layers. Prompts run as before.

    The compiled code takes a block's weights as arguments, so one serves all. Before each call it would check
    that shapes and types are still those it was made for; in one run they are, and the check is left out.
    """
    unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    eager, fused = Block.forward, torch.compile(Block.forward, dynamic=False, options=unchecked)

    def forward(self, stream, past, h0, reset):
        step = fused if stream.shape[1] == 1 and reset is None else eager
        return step(self, stream, past, h0, reset)
    Block.forward = forward


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
    """Load, read, write, and report on standard error."""
    typed = sys.stdin.read().removesuffix("\n") if "-" in args.prompt and sys.stdin else ""     # None: closed
    prompts = [typed if prompt == "-" else prompt for prompt in args.prompt]
    if not args.load_state and not all(prompts):
        raise ValueError("without --load-state, each --prompt needs some text, and so does standard input")
    start, folder = time.perf_counter(), find(args.model)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    model = Mamba.from_pretrained(folder, args.device, dtype, nf4(args.device) if args.quantize else None)
    if (size := vocabulary(tokenizer)) > model.config.vocab_size:
        raise ValueError(f"{folder}'s tokenizer has {size} tokens, its model {model.config.vocab_size}")
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    state = model.blank_state(len(rows) * args.num_samples)
    if args.load_state:
        state, last = load_state(args.load_state, model, args.num_samples)
        rows[0].insert(0, last)
    if not all(rows):
        raise ValueError("the tokenizer has no token for any character of a prompt")
    if args.compile:
        compile_blocks()
    weights = sum(p.nbytes for p in model.parameters())
    print(f"{args.model}: {weights / 1e9:.3g} GB of weights on {args.device}, {model.lm_head.weight.dtype}; "
          f"scan: {default_backend(args.device, PIECE)} for prompts, {default_backend(args.device, 1)} for "
          f"tokens; loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)

    prompts, rows = prompts * args.num_samples, rows * args.num_samples
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=args.device)
    starts = torch.tensor([[longest - len(row)] for row in rows], device=args.device)
    # Each prompt is a document, and so is the padding on its left.
    reset = torch.arange(longest, device=args.device) == starts if starts.any() else None
    stop = tokenizer.token_to_id("<|endoftext|>")
    stop = model.config.eos_token_id if stop is None else stop
    generator = torch.Generator(args.device).manual_seed(args.seed)

    def steps():
        nonlocal state
        state = yield from generate(model, tokens, args.max_new_tokens, args.temperature, args.top_k,
                                    args.top_p, stop, generator, state, reset)
    made, times = write(steps(), tokenizer, prompts, stop)

    if args.save_state:
        with new_file(args.save_state) as file:
            file.write(save(packed(state, made[-1][0] if made else rows[0][-1])))
    if not model.config.tie_embeddings:     # of the embeddings a token reads one row, not all
        weights -= model.backbone.embeddings.weight.nbytes
    report = f"seed {args.seed}; {len(times) - 1} steps"
    if len(times) > 1:
        report += f"; prefill {sum(map(len, rows)) / (times[1] - times[0]):.1f} tokens/s"
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        report += f"; decode {rate * len(rows):.1f} tokens/s, {rate * weights / 1e9:.1f} GB/s of weights"
    print(f"{report}; at most {peak_memory(args.device)}", file=sys.stderr)


def write(steps: Iterator[Tensor], tokenizer: Tokenizer, prompts: list[str],
          stop: int) -> tuple[list[list[int]], list[float]]:
    """Print the first text as it is made and the others after it -> the tokens of each step, and the times.

    A character is printed once all of its bytes are there.
    """
    decoders, texts = [DecodeStream() for _ in prompts], list(prompts)
    made, times = [], [time.perf_counter()]
    print(texts[0], end="", flush=True)
    for step in steps:
        made.append(step.tolist())
        times.append(time.perf_counter())
        pieces = ["" if token == stop else decoder.step(tokenizer, token) or ""
                  for decoder, token in zip(decoders, made[-1])]
        print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces)]
    print("", *texts[1:], sep="\n")
    return made, times


def number(kind: type, low: float, high: float):
    """An argparse type: a number of that kind from low to high."""
    def parse(text):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r:.50} is no {whole}number from {low} to {high}")
    return parse


def device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    name = text if text != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.zeros(1, device=name)
        found.item()            # not on "meta", which keeps no numbers
        if found.is_cuda:       # where streams, graphs and FSDP look
            torch.cuda.set_device(found.device)
            if default_backend(found.device, 1) == "triton":
                import triton
                triton.runtime.driver.active.utils      # built here, if not yet: it takes a C compiler
        return found.device
    except Exception as e:      # each backend raises its own
        raise argparse.ArgumentTypeError(f"{name!r:.50} is not usable here ({shorten(str(e), 200)}); "
                                         "try cpu") from e


@contextmanager
def plainly(program: str, remedy: str):
    """A decorator: what a user can help ends the program in one sentence, other faults in a traceback."""
    sys.stderr = sys.stderr or open(os.devnull, "w")            # None if it was closed
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):                      # Windows has another encoding for pipes
            stream.reconfigure(encoding="utf-8")
    try:
        yield
    except RuntimeError as e:   # a GPU's allocator has a class of its own for this, the CPU's has not
        if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
            raise
        sys.exit(f"{program}: out of memory ({str(e).splitlines()[0]}); try {remedy}")
    except (ValueError, OSError) as e:
        sys.exit(f"{program}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


@plainly("sample.py", "--quantize nf4")
def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text with a Falcon-Mamba.")
    add = parser.add_argument
    add("--model", default="tiiuae/falcon-mamba-7b-pre-decay",
        help="folder or Hugging Face hub id (default %(default)s)")
    add("--prompt", action="append", metavar="TEXT",
        help="text to continue, - for standard input; repeat for a batch")
    add("--max-new-tokens", type=number(int, 0, 10**9), default=200, help="default %(default)s")
    add("--temperature", type=number(float, 0, 1e6), default=0.8,
        help="0 takes the likeliest (default %(default)s)")
    add("--top-k", type=number(int, 1, 10**9), help="draw from the k likeliest tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from the likeliest that hold this probability")
    add("--seed", type=number(int, 0, 2**63 - 1), default=torch.seed() % 2**63,
        help="the same seed, the same text (default: a new one)")
    add("--num-samples", type=number(int, 1, 10**6), default=1, help="texts from each prompt (default 1)")
    add("--device", type=device, default="auto", help="cpu, cuda, mps ... (default: cuda if there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: as stored")
    add("--quantize", choices=["nf4"], help="4-bit weights, through the package bitsandbytes")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster to write")
    add("--save-state", type=Path, metavar="FILE", help="where to keep the state after the text")
    add("--load-state", type=Path, metavar="FILE", help="a kept state to go on from")
    args = parser.parse_args()
    args.prompt = args.prompt or [""]
    prompts = len(args.prompt)
    if args.load_state and prompts > 1 or args.save_state and prompts * args.num_samples > 1:
        parser.error(f"a state file holds one text, but there are {prompts} prompts and --num-samples is "
                     f"{args.num_samples}")
    if args.save_state:
        path = Path(os.path.realpath(args.save_state))
        if path.exists() and not path.is_file() or not os.access(f"{path.parent}/", os.W_OK):
            parser.error(f"--save-state {args.save_state} is no file, or in no folder that can be written to")
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if args.compile and args.device.type == "cpu" and os.name == "posix" and not shutil.which(compiler):
        parser.error(f"--compile needs a C++ compiler for the CPU, and there is no {compiler} here")
    try:
        run(args)
    except BrokenPipeError:     # whoever read the text has had enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.save_state:
            raise OSError(f"the text's reader left early; {args.save_state} is not written") from None


if __name__ == "__main__":
    main()
