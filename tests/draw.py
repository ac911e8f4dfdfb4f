"""The README's pictures, as SVG: python tests/draw.py [out/metrics.jsonl]

block.svg and tree.svg are laid out here by hand. schedule.svg asks train.py's own functions. loss.svg and
cost.svg show measurements, kept beside them: assets/loss.jsonl, taken from a run's metrics when you name
them, and assets/bench.json, written by `python tests/bench.py --save assets/bench.json`. Each picture has a
plate of its own and two sets of colours, for light and for dark pages.
"""
import argparse
import json
import math
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train import RECIPES, batch_size, context_length, learning_rate

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GT = 10**9
LIGHT = dict(plate="#ffffff", edge="#d0d7de", ink="#1f2328", soft="#656d76", box="#f3f5f8", new="#ffd9a8",
             new_edge="#bc4c00", one="#0969da", two="#bc4c00", three="#1a7f37")
DARK = dict(plate="#0d1117", edge="#3d444d", ink="#e6edf3", soft="#9198a1", box="#1b2129", new="#7a3d00",
            new_edge="#ffa657", one="#58a6ff", two="#ffa657", three="#3fb950")
# The colour of every mark is a class, so that a page's preference can change it.
RULES = (".plate{{fill:{plate};stroke:{edge}}} text{{fill:{ink};font:15px system-ui,sans-serif}} "
         ".small{{font-size:12px}} .soft{{fill:{soft}}} .box{{fill:{box};stroke:{soft}}} "
         ".new{{fill:{new};stroke:{new_edge};stroke-width:2}} "
         ".line{{fill:none;stroke:{soft};stroke-width:1.5}} .tip{{fill:{soft}}} .grid{{stroke:{edge}}} "
         ".one{{fill:none;stroke:{one};stroke-width:2}} "
         ".two{{fill:none;stroke:{two};stroke-width:2}} .three{{fill:none;stroke:{three};stroke-width:2}} "
         ".dot1{{fill:{one}}} .dot2{{fill:{two}}} .dot3{{fill:{three}}}")


def svg(width: int, height: int, title: str, marks: list[str]) -> str:
    style = RULES.format(**LIGHT) + " @media (prefers-color-scheme:dark){" + RULES.format(**DARK) + "}"
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
            f"<title>{escape(title)}</title><style>{style}</style>\n"
            f'<rect class="plate" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
            + "\n".join(marks) + "\n</svg>\n")


