"""Text from a Falcon-Mamba: read a prompt, then write token after token.

    python sample.py --model out --prompt "def "              what `python train.py` made
    python sample.py --prompt "Hello today" --temperature 0   the published 7B: a download of 15 GB

Reading and writing are the same call, model(tokens, state), with many tokens or with one. The state
has a fixed size. So the millionth token costs what the first did, and a small file of the state keeps
all that the model knows of a text. The text goes to standard output, all else to standard error.

Read mamba.py first; train.py is next. Sizes in the shape comments: b texts, l tokens of each.
"""
import argparse
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor

from mamba import Block, Mamba, State, find, read_json, replace_file
from scan import default_backend

PIECE = 512     # tokens of a prompt read at a time: enough for full speed, and little memory
SMALL = 10e6    # bytes of weights: with fewer, one thread is as fast, and needs not wait for another
TAIL = 16       # tokens that are decoded again with the next ones, whose text may depend on them
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.inference_mode()
def generate(model: Mamba, tokens: Tensor, max_new_tokens: int, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None,
             stop: int | list[int] | None = None, generator: torch.Generator | None = None,
             state: State | None = None, reset: Tensor | None = None,
             interrupted: Event | None = None) -> Iterator[Tensor]:
    """Read tokens (b, l) from `state`, then yield one new token of each text, (b,), again and again.

    choose() says how a token is chosen. A text that has yielded a `stop` token goes on yielding it.
    Generation ends after max_new_tokens, or when all texts have stopped, or once `interrupted` is set.
    reset (b, l) is true where a document starts, as in Mamba.forward; padding on the left is one.
    `yield from generate(...)` returns the last state. It has read all tokens but the last.
    """
    length = tokens.shape[1]
    if length == 0:
        raise ValueError("there is no token to read; a prompt has at least one")
    state = state or model.blank_state(len(tokens))
    # All tokens but the last are only read. The last is read in the loop below, like each new one.
    for begin in range(0, length - 1, PIECE):
        end = min(begin + PIECE, length - 1)
        starts = None if reset is None else reset[:, begin:end]
        _, state = model(tokens[:, begin:end], state, starts, last_only=True)

    stops = torch.tensor([] if stop is None else stop, dtype=torch.int64, device=tokens.device)
    token = tokens[:, -1]                                       # (b,)
    starts = None if reset is None else reset[:, -1:]           # (b, 1)
    ended = torch.zeros_like(token, dtype=torch.bool)           # (b,)
    step = model
    for i in range(max_new_tokens):
        if i == 1:
            starts = None           # no new token starts a document
            if tokens.is_cuda:      # from here on all steps are alike, so one can be recorded
                step = replayed(model, state)
        logits, state = step(token[:, None], state, starts)     # (b, 1, vocab_size)
        chosen = choose(logits[:, 0], temperature, top_k, top_p, generator)
        token = torch.where(ended, token, chosen)
        ended = torch.isin(token, stops)
        yield token
        if ended.all() or (interrupted and interrupted.is_set()):
            break
    with torch.inference_mode(False):       # tensors made in this mode cannot be differentiated through
        conv = [layer.clone() for layer in state.conv]
        ssm = [layer.clone() for layer in state.ssm]
    return State(conv, ssm)


