"""Pictures, as SVG.

    python tests/draw.py out                    the losses of the run in out/, into out/loss.svg
    python tests/draw.py a-0 a-1 b-0            of several runs over one another, into runs.svg
    python tests/draw.py                        the README's pictures, into assets/

block, tree and passes are laid out by hand. schedule asks train.py's own functions. All others show
figures that lie in assets/ too, and a run must be shown anew to change them:

    python tests/draw.py out --keep loss        loss.jsonl, model.json: of the default run
    python tests/draw.py a-0 b-0 --keep decay   runs.json: several runs for decay.svg
    python tests/copying.py --keep              copying.json
    python tests/bench.py --save assets/bench.json

assets/README.md tells what these runs were and what they show.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
sys.path.insert(0, str(ROOT))

from tests.marks import (COLORS, arrow, bars, box, cells, chart, dot, legend, line, rect, sign,
                         strip, svg, text)

# The losses of runs

def read_metrics(path: Path) -> list[dict]:
    """The rows that a run left; ValueError where there are none or one is damaged."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; a run of train.py leaves one in its --out")
    rows = []
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(read_row(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"line {i} of {path} is damaged; train.py --resume drops what a "
                             "killed run had half written") from None
    if not rows:
        raise ValueError(f"{path} is empty: its run has not yet made a step")
    return rows

def read_row(line: bytes) -> dict:
    """What a picture needs of a row. Any of a few errors if it is damaged."""
    found = json.loads(line)
    row = {name: found[name] for name in ("tokens", "loss", "lr")}
    held_out = {}
    for source, loss in found.get("held_out", {}).items():
        held_out[source] = loss[0] if isinstance(loss, list) else loss  # the second: bits a byte
    if not all(0 <= value < 1e18 for value in [*row.values(), *held_out.values()]):
        raise ValueError("a number that no run has")
    return row | {"held_out": held_out}

def unit_of(tokens: int) -> tuple[int, str]:
    """A size in which these tokens are a small number, and its name."""
    units = {10**9: "billion tokens seen", 10**6: "million tokens seen", 1: "tokens seen"}
    size = max(size for size in units if size <= max(tokens, 1))
    return size, units[size]

def losses(rows: list[dict], title: str) -> str:
    """Each step's loss as a line, that on held-out text as dots, the learning rate beside them."""
    unit, under = unit_of(rows[-1]["tokens"])
    training = []
    rate = []
    for row in rows[::len(rows) // 1000 + 1]:       # of a long run, a thousand steps
        training.append((row["tokens"] / unit, row["loss"]))
        rate.append((row["tokens"] / unit, row["lr"]))
    held_out = {}                                   # source -> its points
    for row in rows:
        for source, nats in row["held_out"].items():
            held_out.setdefault(source, []).append((row["tokens"] / unit, nats))
    words = ["each step"]
    dots = []
    for source, points in held_out.items():
        dots.append((len(words) % COLORS, points))
        words.append(f"held-out {source:.20}: {points[-1][1]:.4g}")
    marks = chart(62, 48, 420, 200, "loss, nats a token", under, [(0, training)], dots)
    marks += chart(562, 48, 210, 200, "learning rate", under, [(2, rate)])
    for i, entry in enumerate(words):
        marks += legend(804, 54 + 20 * i, {entry: i % COLORS})
    return svg(1000, 304, title, marks)

def read_runs(folders: list[Path]) -> dict[str, list]:
    """The held-out losses of each run, in its group: "no-decay-0" is one of "no decay"."""
    groups = {}
    for folder in folders:
        points = []                                 # (tokens, mean over the sources)
        for row in read_metrics(folder / "metrics.jsonl"):
            if row["held_out"]:
                nats = sum(row["held_out"].values()) / len(row["held_out"])
                points.append((row["tokens"], round(nats, 4)))
        if not points:
            raise ValueError(f"the run in {folder} has no loss on held-out text yet")
        name = folder.name.rstrip("0123456789").replace("-", " ").strip()
        groups.setdefault(name, []).append(points)
    return groups

def compare(groups: dict[str, list], title: str) -> str:
    """Held-out losses, a colour each group: as curves, if a run has several, and at the end."""
    runs = [points for group in groups.values() for points in group]
    unit, under = unit_of(max(points[-1][0] for points in runs))
    low = 0.98 * min(loss for points in runs for _, loss in points)
    curves = []
    ends = []
    for i, (name, group) in enumerate(groups.items()):
        color = i % COLORS
        ends.append((name, color, [points[-1][1] for points in group]))
        for points in group:        # without the beginning, from where all fall steeply
            near = [(tokens / unit, loss) for tokens, loss in points if loss < 1.3 * low]
            if len(near) > 1:
                curves.append((color, near))
    marks = []
    top = 50
    if curves:
        marks += chart(62, 48, 620, 220, "held-out loss, nats a token", under, curves, low=low)
        top = 350
    words = "held-out loss at the end: a dot each seed"
    marks.append(text(62, top - 14, words, "", "start"))
    marks += strip(230, top, 450, ends)
    return svg(720, top + 30 * len(ends) + 40, title, marks)

# The steps and states of a model

SNIPPET = "def area(width, height):\n    return width * height\n"
CODE = '''import os

class Stack:
    """A list that grows at one end."""

    def push(self, item):
        self.items.append(item)
        return len(self.items)
'''

def read_along(model, tokens: list[int], see) -> None:
    """The model reads, and each layer calls see(mixer, x, delta, B): (l, d), (l, d), (l, n)."""
    import torch
    import torch.nn.functional as F
    from mamba import Mixer
    selection = Mixer.selection

    def watched(mixer, x):
        dt, B, C = selection(mixer, x)
        delta = F.softplus(dt.float() + mixer.dt_proj.bias.float())
        see(mixer, x[0], delta[0], B[0])
        return dt, B, C
    device = model.backbone.embeddings.weight.device
    with mock.patch.object(Mixer, "selection", watched), torch.inference_mode():
        model(torch.tensor([tokens], device=device), last_only=True)

def mean_steps(model, tokens: list[int]) -> list[list[float]]:
    """Of each layer the step of each token, a mean over the channels."""
    layers = []

    def see(mixer, x, delta, B):
        layers.append(rounded(delta.mean(-1)))
    read_along(model, tokens, see)
    if not all(0 < value < math.inf for row in layers for value in row):
        raise ValueError("some steps are no positive numbers; the model's weights are damaged")
    return layers

def keep_model(folder: Path) -> None:
    """What states.svg and steps.svg need of the model in this folder.

    states.svg shows the channel whose steps differ most from byte to byte, of those that write
    something at all.
    """
    import torch
    from mamba import Mamba
    from train import byte_tokenizer
    model = Mamba.from_pretrained(folder)
    layers = []

    def see(mixer, *seen):
        layers.append((-torch.exp(mixer.A_log), *seen))
    read_along(model, byte_tokenizer().encode(SNIPPET).ids, see)
    deltas = torch.stack([delta for _, _, delta, _ in layers])              # (layers, l, d)
    spread = deltas.log().std(1) * (deltas.amax(1) > 0.2)                   # (layers, d)
    layer, c = divmod(spread.argmax().item(), spread.shape[1])
    A, x, delta, B = layers[layer]
    h = torch.zeros_like(B)                                                 # (l, n)
    for t in range(len(x)):         # h[-1], which is read first, is still 0
        h[t] = torch.exp(delta[t, c] * A[c]) * h[t - 1] + delta[t, c] * B[t] * x[t, c]
    found = {"layer": layer, "channel": c, "delta": rounded(delta[:, c])}
    found["states"] = {f"{A[c, n]:.1f}": rounded(h[:, n]) for n in (0, 3, 15)}
    found["steps"] = mean_steps(model, byte_tokenizer().encode(CODE).ids)
    (ASSETS / "model.json").write_text(json.dumps(found) + "\n")

def rounded(values) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]

def draw_steps(model, tokenizer, tokens: list[int], path: Path) -> None:
    """How long each token lasts in each layer, as SVG: of any model, the first 500 tokens."""
    if not tokens:
        raise ValueError("there is no token to draw; give a --prompt")
    shown = tokens[:500]
    title = "Δ, how long each token lasts, in each layer"
    if len(tokens) > len(shown):
        title += f": the first {len(shown)} of {len(tokens)} tokens"
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in shown]
    picture = steps_picture(mean_steps(model, shown), words, title)
    Path(path).write_text(picture, encoding="utf-8")