def text(x, y, words, classes="", anchor="middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x, y, width, height, words, below="", classes="box") -> list[str]:
    marks = [f'<rect class="{classes}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>',
             text(x + width / 2, y + height / 2 + (-3 if below else 5), words)]
    return marks + ([text(x + width / 2, y + height / 2 + 14, below, "small soft")] if below else [])


def line(*points, tip=False, classes="line") -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    mark = f'<path class="{classes}" d="{path}"/>'
    if tip:     # along the last stretch, which runs straight
        (x0, y0), (x, y) = points[-2:]
        u, v = ((x > x0) - (x < x0)) * 7, ((y > y0) - (y < y0)) * 7
        left, right = ((x - u - w * v, y - v - w * u) for w in (.6, -.6))
        mark += f'<path class="tip" d="M{x} {y}L{left[0]:g} {left[1]:g}L{right[0]:g} {right[1]:g}Z"/>'
    return mark


def circle(x, y, sign) -> list[str]:
    return [f'<circle class="box" cx="{x}" cy="{y}" r="13"/>', text(x, y + 5, sign)]


def block() -> str:
    """One layer, as mamba.py's Mixer.forward walks it; sizes are the 7B's."""
    marks = [line((20, 46), (1058, 46), tip=True),
             text(24, 34, "the residual stream, 4096 wide, fp32", "small soft", "start")]
    marks += [line((66, 46), (66, 110), tip=True), *box(20, 110, 92, 44, "RMSNorm"),
              line((112, 132), (130, 132), tip=True), *box(130, 110, 108, 44, "in_proj", "4096 → 2 · 8192"),
              line((238, 132), (282, 132), tip=True), text(260, 124, "x"),
              *box(282, 110, 64, 44, "conv", "4 taps"), line((346, 132), (364, 132), tip=True),
              *box(364, 110, 56, 44, "SiLU"), line((420, 132), (800, 132), tip=True),
              text(780, 124, "x")]
    marks += [line((436, 132), (436, 247), (456, 247), tip=True),
              *box(456, 180, 84, 134, "x_proj", "8192 → 288")]
    for y, name, size in (204, "dt", 256), (247, "B", 16), (290, "C", 16):
        marks += [line((540, y), (580, y), tip=True), text(559, y - 7, name),
                  *box(580, y - 17, 92, 34, "RMSNorm", classes="new"),
                  text(676, y - 7, f"{size}", "small soft", "start"),
                  line((672, y), (706 if name == "dt" else 800, y), tip=True)]
    marks += [*box(706, 187, 74, 34, "dt_proj"), line((780, 204), (800, 204), tip=True),
              *box(800, 110, 72, 204, "scan", "8192 × 16")]
    marks += [line((260, 132), (260, 352), (364, 352), tip=True), text(268, 345, "z, the gate", "", "start"),
              *box(364, 335, 56, 34, "SiLU"), line((420, 352), (902, 352), (902, 226), tip=True),
              line((872, 212), (888, 212), tip=True), *circle(902, 212, "×"),
              line((915, 212), (934, 212), tip=True), *box(934, 190, 84, 44, "out_proj", "8192 → 4096"),
              line((976, 190), (976, 59), tip=True), *circle(976, 46, "+")]
    marks += ['<rect class="new" x="20" y="212" width="18" height="18" rx="3"/>',
              text(46, 226, "the three norms that", "small", "start"),
              text(46, 243, "Falcon-Mamba adds to", "small", "start"),
              text(46, 260, "Mamba: no weights", "small", "start")]
    title = "One Falcon-Mamba layer: the Mamba block, with three RMSNorms on dt, B and C"
    return svg(1078, 386, title, marks)


def tree() -> str:
    """Who merges with whom when scan.py's merge_pairs runs over eight steps. Time goes down."""
    left, wide, top, high, marks, moves = 52, 72, 74, 58, [], []

    def merge_pairs(steps, level):      # the recursion of scan.py, over the numbers of the steps
        if len(steps) == 1:
            return
        moves.append([(a, b, "one") for a, b in zip(steps[0:-1:2], steps[1::2])])
        merge_pairs(steps[1::2], level + 1)
        if fills := [*zip(steps[1::2], steps[2::2])]:
            moves.append([(a, b, "three") for a, b in fills])
    merge_pairs([*range(8)], 0)
    first = [*range(8)]                 # each wire carries the span of steps first[t] to t
    bottom = top + high * len(moves)
    marks += [line((left + wide * t, top - 12), (left + wide * t, bottom + 34)) for t in range(8)]
    for t in range(8):
        marks += [text(left + wide * t, top - 34, f"step {t}"),
                  text(left + wide * t, top - 18, f"a{t}, b{t}", "small soft")]
    for k, move in enumerate(moves, 1):
        y = top + high * k
        for a, b, kind in move:
            marks.append(line((left + wide * a, y - high + 18), (left + wide * b, y), classes=kind))
            first[b] = first[a]
            dot = "dot1" if kind == "one" else "dot3"
            marks.append(f'<circle class="{dot}" cx="{left + wide * b}" cy="{y}" r="5"/>')
            marks.append(text(left + wide * b - 9, y + 18, f"{first[b]}–{b}", "small", "end"))
        marks.append(text(left + wide * 7 + 34, y + 5, f"move {k}", "soft", "start"))
    marks += [text(left + wide * t, bottom + 52, f"h{t}") for t in range(8)]
    marks += ['<circle class="dot1" cx="58" cy="450" r="5"/>',
              text(70, 455, "halve: two neighbours become one step", "small", "start"),
              '<circle class="dot3" cx="340" cy="450" r="5"/>',
              text(352, 455, "fill in: a finished state meets the next span", "small", "start")]
    return svg(660, 474, "The parallel scan of eight steps in five moves", marks)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / count))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (size * k) <= count + 1)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def chart(left: int, top: int, width: int, height: int, title: str, under: str, curves: dict, x_log=False,
          low: float = 0, x_label=lambda v: f"{v:g}", dots=()) -> list[str]:
    """One panel: class of line -> its points (x, y), and single points with their values."""
    points = [*dots, *(p for curve in curves.values() for p in curve)]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_of = math.log10 if x_log else float
    high, x0, x1 = max(ys) * 1.06, x_of(min(xs)), x_of(max(xs))

    def at(x, y):
        return left + (x_of(x) - x0) / (x1 - x0) * width, top + height - (y - low) / (high - low) * height
    marks = [text(left, top - 12, title, "", "start"),
             text(left + width, top + height + 36, under, "small soft", "end")]
    for v in ticks(low, high):
        y = at(min(xs), v)[1]
        marks += [f'<path class="grid" d="M{left} {y:.1f}H{left + width}"/>',
                  text(left - 8, y + 4, f"{v:g}", "small soft", "end")]
    for v in sorted(set(xs)) if x_log else ticks(x0, x1):
        marks.append(text(at(v, low)[0], top + height + 18, x_label(v), "small soft"))
    for x, y in dots:
        u, v = at(x, y)
        marks += [f'<circle class="dot2" cx="{u:.1f}" cy="{v:.1f}" r="4"/>',
                  text(u, v + 30, f"{y:.2f}", "small", "end")]
    return marks + [line(*(at(x, y) for x, y in curve), classes=kind) for kind, curve in curves.items()]


