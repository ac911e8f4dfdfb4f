"""Marks and charts as SVG, for draw.py.

A function returns a mark, or a list of them. The colour of every mark is a class, so that a page's
preference for light or dark can change it.
"""
import math
from html import escape

LIGHT = {"plate": "#ffffff", "edge": "#d0d7de", "ink": "#1f2328", "soft": "#656d76",
         "box": "#f3f5f8", "new": "#ffd9a8", "new_edge": "#bc4c00",
         "lines": ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#9a6700"]}
DARK = {"plate": "#0d1117", "edge": "#3d444d", "ink": "#e6edf3", "soft": "#9198a1",
        "box": "#1b2129", "new": "#7a3d00", "new_edge": "#ffa657",
        "lines": ["#58a6ff", "#ffa657", "#3fb950", "#d2a8ff", "#ff9bce", "#e3b341"]}
RULES = """.plate{{fill:{plate};stroke:{edge}}} text{{fill:{ink};font:15px system-ui,sans-serif}}
.small{{font-size:12px}} .soft{{fill:{soft}}} .box{{fill:{box};stroke:{soft}}}
.new{{fill:{new};stroke:{new_edge};stroke-width:2}}
.line{{fill:none;stroke:{soft};stroke-width:1.5}} .tip{{fill:{soft}}} .grid{{stroke:{edge}}}
"""
COLORS = len(LIGHT["lines"])

def style(colors: dict) -> str:
    rules = RULES.format(**colors)
    for i, color in enumerate(colors["lines"]):
        rules += f".line{i}{{fill:none;stroke:{color};stroke-width:2}} .dot{i}{{fill:{color}}}\n"
    return rules

def svg(width: int, height: int, title: str, marks: list[str]) -> str:
    """The whole picture."""
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    edge = f'x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"'
    dark = "@media (prefers-color-scheme:dark){" + style(DARK) + "}"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
             f"<title>{escape(title)}</title>",
             f"<style>{style(LIGHT)}{dark}</style>",
             f'<rect class="plate" {edge}/>',
             *marks,
             "</svg>\n"]
    return "\n".join(lines)

def text(x: float, y: float, words: str, classes: str = "", anchor: str = "middle") -> str:
    place = f'x="{x:g}" y="{y:g}"'
    return f'<text {place} class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'

def rect(x: float, y: float, width: float, height: float, classes: str) -> str:
    size = f'width="{width}" height="{height}"'
    return f'<rect class="{classes}" x="{x}" y="{y}" {size} rx="5"/>'

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