def steps_picture(layers: list[list[float]], words: list[str], title: str) -> str:
    """A row a layer, a column a token."""
    marks, bottom = cells(70, 44, 900, layers, words)
    marks.append(text(70, 28, title, "", "start"))
    meaning = "pale: it passes by; full: it is taken in"
    marks.append(text(970, 28, meaning, "small soft", "end"))
    return svg(1000, bottom, title, marks)

# The README's pictures

def block() -> str:
    """One layer, as mamba.py's Mixer.forward walks it; sizes are the 7B's."""
    marks = [arrow((20, 46), (1058, 46))]
    marks.append(text(24, 34, "the residual stream, 4096 wide, fp32", "small soft", "start"))
    # x, along the upper row
    marks += [arrow((66, 46), (66, 110)), *box(20, 110, 92, 44, "RMSNorm")]
    marks.append(arrow((112, 132), (130, 132)))
    marks += box(130, 110, 108, 44, "in_proj", "4096 → 2 · 8192")
    marks += [arrow((238, 132), (282, 132)), text(260, 124, "x")]
    marks += box(282, 110, 64, 44, "conv", "4 taps")
    marks += [arrow((346, 132), (364, 132)), *box(364, 110, 56, 44, "SiLU")]
    marks += [arrow((420, 132), (800, 132)), text(780, 124, "x")]
    # dt, B and C, each through its norm
    marks += [arrow((436, 132), (436, 247), (456, 247))]
    marks += box(456, 180, 84, 134, "x_proj", "8192 → 288")
    for y, name, size in (204, "dt", 256), (247, "B", 16), (290, "C", 16):
        marks += [arrow((540, y), (580, y)), text(559, y - 7, name)]
        marks += box(580, y - 17, 92, 34, "RMSNorm", classes="new")
        marks.append(text(676, y - 7, f"{size}", "small soft", "start"))
        marks.append(arrow((672, y), (706 if name == "dt" else 800, y)))
    marks += [*box(706, 187, 74, 34, "dt_proj"), arrow((780, 204), (800, 204))]
    marks += box(800, 110, 72, 204, "scan", "8192 × 16")
    # z, the gate, along the lower row, and the way back to the stream
    marks += [arrow((260, 132), (260, 352), (364, 352)), text(268, 345, "z, the gate", "", "start")]
    marks += [*box(364, 335, 56, 34, "SiLU"), arrow((420, 352), (902, 352), (902, 226))]
    marks += [arrow((872, 212), (888, 212)), *sign(902, 212, "×")]
    marks += [arrow((915, 212), (934, 212)), *box(934, 190, 84, 44, "out_proj", "8192 → 4096")]
    marks += [arrow((976, 190), (976, 59)), *sign(976, 46, "+")]
    marks.append(rect(20, 212, 18, 18, "new"))
    note = ["the three norms that", "Falcon-Mamba adds to", "Mamba: no weights"]
    for i, words in enumerate(note):
        marks.append(text(46, 226 + 17 * i, words, "small", "start"))
    title = "One Falcon-Mamba layer: the Mamba block, with three RMSNorms on dt, B and C"
    return svg(1078, 386, title, marks)

