"""One page for people: report.html, self-contained, of what a run measured. report.py writes it.

Everything is in the file: figures are SVG drawn here, colours follow the reader's light or dark setting, nothing is fetched.
Without scripts all text and figures are there; a script of twenty lines only sorts and filters the solutions. Text of a
model is escaped and nothing of it is ever put into a script, an attribute name or a style.
"""

import html
import math
from pathlib import Path

from infra.runs import read_metrics
from report.show import progress_of, read_rows

# One colour per method in every figure: report.COLOURS; black and grey give way to the page's own ink.
INK = {"#000000": "var(--ink)", "#7f7f7f": "var(--faint)"}
TIMES = ["generate", "grade", "verify", "logprob", "backward", "update", "evaluate", "other"]
TIME_COLOURS = ["#0072B2", "#999999", "#009E73", "#56B4E9", "#E69F00", "#D55E00", "#CC79A7", "#bbbbbb"]
SHOWN = 48  # solutions of an arm on the page

STYLE = """
:root { --paper: #ffffff; --ink: #1b1b1b; --faint: #6b6b6b; --line: #d9d9d9; --card: #f6f6f4; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e8e6e3; --faint: #a09c96; --line: #3a3d42; --card: #1f2226; }
}
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px;
       padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p, figcaption { max-width: 46rem; }
figcaption, .faint { color: var(--faint); font-size: .88rem; }
figure { margin: .5rem 0; }
svg { width: 100%; height: auto; max-width: 640px; }
svg text { fill: var(--ink); font-size: 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
@media (max-width: 720px) { .pair { grid-template-columns: 1fr; } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; margin: 0 0 .7rem; padding: .5rem .7rem; }
.prompt { font-weight: 600; white-space: pre-wrap; }
.steps { font-family: ui-monospace, monospace; font-size: .9rem; margin-top: .3rem; }
.step { border-radius: 3px; padding: .05rem .2rem; white-space: pre-wrap; }
.block { display: block; margin: 2px 0; }
.num { color: var(--faint); font-size: .75rem; white-space: nowrap; }
.key { border-radius: 2px; display: inline-block; height: .8em; width: .8em; }
button { background: var(--card); border: 1px solid var(--line); border-radius: 4px; color: var(--ink); font: inherit;
         font-size: .85rem; margin: 0 .3rem .5rem 0; padding: .15rem .6rem; }
button[aria-pressed=true] { border-color: var(--ink); }
.controls { display: none; }
.js .controls { display: block; }
"""

SCRIPT = """
document.documentElement.classList.add("js");
for (const box of document.querySelectorAll(".solutions")) {
  for (const button of box.querySelectorAll("button")) button.addEventListener("click", () => {
    for (const other of box.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    const key = button.dataset.sort, sign = button.dataset.order === "down" ? -1 : 1;
    for (const column of box.querySelectorAll(".column")) {
      const cards = [...column.querySelectorAll(".card")];
      cards.sort((a, b) => sign * (parseFloat(a.dataset[key]) - parseFloat(b.dataset[key])));
      for (const card of cards) column.append(card);
    }
  });
}
"""

SORTS = [("order", "up", "as drawn"), ("gain", "down", "largest gain over the prompt"), ("best", "down", "best single step"),
         ("worst", "up", "worst single step")]


def ink(colour):
    return INK.get(colour, colour)


# ----------------------------------------------------------------------------------------------------
# Figures.


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    size = 10.0 ** math.floor(math.log10((high - low) / n))
    step = next(size * m for m in (1, 2, 5, 10) if size * m * n >= (high - low) * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(n + 2) if (first + i) * step <= high * (1 + 1e-9)]