def schedule() -> str:
    """The 7B's batch, learning rate and context, from the functions that train.py trains with."""
    recipe, marks = RECIPES["falcon-mamba-7b"], []
    for row, end in enumerate((100 * GT, recipe.total_tokens)):
        seen = [end * i // 400 for i in range(401)]
        panels = [("learning rate / 1e-4", lambda t: learning_rate(recipe, t) * 1e4),
                  ("sequences a step", lambda t: batch_size(recipe, t)),
                  ("tokens a sequence", lambda t: context_length(recipe, t))]
        for column, ((title, value), kind) in enumerate(zip(panels, ("one", "two", "three"))):
            marks += chart(62 + 300 * column, 48 + 210 * row, 220, 120, title, "billion tokens seen",
                           {kind: [(t / GT, value(t)) for t in seen]})
    return svg(922, 444, "The schedule of Falcon-Mamba-7B: its beginning above, the whole run below", marks)


def loss() -> str:
    """The default run of train.py that assets/loss.jsonl was taken from."""
    rows = [json.loads(row) for row in (ASSETS / "loss.jsonl").read_text().splitlines()]
    steps = [(row["tokens"] / 1e3, row["loss"]) for row in rows]
    dots = [(row["tokens"] / 1e3, row["held_out"]) for row in rows if "held_out" in row]
    marks = chart(62, 62, 540, 200, "nats a byte: each step's own, and held out (dots)",
                  "thousand tokens seen", {"one": steps}, dots=dots)
    return svg(640, 320, "Loss of the default run of train.py", marks)


def keep(metrics: Path) -> None:
    """What loss.svg needs of a run's metrics.jsonl, into assets/loss.jsonl."""
    rows = []
    for row in map(json.loads, metrics.read_text().splitlines()):
        rows.append({"tokens": row["tokens"], "loss": round(row["loss"], 4)})
        if "held_out" in row:
            rows[-1]["held_out"] = round(row["held_out"]["text"], 4)
    (ASSETS / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def cost() -> str:
    """Time and memory of one more token, against the tokens before it, as tests/bench.py measured them."""
    rows = json.loads((ASSETS / "bench.json").read_text())["length"]
    marks = []
    panels = [("milliseconds a token", "ms"), ("what is kept of the text, in MB", "state_mb")]
    for column, (title, name) in enumerate(panels):
        curves = {kind: [(row["tokens"], row[name]) for row in rows if row["peer"] == peer]
                  for kind, peer in (("one", "ours"), ("two", "attention"))}
        marks += chart(62 + 380 * column, 78, 290, 144, title, "tokens before it", curves, x_log=True,
                       x_label=lambda v: f"{v:g}" if v < 1000 else f"{v / 1024:g}k")
    for i, (kind, words) in enumerate((("dot1", "Falcon-Mamba, this code"), ("dot2", "attention"))):
        marks += [f'<circle class="{kind}" cx="{68 + 200 * i}" cy="24" r="5"/>',
                  text(80 + 200 * i, 28, words, "small", "start")]
    return svg(782, 300, "The cost of a token, against the length of the text before it", marks)


PICTURES = {f"{picture.__name__}.svg": picture for picture in (block, tree, schedule, loss, cost)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's pictures into assets/.")
    parser.add_argument("metrics", nargs="?", type=Path, help="a run's metrics.jsonl, for a new loss.svg")
    if metrics := parser.parse_args().metrics:
        if not metrics.is_file():
            parser.error(f"{metrics} is no file; a run of train.py leaves one in its --out")
        keep(metrics)
    for name, picture in PICTURES.items():
        (ASSETS / name).write_text(picture())
        print(f"assets/{name}")


if __name__ == "__main__":
    main()
