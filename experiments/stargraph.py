"""Star graphs: does a penalty on the wrong first node teach a model to look ahead where imitation does not?

    python experiments/stargraph.py              # about 6 minutes of one core
    python experiments/stargraph.py --smoke      # the same road in seconds
    -> docs/results/stargraph/: results.json, table.md, curves.png

Task: the edges of a star of two arms of two edges, its centre and one end; write the way there (tasks/stargraph.py). All but
the first node follow from the node before. The first, critical one needs looking back from the goal, and imitation
can get through a small training set by remembering it instead (Bachmann and Nagarajan 2024, arXiv 2403.06963).

The claim (Setlur et al. 2024, arXiv 2406.14532): per-step negatives at the critical token, sampled from an SFT policy
that has not been trained too long, mend that; from one trained too long they do not.

    sft            few, more and many steps on 1000 graphs (also the control for "train longer")
    dpo_per_step   from the first and the second of these policies; learning rate searched on a tuning seed
    dpo_whole      from the second, learning rate searched alike
    rft            from the samples of the second, as many steps

Measured on new graphs: is the first node right (a guess: 0.5), is the whole way right. What would have falsified the
claim: no gain at the first node over the SFT policy that per-step DPO started from, beyond the spread over seeds.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from negatives import DPO, NAMES, SAMPLING, TUNING, Arm, verdict  # noqa: E402

from infra.cli import UserError, opt, parse, script  # noqa: E402
from infra.runs import mean, write_json  # noqa: E402
from report.figures import METHOD_COLOURS, finish, machine, print_results, pyplot, spread  # noqa: E402


@dataclass
class Config:
    size: int = opt(1000, "training graphs", low=1)
    seeds: int = opt(5, "seeds of the reported numbers", low=2)
    steps: list = opt([100, 300, 600], "three lengths of SFT, in steps of 64 examples")
    learning_rates: list = opt([3e-4, 1e-3], "grid of the DPO arms")
    beta: float = opt(0.1, "of the DPO arms", above=0)
    dpo_steps: int = opt(100, "optimizer steps of 64 pairs", low=1)
    test_problems: int = opt(1000, "graphs of an evaluation", low=1)
    out: str = opt("docs/results/stargraph", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


def run_all(cfg, root):
    """-> rows (one per SFT length, method and seed), chosen settings, their search."""
    few, middle, _ = cfg.steps
    arm = lambda name, seed, setting: Arm(cfg, "stargraph", name, cfg.size, seed, root / f"seed{seed}").run(setting)  # noqa: E731
    best, tuning, rows = dict(rft=dict(steps=middle)), {}, []
    for name in ("dpo_per_step", "dpo_whole"):
        grid = [dict(learning_rate=lr, beta=cfg.beta) for lr in cfg.learning_rates]
        scores = [(arm(name, TUNING, dict(policy=middle) | s)[0]["val"], s) for s in grid]
        best[name], tuning[name] = max(scores, key=lambda x: x[0])[1], [dict(s, val=v) for v, s in scores]
    more = {few: ("dpo_per_step",), middle: ("dpo_per_step", "dpo_whole", "rft")}
    for seed, steps in itertools.product(range(cfg.seeds), cfg.steps):
        sft, _ = arm("sft", seed, dict(steps=steps))
        found = dict(sft=sft)
        for name in more.get(steps, ()):
            try:
                found[name], _ = arm(name, seed, dict(policy=steps) | best[name])
            except UserError:  # no negative left: nothing to train on
                found[name] = sft | dict(pairs=0)
        for name, r in found.items():
            wrong = 1 - r["correct"] / r["sampled"] if r.get("sampled") else None
            rows.append(dict(steps=steps, seed=seed, method=name, first=r["first"], test=r["test"],
                             gain=r["first"] - sft["first"], pairs=r.get("pairs"), wrong_share=wrong))
    return rows, best, tuning


def table(rows, cfg):
    lines = [f"{cfg.size} training graphs, {cfg.seeds} seeds, {cfg.test_problems} new graphs; a guess at the first node: 0.5", "",
             "| SFT steps | method | first node right (sd) | way right (sd) | first node minus its SFT policy, paired (sd) | "
             "pairs | wrong among the samples |", "|---|---|---|---|---|---|---|"]
    for steps, name in itertools.product(cfg.steps, NAMES):
        mine = [r for r in rows if r["steps"] == steps and r["method"] == name]
        if mine:
            cells = [f"{mean(r[k] for r in mine):.3f} ({spread([r[k] for r in mine]):.3f})" for k in ("first", "test")]
            gain = f"{mean(r['gain'] for r in mine):+.3f} ({spread([r['gain'] for r in mine]):.3f})" if name != "sft" else ""
            pairs = f"{mean(r['pairs'] for r in mine):.0f}" if name in DPO else ""
            wrong = [r["wrong_share"] for r in mine if r["wrong_share"] is not None]
            lines.append("| " + " | ".join([str(steps), NAMES[name], *cells, gain, pairs,
                                            f"{mean(wrong):.2f}" if wrong else ""]) + " |")
    return "\n".join(lines)


def claims(rows, cfg):
    """For README (experiments/claims.py): the gain at the critical token from an early and from a longer-trained policy."""
    few, middle, _ = cfg.steps
    gain = lambda name, steps: [r["gain"] for r in rows if r["method"] == name and r["steps"] == steps]  # noqa: E731
    show = lambda d: f"{mean(d):+.3f} ({spread(d):.3f})"  # noqa: E731
    early, late, whole = gain("dpo_per_step", few), gain("dpo_per_step", middle), gain("dpo_whole", middle)
    sft = mean(r["first"] for r in rows if r["method"] == "sft" and r["steps"] == few)
    return [dict(
        paper="2406.14532", command="python experiments/stargraph.py", holds=verdict([early]),
        claim="imitation guesses the critical token of a star graph; per-step negatives of an early SFT policy mend that, "
              "those of one trained too long do not",
        measured=f"first node right {sft:.3f} after {few} steps of SFT (a guess: 0.5); per-step DPO from there {show(early)}, "
                 f"from {middle} steps {show(late)}, whole-solution DPO from there {show(whole)} ({cfg.seeds} seeds, sd)",
        fails_when=f"the policy was trained for {middle} steps: its samples on its own graphs are nearly all right, so that "
                   "there are few negatives" if mean(late) < mean(early) else "")]


def figure(rows, cfg, path):
    """First-node accuracy against how long the SFT policy was trained; every seed a dot."""
    plt = pyplot()
    if plt is None:
        return
    fig, axis = plt.subplots(figsize=(6, 4.2), constrained_layout=True)
    for name, shift in (("sft", 0.92), ("dpo_per_step", 1.0), ("dpo_whole", 1.08), ("rft", 1.16)):
        mine = [r for r in rows if r["method"] == name]
        axis.plot([r["steps"] * shift for r in mine], [r["first"] for r in mine], "o", color=METHOD_COLOURS[name], alpha=0.4,
                  markersize=4)
        steps = [s for s in cfg.steps if any(r["steps"] == s for r in mine)]
        axis.plot([s * shift for s in steps], [mean(r["first"] for r in mine if r["steps"] == s) for s in steps], "-D",
                  color=METHOD_COLOURS[name], label=NAMES[name], markersize=7)
    axis.axhline(0.5, color="#aaaaaa", linestyle=":", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(cfg.steps, cfg.steps)
    axis.minorticks_off()
    axis.set(xlabel="SFT steps of the policy that is sampled", ylabel="first node right, new graphs",
             title="stargraph: the critical token (dots: seeds; dotted: a guess)")
    axis.legend(frameon=False, fontsize=8)
    finish(plt, fig, (axis,), path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root, out = Path("runs/stargraph_smoke" if cfg.smoke else "runs/stargraph"), Path(cfg.out)
    if cfg.smoke:
        cfg.size, cfg.seeds, cfg.steps, cfg.dpo_steps, cfg.test_problems = 64, 2, [3, 6, 9], 2, 32
        cfg.learning_rates, SAMPLING["num_generations"], out = [1e-3], 4, root / "results"
    if len(cfg.steps) != 3:
        raise UserError("--steps wants three numbers")
    rows, best, tuning = run_all(cfg, root)
    text = table(rows, cfg)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    write_json(out / "results.json", dict(
        command="python experiments/stargraph.py" + (" --smoke" if cfg.smoke else ""), machine=machine(),
        torch=torch.__version__, settings=vars(cfg), best=best, tuning=tuning,
        claims=claims(rows, cfg), rows=rows,
        cpu_seconds=round(sum(json.loads(p.read_text())["cpu_seconds"] for p in root.glob("**/accuracy.json")))))
    figure(rows, cfg, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