def chart(series, xlabel, ylabel, title, x_range, y_range=(0, 1), diagonal=False):
    """series: [(name, colour, [(x, y)], [(x, low, high)] or None, "line" or "dots")] -> SVG with its legend."""
    W, H, left, right, top, bottom = 640, 360, 56, 12, 12, 46
    (x0, x1), (y0, y1) = x_range, y_range
    X = lambda x: left + (W - left - right) * (x - x0) / ((x1 - x0) or 1)  # noqa: E731
    Y = lambda y: H - bottom - (H - top - bottom) * (y - y0) / ((y1 - y0) or 1)  # noqa: E731
    at = lambda points: " ".join(f"{X(x):.1f},{Y(y):.1f}" for x, y in points)  # noqa: E731
    out = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(title)}">']
    for x in ticks(x0, x1):
        out.append(f'<line x1="{X(x):.1f}" x2="{X(x):.1f}" y1="{top}" y2="{H - bottom}" stroke="var(--line)"/>'
                   f'<text x="{X(x):.1f}" y="{H - bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y0, y1):
        out.append(f'<line x1="{left}" x2="{W - right}" y1="{Y(y):.1f}" y2="{Y(y):.1f}" stroke="var(--line)"/>'
                   f'<text x="{left - 6}" y="{Y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    if diagonal:
        out.append(f'<line x1="{X(0)}" y1="{Y(0)}" x2="{X(1)}" y2="{Y(1)}" stroke="var(--faint)" stroke-dasharray="2 4"/>')
    for _, colour, points, band, kind in series:
        colour = ink(colour)
        if band:
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            out.append(f'<polygon points="{at(edge)}" style="fill:{colour};opacity:.15"/>')
        if kind == "line":
            out.append(f'<polyline points="{at(points)}" style="fill:none;stroke:{colour};stroke-width:2"/>')
        for x, y in points if kind == "dots" else points[-1:]:
            out.append(f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="3.5" style="fill:{colour}"/>')
    middle = (top + H - bottom) / 2
    out.append(f'<text x="{(left + W - right) / 2}" y="{H - 8}" text-anchor="middle">{html.escape(xlabel)}</text>'
               f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
               f"{html.escape(ylabel)}</text></svg>")
    names = {name: colour for name, colour, *_ in series if name}
    return "".join(out) + "<br>" + " &nbsp; ".join(
        f'<span class="key" style="background:{ink(colour)}"></span> {html.escape(name)}' for name, colour in names.items())


def waterfall(rows, names):
    """rows: {arm: {part: mean seconds a step}} -> bars of where a step's time goes."""
    longest = max(sum(r.values()) for r in rows.values())
    out = ['<div class="wide"><table><tr><th>arm</th><th>seconds a step</th><th>parts</th></tr>']
    for arm, parts in rows.items():
        total, x, bars = sum(parts.values()), 0.0, []
        for name, colour in zip(TIMES, TIME_COLOURS):
            width = 560 * parts.get(name, 0) / longest
            bars.append(f'<rect x="{x:.1f}" y="2" width="{width:.1f}" height="16" style="fill:{colour}">'
                        f"<title>{name}: {parts.get(name, 0):.4f} s</title></rect>")
            x += width
        out.append(f'<tr><td>{html.escape(names[arm])}</td><td>{total:.4f}</td><td><svg viewBox="0 0 560 20" role="img" '
                   f'aria-label="parts of a step" style="width:560px">{"".join(bars)}</svg></td></tr>')
    key = " &nbsp; ".join(f'<span class="key" style="background:{c}"></span> {n}' for n, c in zip(TIMES, TIME_COLOURS))
    return "".join(out) + f"</table></div>{key}"


# ----------------------------------------------------------------------------------------------------
# Solutions.


def shade(a):
    """Progress in [-1,1] -> a background: blue for a gain, orange for a loss, deeper the larger it is."""
    red, green, blue = (0, 114, 178) if a >= 0 else (230, 129, 0)
    return f"background:rgba({red},{green},{blue},{min(0.75, 0.08 + 0.9 * abs(a)) if abs(a) >= 0.005 else 0:.2f})"


def card(row, order):
    """One solution; every step shaded by its progress, with the numbers for those who cannot see the shade."""
    progress = progress_of(row)
    long = any("\n" in s for s in row["steps"]) or max(map(len, row["steps"]), default=0) > 12
    steps = "".join(
        f'<span class="step{" block" if long else ""}" style="{shade(a)}" title="progress {a:+.3f}, value {v:.3f}">'
        f'{html.escape(text.rstrip(chr(10)))}{f" <span class=num>{a:+.2f}</span>" if long else ""}</span>'
        for a, v, text in zip(progress, row["values"][1:], row["steps"]))
    gain = row["values"][-1] - row["values"][0]
    return (f'<div class="card" data-order="{order}" data-gain="{gain:.4f}" data-best="{max(progress, default=0):.4f}" '
            f'data-worst="{min(progress, default=0):.4f}"><div class="prompt">{html.escape(row["prompt"].strip())}</div>'
            f'<div class="steps">{steps}</div><div class="num">value {row["values"][0]:.2f} &rarr; {row["values"][-1]:.2f}, '
            f'gain {gain:+.2f}, {len(progress)} steps{", cut off" if row["finish_reason"] == "length" else ""}</div></div>')


def browser(rows, title):
    """Right solutions on the left, wrong ones on the right."""
    sides = []
    for name, reward in (("right", 1.0), ("wrong", 0.0)):
        mine = [r for r in rows if r["reward"] == reward]
        cards = "".join(card(r, i) for i, r in enumerate(mine[: SHOWN // 2])) or '<p class="faint">none</p>'
        sides.append(f'<div class="column"><h4>{name} ({len(mine)})</h4>{cards}</div>')
    buttons = "".join(f'<button type="button" data-sort="{key}" data-order="{order}" aria-pressed="{str(i == 0).lower()}">'
                      f"{text}</button>" for i, (key, order, text) in enumerate(SORTS))
    return (f'<section class="solutions"><h3>{html.escape(title)}</h3><div class="controls">{buttons}</div>'
            f'<div class="pair">{"".join(sides)}</div></section>')


# ----------------------------------------------------------------------------------------------------
# The page.


def markdown_table(text):
    head, _, *body = [[html.escape(c.strip()) for c in line.strip("| ").split("|")] for line in text.splitlines()]
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"  # noqa: E731
    return f'<div class="wide"><table>{row(head, "th")}{"".join(row(b, "td") for b in body)}</table></div>'


def learning_series(arms, names, colours, accuracy_at):
    """Mean accuracy over seeds against thousands of sampled tokens, with a band from the worst to the best seed."""
    series = []
    for arm, runs in arms.items():
        end = min(e[-1]["num_tokens"] for _, e, *_ in runs)
        grid = [i * end / 60 for i in range(61)]
        curves = [[accuracy_at(e, t) for _, e, *_ in runs] for t in grid]  # [61, seeds]
        band = [(t / 1e3, min(c), max(c)) for t, c in zip(grid, curves)] if len(runs) > 1 else None
        points = [(t / 1e3, sum(c) / len(c)) for t, c in zip(grid, curves)]
        series.append((f"{names[arm]} (n={len(runs)})", colours[arm], points, band, "line"))
    return series


def verifier_series(arms, names, colours):
    """Goodhart: one line a run, (verifier's score, true accuracy). Reliability: dots (prediction, what came true)."""
    goodhart, reliability = [], []
    for arm, runs in arms.items():
        for _, e, info, _ in runs:
            points = [(r["eval/verifier_score"], r["eval/accuracy"]) for r in e if "eval/verifier_score" in r]
            if points and info:
                goodhart.append((names[arm], colours[arm], points, None, "line"))
            if info and info.get("reliability") and not arm.startswith("outcome"):  # who is paid by it
                reliability.append((names[arm], colours[arm], [(p, o) for p, o, _ in info["reliability"]], None, "dots"))
    return goodhart, reliability


def step_times(arms, root):
    """{arm: {part: mean seconds a step}} from timing/* of every seed's metrics.jsonl; arms without them are left out."""
    out = {}
    for arm, runs in arms.items():
        steps = [r for seed, *_ in runs for r in read_metrics(Path(root) / seed / f"rl_{arm}") if "timing/generate" in r]
        if steps:
            out[arm] = {t: sum(r.get(f"timing/{t}", 0.0) for r in steps) / len(steps) for t in TIMES}
    return out


def page(title, table, arms, names, colours, accuracy_at, root, command):
    """-> the whole of report.html. arms: {arm: [(seed, evaluations, verifier's summary or None, config)]}, as
    report.load_arms gives them; accuracy_at(evaluations, tokens) and the other arguments are report.py's."""
    parts, end = [], max(e[-1]["num_tokens"] for runs in arms.values() for _, e, *_ in runs) / 1e3

    def figure(name, body, caption):
        parts.append(f"<h2>{name}</h2><figure>{body}<figcaption>{caption}</figcaption></figure>")

    figure("Learning curves",
           chart(learning_series(arms, names, colours, accuracy_at), "sampled tokens, thousands (without the verifier's)",
                 "sampled accuracy", "accuracy against sampled tokens", (0, end)),
           "Mean over seeds; the band reaches from the worst to the best seed.")
    goodhart, reliability = verifier_series(arms, names, colours)
    if goodhart:
        figure("Is the verifier being fooled?",
               chart(goodhart, "the verifier's mean score of the same solutions", "true accuracy",
                     "true accuracy against verifier score", (0, 1), diagonal=True),
               "One line a seed, a dot where it ends. Below the diagonal the verifier believes more than is true; a line that "
               "turns down while it moves to the right is Goodhart's law at work.")
    if reliability:
        figure("Is the verifier calibrated?",
               chart(reliability, "predicted value", "share of fresh prover rollouts that succeed",
                     "reliability of the verifiers", (0, 1), diagonal=True),
               "On the diagonal a predicted 0.3 comes true in 30% of cases.")
    if times := step_times(arms, root):
        figure("Where a step's time goes", waterfall(times, names),
               "Mean over all steps (timing/* in metrics.jsonl); evaluations happen in some steps only.")
    parts.append("<h2>Solutions, step by step</h2><p>Blue: the step raised the chance that the prover finishes the solution. "
                 "Orange: it lowered it. Distinct solutions of an evaluation of the first seed.</p>")
    for i, (arm, runs) in enumerate(arms.items()):
        for when in ("end", "start") if i == 0 else ("end",):  # all arms start from the same policy
            path = Path(root) / runs[0][0] / f"rl_{arm}" / f"solutions_{when}.jsonl"
            if path.exists():
                parts.append(browser(read_rows(path), "before training" if when == "start" else f"{names[arm]}, after training"))
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>'
            f'<p class="faint">made by <code>{html.escape(command)}</code></p>{markdown_table(table)}{"".join(parts)}'
            f"<script>{SCRIPT}</script></body></html>\n")
