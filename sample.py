"""Text from a Falcon-Mamba: read a prompt, then write token after token.

    python sample.py --model out --prompt "def "              what `python train.py` made
    python sample.py --prompt "Hello today" --temperature 0   the published 7B: a download of 15 GB

Reading and writing are the same call, model(tokens, state), with many tokens or with one. The state
has a fixed size, so the millionth token costs what the first did. A file of it keeps all that the
model knows of a text. The text goes to standard output, all else to standard error.

Read mamba.py first; train.py is next. Sizes in the shape comments: b texts, l tokens of each.
"""
import argparse
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from threading import Event

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # before torch: see README, "It is slow"
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from mamba import Block, Mamba, State, find, read_json, write_file
from scan import default_backend

PIECE = 512     # tokens of a prompt read at a time: enough for full speed, and little memory
CUDA_PIECE = 4096       # the same on a GPU, where fewer would wait for their launches
SMALL = 10e6    # bytes of weights: with fewer, one thread is as fast, and waits for no other
RECENT = 16     # old tokens that are decoded with a new one, because its text depends on them
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

@torch.inference_mode()
def generate(model: Mamba, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None,
             stop: int | list[int] | None = None, generator: torch.Generator | None = None,
             state: State | None = None, reset: Tensor | None = None,
             interrupted: Event | None = None) -> Iterator[Tensor]:
    """Read tokens (b, l) from `state`, then yield one new token of each text, (b,), step by step.

    A text that has yielded a `stop` token goes on yielding it. Once all have, or `interrupted` is
    set, the steps end. reset (b, l) is true where a document starts, as in Mamba.forward.
    `yield from generate(...)` returns the last state, which has read all tokens but the last.
    """
    state = state.copy() if state else model.blank_state(len(tokens))
    # All tokens but the last are only read. The last is read in the loop below, like each new one.
    last = tokens.shape[1] - 1
    if last < 0:
        raise ValueError("there is no token to read; a prompt has at least one")
    piece = CUDA_PIECE if tokens.is_cuda else PIECE
    for begin in range(0, last, piece):
        end = min(begin + piece, last)
        starts = None if reset is None else reset[:, begin:end]
        _, state = model(tokens[:, begin:end], state, starts, last_only=True)
    if reset is not None:       # a document may start at the last token: blank what is before it
        for values in state.conv + state.ssm:
            values[reset[:, last]] = 0

    stops = torch.tensor([] if stop is None else stop, dtype=torch.int64)
    stops_there = stops.to(tokens.device)
    ended = torch.zeros_like(tokens[:, last], dtype=torch.bool)         # (b,)
    constants = model.constants()
    token = tokens[:, last].clone()             # (b,)

    def step():     # overwrites state, token and ended; a token that ended its text stays
        logits = model.step(token[:, None], state, constants)           # (b, 1, vocab_size)
        chosen = choose(logits[:, 0], temperature, top_k, top_p, generator)
        token.copy_(torch.where(ended, token, chosen))
        ended.logical_or_((token[:, None] == stops_there).any(-1))

    for i in range(max_new_tokens):
        if i == 1 and tokens.is_cuda:           # a recording cannot compile, as the first step did
            step = recorded(step, generator)
        step()
        made = token.to("cpu", copy=True)       # the only wait for a GPU; -1: see choose
        if made.lt(0).any():
            raise ValueError("the logits are not finite: the weights or the state are damaged, or "
                             "too large for --dtype")
        yield made
        if torch.isin(made, stops).all() or (interrupted and interrupted.is_set()):
            break
    with torch.inference_mode(False):   # autograd takes no tensor of that mode, but takes its copy
        return state.copy()

def recorded(step: Callable, generator: torch.Generator | None) -> Callable:
    """step() as a CUDA graph: one launch, not a thousand. We have not run this on a GPU yet.

    To record computes nothing. A replay uses the same memory, so step() changes tensors in place.
    """
    graph = torch.cuda.CUDAGraph()
    if generator:
        graph.register_generator_state(generator)   # else each replay would draw the same
    with torch.cuda.graph(graph):
        step()
    return graph.replay