def replayed(model: Mamba, state: State):
    """model(token, state) for one token a text, as a CUDA graph: one launch, not a thousand.

    A graph is a recording of kernels. It replays on the memory that it was recorded with. So a step
    copies its token into a buffer and overwrites `state`. We have not run this on a GPU yet.
    """
    with torch.cuda.device(state.ssm[0].device):
        token = torch.zeros(len(state.ssm[0]), 1, dtype=torch.int64, device="cuda")
        side = torch.cuda.Stream()      # PyTorch asks for a warm-up on another stream first
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(token, state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = model(token, state)
            for old, new in zip([*state.conv, *state.ssm], [*after.conv, *after.ssm]):
                old.copy_(new)

    def step(new_token, _state, _reset):
        token.copy_(new_token)
        graph.replay()
        return logits, state
    return step


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator | None) -> Tensor:
    """One token for each row of logits (b, vocab_size) -> (b,).

    Temperature 0 takes the likeliest. Otherwise one is drawn from softmax(logits / temperature): from
    the top_k likeliest, and from the fewest of these that hold top_p of their probability.
    """
    best = logits.max(-1, keepdim=True)     # NaN if there is one
    if not best.values.isfinite().all():
        raise ValueError("the logits are not finite: the weights are damaged or too large for --dtype")
    if temperature < torch.finfo(logits.dtype).tiny:            # which a tensor takes for 0
        return best.indices[:, 0]
    logits = (logits - best.values) / temperature               # at most 0, so softmax is safe
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    size = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k or size, size))      # (b, k), the likeliest first
    probs = logits.softmax(-1)
    if top_p is not None:
        likelier = probs.cumsum(-1) - probs                     # what all likelier tokens hold
        probs = probs.masked_fill(likelier >= top_p, 0)
    drawn = torch.multinomial(probs, 1, generator=generator)    # (b, 1)
    return tokens.gather(-1, drawn)[:, 0]