def ticks(low: float, high: float) -> list[float]:
    """Four round numbers or so, from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / 4))
    for step in (size, 2 * size, 2.5 * size, 5 * size, 10 * size):
        if (high - low) / step <= 5:
            break
    first = math.ceil(low / step)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]

def chart(left: int, top: int, width: int, height: int, title: str, under: str,
          curves: list[tuple], dots: list[tuple] = [], log: bool = False,
          low: float = 0) -> list[str]:
    """A panel of curves and dots, each a colour and its points (x, y). y begins at `low`.

    With `log`, x is drawn by its logarithm.
    """
    points = [point for color, each in [*curves, *dots] for point in each]
    place = math.log10 if log else float
    first = min(place(x) for x, y in points)
    last = max(place(x) for x, y in points)
    if first == last:
        last += 1
    high = max(y for x, y in points)
    high += 0.06 * (high - low) if high > low else 1

    def across(x):
        return left + (place(x) - first) / (last - first) * width

    def up(y):
        return top + height - (y - low) / (high - low) * height

    marks = [text(left, top - 12, title, "", "start")]
    marks.append(text(left + width, top + height + 36, under, "small soft", "end"))
    for y in ticks(low, high):
        marks.append(f'<path class="grid" d="M{left} {up(y):.1f}H{left + width}"/>')
        marks.append(text(left - 8, up(y) + 4, f"{y:g}", "small soft", "end"))
    for x in sorted({x for x, y in points}) if log else ticks(first, last):
        words = f"{x / 1024:g}k" if log and x >= 1024 else f"{x:g}"
        marks.append(text(across(x), top + height + 18, words, "small soft"))
    for color, each in curves:
        marks.append(line(*((across(x), up(y)) for x, y in each), classes=f"line{color}"))
    for color, each in dots:
        marks += [dot(across(x), up(y), color, 4) for x, y in each]
    return marks

def strip(left: int, top: int, width: int, groups: list[tuple]) -> list[str]:
    """A row each group, (name, colour, values): a dot each value."""
    values = [value for name, color, each in groups for value in each]
    low = min(values)
    span = max(values) - low or 1
    bottom = top + 30 * len(groups)

    def across(value):
        return left + (value - low) / span * width
    marks = []
    for value in ticks(low, low + span):
        marks.append(line((across(value), top), (across(value), bottom), classes="grid"))
        marks.append(text(across(value), bottom + 16, f"{value:g}", "small soft"))
    for i, (name, color, each) in enumerate(groups):
        y = top + 15 + 30 * i
        marks.append(text(left - 16, y + 4, name, "small", "end"))
        marks += [dot(across(value), y, color) for value in each]
    return marks

def visible(word: str) -> str:
    """Each character as one that is seen and that XML allows. Of long words, the beginning."""
    names = {" ": "␣", "\n": "↵", "\t": "⇥"}
    seen = [names.get(char, char if char.isprintable() else "�") for char in word[:40]]
    return "".join(seen) or "�"

def bars(left: int, bottom: int, wide: int, words: list[str], values: list[float]) -> list[str]:
    """A bar for each value, the highest 70 px, with a word under each."""
    most = max(values)
    marks = [text(left - 8, bottom - 66, f"{most:.2g}", "small soft", "end")]
    marks.append(text(left - 8, bottom + 4, "0", "small soft", "end"))
    for i, (word, value) in enumerate(zip(words, values)):
        x = left + wide * i
        high = 70 * value / most
        place = f'x="{x + 2}" y="{bottom - high:.1f}" width="{wide - 4}" height="{high:.1f}"'
        marks.append(f'<rect class="dot3" {place}/>')
        marks.append(text(x + wide / 2, bottom + 18, visible(word), "small"))
    return marks

def cells(left: int, top: int, width: int, rows: list[list[float]], words: list[str]) -> tuple:
    """A row of cells each, darker for greater values, with the words below -> marks, their end.

    It goes on below as a text does. A word's column is as wide as the word.
    """
    high = max(3, min(16, 160 // len(rows)))        # of a row
    lines = [[]]                                    # of each line its columns
    x = left
    for i, word in enumerate(words):
        word = visible(word)
        wide = 3 + 8 * len(word)
        if x + wide > left + width and x > left:
            lines.append([])
            x = left
        lines[-1].append((i, word, x, wide))
        x += wide
    rows = [shades(row) for row in rows]
    marks = []
    for columns in lines:
        paths = {}                                  # shade -> the path of its cells
        bottom = top + high * len(rows)
        for k, row in enumerate(rows):
            y = top + high * k
            if high >= 12 or k % 8 == 0:
                marks.append(text(left - 8, y + min(high, 12), f"layer {k}", "small soft", "end"))
            for i, _, x, wide in columns:
                cell = f"M{x} {y}h{wide - 1}v{high - 1}h{1 - wide}z"
                paths[row[i]] = paths.get(row[i], "") + cell
        for shade, path in sorted(paths.items()):
            marks.append(f'<path class="dot0" opacity="{shade}" d="{path}"/>')
        for _, word, x, wide in columns:
            fit = f'x="{x + 1}" y="{bottom + 13}" textLength="{wide - 3}"'
            marks.append(f'<text class="small" {fit}>{escape(word)}</text>')
        top = bottom + 30
    return marks, top

def shades(row: list[float]) -> list[float]:
    """From .1 to 1, by the logarithm. The least twentieth is all .1, the greatest all 1."""
    ordered = sorted(row)
    cut = len(row) // 20
    low = math.log(ordered[cut])
    high = math.log(ordered[-1 - cut])
    found = []
    for value in row:
        part = (math.log(value) - low) / (high - low) if high > low else 0.5
        found.append(round(0.1 + 0.9 * min(max(part, 0), 1), 1))
    return found