def merges(steps: list[int]) -> list[list[tuple[int, int, int]]]:
    """The moves of scan.py's merge_pairs: in each, who is merged into whom, and a colour."""
    if len(steps) == 1:
        return []
    odd = steps[1::2]
    halve = [(a, b, 0) for a, b in zip(steps[::2], odd)]
    fill = [(a, b, 2) for a, b in zip(odd, steps[2::2])]
    return [halve, *merges(odd), *([fill] if fill else [])]

def tree() -> str:
    """Who merges with whom when merge_pairs runs over eight steps. Time goes down."""
    top = 74
    high = 58
    moves = merges([*range(8)])
    bottom = top + high * len(moves)
    marks = []

    def across(t):
        return 52 + 72 * t
    for t in range(8):
        marks.append(line((across(t), top - 12), (across(t), bottom + 34)))
        marks.append(text(across(t), top - 34, f"step {t}"))
        marks.append(text(across(t), top - 18, f"a{t}, b{t}", "small soft"))
        marks.append(text(across(t), bottom + 52, f"h{t}"))
    first = [*range(8)]                 # wire t carries the span of steps from first[t] to t
    for k, move in enumerate(moves, 1):
        y = top + high * k
        for a, b, color in move:
            first[b] = first[a]
            marks.append(line((across(a), y - high + 18), (across(b), y), classes=f"line{color}"))
            marks.append(dot(across(b), y, color))
            marks.append(text(across(b) - 9, y + 18, f"{first[b]}–{b}", "small", "end"))
        marks.append(text(across(7) + 34, y + 5, f"move {k}", "soft", "start"))
    marks += legend(58, 450, {"halve: two neighbours become one step": 0,
                              "fill in: a finished state meets the next span": 2})
    return svg(660, 474, "The parallel scan of eight steps in five moves", marks)