class Text:
    """A text that grows by tokens. What is no character yet waits.

    The pieces joined are what the tokenizer makes of all tokens at once. What it makes of one depends
    on those before it: often the first word of a text loses its space. So they are decoded together.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str,
                 shown: list[int] = [], waiting: list[int] = []):
        """Begin with a prompt, or go on from what another run has shown and what it has not."""
        self.tokenizer = tokenizer
        self.shown = [*shown]           # the last tokens that were shown
        self.waiting = [*waiting]       # the tokens after them
        self.pieces = []
        if prompt:      # shown as it was typed, which its tokens may not be
            self.pieces = [self.rest(), prompt]
            self.shown = tokenizer.encode(prompt, add_special_tokens=False).ids[-TAIL:]

    def add(self, token: int) -> str:
        """One more token -> the text that can be shown now."""
        self.waiting.append(token)
        # Some tokenizers have a token <0xE2> for that byte. In a run of such tokens one wrong byte
        # spoils them all, so a run waits for its end. Others make U+FFFD of half a character.
        is_byte = re.fullmatch("<0x..>", self.tokenizer.id_to_token(token) or "")
        if is_byte or self.decode(self.waiting).endswith("\ufffd"):
            return ""
        return self.rest()

    def rest(self) -> str:
        """The text of all that waits, with U+FFFD for what is no character."""
        before = self.decode(self.shown)
        tokens = self.shown + self.waiting
        self.shown = tokens[-TAIL:]
        self.waiting = []
        return self.decode(tokens)[len(before):]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)


def write(steps: Iterator[Tensor], tokenizer: Tokenizer, prompts: list[str], stop: list[int],
          texts: list[Text] | None = None, goes_on: bool = False) -> tuple[list, list[float], State]:
    """Print the first text as it is made, and the others after it.

    `texts` are the prompts' unless given. If a text goes on in another run, what is no character yet
    is left to that. Returns each step's tokens, the times at first and after each, and the last state.
    """
    texts = texts or [Text(tokenizer, prompt) for prompt in prompts]
    made = []
    times = [time.perf_counter()]
    print("".join(texts[0].pieces), end="", flush=True)
    while True:
        try:
            made.append(next(steps).tolist())
        except StopIteration as end:
            state = end.value
            break
        times.append(time.perf_counter())
        for text, token in zip(texts, made[-1]):
            piece = text.rest() if token in stop else text.add(token)
            text.pieces.append(piece)
        print(texts[0].pieces[-1], end="", flush=True)
    for text in texts:
        text.pieces.append("" if goes_on else text.rest())
    print(texts[0].pieces[-1], flush=True)
    for text in texts[1:]:
        print("".join(text.pieces), flush=True)
    return made, times, state


def save_state(path: Path, state: State, last: int, text: Text) -> None:
    """Keep a text's state, its last token, which the state has not read, and what is to be shown."""
    tensors = {"conv": torch.stack(state.conv), "ssm": torch.stack(state.ssm)}
    for name, tokens in ("last", [last]), ("shown", text.shown), ("waiting", text.waiting):
        tensors[name] = torch.tensor(tokens, dtype=torch.int64)
    new = path.with_name(path.name + ".partial")
    try:
        new.write_bytes(save(tensors))
        replace_file(new, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def load_state(path: Path, model: Mamba, batch: int) -> tuple[State, dict[str, list[int]]]:
    """A file's state, once for each of `batch` texts, and its tokens: "last", "shown", "waiting"."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not a state file: {str(error)!r:.300}") from error
    if not {"conv", "ssm", "last"} <= found.keys():
        raise ValueError(f"{path} is not a state file: it holds {str([*found])!r:.200}")
    state = model.blank_state(batch)
    for name, layers in ("conv", state.conv), ("ssm", state.ssm):
        tensor = found[name]
        needed = [len(layers), 1, *layers[0].shape[1:]]
        is_float = tensor.is_floating_point() and tensor.itemsize > 1       # 8 bits would be too few
        if [*tensor.shape] != needed or not is_float:
            raise ValueError(f"{path} has {name} of {[*tensor.shape]} in {tensor.dtype}, "
                             f"but this model needs {needed} in floats")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path} is damaged: not all numbers of {name} are finite")
        for layer, values in zip(layers, tensor):
            layer.copy_(values)                                 # (b, ...) from (1, ...)
    tokens = {}
    size = model.config.vocab_size
    none = torch.zeros(0, dtype=torch.int64)
    for name in "last", "shown", "waiting":
        values = found.get(name, none)      # former versions kept the first only
        is_list = values.dtype == torch.int64 and values.dim() == 1
        if not is_list or (name == "last" and len(values) != 1):
            raise ValueError(f"{path} has {name} of {[*values.shape]} in {values.dtype}, "
                             "but needs a list of tokens in torch.int64, and one that is last")
        if values.lt(0).any() or values.ge(size).any():
            raise ValueError(f"{path} is damaged: {name} has tokens that are not from 0 to {size - 1}: "
                             f"{values.tolist()!r:.200}")
        tokens[name] = values.tolist()
    return state, tokens


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises plain Exception
        raise ValueError(f"cannot read the tokenizer {path}: {str(error)!r:.300}") from error
    tokenizer.no_truncation()       # a file may ask for these two
    tokenizer.no_padding()
    tokenizer.post_processor = None     # or it adds a token at the front, where Falcon-Mamba has none
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> int:
    """The size a model needs for all its tokens: they may be numbered with gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens. Warns of characters for which there is none, because they are left out."""
    if prompt.encode(errors="ignore").decode() != prompt:       # Python keeps other bytes as surrogates
        raise ValueError("the prompt is not UTF-8 text")
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
    lost = set(prompt) - set(tokenizer.decode(tokens, skip_special_tokens=False))
    if lost:
        tell(f"warning: the tokenizer has no token for {''.join(sorted(lost))!r:.60} and drops it")
    return tokens


def end_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: generation_config.json's, or else config.json's, and <|endoftext|>."""
    ids = None
    for name in "generation_config.json", "config.json":
        if ids is None and (folder / name).exists():
            ids = read_json(folder / name).get("eos_token_id")
    if ids is None:
        ids = []
    if not isinstance(ids, list):
        ids = [ids]
    for token in ids:
        if type(token) is not int:
            raise ValueError(f"{folder} has eos_token_id {token!r:.50}, which is no token's number")
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        return ids
    # 0 is only transformers' default: published files have it although their texts end otherwise.
    return [end, *(token for token in ids if token not in (0, end))]


def compile_blocks() -> None:
    """Let torch.compile fuse what a block does to one token. Prompts run as before.

    Compiled code takes a block's weights as arguments, so one serves all layers. Before each call it
    checks, in 0.015 ms, that shapes and types are those it was made for. Others are compiled anew.
    """
    eager = Block.forward
    fused = torch.compile(Block.forward, dynamic=False)

    def forward(self, stream, past, h0, reset):
        step = fused if stream.shape[1] == 1 and reset is None else eager
        return step(self, stream, past, h0, reset)
    Block.forward = forward


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
    size = vocabulary(tokenizer)
    if size > model.config.vocab_size:
        raise ValueError(f"{folder}'s tokenizer has {size} tokens, its model {model.config.vocab_size}")
    weights = sum(p.nbytes for p in model.parameters())
    if args.device.type == "cpu" and weights < SMALL:
        torch.set_num_threads(1)
    tell(f"{args.model}: {weights / 1e9:.3g} GB of weights on {args.device}, "
         f"{model.backbone.embeddings.weight.dtype}; scan: {default_backend(args.device, PIECE)} for prompts, "
         f"{default_backend(args.device, 1)} for tokens; "
         f"loaded in {time.perf_counter() - begin:.1f} s; seed {args.seed}")
    return model, tokenizer, stop


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths as one tensor (b, l), and where its documents start.

    Shorter prompts are padded on the left. The padding is a document, and the prompt after it another.
    """
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    tokens = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows)], device=device)
    if not any(padding):
        return tokens, None
    starts = torch.tensor(padding, device=device)[:, None]                  # (b, 1)
    return tokens, torch.arange(length, device=device) == starts            # (b, l), (b, l)


def ctrl_c() -> Event:
    """An event that the first Ctrl-C sets. A second one ends the program."""
    pressed = Event()

    def press(_number, _frame):
        pressed.set()
        tell("\nending after this token, to keep its state; Ctrl-C again ends at once")
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGINT, press)
    return pressed


def run(args: argparse.Namespace) -> None:
    prompts = args.prompt
    if "-" in prompts:
        typed = sys.stdin.read().removesuffix("\n") if sys.stdin else ""    # None if it is closed
        prompts = [typed if prompt == "-" else prompt for prompt in prompts]
    if not args.load_state and not all(prompts):
        raise ValueError("without --load-state, each --prompt needs text, and so does standard input")
    model, tokenizer, stop = load(args)
    rows = [encode(tokenizer, prompt) for prompt in prompts] * args.num_samples
    prompts = prompts * args.num_samples
    state = None
    kept = {"last": [], "shown": [], "waiting": []}
    if args.load_state:
        state, kept = load_state(args.load_state, model, len(rows))
    rows = [kept["last"] + row for row in rows]         # a kept state has not read the last token
    texts = [Text(tokenizer, prompt, kept["shown"], kept["waiting"]) for prompt in prompts]
    if not all(rows):
        raise ValueError("the tokenizer has no token for any character of a prompt")
    tokens, reset = padded(rows, args.device)
    if tokens.shape[1] > PIECE:
        tell(f"reading {tokens.shape[1]} tokens")
    if args.compile:
        tell("compiling for up to a minute, at the first tokens")
        compile_blocks()

    # Ctrl-C ends the text after a whole token if its state is to be kept, and at once if not.
    interrupted = ctrl_c() if args.save_state else Event()
    generator = torch.Generator(args.device).manual_seed(args.seed)
    steps = generate(model, tokens, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                     stop, generator, state, reset, interrupted)
    made, times, state = write(steps, tokenizer, prompts, stop, texts, bool(args.save_state))
    if args.save_state:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        last = made[-1][0] if made else rows[0][-1]
        save_state(args.save_state, state, last, texts[0])
    report(times, rows, model)
    if interrupted.is_set():
        raise KeyboardInterrupt


def report(times: list[float], rows: list[list[int]], model: Mamba) -> None:
    facts = f"{len(times) - 1} steps"
    if len(times) > 1:
        facts += f"; prefill {sum(map(len, rows)) / (times[1] - times[0]):.1f} tokens/s"
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        read = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_embeddings:     # of the embeddings a token reads one row, not all
            read -= model.backbone.embeddings.weight.nbytes
        facts += f"; decode {rate * len(rows):.1f} tokens/s, {rate * read / 1e9:.1f} GB/s of weights"
    if model.backbone.embeddings.weight.is_cuda:
        facts += f"; at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of GPU memory"
    elif os.name == "posix":
        import resource     # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 1 if sys.platform == "darwin" else 1024
        facts += f"; at most {peak * unit / 1e9:.2f} GB of memory"
    tell(facts)


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of that kind from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan        # which is in no range
        if not low <= value <= high:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r:.50} is no {name} from {low} to {high}")
        return value
    return parse


def device(text: str) -> torch.device:
    """An argparse type: a device that this machine has."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.zeros(1, device=text)
        found.item()            # fails on "meta", which keeps no numbers
        if found.is_cuda:       # streams, graphs and FSDP use the current one
            torch.cuda.set_device(found.device)
            if default_backend(found.device, 1) == "triton":
                import triton   # which needs a C compiler, and fails here if there is none
                triton.runtime.driver.active.get_current_target()
        return found.device
    except Exception as error:  # each backend raises its own
        reason = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not usable here ({reason:.200}); try cpu")


def new_file(text: str) -> Path:
    """An argparse type: a file that can be written. A link stands for what it links to."""
    path = Path(os.path.realpath(text))
    if (path.exists() and not path.is_file()) or not os.access(f"{path.parent}/", os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is no file, or in no folder that can be written to")
    return path


def main() -> None:
    sys.stderr = sys.stderr or open(os.devnull, "w")        # None if it is closed
    for stream in sys.stdin, sys.stdout:
        if hasattr(stream, "reconfigure"):                  # Windows has another encoding for pipes
            stream.reconfigure(encoding="utf-8")
    parser = argparse.ArgumentParser(description="Continue a text with a Falcon-Mamba.")
    add = parser.add_argument
    add("--model", default="tiiuae/falcon-mamba-7b-pre-decay",
        help="folder or Hugging Face hub id (default %(default)s)")
    add("--prompt", action="append", help="text to continue, - for standard input; repeat for a batch")
    add("--max-new-tokens", type=number(int, 0, 10**9), default=200, help="default %(default)s")
    add("--temperature", type=number(float, 0, 1e6), default=0.8, help="0: the likeliest (default 0.8)")
    add("--top-k", type=number(int, 1, 10**9), help="draw from the k likeliest tokens")
    add("--top-p", type=number(float, 1e-9, 1), help="draw from the likeliest that hold this probability")
    add("--seed", type=number(int, 0, 2**63 - 1), default=torch.seed() % 2**63,
        help="the same seed and flags write the same text (default: drawn at random, and printed)")
    add("--num-samples", type=number(int, 1, 10**6), default=1, help="texts from each prompt (default 1)")
    add("--device", type=device, default="auto", help="cpu, cuda, mps ... (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: as stored")
    add("--quantize", choices=["int4"], help="4 bits a weight: a third of bf16's memory, and inexact")
    add("--compile", action="store_true", help="torch.compile: slow to start, faster to write")
    add("--save-state", type=new_file, metavar="FILE", help="where to keep the state after the text")
    add("--load-state", type=Path, metavar="FILE", help="a kept state to go on from")
    args = parser.parse_args()
    args.prompt = args.prompt or [""]
    texts = len(args.prompt) * args.num_samples
    if (args.load_state and len(args.prompt) > 1) or (args.save_state and texts > 1):
        parser.error(f"a state file holds one text, but there are {len(args.prompt)} prompts and "
                     f"--num-samples is {args.num_samples}")
    compiler = os.environ.get("CXX", "g++").split()[-1]
    if args.compile and args.device.type == "cpu" and os.name == "posix" and not shutil.which(compiler):
        parser.error(f"--compile needs a C++ compiler for the CPU, and there is no {compiler} here")
    try:
        run(args)
    except OSError as error:
        sys.stdout = None       # or Python would try once more to write what it holds
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"sample.py: {error}")
        if args.save_state:     # without it all is well: whoever read the text had enough (`| head`)
            sys.exit(f"sample.py: the text's reader left early; {args.save_state} is not written")
    except ValueError as error:
        sys.exit(f"sample.py: {error}")
    except RuntimeError as error:
        words = str(error)
        if "out of memory" not in words and "can't allocate memory" not in words:
            raise
        sys.exit(f"sample.py: out of memory ({words.splitlines()[0]}); try --quantize int4")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