def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (b, vocab_size) -> (b,), or -1 if they are not finite.

    Temperature 0 takes the likeliest. Else one is drawn from softmax(logits / temperature), of the
    top_k likeliest, and of the fewest of these that hold top_p of their probability.
    """
    finite = logits.isfinite().all(-1)                          # (b,)
    if temperature == 0:
        return torch.where(finite, logits.argmax(-1), -1)
    logits = logits - logits.amax(-1, keepdim=True)             # at most 0, so softmax is safe
    logits = logits / max(temperature, 1e-30)                   # in fp32 1e-46 is 0
    tokens = None
    if top_k or top_p:
        size = logits.shape[-1]
        logits, tokens = logits.topk(min(top_k or size, size))  # (b, k), the likeliest first
    probs = logits.softmax(-1)
    if top_p is not None:
        likelier = probs.cumsum(-1) - probs                     # what all likelier tokens hold
        probs = probs.masked_fill(likelier >= top_p, 0)
    # With times E_i drawn from Exp(1), p_i / E_i is the largest with probability p_i. This is how
    # torch.multinomial draws, but that waits for the GPU, which a recorded graph cannot.
    times = torch.empty_like(probs).exponential_(generator=generator)
    drawn = (probs / times).argmax(-1, keepdim=True)            # (b, 1)
    drawn = drawn if tokens is None else tokens.gather(-1, drawn)
    return torch.where(finite, drawn[:, 0], -1)

@dataclass
class Text:
    """Tokens as text, while they are made. The bytes of an unfinished character are held back.

    A token's text depends on those before it: a text's first word often loses its space. So new
    tokens are decoded after some old ones, whose text is cut off.
    """
    tokenizer: Tokenizer
    printed: list[int]          # the last tokens that were printed, at most RECENT
    unprinted: list[int]        # those that were not printed yet
    unread: list[int]           # those, printed or not, that the model has not read yet
    ended: bool = False

    def show(self) -> str:
        """The text of `unprinted`, or "" while it may end in half a character."""
        if not self.unprinted:
            return ""
        tokens = self.printed + self.unprinted
        before = self.tokenizer.decode(self.printed, skip_special_tokens=False)
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        # Some tokenizers, not Falcon's, have tokens of one byte, like <0xE2>. A wrong byte makes
        # U+FFFD of a whole run of them, even of what was right. So a run waits for its end.
        last = self.tokenizer.id_to_token(tokens[-1]) or ""
        is_half = text.endswith("\ufffd") or re.fullmatch("<0x..>", last)
        if is_half and not self.ended:
            return ""
        self.printed = tokens[-RECENT:]
        self.unprinted = []
        return text[len(before):]

def write(steps: Iterator[Tensor], texts: list[Text], stop: list[int], goes_on: bool):
    """Print the first text as it is made, then the others. With goes_on, half a character waits.

    Returns the times before the first step and after each, and the last state.
    """
    times = []
    while True:
        print(texts[0].show(), end="", flush=True)      # at first, the prompt
        times.append(time.perf_counter())
        try:
            tokens = next(steps).tolist()
        except StopIteration as end:    # it carries what the generator returns
            state = end.value
            break
        for text, token in zip(texts, tokens):
            text.unread = [token]
            if token in stop:           # it is not shown
                text.ended = True
            else:
                text.unprinted.append(token)
    for text in texts:
        text.ended = text.ended or not goes_on
        print(text.show(), flush=True)      # now, because at exit nobody catches a closed pipe
    return times, state

def read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises plain Exception
        raise ValueError(f"cannot read the tokenizer {path}: {str(error)!r:.300}") from error
    tokenizer.no_truncation()       # a file may ask for these two
    tokenizer.no_padding()
    tokenizer.post_processor = None     # it may put a token before a text; Falcon-Mamba has none
    return tokenizer

def vocabulary(tokenizer: Tokenizer) -> int:
    """The size a model needs for all its tokens: they may be numbered with gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)

def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens. Some tokenizers drop characters, so a prompt is shown as they read it."""
    prompt.encode()     # ValueError if it was typed in bytes that are not UTF-8
    return tokenizer.encode(prompt, add_special_tokens=False).ids

def end_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """What ends a text: <|endoftext|>, and what generation_config.json or config.json says."""
    ids = []
    for name in "config.json", "generation_config.json":
        if (folder / name).exists():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                ids = found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"{folder} has eos_token_id {ids!r:.50}, which must be numbers of tokens")
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        return ids
    # The pre-decay file says 0, transformers' default. There 0 is >>TITLE<<, which ends nothing.
    return [end, *(token for token in ids if token not in (0, end))]

def save_state(path: Path, state: State, text: Text) -> None:
    """Keep a text's state and its last tokens. The state has read all but the very last."""
    tokens = {"printed": text.printed, "unprinted": text.unprinted, "unread": text.unread[-1:]}
    tensors = {name: torch.tensor(ids, dtype=torch.int64) for name, ids in tokens.items()}
    tensors |= {"conv": torch.stack(state.conv), "ssm": torch.stack(state.ssm)}
    write_file(path, save(tensors))

