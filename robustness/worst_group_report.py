"""Tables, claims and figure of worst_group.py.

    report(rows, parts, cfg, command)    (text, claims, draw)
"""

from infra.runs import mean
from robustness import common
from robustness.common import TUNING_SEED, cell, lead

SHORTCUTS = ("marker", "photograph")
KNOWS, MTL_L1 = "balanced (knows groups)", "MTL + l1"


def report(rows, parts, cfg, command):
    """rows [{shortcut, arm, seed, worst, average, last}], parts {shortcut: shares of variance}."""
    columns = [f"{s}, {what}" for s in SHORTCUTS for what in ("worst", "average", "last")]
    worst = {f"{s}, worst": s for s in SHORTCUTS}
    arms = list(dict.fromkeys(r["arm"] for r in rows))

    def at(arm, column):
        shortcut, what = column.split(", ")
        return common.pick(rows, what, arm=arm, shortcut=shortcut)

    text = "\n\n".join([
        f"Test accuracy, {cfg.seeds} seeds; worst group and average at the step that the worst "
        "group of a balanced validation set chose, last: worst group at the last step. Settings: "
        f"four an arm, by the same on seed {TUNING_SEED}.",
        common.markdown(["share of the pixels' variance between", *SHORTCUTS],
                        [[name, *(f"{parts[s][i]:.3f}" for s in SHORTCUTS)]
                         for i, name in enumerate(("the shortcut's values", "the labels"))]),
        common.matrix("All arms", arms, columns, at),
        common.leads("All columns", MTL_L1, arms, columns, at)])

    def ahead(arm, rival):
        return [worst[c] for c in common.ahead(at, arm, rival, worst)]

    def paired(arm, rival):
        found = {s: lead(at(arm, c), at(rival, c)) for c, s in worst.items()}
        return ", ".join(f"{s} {m:+.3f} ({sd:.3f})" for s, (m, sd, _) in found.items())

    def cells(*arms):
        return "; ".join(f"{arm} " + " / ".join(cell(at(arm, c)) for c in worst) for arm in arms)

    tests = {f"{s} against {rival}": s in ahead(MTL_L1, rival)
             for s in SHORTCUTS for rival in ("ERM", "JTT")}
    lost = [name for name, won in tests.items() if not won]
    one, other, pretrained = "MTL", "ERM + l1", "pre-training, MTL + l1"
    claims = [dict(
        paper="2312.03151", command=command, holds=common.verdict(tests.values()),
        claim="MTL with the pre-training objective on the end task's data, with an l1 penalty, "
              "beats ERM and JTT on the worst group",
        short="Reconstruction with an l1 penalty beats ERM and JTT's worst group",
        measured=f"worst group, marker / photograph: {cells(MTL_L1, 'ERM', 'JTT', KNOWS)}; paired "
                 f"over ERM {paired(MTL_L1, 'ERM')}, over JTT {paired(MTL_L1, 'JTT')} "
                 f"({cfg.seeds} seeds, sd)",
        fails_when=f"not clearly ahead: {', '.join(lost) or 'nowhere'}"), dict(
        paper="2312.03151", command=command,
        holds=common.verdict("marker" in ahead(arm, rival) for arm, rival in
                             ((MTL_L1, one), (MTL_L1, other), (pretrained, MTL_L1))),
        claim="both parts, the task and the l1 penalty, and the pre-training are needed",
        short="Task, l1 penalty and pre-training are all needed",
        measured=f"worst group, marker / photograph: {cells(MTL_L1, one, other, pretrained)}; "
                 f"pre-training before it {paired(pretrained, MTL_L1)} ({cfg.seeds} seeds, sd)",
        fails_when="pre-training is on the same images here, in the paper on others")]
    return text, claims, lambda plt: draw(plt, arms, at)


def draw(plt, arms, at):
    """Worst group of every arm, a dot a seed, a bar for the mean."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), sharey=True, constrained_layout=True)
    for axis, shortcut in zip(axes, SHORTCUTS):
        for i, (arm, colour) in enumerate(zip(arms, common.COLOURS)):
            values = at(arm, f"{shortcut}, worst")
            axis.plot([i] * len(values), values, "o", color=colour, alpha=0.5, markersize=4)
            axis.plot([i - 0.3, i + 0.3], [mean(values)] * 2, color=colour, linewidth=3)
        axis.axhline(mean(at("ERM", f"{shortcut}, worst")), color="#aaaaaa", linewidth=1)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
        axis.set(title=f"shortcut: {shortcut}", ylabel="accuracy of the worst group")
    return fig, axes
