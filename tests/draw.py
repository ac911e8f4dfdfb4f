"""Pictures, as SVG.

    python tests/draw.py out            the losses of the run in out/, into out/loss.svg
    python tests/draw.py                the README's pictures, into assets/
    python tests/draw.py out --keep     both: the README then shows the run in out/

block, tree and passes are laid out by hand. schedule asks train.py's own functions. The others show figures
that lie beside them in assets/: --keep writes loss.jsonl and model.json, of a run and its model, and
`python tests/bench.py --save assets/bench.json` writes bench.json.
"""
import argparse
import json
import math
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
sys.path.insert(0, str(ROOT))

LIGHT = dict(plate="#ffffff", edge="#d0d7de", ink="#1f2328", soft="#656d76", box="#f3f5f8", new="#ffd9a8",
             new_edge="#bc4c00", lines=["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700"])
DARK = dict(plate="#0d1117", edge="#3d444d", ink="#e6edf3", soft="#9198a1", box="#1b2129", new="#7a3d00",
            new_edge="#ffa657", lines=["#58a6ff", "#ffa657", "#3fb950", "#d2a8ff", "#ff9bce", "#e3b341"])
# The colour of every mark is a class, so that a page's preference for light or dark can change it.
RULES = """.plate{{fill:{plate};stroke:{edge}}} text{{fill:{ink};font:15px system-ui,sans-serif}}
.small{{font-size:12px}} .soft{{fill:{soft}}} .box{{fill:{box};stroke:{soft}}}
.new{{fill:{new};stroke:{new_edge};stroke-width:2}} .line{{fill:none;stroke:{soft};stroke-width:1.5}}
.tip{{fill:{soft}}} .grid{{stroke:{edge}}}
"""

def style(colors: dict) -> str:
    rules = RULES.format(**colors)
    for i, color in enumerate(colors["lines"]):
        rules += f".line{i}{{fill:none;stroke:{color};stroke-width:2}} .dot{i}{{fill:{color}}}\n"
    return rules

# Marks: each function returns SVG, one mark or a list of them
def svg(width: int, height: int, title: str, marks: list[str]) -> str:
    dark = "@media (prefers-color-scheme:dark){" + style(DARK) + "}"
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    plate = f'<rect class="plate" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    lines = [head, f"<title>{escape(title)}</title>", f"<style>{style(LIGHT)}{dark}</style>", plate, *marks]
    return "\n".join(lines) + "\n</svg>\n"