def passes() -> str:
    """The three passes of scan_triton.py, over four chunks. Time goes from left to right."""
    def starts(k):                      # where chunk k begins; behind the last one its end
        return 250 + 160 * k

    def steps(k, y, color):
        """Chunk k as a row of steps, one after the other."""
        marks = [line((starts(k), y), (starts(k) + 132, y), classes=f"line{color}")]
        return marks + [dot(starts(k) + 12 + 24 * i, y, color) for i in range(6)]

    marks = []
    passes = [(60, "pass 1", "every chunk at once,", "from a state of 0"),
              (190, "pass 2", "one step a chunk,", "chunk after chunk"),
              (320, "pass 3", "every chunk at once, from", "the state that enters it")]
    for y, name, words, more in passes:
        marks.append(text(24, y - 8, name, "", "start"))
        marks.append(text(24, y + 12, words, "small soft", "start"))
        marks.append(text(24, y + 29, more, "small soft", "start"))
    for k in range(4):
        middle = starts(k) + 66
        edge = starts(k) - 12
        # pass 1: all steps of a chunk become one
        marks.append(text(edge + 3, 65, "0", "small soft"))
        marks += steps(k, 60, 0)
        marks.append(arrow((middle, 70), (middle, 96)))
        marks += box(middle - 58, 96, 116, 40, "decay, local", "one merged step")
        # pass 2: the walk over those
        marks.append(dot(edge, 190, 2, 7))
        marks.append(arrow((edge + 8, 190), (starts(k + 1) - 20, 190)))
        marks.append(arrow((middle, 136), (middle, 184)))
        marks.append(text(middle, 210, "decay · h + local", "small"))
        # pass 3: the chunk's steps again, now from the right state
        marks.append(arrow((edge, 198), (edge, 320), (starts(k), 320)))
        marks += steps(k, 320, 1)
        for i in range(6):
            x = starts(k) + 12 + 24 * i
            marks.append(arrow((x, 326), (x, 350)))
            marks.append(text(x, 366, "y", "small"))
    marks.append(text(starts(0) - 24, 186, "h0", "", "end"))
    marks.append(dot(starts(4) - 12, 190, 2, 7))
    marks.append(text(starts(4) - 12, 176, "last h"))
    title = "The scan on a GPU in three passes: a chunk of steps is one merged step"
    return svg(930, 392, title, marks)

def states() -> str:
    """One channel of the default run's model over a snippet: a long step writes and forgets."""
    found = read("model.json")
    wide = 17
    width = wide * len(SNIPPET)
    marks = [text(62, 30, "three numbers of its state, each over its largest", "", "start")]
    marks.append(line((62, 110), (62 + width, 110), classes="grid"))
    fades = {}
    for color, (rate, h) in enumerate(found["states"].items()):
        largest = max(map(abs, h))
        curve = [(62, 110)]
        for t, value in enumerate(h):
            y = 110 - 62 * value / largest
            curve += [(62 + wide * t, y), (62 + wide * (t + 1), y)]
        marks.append(line(*curve, classes=f"line{color}"))
        fades[f"A = {rate}"] = color
    marks += legend(62 + width - 330, 26, fades)
    marks.append(text(62, 206, "Δ, how long each byte lasts", "", "start"))
    marks += bars(62, 290, wide, SNIPPET, found["delta"])
    title = "One channel reads a line of Python: a long step writes and forgets"
    return svg(62 + width + 24, 330, title, marks)

def steps() -> str:
    """The steps of the default run's model over some Python, a mean over each layer's channels."""
    layers = read("model.json")["steps"]
    return steps_picture(layers, [*CODE], "Δ, how long each byte lasts, in each layer")

def copying() -> str:
    """Selective copying, with steps computed from the token and with fixed ones."""
    found = read("copying.json")
    colors = {"Δ computed from the token": 0, "Δ fixed": 1}
    marks = legend(62, 24, colors)
    curves = [(0, found["learned"]), (1, found["fixed"])]
    marks += chart(62, 78, 360, 150, "letters said correctly", "steps of training", curves)
    marks.append(text(500, 66, "Δ in one channel of the first: noise (·) passes by", "", "start"))
    note = "the bar behind a letter: the convolution still sees the letter"
    marks.append(text(500, 264, note, "small soft", "start"))
    marks += bars(500, 228, 14, found["text"], found["delta"])
    return svg(1040, 290, "Selective copying: what a step computed from the token buys", marks)

