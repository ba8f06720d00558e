"""One page for people: report.html, self-contained, of what a run measured.

Everything is in the file: figures are SVG drawn here, colours follow the reader's light or dark
setting, nothing is fetched. Without scripts all text and figures are there; a script of twenty
lines only sorts the solutions. Text of a model is escaped, and nothing of it is ever put into a
script, an attribute name or a style.
"""

import html

from report.arms import arm_of
from report.charts import chart, legend, value_range
from report.figures import accuracy_at
from report.solutions import progress_of, read_rows

TIMES = {
    "generate": "#0072B2",
    "grade": "#999999",
    "verify": "#009E73",
    "logprob": "#56B4E9",
    "backward": "#E69F00",
    "update": "#D55E00",
    "evaluate": "#CC79A7",
    "other": "#bbbbbb",
}
# Names of metrics.jsonl -> the chart's heading, in the order of the page.
TRAINING = {
    "reward": "reward",
    "entropy": "entropy (nats a token)",
    "completions/mean_length": "completion length (tokens)",
    "grad_norm": "gradient norm (before clipping)",
    "kl": "KL to the initial policy",
    "completions/clipped_ratio": "share of completions cut at the limit",
    "frac_reward_zero_std": "share of prompts whose samples all agree",
    "rewards/progress/mean": "progress bonus a step (before centering)",
}
POINTS = 100  # of a curve against steps; more steps than that are averaged
SHOWN = 24  # solutions of one side of an arm on the page
OPEN = 6  # of them shown before "more"

STYLE = """
:root { --paper: #ffffff; --ink: #1b1b1b; --faint: #6b6b6b; --grey: #7f7f7f; --wine: #882255;
        --line: #d9d9d9; --card: #f6f6f4; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e8e6e3; --faint: #a09c96; --grey: #989898; --wine: #cf5f97;
          --line: #3a3d42; --card: #1f2226; }
}
* { box-sizing: border-box; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
       margin: 0 auto; max-width: 1120px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
h4 { font-size: .92rem; font-weight: 600; margin: .6rem 0 .3rem; }
p, figcaption { max-width: 46rem; }
figcaption, .faint { color: var(--faint); font-size: .88rem; }
figure { margin: .3rem 0 1rem; }
svg { display: block; height: auto; max-width: 560px; width: 100%; }
svg text { fill: var(--ink); font-size: 12px; }
svg text.small { fill: var(--faint); font-size: 10px; }
.charts { display: grid; gap: .4rem 1.6rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
.small-charts { display: grid; gap: .2rem 1.2rem;
                grid-template-columns: repeat(3, minmax(0, 1fr)); }
.small-charts h4 { margin: .5rem 0 0; }
@media (max-width: 820px) {
  .charts, .small-charts { grid-template-columns: minmax(0, 1fr); }
}
.legend { font-size: .85rem; }
.entry { display: inline-block; margin-right: 1rem; }
.key { border-radius: 2px; display: inline-block; height: .8em; width: .8em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem .25rem 0; text-align: left;
         vertical-align: top; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers th { min-width: 4.4rem; vertical-align: bottom; }
.numbers td:first-child, .numbers th:first-child { background: var(--paper); left: 0;
  min-width: min(12rem, 38vw); position: sticky; white-space: normal; }
.bar { display: flex; height: 16px; min-width: 1px; }
.times { display: grid; font-size: .9rem; gap: .1rem .8rem; grid-template-columns: 1fr auto;
         margin: .4rem 0; }
.times > :nth-child(3n) { grid-column: 1 / 3; margin-bottom: .5rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .85em; }
p code, figcaption code { white-space: nowrap; }
pre { background: var(--card); padding: .5rem; white-space: pre-wrap; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-size: .9rem; }
.settings { column-width: 17rem; font-size: .85rem; margin: .4rem 0; }
.settings div { break-inside: avoid; }
.pair { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.alone .list { column-width: 24rem; }
@media (max-width: 720px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
        break-inside: avoid; margin: 0 0 .7rem; padding: .5rem .7rem; }
.prompt { font-weight: 600; white-space: pre-wrap; }
.answer { color: var(--faint); font-weight: 400; }
.steps { font-family: ui-monospace, monospace; font-size: .9rem; margin-top: .3rem; }
.step { border-radius: 3px; padding: .05rem .2rem; white-space: pre-wrap; }
.block { display: block; margin: 2px 0; }
.num { color: var(--faint); font-size: .78rem; }
button { background: var(--card); border: 1px solid var(--line); border-radius: 4px;
         color: var(--ink); font: inherit; font-size: .85rem; margin: 0 .3rem .5rem 0;
         padding: .15rem .6rem; }
button[aria-pressed=true] { border-color: var(--ink); }
.controls { display: none; }
.js .controls { display: block; }
"""

