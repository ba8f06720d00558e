"""Charts as SVG text, without a library: they follow the page's light or dark colours and stay
readable on a phone."""

import html
import math

# Colours too dark, or too faint, on one of the two backgrounds give way to the page's.
INK = {"#000000": "var(--ink)", "#7f7f7f": "var(--grey)", "#882255": "var(--wine)"}
WIDTH = 400  # of the drawing; a phone shows it at about this size, so that 12 px text stays 11 px
HEIGHT = 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42  # margins


def ink(colour):
    return INK.get(colour, colour)


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    size = 10.0 ** math.floor(math.log10((high - low) / n))
    wide_enough = (size * m for m in (1, 2, 5, 10) if size * m * n >= (high - low) * (1 - 1e-9))
    step = next(wide_enough)
    first = math.ceil(low / step - 1e-9)
    values = [round((first + i) * step, 10) for i in range(n + 2)]
    return [v for v in values if v <= high + 1e-9 * (high - low)]


def value_range(values):
    """A range for an axis that holds all values; from 0 where they lie near enough to it."""
    low = min(values)
    high = max(values)
    if low == high:
        return (low - 0.5, low + 0.5) if low else (0.0, 1.0)
    if 0 <= low < 0.5 * high:
        low = 0.0
    room = 0.05 * (high - low)
    return (low - room if low else 0.0), high + room


class Axes:
    """Data coordinates -> places in the drawing."""

    def __init__(self, x_range, y_range):
        self.x_range = x_range
        self.y_range = y_range

    def x(self, value):
        low, high = self.x_range
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / ((high - low) or 1)

    def y(self, value):
        low, high = self.y_range
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / ((high - low) or 1)

    def points(self, pairs):
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in pairs)


def grid(axes, xlabel, ylabel):
    """Grid lines, their numbers, and the names of the axes."""
    out = []
    for value in ticks(*axes.x_range):
        x = axes.x(value)
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            f'stroke="var(--line)"/><text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" '
            f'text-anchor="middle">{value:g}</text>'
        )
    for value in ticks(*axes.y_range):
        y = axes.y(value)
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 5}" y="{y + 4:.1f}" '
            f'text-anchor="end">{value:g}</text>'
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(xlabel)}</text>"
    )
    if ylabel:
        out.append(
            f'<text x="11" y="{middle}" text-anchor="middle" transform="rotate(-90 11 {middle})">'
            f"{html.escape(ylabel)}</text>"
        )
    return "".join(out)


def radius(count):
    """Of a dot that stands for count draws."""
    return 2 + 1.2 * math.log10(1 + count)


def chart(series, xlabel, ylabel, title, x_range, y_range=(0, 1), diagonal=False):
    """-> SVG. series: dicts with
    colour, points [(x, y)];
    kind: "line" (default; a dot at its end), "dashed", "thin" (no dot), or "dots" with counts [n],
    whose size and number tell how many draws each stands for."""
    axes = Axes(x_range, y_range)
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        grid(axes, xlabel, ylabel),
    ]
    if diagonal:
        out.append(
            f'<line x1="{axes.x(0)}" y1="{axes.y(0)}" x2="{axes.x(1)}" y2="{axes.y(1)}" '
            'stroke="var(--faint)" stroke-dasharray="2 4"/>'
        )
    for s in series:
        out.append(dots(axes, s) if s.get("kind") == "dots" else line(axes, s))
    return "".join(out) + "</svg>"


def line(axes, s):
    colour = ink(s["colour"])
    look = {"dashed": "1.8;stroke-dasharray:6 4", "thin": ".8;opacity:.45"}
    width = look.get(s.get("kind"), "1.8")
    drawn = (
        f'<polyline points="{axes.points(s["points"])}" '
        f'style="fill:none;stroke:{colour};stroke-width:{width}"/>'
    )
    if s.get("kind") == "thin":
        return drawn
    x, y = s["points"][-1]
    return drawn + (
        f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3" style="fill:{colour}"/>'
    )


def dots(axes, s):
    colour = ink(s["colour"])
    out = []
    for (x, y), count in zip(s["points"], s["counts"]):
        left = axes.x(x) > WIDTH - 70
        place = axes.x(x) + (-radius(count) - 2 if left else radius(count) + 2)
        out.append(
            f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{radius(count):.1f}" '
            f'style="fill:{colour};opacity:.8"><title>n={count}: predicted {x:.3f}, '
            f"came true {y:.3f}</title></circle>"
            f'<text class="small" x="{place:.1f}" y="{axes.y(y) + 12:.1f}" '
            f'text-anchor="{"end" if left else "start"}">n={count:,}</text>'
        )
    return "".join(out)


def legend(entries):
    """entries: {label: colour} -> a line of keys."""
    keys = (
        f'<span class="entry"><span class="key" style="background:{ink(colour)}"></span> '
        f"{html.escape(label)}</span>"
        for label, colour in entries.items()
    )
    return f'<div class="legend">{"".join(keys)}</div>'