def text(x: float, y: float, words: str, classes: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'

def rect(x: float, y: float, width: float, height: float, classes: str) -> str:
    return f'<rect class="{classes}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'

def box(x: float, y: float, width: float, height: float, words: str, below: str = "",
        classes: str = "box") -> list[str]:
    middle = x + width / 2
    marks = [rect(x, y, width, height, classes)]
    if below:
        marks.append(text(middle, y + height / 2 - 3, words))
        marks.append(text(middle, y + height / 2 + 14, below, "small soft"))
    else:
        marks.append(text(middle, y + height / 2 + 5, words))
    return marks

def dot(x: float, y: float, color: int, radius: float = 5) -> str:
    return f'<circle class="dot{color}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'

def sign(x: float, y: float, words: str) -> list[str]:
    return [f'<circle class="box" cx="{x}" cy="{y}" r="13"/>', text(x, y + 5, words)]

def line(*points: tuple[float, float], classes: str = "line") -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{classes}" d="M{path}"/>'

def arrow(*points: tuple[float, float]) -> str:
    """A line with a tip. Its last stretch runs straight across or straight up or down."""
    (x0, y0), (x, y) = points[-2:]
    across = 7 * ((x > x0) - (x < x0))
    down = 7 * ((y > y0) - (y < y0))
    one = f"{x - across - .6 * down:g} {y - down - .6 * across:g}"
    other = f"{x - across + .6 * down:g} {y - down + .6 * across:g}"
    return line(*points) + f'<path class="tip" d="M{x} {y}L{one}L{other}Z"/>'

def legend(x: float, y: float, entries: dict[str, int]) -> list[str]:
    """A dot of its colour before each text, one after the other."""
    marks = []
    for words, color in entries.items():
        marks.append(dot(x, y, color))
        marks.append(text(x + 12, y + 4, words, "small", "start"))
        x += 40 + 6.5 * len(words)      # a character of 12 px is about so wide
    return marks

# Charts

def ticks(low: float, high: float) -> list[float]:
    """Four round numbers or so, from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (size * k) <= 5)
    first = math.ceil(low / step)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]

def chart(left: int, top: int, width: int, height: int, title: str, under: str, curves: dict[int, list],
          dots: dict[int, list] = {}, log: bool = False) -> list[str]:
    """A panel of curves and dots: colour -> points (x, y). With `log`, x is drawn by its logarithm."""
    points = [point for group in (curves, dots) for each in group.values() for point in each]
    place = math.log10 if log else float
    first = min(place(x) for x, y in points)
    last = max(place(x) for x, y in points)
    if first == last:
        last += 1
    high = 1.06 * max(y for x, y in points) or 1        # 1 where all are 0

    def across(x):
        return left + (place(x) - first) / (last - first) * width

    def up(y):
        return top + height - y / high * height

    marks = [text(left, top - 12, title, "", "start")]
    marks.append(text(left + width, top + height + 36, under, "small soft", "end"))
    for y in ticks(0, high):
        marks.append(f'<path class="grid" d="M{left} {up(y):.1f}H{left + width}"/>')
        marks.append(text(left - 8, up(y) + 4, f"{y:g}", "small soft", "end"))
    for x in sorted({x for x, y in points}) if log else ticks(first, last):
        words = f"{x:g}" if x < 1000 or not log else f"{x / 1024:g}k"
        marks.append(text(across(x), top + height + 18, words, "small soft"))
    for color, each in curves.items():
        marks.append(line(*((across(x), up(y)) for x, y in each), classes=f"line{color}"))
    for color, each in dots.items():
        marks += [dot(across(x), up(y), color, 4) for x, y in each]
    return marks

# The losses of a run

def read_metrics(path: Path) -> list[dict]:
    """The rows that a run left; ValueError, in one sentence, where there are none or one is damaged."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; a run of train.py leaves one in the folder that --out names")
    rows = []
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(read_row(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"line {i} of {path} is damaged; train.py --resume drops what a killed run had "
                             "half written") from None
    if not rows:
        raise ValueError(f"{path} is empty: its run has not yet made a step")
    return rows

def read_row(line: bytes) -> dict:
    """What the picture needs of a row. Any of a few errors if it is damaged."""
    found = json.loads(line)
    row = {name: found[name] for name in ("tokens", "loss", "lr")}
    held_out = {}
    for source, loss in found.get("held_out", {}).items():
        held_out[source] = loss[0] if isinstance(loss, list) else loss      # the second is bits a byte
    if not all(0 <= value < 1e18 for value in [*row.values(), *held_out.values()]):
        raise ValueError("a number that no run has")
    return row | {"held_out": held_out}

def losses(rows: list[dict], title: str) -> str:
    """Each step's loss as a line, that on held-out text as dots, and the learning rate beside them."""
    units = {10**9: "billion tokens seen", 10**6: "million tokens seen", 1: "tokens seen"}
    unit = max(size for size in units if size <= max(rows[-1]["tokens"], 1))
    training = []
    rate = []
    for row in rows[::len(rows) // 1000 + 1]:       # of a long run, a thousand steps
        training.append((row["tokens"] / unit, row["loss"]))
        rate.append((row["tokens"] / unit, row["lr"]))
    held_out = {}                                   # source -> its points
    for row in rows:
        for source, nats in row["held_out"].items():
            held_out.setdefault(source, []).append((row["tokens"] / unit, nats))
    words = {"each step": 0}
    dots = {}
    for color, (source, points) in enumerate(held_out.items(), 1):
        color %= len(LIGHT["lines"])
        words[f"held-out {source:.20}: {points[-1][1]:.4g}"] = color
        dots[color] = dots.get(color, []) + points
    marks = chart(62, 48, 420, 200, "loss, nats a token", units[unit], {0: training}, dots)
    marks += chart(562, 48, 210, 200, "learning rate", units[unit], {2: rate})
    for i, (entry, color) in enumerate(words.items()):
        marks += legend(804, 54 + 20 * i, {entry: color})
    return svg(1000, 304, title, marks)

def keep_losses(rows: list[dict]) -> None:
    """These rows, with fewer digits, for the README's picture."""
    lines = []
    for row in rows:
        kept = {"tokens": row["tokens"], "loss": round(row["loss"], 4), "lr": float(f"{row['lr']:.4g}")}
        if row["held_out"]:
            kept["held_out"] = {source: round(loss, 4) for source, loss in row["held_out"].items()}
        lines.append(json.dumps(kept) + "\n")
    (ASSETS / "loss.jsonl").write_text("".join(lines))

# The states of a model

SNIPPET = "def area(width, height):\n    return width * height\n"
CODE = '''import os

class Stack:
    """A list that grows at one end."""

    def push(self, item):
        self.items.append(item)
        return len(self.items)
'''

def read_along(model, tokens: list[int], see) -> None:
    """The model reads, and in each layer see(mixer, x, delta, B) is called: (l, d), (l, d), (l, n)."""
    import torch
    import torch.nn.functional as F
    mixers = [layer.mixer for layer in model.backbone.layers]

    def watch(mixer):
        selection = mixer.selection

        def watched(x):
            dt, B, C = selection(x)
            delta = F.softplus(dt.float() + mixer.dt_proj.bias.float())
            see(mixer, x[0], delta[0], B[0])
            return dt, B, C
        mixer.selection = watched

    for mixer in mixers:
        watch(mixer)
    device = model.backbone.embeddings.weight.device
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens], device=device), last_only=True)
    finally:
        for mixer in mixers:
            del mixer.selection         # its own, hidden by `watched`, is seen again

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
    """A row a layer, a column a token. It goes on below as a text does."""
    high = max(3, min(16, 160 // len(layers)))      # of a row
    lines = [[]]                                    # of each line the places of its tokens
    x = 0
    for t, word in enumerate(words):
        word = visible(word)
        width = 3 + 8 * len(word)
        if x + width > 900 and x > 0:
            lines.append([])
            x = 0
        lines[-1].append((t, word, 70 + x, width))
        x += width
    shades = [shades_of(row) for row in layers]
    marks = [text(70, 28, title, "", "start")]
    marks.append(text(970, 28, "pale: it passes by; full: it is taken in", "small soft", "end"))
    top = 44
    for places in lines:
        cells = {}                                  # shade -> the path of its cells
        bottom = top + high * len(layers)
        for i, row in enumerate(shades):
            y = top + high * i
            if high >= 12 or i % 8 == 0:
                marks.append(text(62, y + min(high, 12), f"layer {i}", "small soft", "end"))
            for t, _, x, width in places:
                cell = f"M{x} {y}h{width - 1}v{high - 1}h{1 - width}z"
                cells[row[t]] = cells.get(row[t], "") + cell
        for shade, path in sorted(cells.items()):
            marks.append(f'<path class="dot0" opacity="{shade}" d="{path}"/>')
        for _, word, x, width in places:
            fit = f'x="{x + 1}" y="{bottom + 13}" textLength="{width - 3}"'
            marks.append(f'<text class="small" {fit}>{escape(word)}</text>')
        top = bottom + 30
    return svg(1000, top, title, marks)

def visible(word: str) -> str:
    """Each character as one that is seen and that XML allows. Of long words, the beginning."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥"}
    seen = [marks.get(char, char if char.isprintable() else "�") for char in word[:40]]
    return "".join(seen) or "�"

def shades_of(row: list[float]) -> list[float]:
    """From .1 to 1, by the logarithm. The shortest twentieth is all .1, the longest all 1."""
    ordered = sorted(row)
    cut = len(row) // 20
    low = math.log(ordered[cut])
    high = math.log(ordered[-1 - cut])
    shades = []
    for value in row:
        part = (math.log(value) - low) / (high - low) if high > low else 0.5
        shades.append(round(0.1 + 0.9 * min(max(part, 0), 1), 1))
    return shades

# The README's pictures

def block() -> str:
    """One layer, as mamba.py's Mixer.forward walks it; sizes are the 7B's."""
    marks = [arrow((20, 46), (1058, 46))]
    marks.append(text(24, 34, "the residual stream, 4096 wide, fp32", "small soft", "start"))
    # x, along the upper row
    marks += [arrow((66, 46), (66, 110)), *box(20, 110, 92, 44, "RMSNorm")]
    marks += [arrow((112, 132), (130, 132)), *box(130, 110, 108, 44, "in_proj", "4096 → 2 · 8192")]
    marks += [arrow((238, 132), (282, 132)), text(260, 124, "x"), *box(282, 110, 64, 44, "conv", "4 taps")]
    marks += [arrow((346, 132), (364, 132)), *box(364, 110, 56, 44, "SiLU")]
    marks += [arrow((420, 132), (800, 132)), text(780, 124, "x")]
    # dt, B and C, each through its norm
    marks += [arrow((436, 132), (436, 247), (456, 247)), *box(456, 180, 84, 134, "x_proj", "8192 → 288")]
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
    for i, words in enumerate(["the three norms that", "Falcon-Mamba adds to", "Mamba: no weights"]):
        marks.append(text(46, 226 + 17 * i, words, "small", "start"))
    title = "One Falcon-Mamba layer: the Mamba block, with three RMSNorms on dt, B and C"
    return svg(1078, 386, title, marks)

def merges(steps: list[int]) -> list[list[tuple[int, int, int]]]:
    """The moves of scan.py's merge_pairs over these steps: in each, who is merged into whom, and a colour."""
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
    for y, name, words in [(60, "pass 1", ["every chunk at once,", "from a state of 0"]),
                           (190, "pass 2", ["one step a chunk,", "chunk after chunk"]),
                           (320, "pass 3", ["every chunk at once, from", "the state that enters it"])]:
        marks.append(text(24, y - 8, name, "", "start"))
        for i, each in enumerate(words):
            marks.append(text(24, y + 12 + 17 * i, each, "small soft", "start"))
    for k in range(4):
        middle = starts(k) + 66
        # pass 1: all steps of a chunk become one
        marks.append(text(starts(k) - 9, 65, "0", "small soft"))
        marks += steps(k, 60, 0)
        marks += [arrow((middle, 70), (middle, 96)), *box(middle - 58, 96, 116, 40, "decay, local", "one merged step")]
        # pass 2: the walk over those
        marks += [dot(starts(k) - 12, 190, 2, 7), arrow((starts(k) - 4, 190), (starts(k + 1) - 20, 190))]
        marks += [arrow((middle, 136), (middle, 184)), text(middle, 210, "decay · h + local", "small")]
        # pass 3: the chunk's steps again, now from the right state
        marks += [arrow((starts(k) - 12, 198), (starts(k) - 12, 320), (starts(k), 320)), *steps(k, 320, 1)]
        for i in range(6):
            x = starts(k) + 12 + 24 * i
            marks += [arrow((x, 326), (x, 350)), text(x, 366, "y", "small")]
    marks += [text(starts(0) - 24, 186, "h0", "", "end"), dot(starts(4) - 12, 190, 2, 7)]
    marks.append(text(starts(4) - 12, 176, "last h"))
    return svg(930, 392, "The scan on a GPU in three passes: a chunk of steps is one merged step", marks)

def states() -> str:
    """One channel of the default run's model over a snippet: a long step writes and forgets."""
    found = json.loads((ASSETS / "model.json").read_text())
    wide = 17

    def across(t):
        return 62 + wide * t
    width = wide * len(SNIPPET)
    marks = [text(62, 30, "three numbers of its state, each over its largest", "", "start")]
    marks.append(line((62, 110), (62 + width, 110), classes="grid"))
    fades = {}
    for color, (rate, h) in enumerate(found["states"].items()):
        largest = max(map(abs, h))
        curve = [(across(0), 110)]
        for t, value in enumerate(h):
            y = 110 - 62 * value / largest
            curve += [(across(t), y), (across(t + 1), y)]
        marks.append(line(*curve, classes=f"line{color}"))
        fades[f"A = {rate}"] = color
    marks += legend(62 + width - 330, 26, fades)
    marks.append(text(62, 206, "Δ, how long each byte lasts", "", "start"))
    longest = max(found["delta"])
    for t, (byte, delta) in enumerate(zip(SNIPPET, found["delta"])):
        high = 70 * delta / longest
        marks.append(f'<rect class="dot3" x="{across(t) + 2}" y="{290 - high:.1f}" width="{wide - 4}" '
                     f'height="{high:.1f}"/>')
        marks.append(text(across(t) + wide / 2, 308, {" ": "␣", "\n": "↵"}.get(byte, byte), "small"))
    marks.append(text(54, 224, f"{longest:.2g}", "small soft", "end"))
    marks.append(text(54, 294, "0", "small soft", "end"))
    return svg(62 + width + 24, 330, "One channel reads a line of Python: a long step writes and forgets", marks)

def steps() -> str:
    """The steps of the default run's model over some Python, a mean over each layer's channels."""
    found = json.loads((ASSETS / "model.json").read_text())
    return steps_picture(found["steps"], [*CODE], "Δ, how long each byte lasts, in each layer")

def schedule() -> str:
    """The 7B's learning rate, batch and context, from the functions that train.py trains with."""
    from train import RECIPES, batch_size, context_length, learning_rate    # here: it takes seconds to import
    recipe = RECIPES["falcon-mamba-7b"]
    panels = {
        "learning rate": learning_rate,
        "sequences a step": batch_size,
        "tokens a sequence": context_length,
    }
    marks = []
    for row, end in enumerate([100 * 10**9, recipe.total_tokens]):
        seen = [end * i // 400 for i in range(401)]
        for column, (title, value) in enumerate(panels.items()):
            curve = [(tokens / 10**9, value(recipe, tokens)) for tokens in seen]
            marks += chart(62 + 300 * column, 48 + 210 * row, 220, 120, title, "billion tokens seen",
                           {column: curve})
    return svg(922, 444, "The schedule of Falcon-Mamba-7B: its beginning above, the whole run below", marks)

def loss() -> str:
    return losses(read_metrics(ASSETS / "loss.jsonl"), "Loss of the default run of train.py")

def cost() -> str:
    """Time and memory of one more token, against the tokens before it, as tests/bench.py measured them."""
    rounds = json.loads((ASSETS / "bench.json").read_text())["length"]
    panels = {"ms": "milliseconds a token", "state_mb": "what is kept of the text, in MB"}
    marks = legend(68, 24, {"Falcon-Mamba, this code": 0, "attention": 1})
    for column, (name, title) in enumerate(panels.items()):
        curves = {}
        for color, peer in enumerate(["ours", "attention"]):
            curves[color] = [(row["tokens"], row[name]) for row in rounds[peer]]
        marks += chart(62 + 380 * column, 78, 290, 144, title, "tokens before it", curves, log=True)
    return svg(782, 300, "The cost of a token, against the length of the text before it", marks)

PICTURES = {"block.svg": block, "states.svg": states, "steps.svg": steps, "tree.svg": tree, "passes.svg": passes,
            "schedule.svg": schedule, "loss.svg": loss, "cost.svg": cost}

def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the losses of a run, or the README's pictures.")
    parser.add_argument("out", nargs="?", type=Path, help="the folder of a run, for its loss.svg")
    parser.add_argument("--keep", action="store_true", help="show this run and its model in the README")
    args = parser.parse_args()
    if args.keep and not args.out:
        parser.error("--keep needs the folder of a run")
    if args.out:
        try:
            rows = read_metrics(args.out / "metrics.jsonl")
            path = args.out / "loss.svg"
            path.write_text(losses(rows, f"Loss of the run in {args.out}"), encoding="utf-8")
            if args.keep:
                keep_losses(rows)
                keep_model(args.out)
        except (ValueError, OSError) as e:
            parser.error(str(e))
        print(path)
        if not args.keep:
            return
    for name, picture in PICTURES.items():
        (ASSETS / name).write_text(picture(), encoding="utf-8")
        print(f"assets/{name}")

if __name__ == "__main__":
    main()