SCRIPT = """
document.documentElement.classList.add("js");
for (const box of document.querySelectorAll(".solutions")) {
  for (const button of box.querySelectorAll("button")) button.addEventListener("click", () => {
    for (const other of box.querySelectorAll("button"))
      other.setAttribute("aria-pressed", other === button);
    const key = button.dataset.sort, sign = button.dataset.order === "down" ? -1 : 1;
    for (const column of box.querySelectorAll(".column")) {
      const cards = [...column.querySelectorAll(".card")];
      const places = cards.map(card => card.parentNode);
      cards.sort((a, b) => sign * (parseFloat(a.dataset[key]) - parseFloat(b.dataset[key])));
      cards.forEach((card, i) => places[i].append(card));
    }
  });
}
"""

SORTS = [
    ("order", "up", "as drawn"),
    ("gain", "down", "largest gain over the prompt"),
    ("best", "down", "best single step"),
    ("worst", "up", "worst single step"),
]


# --------------------------------------------------------------------------------------------------
# Curves.


def shown_end(arms, last):
    """Where an axis ends: at the largest last(run), but for arms that run longer by design, which
    would press all others into a corner."""
    ends = {arm: max(last(run) for run in runs) for arm, runs in arms.items()}
    return max([e for arm, e in ends.items() if not arm_of(arm).longer] or ends.values())


def learning_curves(runs, end, points=120):
    """Accuracy against sampled tokens, from 0 to `end` or the shortest run's end -> (tokens, mean
    over seeds, [accuracies of each seed])."""
    end = min(end, *(run.evaluations[-1]["num_tokens"] for run in runs))
    tokens = [i * end / points for i in range(points + 1)]
    seeds = [[accuracy_at(run.evaluations, t) for t in tokens] for run in runs]
    return tokens, [sum(values) / len(values) for values in zip(*seeds)], seeds


def learning_label(arm, runs, end):
    """The arm's name and number of seeds; its end where the axis stops before it."""
    label = f"{arm_of(arm).label} (n={len(runs)})"
    last = min(run.evaluations[-1]["num_tokens"] for run in runs)
    if last <= end:
        return label
    accuracy = sum(run.evaluations[-1]["eval/accuracy"] for run in runs) / len(runs)
    return f"{label}: {accuracy:.2f} at {last / 1e3:,.0f}k"


def learning_chart(arms):
    end = shown_end(arms, lambda run: run.evaluations[-1]["num_tokens"])
    series = []
    keys = {}
    for arm, runs in arms.items():
        tokens, mean, seeds = learning_curves(runs, end)
        thousands = [t / 1e3 for t in tokens]
        colour = arm_of(arm).colour
        longer = arm_of(arm).longer
        if len(runs) > 1 and not longer:
            thin = [dict(colour=colour, points=list(zip(thousands, s)), kind="thin") for s in seeds]
            series = thin + series  # below all means
        kind = "dashed" if longer else "line"
        series.append(dict(colour=colour, points=list(zip(thousands, mean)), kind=kind))
        keys[learning_label(arm, runs, end)] = colour
    drawing = chart(
        series,
        "sampled tokens, thousands (without the verifier's)",
        "sampled accuracy",
        "accuracy against sampled tokens",
        (0, end / 1e3),
    )
    return drawing + legend(keys)


