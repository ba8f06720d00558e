"""How to spend a verifier's rollouts: many noisy prefixes, few exact ones, or the pits?

    python -m experiments.pav_data             # about 15 minutes of one core
    python -m experiments.pav_data --smoke     # few steps, under 20 seconds
    -> docs/results/pav_data/: results.json, table.md, curves.png

The claims (Setlur et al. 2024, arXiv 2410.08146, section 4 and appendix D): with few rollouts it is
better to cover more seed solutions (n_cov) than to repeat continuations (n_mc), with many it is the
other way round; and prefixes chosen up to the first pit make better verifiers than those of random
seed solutions, most of all where these are few.

    mc1, mc4, mc16   every step end of every seed solution is cut and continued n_mc times by the
                     prover; the label of a cut is the mean of its continuations, as in the paper.
                     At equal tokens: many, some, few seed solutions
    first_pit        2 cuts a seed solution and n_mc 4; then prefixes on the way to the first pit
                     (pav.py), 8 continuations each
    mc1_all, mc16_all   the rollouts of mc1 and mc16; the later step ends of each continuation are
                        labelled too, by its own
                     outcome: what pav.py does, and the paper does not. They cost no token

On `planted`: 4 prompts, hidden sequences of 5 letters, others for every seed. Policy and prover are
SFT models of scripted players (strength 5 and 16), seed solutions come from the policy. The
scripted prover's advantage is known exactly, and the verdict is the correlation with it on 512
steps of the policy; Brier score and AUC against fresh rollouts stand beside it. A budget counts the
tokens of seeds and continuations, to within one shard. RL (train_rl.py --reward pav, default
settings) runs on the verifiers of --rl-arms at the largest budget.

Tuning: every arm and budget chooses among the same --steps of the fit (rounded up to whole passes),
on a seed that is not reported. The threshold and the shares of first_pit are not tuned, nor is
anything else.

What would have falsified the claims: mc16 not below mc1 at the lowest budget, or not above it at
the highest; first_pit not above the best of the three uniform arms at a budget. A difference counts
if its 95% interval leaves out 0, paired over seeds (Student's t).

Everything stays in runs/pav_data: killed, the same command goes on.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import train_rl
import train_sft
from experiments.toolkit import (
    TUNING,
    cached,
    cpu_seconds,
    finish,
    mean_sd,
    print_results,
    pyplot,
    spread,
    together,
    typed,
    verdict,
    with_sd,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import Run, mean
from model import load_model
from pav import Config as VerifierConfig
from pav import collect, fit, join
from report.judge import judge
from rollouts import write_tensors
from tasks import get_task
from verifier import Verifier

# problems: seed solutions in a shard, so that a shard costs at most a third of the lowest budget.
DESIGNS = {
    "mc1": dict(n_mc=1, cuts=0, problems=32),
    "mc4": dict(n_mc=4, cuts=0, problems=8),
    "mc16": dict(n_mc=16, cuts=0, problems=4),
    "first_pit": dict(n_mc=4, cuts=2, coverage="first-pit", problems=16),
}
# arm -> (whose rollouts, are later step ends labelled).
ARMS = {
    "mc1": ("mc1", False),
    "mc4": ("mc4", False),
    "mc16": ("mc16", False),
    "first_pit": ("first_pit", False),
    "mc1_all": ("mc1", True),
    "mc16_all": ("mc16", True),
}
UNIFORM = ("mc1", "mc4", "mc16")
NAMES = {
    "mc1": "n_mc 1: many seeds",
    "mc4": "n_mc 4",
    "mc16": "n_mc 16: few seeds",
    "first_pit": "first pit",
    "mc1_all": "n_mc 1, later ends labelled",
    "mc16_all": "n_mc 16, later ends labelled",
}
COLOURS = {
    "mc1": "#0072B2",
    "mc4": "#56B4E9",
    "mc16": "#D55E00",
    "first_pit": "#009E73",
    "mc1_all": "#0072B2",
    "mc16_all": "#D55E00",
}
STRENGTH = dict(sft=5.0, prover=16.0)
TINY = dict(task="planted", task_args=["length=5"], threads=1, device="cpu", save_steps=10**6)
SAMPLING = {}  # CPU seconds of every shard that was used
METRICS = ("corr_advantage_exact", "corr_value_exact", "corr_advantage", "brier", "auc")


@dataclass
class Config:
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    budgets: list = opt([12500, 100000], "tokens of seed solutions and continuations", low=1)
    steps: list = opt([20, 60, 300], "grid of the fits: optimizer steps of 128 sequences", low=1)
    rl_arms: list = opt(
        ["mc1", "mc16", "first_pit", "mc1_all"],
        "whose verifiers at the largest budget train a policy",
        choices=list(ARMS),
    )
    rl_steps: int = opt(60, "RL steps of 4 prompts x 32 samples", low=1)
    out: str = opt("docs/results/pav_data", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# Pure functions.


def labels_at_cuts(data):
    """Sequences as pav.collect gives them -> one row a cut: its prefix and the mean of its
    continuations, nothing else.

    A cut's n_mc rows are neighbours with the same prefix and the same label, so of equal
    neighbours one is kept.
    -> dict(tokens [M,T], ends [M,1], target [M,1], weight [M,1])."""
    # Of the cut: the first labelled step end.
    column = (data["weight"] > 0).int().argmax(1, keepdim=True)
    end = data["ends"].gather(1, column)
    target = data["target"].gather(1, column)
    tokens = data["tokens"] * (torch.arange(data["tokens"].shape[1]) < end)
    fresh = torch.ones(len(tokens), dtype=torch.bool)
    fresh[1:] = (tokens[1:] != tokens[:-1]).any(1) | (end[1:] != end[:-1])[:, 0]
    return dict(
        tokens=tokens[fresh],
        ends=end[fresh],
        target=target[fresh],
        weight=torch.ones(int(fresh.sum()), 1),
    )


def shards_within(costs, budget):
    """How many shards, in order, come nearest to the budget (at least one)."""
    total = np.cumsum(costs)
    return int(np.abs(total - budget).argmin()) + 1


def per_seed(rows, arm, budget, metric="corr_advantage_exact"):
    """One metric of an arm at a budget, in the order of seeds; nan where a constant verifier has
    no correlation. rows: [{arm, budget, seed, metric...}]."""
    at = {r["seed"]: r[metric] for r in rows if r["arm"] == arm and r["budget"] == budget}
    return [math.nan if at[s] is None else at[s] for s in sorted(at)]


def gain(rows, arm, other, budget, metric="corr_advantage_exact"):
    """Paired differences between two arms, a seed each."""
    return [
        a - b
        for a, b in zip(per_seed(rows, arm, budget, metric), per_seed(rows, other, budget, metric))
    ]


# --------------------------------------------------------------------------------------------------
# Stages.


def policies(cfg, home, seed):
    shape = (
        dict(steps=5, num_examples=64, eval_problems=8)
        if cfg.smoke
        else dict(steps=300, num_examples=6000)
    )
    for name, strength in STRENGTH.items():
        config = train_sft.Config(
            **TINY, seed=seed, strength=strength, run_dir=str(home / name), **shape
        )
        cached(home / f"{name}.json", lambda: train_sft.train(config))  # noqa: B023


def verifier_config(cfg, home, seed, run="", **more):
    shape = dict(eval_problems=16, eval_mc=2) if cfg.smoke else dict(eval_problems=512, eval_mc=4)
    return VerifierConfig(
        **TINY,
        seed=seed,
        policy=str(home / "sft"),
        prover=str(home / "prover"),
        run_dir=str(run),
        prover_strength=STRENGTH["prover"],
        **shape,
        **more,
    )


def draw(cfg, home, seed, design):
    """Shards of a design until the largest budget is spent -> [(tokens spent, data)]; each is a
    file, drawn once."""
    options = {k: v for k, v in DESIGNS[design].items() if k != "problems"}
    config = verifier_config(cfg, home, seed, **options)
    n = DESIGNS[design]["problems"]
    task = get_task(config)
    shards = []
    spent = 0
    base, tokenizer = load_model(home / "sft")
    prover, _ = load_model(home / "prover")
    problems = task.problems("train", n, seed)
    while spent < max(cfg.budgets):
        path = home / "rollouts" / f"{design}_{len(shards):04d}.safetensors"
        if not path.exists():
            clock = time.process_time()
            data, cost = collect(base, prover, tokenizer, task, problems, config, len(shards))
            path.parent.mkdir(exist_ok=True)
            write_tensors(
                path,
                data
                | dict(
                    spent=torch.tensor(cost), cpu_seconds=torch.tensor(time.process_time() - clock)
                ),
            )
        data = load_file(path)
        SAMPLING[path] = float(data.pop("cpu_seconds"))
        shards.append((int(data.pop("spent")), data))
        spent += shards[-1][0]
    return shards


def verify(cfg, home, seed, arm, budget, steps, shards):
    """Fit and judge one verifier -> its numbers. shards: as draw gives them, of the arm's
    design."""
    run = home / f"{arm}_{budget}_{steps}"

    def make():
        n = shards_within([cost for cost, _ in shards], budget)
        data = join([d for _, d in shards[:n]])
        data = data if ARMS[arm][1] else labels_at_cuts(data)
        config = verifier_config(cfg, home, seed, run)
        config.epochs = math.ceil(steps * config.batch_size / len(data["tokens"]))
        base, tokenizer = load_model(home / "sft")
        prover, _ = load_model(home / "prover")
        verifier = Verifier(load_model(home / "sft")[0], fingerprint=tokenizer.fingerprint)
        info = dict(task="planted", label="q", prover=config.prover)
        fit(verifier, data, config, Run(config), tokenizer, info, "cpu")
        quality = judge(verifier, base, prover, tokenizer, get_task(config), config)
        return {k: quality[k] for k in METRICS} | dict(
            spent=sum(cost for cost, _ in shards[:n]),
            labels=int((data["weight"] > 0).sum()),
            epochs=config.epochs,
            seeds=n * DESIGNS[ARMS[arm][0]]["problems"],
            right=float((data["target"] * data["weight"]).sum() / data["weight"].sum()),
        )

    return cached(home / f"{run.name}.json", make), run


def reinforce(cfg, home, seed, arm, verifier):
    """RL on a verifier -> accuracy at the end, and mean over the curve."""
    run = home / f"rl_{verifier.name}"
    config = train_rl.Config(
        **TINY,
        seed=seed,
        reward="pav",
        policy=str(home / "sft"),
        verifier=str(verifier),
        run_dir=str(run),
        steps=cfg.rl_steps,
        num_prompts=4,
        num_generations=32,
        eval_steps=10,
        eval_problems=16 if cfg.smoke else 256,
    )
    return cached(home / f"{run.name}.json", lambda: train_rl.train(config))


def compare(cfg, root):
    """-> rows {arm, budget, seed, metrics} of the reported seeds, chosen steps, all that the
    tuning tried, RL rows."""
    rows = []
    tried = []
    chosen = {}
    rl = []
    for seed in (TUNING, *range(cfg.seeds)):
        home = root / f"seed{seed}"
        home.mkdir(parents=True, exist_ok=True)
        policies(cfg, home, seed)
        shards = {design: draw(cfg, home, seed, design) for design in DESIGNS}
        for arm, (design, _) in ARMS.items():
            for budget in cfg.budgets:
                for steps in cfg.steps if seed == TUNING else [chosen[arm, budget]]:
                    row, run = verify(cfg, home, seed, arm, budget, steps, shards[design])
                    row = dict(arm=arm, budget=budget, steps=steps, seed=seed) | {
                        k: math.nan if v is None else v for k, v in row.items()
                    }
                    (tried if seed == TUNING else rows).append(row)
                if seed == TUNING:
                    cell = [r for r in tried if r["arm"] == arm and r["budget"] == budget]
                    chosen[arm, budget] = max(cell, key=lambda r: r["corr_advantage_exact"])[
                        "steps"
                    ]
                elif arm in cfg.rl_arms and budget == cfg.budgets[-1]:
                    rl.append(dict(arm=arm, seed=seed) | reinforce(cfg, home, seed, arm, run))
        if seed != TUNING:
            print(
                f"seed {seed}: "
                + "; ".join(
                    f"{b} tokens: "
                    + ", ".join(
                        f"{r['arm']} {r['corr_advantage_exact']:.2f}"
                        for r in rows
                        if r["seed"] == seed and r["budget"] == b
                    )
                    for b in cfg.budgets
                ),
                flush=True,
            )
    return rows, chosen, tried, rl


# --------------------------------------------------------------------------------------------------
# Results.


def summarise(rows, rl):
    """Means and standard deviations over seeds, a row an arm and budget."""
    out = []
    for arm, budget in dict.fromkeys((r["arm"], r["budget"]) for r in rows):
        cell = [r for r in rows if r["arm"] == arm and r["budget"] == budget]
        row = dict(
            arm=arm,
            budget=budget,
            steps=cell[0]["steps"],
            per_seed=[r["corr_advantage_exact"] for r in cell],
        )
        for k in (*METRICS, "spent", "labels", "seeds", "right"):
            row[k] = mean(r[k] for r in cell)
            row[f"{k}_sd"] = spread([r[k] for r in cell])
        out.append(row)
    accuracy = [
        dict(
            arm=arm,
            accuracy=[r["accuracy"] for r in rl if r["arm"] == arm],
            curve_mean=[r["curve_mean"] for r in rl if r["arm"] == arm],
        )
        for arm in dict.fromkeys(r["arm"] for r in rl)
    ]
    return out, accuracy


def table(rows, rl, cfg):
    lines = [
        "| tokens | data | seed solutions | labels | fit steps | corr. of A with exact A (sd) | "
        "of A with fresh rollouts | Brier | AUC |",
        "|---" * 9 + "|",
    ]
    for budget in cfg.budgets:
        for r in [r for r in rows if r["budget"] == budget]:
            lines.append(
                f"| {r['spent'] / 1e3:.1f}k | {NAMES[r['arm']]} | {r['seeds']:.0f} | "
                f"{r['labels']:.0f} | {r['steps']} | "
                f"{with_sd(r['corr_advantage_exact'], r['corr_advantage_exact_sd'])} | "
                f"{r['corr_advantage']:.2f} | {r['brier']:.4f} | {r['auc']:.3f} |"
            )
    lines += [
        "",
        f"RL on the verifiers of the largest budget, {cfg.rl_steps} steps:",
        "",
        "| data | accuracy at the end (sd) | mean over the curve (sd) |",
        "|---|---|---|",
    ]
    for r in rl:
        lines.append(
            f"| {NAMES[r['arm']]} | {mean_sd(r['accuracy'])} | {mean_sd(r['curve_mean'])} |"
        )
    return "\n".join(lines)


def claims_of(results):
    """What the paper says against what is seen; the rules are those of the header. Many
    continuations a prefix are tested only where rollouts are many: where the best arm no longer
    gains between the two budgets."""
    rows = results["details"]
    summary = results["rows"]
    budgets = results["settings"]["budgets"]
    low = budgets[0]
    high = budgets[-1]
    at = {(r["arm"], r["budget"]): r["corr_advantage_exact"] or 0.0 for r in summary}
    best = {b: max(UNIFORM, key=lambda arm: at[arm, b]) for b in budgets}  # noqa: B023

    def plus(*pair):
        return mean_sd(gain(rows, *pair), signed=True)

    shared = dict(paper="2410.08146", command=results["command"])
    more = [b - a for a, b in zip(*(per_seed(rows, best[high], b) for b in (low, high)))]
    rising = low == high or verdict(more) is not False
    correlation = "Correlation of the advantage with the exact one"
    few = dict(
        claim="With few rollouts covering more solutions (n_cov) makes the better verifier than "
        "repeating continuations (n_mc).",
        short="Few rollouts: cover more solutions, do not repeat continuations",
        measured=f"{correlation}, n_mc 1 minus n_mc 16: "
        + ", ".join(f"{plus('mc1', 'mc16', b)} at {b} tokens" for b in budgets)
        + f" ({results['settings']['seeds']} seeds, sd).",
        holds=together(verdict(gain(rows, "mc1", "mc16", b)) for b in budgets),
        fails_when="Labelling the later step ends of a continuation too, which is free, matters "
        f"more than n_mc: with n_mc 1 {plus('mc1_all', 'mc1', low)} at {low} tokens, "
        f"{plus('mc1_all', 'mc1', high)} at {high}; n_mc 1 minus n_mc 16 is then "
        f"{plus('mc1_all', 'mc16_all', high)}.",
    )
    many = dict(
        claim="With many rollouts more continuations a prefix (n_mc; 20 in the final runs) make "
        "the better verifier.",
        short="Many rollouts: repeat continuations of each prefix",
        measured=f"{correlation} of the best arm of cuts alone, {NAMES[best[high]]}, still rises "
        f"between {low} and {high} tokens ({mean_sd(per_seed(rows, best[high], low))} "
        f"to {mean_sd(per_seed(rows, best[high], high))}): {high} are few."
        if rising
        else f"{correlation}, n_mc 16 minus n_mc 1: {plus('mc16', 'mc1', high)} at {high} tokens.",
        holds="not tested" if rising else verdict(gain(rows, "mc16", "mc1", high)),
        fails_when="",
    )
    against = "; ".join(
        f"{b} tokens: {plus('first_pit', best[b], b)} against {NAMES[best[b]].split(':')[0]}"
        for b in budgets
    )
    pit = dict(
        claim="Prefixes up to the first pit make better verifiers than random ones, most where "
        "few.",
        short="First-pit prefixes make better verifiers than random ones",
        measured=f"First pit minus the best uniform cuts, same correlation: {against}.",
        holds=together(verdict(gain(rows, "first_pit", best[b], b)) for b in budgets),
        fails_when="As a judge of states it is worse (AUC "
        f"{plus('first_pit', best[high], high, 'auc')} at {high} tokens), and there "
        f"it is {plus('first_pit', 'mc1_all', high)} against n_mc 1 with later step "
        "ends labelled.",
    )
    return [shared | c for c in (few, many, pit)]


def figure(summary, rl, cfg, path):
    """Correlation of the advantage and AUC against tokens (bars: sd over seeds; dashed: later
    step ends labelled), and RL."""
    if (plt := pyplot()) is None:
        return
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14.5, 4.3), constrained_layout=True)
    for axis, metric in ((left, "corr_advantage_exact"), (middle, "auc")):
        for j, (arm, label) in enumerate(NAMES.items()):
            points = [r for r in summary if r["arm"] == arm]
            axis.errorbar(
                [r["spent"] * 1.02 ** (j - 2) for r in points],
                [r[metric] for r in points],
                [r[f"{metric}_sd"] for r in points],
                color=COLOURS[arm],
                linestyle="--" if ARMS[arm][1] else "-",
                label=label,
                linewidth=2,
                marker="o",
                markersize=4,
                capsize=3,
            )
        axis.set_xscale("log")
        axis.set_xlabel("tokens sampled for the verifier")
    left.set(
        ylabel="correlation with the exact advantage",
        title="What RL is paid by (bars: sd over seeds)",
    )
    left.legend(frameon=False, fontsize=8, handlelength=3.5)
    middle.set(ylabel="AUC against fresh rollouts", title="Ranking of states")
    for j, r in enumerate(rl):
        right.bar(j, mean(r["accuracy"]), color=COLOURS[r["arm"]], alpha=0.35)
        right.plot(
            [j] * len(r["accuracy"]), r["accuracy"], "o", color=COLOURS[r["arm"]], markersize=5
        )
    right.set_xticks(
        range(len(rl)),
        [NAMES[r["arm"]].replace(": ", "\n").replace(", ", "\n") for r in rl],
        fontsize=8,
    )
    right.set(
        ylabel=f"accuracy after {cfg.rl_steps} RL steps",
        ylim=(0, 1.03),
        title=f"RL on verifiers of {cfg.budgets[-1] // 1000}k tokens (dots: seeds)",
    )
    finish(plt, fig, (left, middle, right), path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path("runs/pav_data")
    out = Path(cfg.out)
    if cfg.smoke:
        root = Path("runs/pav_data_smoke")
        out = Path("runs/pav_data_smoke/results")
        cfg.seeds = 2
        cfg.budgets = [1500]
        cfg.steps = [2]
        cfg.rl_arms = ["mc1"]
        cfg.rl_steps = 2
    rows, chosen, tried, rl = compare(cfg, root)
    summary, accuracy = summarise(rows, rl)
    text = table(summary, accuracy, cfg)
    seconds = cpu_seconds(root.glob("seed*/*.json")) + round(sum(SAMPLING.values()))
    write_results(
        out,
        f"`planted`, {cfg.seeds} seeds:\n\n{text}",
        typed("pav_data", argv),
        cfg,
        claims_of,
        designs=DESIGNS,
        cpu_seconds=seconds,
        rows=summary,
        rl=accuracy,
        details=rows,
        tuning=tried,
    )
    figure(summary, accuracy, cfg, out / "curves.png")
    print_results(text, out, seconds)


if __name__ == "__main__":
    script(main)