def load_state(path: Path | None, model: Mamba, batch: int) -> tuple[State, list, list, list]:
    """A file's state, once for each of `batch` texts, and a Text's three lists of tokens."""
    state = model.blank_state(batch)
    if path is None:
        return state, [], [], []
    try:
        found = load_file(path)
        pairs = (state.conv, found["conv"]), (state.ssm, found["ssm"])
        tokens = [found[name].flatten().tolist() for name in ("printed", "unprinted", "unread")]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a state file: {str(error)!r:.300}") from error
    for layers, kept in pairs:
        needed = torch.stack(layers)[:, :1].shape
        if kept.shape != needed or not kept.is_floating_point():
            raise ValueError(f"{path} has a state of {[*kept.shape]} in {kept.dtype}, but this "
                             f"model needs {[*needed]} in floats")
        for layer, values in zip(layers, kept):
            layer.copy_(values)                                 # (b, ...) from (1, ...)
    for token in sum(tokens, []):
        if type(token) is not int or not 0 <= token < model.config.vocab_size:
            raise ValueError(f"{path} has a token that the model has not: {token}")
    return state, *tokens

# The command line.

def compile_blocks() -> None:
    """Let torch.compile fuse what a block does to one token, and on a GPU to a prompt's pieces.

    Compiled code takes a block's weights as arguments, so one serves all layers.
    """
    Block.step = torch.compile(Block.step, dynamic=False)
    eager = Block.forward
    fused = torch.compile(Block.forward, dynamic=False)

    def forward(self, stream, past, h, reset):
        whole_piece = stream.is_cuda and stream.shape[1] == CUDA_PIECE
        return (fused if whole_piece else eager)(self, stream, past, h, reset)
    Block.forward = forward

def keep_memory() -> None:
    """Let the C library keep what is freed, for the next block of that size.

    glibc gives large blocks back to the system, depending on where they lie. To get them anew, page
    by page, made a prompt take up to 1.6 times as long.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):            # other C libraries have none
            libc.mallopt(-1, 2**31 - 1)         # M_TRIM_THRESHOLD: free bytes at the heap's end
            libc.mallopt(-3, 2**25)             # M_MMAP_THRESHOLD: 32 MB, the most it takes

def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

def load(args: argparse.Namespace) -> tuple[Mamba, Tokenizer, list[int]]:
    """The model, its tokenizer, and the tokens that end a text."""
    begin = time.perf_counter()
    tell(f"loading {args.model}")
    folder = find(args.model)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    stop = end_tokens(folder, tokenizer)
    model = Mamba.from_pretrained(folder, args.device, DTYPES[args.dtype], bool(args.quantize))
    if vocabulary(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{folder}'s tokenizer has {vocabulary(tokenizer)} tokens, its model only "
                         f"{model.config.vocab_size}")
    weights = sum(p.nbytes for p in model.parameters())
    if args.device.type == "cpu" and weights < SMALL:
        torch.set_num_threads(1)
    dtype = model.backbone.embeddings.weight.dtype
    tell(f"{args.model}: {weights / 1e9:.3g} GB of weights on {args.device}, {dtype}; "
         f"scan: {default_backend(args.device, PIECE)} for prompts, "
         f"{default_backend(args.device, 1)} for tokens; "
         f"loaded in {time.perf_counter() - begin:.1f} s; seed {args.seed}")
    return model, tokenizer, stop

def run(args: argparse.Namespace) -> None:
    prompts = args.prompt * args.num_samples
    if "-" in prompts:
        typed = sys.stdin.read().removesuffix("\n") if sys.stdin else ""        # None: closed
        prompts = [typed if prompt == "-" else prompt for prompt in prompts]
    if not args.load_state and not all(prompts):
        raise ValueError("without --load-state, each --prompt needs text; so does standard input")
    model, tokenizer, stop = load(args)
    keep_memory()       # from here on: what was freed in loading is not needed again
    state, printed, unprinted, unread = load_state(args.load_state, model, len(prompts))
    texts = []
    for prompt in prompts:
        tokens = encode(tokenizer, prompt)
        texts.append(Text(tokenizer, printed, unprinted + tokens, unread + tokens))
    rows = [text.unread for text in texts]
    if not all(rows):
        raise ValueError("the tokenizer has no token for any character of a prompt")
    if args.show_steps:
        from tests.draw import draw_steps
        draw_steps(model, tokenizer, rows[0], args.show_steps)
        return
    # Shorter prompts are padded on the left. A reset at their first token hides the padding.
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=args.device)
    first = torch.tensor([[length - len(row)] for row in rows], device=args.device)         # (b, 1)
    reset = torch.arange(length, device=args.device) == first if first.any() else None      # (b, l)
    if length > PIECE:
        tell(f"reading {length} tokens")
    if args.compile:
        tell("compiling for up to a minute, at the first tokens")
        compile_blocks()

    interrupted = Event()

    def on_interrupt(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a second one ends at once
    if args.save_state:     # Ctrl-C then waits for a whole token, because its state is to be kept
        signal.signal(signal.SIGINT, on_interrupt)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    steps = generate(model, tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                     stop, generator, state, reset, interrupted)
    times, state = write(steps, texts, stop, goes_on=bool(args.save_state))
    if args.save_state:
        save_state(args.save_state, state, texts[0])
    report(times, sum(map(len, rows)), len(rows), args.device)
    if interrupted.is_set():
        sys.exit(130)

def report(times: list[float], read: int, texts: int, device: torch.device) -> None:
    """How fast the prompts were read and the texts written, and in how much memory."""
    steps = len(times) - 1
    facts = f"{steps} steps"
    if steps > 0:
        facts += f"; prefill {read / (times[1] - times[0]):.1f} tokens/s"
    if steps > 1:
        facts += f"; decode {(steps - 1) * texts / (times[-1] - times[1]):.1f} tokens/s"
    if device.type == "cuda":
        facts += f"; at most {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB of GPU memory"
    elif sys.platform == "linux":
        import resource     # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        facts += f"; at most {peak * 1024 / 1e9:.2f} GB of memory"
    tell(facts)

def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of that kind from low to high."""
    def parse(text):
        value = kind(text)      # argparse itself tells of a ValueError
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r:.50} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__
    return parse