def goodhart_points(run):
    """[(V, accuracy)] of a run's evaluations. V is of a single sample, as train_rl.py logs it: what
    the verifier says of a Best-of-K prover, read back as 1 - (1 - V)^(1/K)."""
    return [
        (row["eval/verifier_score"], row["eval/accuracy"])
        for row in run.evaluations
        if row.get("eval/verifier_score") is not None
    ]


def goodhart_chart(arms):
    """One line a run; None where no evaluation knows a verifier's score."""
    series = []
    keys = {}
    for arm, runs in arms.items():
        for run in runs:
            points = goodhart_points(run)
            if points and run.verifier and not arm_of(arm).longer:
                series.append(dict(colour=arm_of(arm).colour, points=points))
                keys[arm_of(arm).label] = arm_of(arm).colour
    if not series:
        return None
    drawing = chart(
        series,
        "V: the verifier's mean value of the same solutions",
        "true accuracy",
        "true accuracy against the verifier's value",
        (0, 1),
        diagonal=True,
    )
    return drawing + legend(keys)


def pooled_reliability(summaries):
    """Reliability of several seeds' verifiers, bin by bin: [(prediction, outcome, count)]."""
    bins = {}
    for summary in summaries:
        for prediction, outcome, count in summary.get("reliability") or []:
            bins.setdefault(min(9, int(10 * prediction)), []).append((prediction, outcome, count))
    out = []
    for _, rows in sorted(bins.items()):
        n = sum(count for *_, count in rows)
        mean = [sum(row[i] * row[2] for row in rows) / n for i in (0, 1)]
        out.append((*mean, n))
    return out


def reliability_chart(arms):
    """Dots of each verifier that pays some arm; arms that share one are named together."""
    shared = {}
    for arm, runs in arms.items():
        wants = arm_of(arm).verifier
        summaries = [run.verifier for run in runs if run.verifier]
        if wants and arm != "constant" and pooled_reliability(summaries):
            shared.setdefault(wants, []).append((arm, pooled_reliability(summaries)))
    if not shared:
        return None
    series = []
    keys = {}
    for users in shared.values():
        arm, rows = users[0]
        series.append(
            dict(
                colour=arm_of(arm).colour,
                kind="dots",
                points=[(prediction, outcome) for prediction, outcome, _ in rows],
                counts=[count for *_, count in rows],
            )
        )
        keys["verifier of " + ", ".join(arm_of(a).label for a, _ in users)] = arm_of(arm).colour
    drawing = chart(
        series,
        "predicted value",
        "share of fresh rollouts that succeed",
        "reliability of the verifiers",
        (0, 1),
        diagonal=True,
    )
    return drawing + legend(keys)