def decay() -> str:
    """The default run, with and without its decay, and the latter continued."""
    groups = read("runs.json")["decay"]
    for points in groups["continued with decay"]:
        points[:] = [(700_000 + tokens, loss) for tokens, loss in points]
    return compare(groups, "What the decay of the learning rate buys")

def ramp() -> str:
    return compare(read("runs.json")["ramp"], "A batch that grows, with and without BatchScaling")

def norms() -> str:
    return compare(read("runs.json")["norms"], "With and without the three norms")

def schedule() -> str:
    """The 7B's learning rate, batch and context, from the functions that train.py trains with."""
    import train        # here, because it takes seconds
    recipe = train.RECIPES["falcon-mamba-7b"]
    panels = {"learning rate": train.learning_rate, "rows a step": train.batch_size,
              "context, in tokens": train.context_length}
    marks = []
    for row, end in enumerate([100 * 10**9, recipe.total_tokens]):
        seen = [end * i // 400 for i in range(401)]
        for column, (title, value) in enumerate(panels.items()):
            curve = [(tokens / 10**9, value(recipe, tokens)) for tokens in seen]
            left = 62 + 300 * column
            top = 48 + 210 * row
            marks += chart(left, top, 220, 120, title, "billion tokens seen", [(column, curve)])
    title = "The schedule of Falcon-Mamba-7B: its beginning above, the whole run below"
    return svg(922, 444, title, marks)

def loss() -> str:
    rows = read_metrics(ASSETS / "loss.jsonl")
    return losses(rows, "Loss of the default run of train.py")

def cost() -> str:
    """Time and memory of one more token, against the tokens before it, by tests/bench.py."""
    rounds = read("bench.json")["length"]
    panels = {"ms": "milliseconds a token", "state_mb": "what is kept of the text, in MB"}
    marks = legend(68, 24, {"Falcon-Mamba, this code": 0, "attention": 1})
    for column, (name, title) in enumerate(panels.items()):
        curves = []
        for color, peer in enumerate(["ours", "attention"]):
            curves.append((color, [(row["tokens"], row[name]) for row in rounds[peer]]))
        left = 62 + 380 * column
        marks += chart(left, 78, 290, 144, title, "tokens before it", curves, log=True)
    return svg(782, 300, "The cost of a token, against the length of the text before it", marks)

def read(name: str) -> dict:
    return json.loads((ASSETS / name).read_text())

PICTURES = {f"{picture.__name__}.svg": picture for picture in (
    block, states, steps, copying, tree, passes, schedule, loss, decay, ramp, norms, cost)}

def keep(name: str, folders: list[Path]) -> None:
    """Show these runs in the README, as the picture of that name."""
    if name == "loss":
        rows = read_metrics(folders[0] / "metrics.jsonl")
        (ASSETS / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        keep_model(folders[0])
    else:
        runs = ASSETS / "runs.json"
        found = read("runs.json") | {name: read_runs(folders)}
        runs.write_text(json.dumps(found) + "\n")

def draw_runs(folders: list[Path]) -> Path:
    """The losses of a run, or of several over one another -> where they were drawn."""
    if len(folders) == 1:
        path = folders[0] / "loss.svg"
        rows = read_metrics(folders[0] / "metrics.jsonl")
        picture = losses(rows, f"Loss of the run in {folders[0]}")
    else:
        path = Path("runs.svg")
        picture = compare(read_runs(folders), "Losses of runs")
    path.write_text(picture, encoding="utf-8")
    return path

def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the losses of runs, or the README's.")
    parser.add_argument("out", nargs="*", type=Path, help="the folder of a run, or of several")
    parser.add_argument("--keep", choices=["loss", "decay", "ramp", "norms"],
                        help="show these runs in the README, as this picture")
    args = parser.parse_args()
    if args.keep and not args.out:
        parser.error("--keep needs the folder of a run")
    try:
        if args.keep:
            keep(args.keep, args.out)
        elif args.out:
            return print(draw_runs(args.out))
    except (ValueError, OSError) as e:
        parser.error(str(e))
    for name, picture in PICTURES.items():
        (ASSETS / name).write_text(picture(), encoding="utf-8")
        print(f"assets/{name}")

if __name__ == "__main__":
    main()