def new_file(text: str) -> Path:
    """An argparse type: a file that can be made or replaced."""
    path = Path(text)
    is_other = os.path.exists(path) and not os.path.isfile(path)
    if is_other or not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"{text!r} is no file, or in no folder")
    return path

def device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.zeros(1, device=text)
        found.item()            # fails on "meta", which keeps no numbers
        return found.device
    except Exception as error:  # each backend raises its own
        why = shorten(str(error), 200)
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not usable here ({why}); try cpu")

def main() -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")        # None: closed
    for stream in sys.stdin, sys.stdout:
        if hasattr(stream, "reconfigure"):                  # Windows has another encoding for pipes
            stream.reconfigure(encoding="utf-8", errors=stream.errors)
    parser = argparse.ArgumentParser(description="Continue a text with a Falcon-Mamba.")
    add = parser.add_argument
    add("--model", default="tiiuae/falcon-mamba-7b-pre-decay",
        help="folder or Hugging Face hub id (default %(default)s)")
    add("--prompt", action="append", help="text to go on from; -: standard input; again: a batch")
    add("--max-new-tokens", type=number(int, 0, 10**9), default=200, help="default %(default)s")
    add("--temperature", type=number(float, 0, 1e6), default=0.8, help="0: likeliest (default 0.8)")
    add("--top-k", type=number(int, 1, 10**9), help="draw from the k likeliest tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from the likeliest that hold this much")
    add("--seed", type=number(int, 0, 2**63 - 1), default=time.time_ns(),
        help="the same seed and flags write the same text (default: a new one, printed)")
    add("--num-samples", type=number(int, 1, 10**6), default=1, help="texts a prompt (default 1)")
    add("--device", type=device, default="auto", help="cpu, cuda, mps ... (default: a GPU, or cpu)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: as stored")
    add("--quantize", choices=["int4"], help="4 bits a weight: a third of bf16's memory, inexact")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster to write")
    add("--save-state", type=new_file, metavar="FILE", help="keep the state after the text")
    add("--load-state", type=Path, metavar="FILE", help="a kept state to go on from")
    add("--show-steps", type=new_file, metavar="FILE.svg",
        help="write nothing, but draw how long each token of the prompt lasts in each layer")
    args = parser.parse_args()
    args.prompt = args.prompt or [""]
    texts = len(args.prompt) * args.num_samples
    if (args.load_state and len(args.prompt) > 1) or (args.save_state and texts > 1):
        parser.error(f"a state file holds one text, but there are {len(args.prompt)} prompts and "
                     f"--num-samples is {args.num_samples}")
    if args.show_steps and (args.load_state or texts > 1):
        parser.error("--show-steps draws a single prompt, from its beginning")
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.stdout = None       # or Python would try once more to write what it holds
        if isinstance(error, BrokenPipeError) and not args.save_state:
            return              # whoever read the text had enough (`| head`)
        sys.exit(f"sample.py: {error}")
    except RuntimeError as error:
        words = str(error)
        if not re.search(r"out of memory|can't allocate memory|C(\+\+)? compiler", words):
            raise
        advice = "" if "compiler" in words else "; try --quantize int4"
        sys.exit(f"sample.py: {words.splitlines()[0]}{advice}")
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