def metric_curve(runs, name, end):
    """[(step, mean over seeds)] of one metric, steps up to `end`, averaged into POINTS at most."""
    values = {}
    for run in runs:
        for row in run.steps:
            if row.get(name) is not None and row["step"] <= end:
                values.setdefault(row["step"], []).append(row[name])
    means = [(step, sum(v) / len(v)) for step, v in sorted(values.items())]
    size = -(-len(means) // POINTS) or 1
    chunks = [means[i : i + size] for i in range(0, len(means), size)]
    return [tuple(sum(pair[i] for pair in c) / len(c) for i in (0, 1)) for c in chunks]


def training_charts(arms):
    """The metrics of TRAINING against steps, one small chart each."""
    end = shown_end(arms, lambda run: run.rows[-1]["step"])
    out = []
    for name, heading in TRAINING.items():
        series = []
        for arm, runs in arms.items():
            if points := metric_curve(runs, name, end):
                series.append(dict(colour=arm_of(arm).colour, points=points))
        if series:
            drawn = value_range([y for s in series for _, y in s["points"]])
            drawing = chart(series, "step", "", heading, (0, end), drawn)
            out.append(
                f"<div><h4>{html.escape(heading)}</h4>{drawing}"
                f'<span class="faint"><code>{html.escape(name)}</code></span></div>'
            )
    if not out:
        return ""
    keys = {arm_of(arm).label: arm_of(arm).colour for arm in arms}
    every_row = (row for runs in arms.values() for run in runs for row in run.rows)
    kl = any(row.get("kl") is not None for row in every_row)
    no_kl = "" if kl else " The KL is measured where <code>--beta</code> is above 0."
    return (
        f'{legend(keys)}<div class="small-charts">{"".join(out)}</div>'
        f"<figcaption>Mean over seeds.{no_kl}</figcaption>"
    )


def step_times(arms):
    """{arm: {part: mean seconds a step}} from timing/* of all seeds; arms without are left out."""
    out = {}
    for arm, runs in arms.items():
        steps = [row for run in runs for row in run.steps if "timing/generate" in row]
        if steps:
            parts = {t: sum(row.get(f"timing/{t}") or 0.0 for row in steps) for t in TIMES}
            out[arm] = {t: seconds / len(steps) for t, seconds in parts.items()}
    return out


def time_bars(times):
    """{arm: {part: seconds}} -> one bar an arm, its parts in colours."""
    longest = max(sum(parts.values()) for parts in times.values()) or 1.0
    out = []
    for arm, parts in times.items():
        pieces = "".join(
            f'<span style="background:{TIMES[t]};width:{100 * seconds / longest:.2f}%" '
            f'title="{t}: {seconds:.4f} s"></span>'
            for t, seconds in parts.items()
        )
        out.append(
            f"<div>{html.escape(arm_of(arm).label)}</div><div>{sum(parts.values()):.4f} s</div>"
            f'<div class="bar">{pieces}</div>'
        )
    return f'<div class="times">{"".join(out)}</div>{legend(TIMES)}'


# --------------------------------------------------------------------------------------------------
# Solutions.


def shade(progress):
    """Progress in [-1,1] -> a background: blue for a gain, orange for a loss, deeper the larger."""
    red, green, blue = (0, 114, 178) if progress >= 0 else (230, 129, 0)
    size = abs(progress)
    alpha = min(0.75, 0.08 + 0.9 * size) if size >= 0.005 else 0
    return f"background:rgba({red},{green},{blue},{alpha:.2f})"


def step_span(progress, value, text, block):
    """One step, shaded; where steps are lines, its progress stands beside it as a number."""
    number = f" <span class=num>{progress:+.2f}</span>" if block else ""
    return (
        f'<span class="step{" block" if block else ""}" style="{shade(progress)}" '
        f'title="progress {progress:+.3f}, value {value:.3f}">'
        f"{html.escape(text.rstrip(chr(10)))}{number}</span>"
    )


def card(row, order, ends_with_eos=True):
    """One solution. ends_with_eos: the task's; where it is False, being cut off says
    nothing."""
    progress = progress_of(row)
    block = any("\n" in s for s in row["steps"]) or max(map(len, row["steps"]), default=0) > 12
    steps = "".join(
        step_span(a, value, text, block)
        for a, value, text in zip(progress, row["values"][1:], row["steps"])
    )
    first = row["values"][0]
    last = row["values"][-1]
    cut = ", cut off" if row["finish_reason"] == "length" and ends_with_eos else ""
    wanted = ""
    if row.get("answer"):
        answer = html.escape(str(row["answer"]).strip())
        wanted = f' <span class="answer">answer: {answer}</span>'
    return (
        f'<div class="card" data-order="{order}" data-gain="{last - first:.4f}" '
        f'data-best="{max(progress, default=0):.4f}" data-worst="{min(progress, default=0):.4f}">'
        f'<div class="prompt">{html.escape(row["prompt"].strip())}{wanted}</div>'
        f'<div class="steps">{steps}</div>'
        f'<div class="num">value {first:.2f} &rarr; {last:.2f}, gain {last - first:+.2f}, '
        f"{len(progress)} steps{cut}</div></div>"
    )


def column(rows, heading, ends_with_eos):
    """Cards below a heading, the first OPEN of them open, the others behind "more"."""
    cards = [card(row, i, ends_with_eos) for i, row in enumerate(rows[:SHOWN])]
    more = ""
    if len(cards) > OPEN:
        more = (
            f"<details><summary>{len(cards) - OPEN} more</summary>"
            f'<div class="list">{"".join(cards[OPEN:])}</div></details>'
        )
    first = f'<div class="list">{"".join(cards[:OPEN])}</div>'
    return f'<div class="column"><h4>{heading}</h4>{first}{more}</div>'


def browser(rows, title, note="", ends_with_eos=True):
    """Right solutions on the left, wrong ones on the right; where there is one kind, all over."""
    sides = []
    for name, reward in (("right", True), ("wrong", False)):
        some = [row for row in rows if bool(row["reward"]) is reward]
        if some:
            heading = f"{len(some)} distinct {name} solution{'s' if len(some) > 1 else ''}"
            sides.append(column(some, heading, ends_with_eos))
    buttons = "".join(
        f'<button type="button" data-sort="{key}" data-order="{order}" '
        f'aria-pressed="{str(i == 0).lower()}">{text}</button>'
        for i, (key, order, text) in enumerate(SORTS)
    )
    return (
        f'<section class="solutions"><h3>{html.escape(title)}</h3>'
        f'<p class="faint">{html.escape(note)}</p><div class="controls">{buttons}</div>'
        f'<div class="{"pair" if len(sides) > 1 else "alone"}">{"".join(sides)}</div></section>'
    )


def solutions_of(run, when, answers):
    """Rows of a run's first or last evaluation; answers {prompt: answer} where a row has none."""
    path = run.folder / f"solutions_{when}.jsonl"
    rows = read_rows(path) if path.exists() else []
    return [dict(answer=answers.get(row["prompt"])) | row for row in rows]


def solution_sections(arms, task):
    """The solutions of each arm's first seed after training, then those before it."""
    out = []
    answers = dict(task["truth"])
    ends_with_eos = task["ends_with_eos"]
    for arm, runs in arms.items():
        run = runs[0]
        if rows := solutions_of(run, "end", answers):
            accuracy = run.evaluations[-1]["eval/accuracy"]
            note = (
                f"{run.seed}: accuracy {accuracy:.3f} of {run.config.get('eval_problems', '?')} "
                "samples; shown are distinct ones, so their counts are not the accuracy."
            )
            out.append(browser(rows, f"{arm_of(arm).label}, after training", note, ends_with_eos))
    for runs in arms.values():
        if rows := solutions_of(runs[0], "start", answers):
            accuracy = runs[0].evaluations[0]["eval/accuracy"]
            note = f"{runs[0].seed}: accuracy {accuracy:.3f}"
            out.append(browser(rows, "before training", note, ends_with_eos))
            break
    return "".join(out)


# --------------------------------------------------------------------------------------------------
# The page.


def cells(line):
    """Cells of a Markdown row; an empty last one counts."""
    return [c.strip() for c in line.strip().removeprefix("|").removesuffix("|").split("|")]


def html_row(texts, tag):
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def markdown_table(text):
    head, _, *body = text.splitlines()
    rows = "".join(html_row(cells(line), "td") for line in body)
    head = html_row(cells(head), "th")
    return f'<div class="wide"><table class="numbers">{head}{rows}</table></div>'


def pairs_table(pairs):
    return f"<table>{''.join(html_row(pair, 'td') for pair in pairs)}</table>"


def task_section(task):
    """task: dict(name, text or None, truth [(prompt, answer)], ends_with_eos)."""
    if not task["text"] and not task["truth"]:
        return ""
    text = f"<p>{html.escape(task['text'])}</p>" if task["text"] else ""
    truth = ""
    if task["truth"]:
        lines = [("prompt", "what is right"), *task["truth"]]
        truth = (
            '<p class="faint">What the policy is not told, and the grader knows:</p>'
            + pairs_table([(str(a).strip(), str(b).strip()) for a, b in lines])
        )
    return f"<h2>The task</h2>{text}{truth}"


def settings_list(settings):
    items = "".join(
        f"<div><code>{html.escape(k)}</code> {html.escape(str(v))}</div>"
        for k, v in sorted(settings.items())
    )
    return f'<div class="settings">{items}</div>'


def settings_section(arms):
    """Settings that all runs share, then for each arm those that differ."""
    configs = [run.config for runs in arms.values() for run in runs]
    shared = {k: v for k, v in configs[0].items() if all(k in c and c[k] == v for c in configs)}
    out = [f"<details><summary>settings of all runs</summary>{settings_list(shared)}</details>"]
    for arm, runs in arms.items():
        for run in runs:
            differ = {k: v for k, v in run.config.items() if k not in shared}
            if differ:
                title = html.escape(f"{arm_of(arm).label}, {run.seed}")
                out.append(f"<details><summary>{title}</summary>{settings_list(differ)}</details>")
    return "".join(out)


def provenance(record, arms):
    """record: dict(commit, machine, torch, written, trained, command, commands {label: line})."""
    rows = [
        ("trained", record["trained"]),
        ("page written", f"{record['written']}, by {record['command']}"),
        ("code", record["commit"]),
        ("machine", f"{record['machine']}, torch {record['torch']}"),
    ]
    stages = "\n".join(f"# {label}\n{line}" for label, line in record["commands"].items())
    commands = ""
    if stages:
        opened = " open" if len(record["commands"]) <= OPEN else ""
        commands = (
            f"<details{opened}><summary>the commands that made it, each stage by itself</summary>"
            f"<pre>{html.escape(stages)}</pre></details>"
        )
    return f"<h2>How it was made</h2>{pairs_table(rows)}{commands}{settings_section(arms)}"


def figure(heading, body, caption):
    return (
        f"<div><h2>{heading}</h2><figure>{body}<figcaption>{caption}</figcaption></figure></div>"
        if body
        else ""
    )


def verifier_figures(arms):
    k = max(run.prover_k for runs in arms.values() for run in runs)
    best_of = (
        f" The prover is the best of {k}: what its verifier says is read back as the value of a "
        "single sample, 1 &minus; (1 &minus; V)<sup>1/K</sup>."
        if k > 1
        else ""
    )
    return figure(
        "Is the verifier being fooled?",
        goodhart_chart(arms),
        "One line a seed, a dot where it ends. Below the diagonal the verifier believes more than "
        "is true; a line that turns down while it moves to the right is Goodhart's law at work."
        + best_of,
    ), figure(
        "Is the verifier calibrated?",
        reliability_chart(arms),
        "On the diagonal a predicted 0.3 comes true in 30% of cases. n: rollouts that a dot stands "
        "for, all seeds together; one of few rollouts may lie off by chance.",
    )


def solutions_intro(arms):
    run = next(iter(arms.values()))[0]
    anchored = (
        " The last step's shade is the verifier's own value of the end; in training the true "
        "outcome stands in its place (<code>--guards anchor</code>), so here a right solution may "
        "end in orange."
        if "anchor" in run.config.get("guards", ())
        else ""
    )
    return (
        "<h2>Solutions, step by step</h2><p>Blue: the step raised the chance that the prover "
        f"finishes the solution. Orange: it lowered it.{anchored}</p>"
    )


def page(arms, table, task, record, notes=()):
    """-> the whole of report.html. arms: {arm: [Run]} of report/runs.py; table: Markdown; task: see
    task_section; record: see provenance; notes: sentences below the table."""
    title = html.escape(f"nanoPAV: {task['name']}")
    goodhart, reliability = verifier_figures(arms)
    learning = figure(
        "Learning curves",
        learning_chart(arms),
        "Thick: the mean over seeds; thin: each seed.",
    )
    times = step_times(arms)
    spent = figure(
        "Where a step's time goes",
        time_bars(times) if times else None,
        "Mean over all steps (timing/* in metrics.jsonl); evaluations happen in some only.",
    )
    training = training_charts(arms)
    solutions = solution_sections(arms, task)
    parts = [
        f'<p class="faint">{html.escape(record["trained"])}, {html.escape(record["machine"])}</p>',
        markdown_table(table),
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        task_section(task),
        f'<div class="charts">{learning}{goodhart}</div>',
        f"<h2>Training, step by step</h2>{training}" if training else "",
        f'<div class="charts">{reliability}{spent}</div>',
        solutions_intro(arms) + solutions if solutions else "",
        provenance(record, arms),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )
