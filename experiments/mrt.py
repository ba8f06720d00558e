"""Meta reinforcement fine-tuning against outcome rewards, when the thinking is stopped early.

    python -m experiments.mrt              # about 20 minutes of one core; --no-tune 15
    python -m experiments.mrt --smoke      # few steps, 20 seconds
    -> docs/results/mrt/: results.json, table.md, curves.png

The claim (Setlur et al. 2025, arXiv 2503.07572): rewarding the progress of each episode beside the
outcome gives the same or better accuracy, lower regret, and 1.5 times the token efficiency of
outcome-reward RL (GRPO). Here, on the task `probe` (tasks/probe.py), whose base policy repeats
itself and idles in six of ten episodes but is nearly always right in the end:

    base           SFT on the demonstrator
    outcome        RL with the outcome alone
    outcome_long   the same for three times the steps: about as many sampled tokens as MRT with its
                   meta-prover's. Not tuned.
    length         a right solution of n tokens earns 1 - lambda * n / limit: the plain way to
                   shorter thinking (papers/mrt.py with --alpha 0)
    mrt            progress of each episode, credited to its own tokens (papers/mrt.py)
    mrt_scalar     one number for all that follows a random cut. On-policy that is the outcome with
                   another baseline, so this arm cannot tell the paper's RL form from outcome-only:
                   it shows the noise between two runs of one objective
    star           the STaR form (papers/mrt_star.py): as many solutions in three rounds

All arms of a seed start from one base policy and sample equally many solutions (outcome_long: three
times as many). Four settings an arm are tried on a seed of their own and `val`, and chosen by
regret (--no-tune: the learning rate 1e-3 for all and first guesses for the second dials, COMMON).
Reported is `test`. The meta-prover's tokens are counted beside the policy's.

Measured: accuracy when stopped after t tokens (stepwise: episodes finished by then; J from 4
answers of the policy itself), normalised regret (comparator constant 1, linear between episode
ends, over the task's limit of tokens), the same with the exact J of one who believes the written
tests (no policy can talk it up), and token efficiency: tokens at which the curve reaches 95% of
outcome-only's accuracy, outcome-only's over the arm's.

What would have falsified the claim: regret or efficiency of MRT not better than outcome-only's by
more than the spread of the paired differences; the length penalty or outcome_long as good, as then
progress is not what helps. Regimes where it was expected to help less, at the same settings: a
budget so short that the outcome itself punishes idling (24 tokens, seven episodes), and a base
policy that tests something new in every episode (strength 1), which has little progress to gain.

Runs stay in runs/mrt: killed, the same command goes on. --only 3 4 builds these seeds alone, beside
another process.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train_rl
import train_sft
from experiments.toolkit import (
    COLOURS,
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
from infra.runs import mean
from model import load_model
from papers import mrt, mrt_star
from tasks import get_task

NAMES = {
    "base": "base (SFT)",
    "outcome": "outcome only",
    "outcome_long": "outcome only, 3x the steps",
    "length": "outcome, length penalty",
    "mrt": "MRT, per episode",
    "mrt_scalar": "MRT, scalar after a random cut",
    "star": "MRT (STaR)",
}
COLOUR = {
    "base": "#aaaaaa",
    "outcome": COLOURS["outcome"],
    "outcome_long": COLOURS["outcome-long"],
    "length": "#E69F00",
    "mrt": COLOURS["mrt"],
    "mrt_scalar": "#56B4E9",
    "star": "#009E73",
}
# The arms whose loop is papers/mrt.py's -> their flags.
MRT = {"length": dict(alpha=0.0), "mrt": {}, "mrt_scalar": dict(mrt_credit="scalar")}
LONG = 3
COMMON = {
    "outcome": dict(learning_rate=1e-3),
    "outcome_long": dict(learning_rate=1e-3),
    "base": {},
    "length": dict(learning_rate=1e-3, length_penalty=0.3),
    "mrt": dict(learning_rate=1e-3, alpha=1.0),
    "mrt_scalar": dict(learning_rate=1e-3, alpha=1.0),
    "star": dict(learning_rate=1e-3, steps=15),
}
SHORT = 24  # tokens: seven episodes and the answer
REGIMES = {"": {}, "short": dict(limit=SHORT), "brisk": dict(strength=1.0)}


@dataclass
class Config:
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    brisk_seeds: int = opt(
        3, "of them for a base policy that makes progress in every episode (0: leave it out)", low=0
    )
    sft_steps: int = opt(600, "optimizer steps of the base policies, 64 demonstrations each", low=1)
    rl_steps: int = opt(20, "RL steps; STaR samples as many solutions", low=1)
    num_prompts: int = opt(16, "prompts a step, with 4 solutions each", low=1)
    tune: bool = opt(True, "choose each arm's setting among four, by regret on a seed of its own")
    learning_rates: list = opt(
        [5e-4, 1e-3, 2e-3, 4e-3], "grid; the arms with a second dial take the inner two"
    )
    penalties: list = opt([0.3, 1.0], "grid of the length penalty")
    alphas: list = opt([1.0, 3.0], "grid of both MRT arms: weight of the progress")
    star_steps: list = opt([5, 15], "grid of STaR: optimizer steps a round")
    star_rounds: int = opt(3, "rounds of STaR", low=1)
    test_problems: int = opt(256, "problems of a measurement", low=1)
    only: list = opt([-1], "build the runs of these seeds and stop")
    out: str = opt("docs/results/mrt", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


# --------------------------------------------------------------------------------------------------
# Runs: a directory each, its measurement beside it.


def trained(cfg, run, seed, train, config, limit=0):
    """Train (or find) one run -> its measurement on val (tuning) or test, tokens sampled and
    processor seconds."""

    def make():
        clock = time.process_time()
        summary = train(config)
        spent = time.process_time() - clock
        model, tokenizer = load_model(run)
        task = get_task("probe")
        problems = task.problems("val" if seed == TUNING else "test", cfg.test_problems, 0)
        options = mrt_star.Config(task="probe", max_completion_length=limit, mu_samples=4)
        row = mrt_star.measure(model, tokenizer, task, problems, options, 0)
        mu_tokens = summary.get("mrt_tokens", summary.get("mu_tokens", 0))
        return row | dict(
            train_tokens=summary.get("num_tokens", 0),
            mu_tokens=mu_tokens,
            train_seconds=round(spent, 1),
        )

    return cached(Path(run) / f"measured{limit or ''}.json", make)


def run_arm(cfg, root, name, seed, setting, limit=0, strength=-1.0):
    """One arm at one seed and setting -> its row. limit: tokens of a completion (0: the task's
    own); strength: of the demonstrator behind the base policy (-1: the task's own)."""
    home = root / (f"seed{seed}" if strength < 0 else f"seed{seed}_strength{strength:g}")
    base = home / "base"
    shared = dict(task="probe", seed=seed, threads=1, device="cpu")
    if name == "base":
        config = train_sft.Config(
            **shared,
            run_dir=str(base),
            steps=cfg.sft_steps,
            batch_size=64,
            strength=strength,
            num_examples=min(20000, 64 * cfg.sft_steps),
            learning_rate=4e-3,
            save_steps=10**6,
            eval_problems=32,
        )
        return trained(cfg, base, seed, train_sft.train, config, limit)
    run = (
        home / name / "_".join([f"{k}{v:g}" for k, v in setting.items()] + ["short"] * bool(limit))
    )
    shared |= (
        dict(
            policy=str(base),
            run_dir=str(run),
            max_completion_length=limit,
            num_generations=4,
            eval_problems=8,
        )
        | setting
    )
    if name == "star":
        config = mrt_star.Config(
            **shared,
            rounds=cfg.star_rounds,
            num_prompts=cfg.rl_steps * cfg.num_prompts // cfg.star_rounds,
        )
        return trained(cfg, run, seed, mrt_star.train, config, limit)
    steps = cfg.rl_steps * (LONG if name == "outcome_long" else 1)
    shared |= dict(num_prompts=cfg.num_prompts, steps=steps, eval_steps=steps, save_steps=10**6)
    if name in MRT:
        return trained(cfg, run, seed, mrt.train, mrt.Config(**MRT[name] | shared), limit)
    config = train_rl.Config(**shared, reward="outcome")
    return trained(cfg, run, seed, train_rl.train, config, limit)


def grids(cfg):
    """Four settings an arm."""
    inner = cfg.learning_rates[len(cfg.learning_rates) // 2 - 1 :][:2]

    def pairs(key, values):
        return [dict(learning_rate=a, **{key: b}) for a, b in itertools.product(inner, values)]

    return {
        "outcome": [dict(learning_rate=a) for a in cfg.learning_rates],
        "length": pairs("length_penalty", cfg.penalties),
        "mrt": pairs("alpha", cfg.alphas),
        "mrt_scalar": pairs("alpha", cfg.alphas),
        "star": pairs("steps", cfg.star_steps),
    }


def tune(cfg, root):
    """-> ({arm: setting of least regret on the tuning seed}, {arm: all that was tried})."""
    tried = {"base": [dict(run_arm(cfg, root, "base", TUNING, {}))]}
    for name, settings in grids(cfg).items():
        tried[name] = []
        for setting in settings:
            row = run_arm(cfg, root, name, TUNING, setting)
            tried[name].append(
                setting | {k: round(row[k], 4) for k in ("regret", "accuracy", "tokens")}
            )
            print(f"tuning {name:<11} {tried[name][-1]}", flush=True)
    del tried["base"]
    best = {
        name: grids(cfg)[name][int(np.argmin([t["regret"] for t in rows]))]
        for name, rows in tried.items()
    }
    return best | dict(base={}, outcome_long=best["outcome"]), tried


# --------------------------------------------------------------------------------------------------
# Numbers.


def reach(curve, level):
    """First number of tokens at which the curve is at the level; None if never."""
    return next((t for t, v in enumerate(curve) if v >= level), None)


def summarise(runs):
    """{arm: rows, one a seed} -> {arm: means, spreads, paired differences to outcome-only, token
    efficiency}."""
    keys = (
        "accuracy",
        "tokens",
        "regret",
        "regret_exact",
        "J0",
        "J_bias",
        "clipped",
        "budget",
        "train_tokens",
        "mu_tokens",
        "train_seconds",
    )
    out = {}
    for name, rows in runs.items():
        pairs = list(zip(rows, runs["outcome"]))
        times = [
            (reach(o["curve"], 0.95 * o["accuracy"]), reach(r["curve"], 0.95 * o["accuracy"]))
            for r, o in pairs
        ]
        efficiency = [a / b if a and b else None for a, b in times]
        known = [e for e in efficiency if e is not None]
        gain = [o["regret"] - r["regret"] for r, o in pairs]
        out[name] = {k: mean(r[k] for r in rows) for k in keys}
        out[name] |= dict(
            accuracy_sd=spread([r["accuracy"] for r in rows]),
            regret_sd=spread([r["regret"] for r in rows]),
            regret_per_seed=[r["regret"] for r in rows],
            accuracy_per_seed=[r["accuracy"] for r in rows],
            gain=mean(gain),
            gain_sd=spread(gain),
            efficiency=mean(known) if known else None,
            efficiency_sd=spread(known),
            efficiency_per_seed=efficiency,
            curve=np.mean([r["curve"] for r in rows], 0).round(4).tolist(),
            curve_low=np.min([r["curve"] for r in rows], 0).tolist(),
            curve_high=np.max([r["curve"] for r in rows], 0).tolist(),
        )
    return out


def table(rows, best):
    lines = [
        "| arm | setting | accuracy (sd) | tokens a solution | stopped at 1/4 | at 1/2 | regret "
        "(sd) | with exact J | less regret than outcome only, paired (sd) | token efficiency "
        "(sd) | sampled in training | by mu |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        setting = ", ".join(
            f"{k.replace('learning_rate', 'lr')} {v:g}" for k, v in best[name].items()
        )
        n = len(r["curve"]) - 1
        gain = "" if name == "outcome" else with_sd(r["gain"], r["gain_sd"], signed=True)
        factor = (
            with_sd(r["efficiency"], r["efficiency_sd"], 2) if r["efficiency"] else "not reached"
        )
        if None in r["efficiency_per_seed"] and r["efficiency"]:
            factor += f", {r['efficiency_per_seed'].count(None)} seeds not reached"
        lines.append(
            f"| {NAMES[name]} | {setting} | {with_sd(r['accuracy'], r['accuracy_sd'])} | "
            f"{r['tokens']:.1f} | {r['curve'][n // 4]:.3f} | {r['curve'][n // 2]:.3f} | "
            f"{with_sd(r['regret'], r['regret_sd'])} | {r['regret_exact']:.3f} | {gain} | "
            f"{factor} | {r['train_tokens'] / 1e3:.0f}k | {r['mu_tokens'] / 1e3:.0f}k |"
        )
    return "\n".join(lines)


def claims_of(results):
    """Regret and token efficiency both better than outcome-only's, and regret better than the
    plainer rivals' (the length penalty, more steps of outcome-only): a rival that is not shown
    to be worse makes it "partly"."""
    rows = results["rows"]
    seeds = results["settings"]["seeds"]
    return [
        dict(paper="2503.07572", command=results["command"]) | c
        for c in (regret_claim(results, rows, seeds), scalar_claim(rows, seeds))
    ]


def regret_claim(results, rows, seeds):
    m = rows["mrt"]
    o = rows["outcome"]

    def less(name):
        return [a - b for a, b in zip(rows[name]["regret_per_seed"], m["regret_per_seed"])]

    rivals = {name: less(name) for name in ("length", "outcome_long")}
    reached = [e for e in m["efficiency_per_seed"] if e is not None]
    judged = [
        verdict(less("outcome")),
        verdict(reached, 1.0),
        *(verdict(d) for d in rivals.values()),
    ]
    not_shown = [
        f"{NAMES[n]} ({mean_sd(d, signed=True)}, MRT ahead on {sum(x > 0 for x in d)} of "
        f"{len(d)} seeds)"
        for n, d in rivals.items()
        if verdict(d) is not True
    ]
    efficiency = (
        f"{mean_sd(reached, 2)}, per seed {' '.join(f'{e:.2f}' for e in reached)}"
        if reached
        else "undefined"
    )
    worst = min(range(seeds), key=lambda i: o["accuracy_per_seed"][i])
    gains = {
        n: with_sd(results[n]["mrt"]["gain"], results[n]["mrt"]["gain_sd"], signed=True)
        for n in ("short", "brisk")
        if n in results
    }
    return dict(
        claim="MRT has lower cumulative regret than outcome-reward RL and 1.5 times its token "
        "efficiency.",
        short="MRT: less regret and 1.5 times the token efficiency",
        measured=f"Regret {with_sd(m['regret'], m['regret_sd'])} against "
        f"{with_sd(o['regret'], o['regret_sd'])}, paired "
        f"{mean_sd(less('outcome'), signed=True)}; accuracy {m['accuracy']:.3f} against "
        f"{o['accuracy']:.3f}; token efficiency {efficiency} ({seeds} seeds, sd, "
        f"{'four settings an arm tried' if results['settings']['tune'] else 'no arm tuned'}; "
        f"on seed {worst} outcome-only ends at {o['accuracy_per_seed'][worst]:.3f}, "
        "which makes both spreads). Regret of the length penalty "
        f"{rows['length']['regret']:.3f}, of outcome-only for {LONG} times the steps "
        f"{rows['outcome_long']['regret']:.3f}"
        + (f"; not shown to be worse than MRT: {', '.join(not_shown)}." if not_shown else "."),
        holds=together(judged),
        fails_when=f"Less is gained under a limit of {SHORT} tokens (regret lower by "
        f"{gains['short']}, paired)"
        + (
            f" and from a base policy that idles nowhere ({gains.get('brisk')})"
            * ("brisk" in gains)
        )
        + f"; the STaR form does not reach it ({rows['star']['regret']:.3f}); mu samples "
        f"{m['mu_tokens'] / max(1, m['train_tokens']):.1f} times the policy's tokens.",
    )


def scalar_claim(rows, seeds):
    """Not tested: what all tokens after the cut are paid, R - J(cut), is the outcome minus a
    number that they cannot change, a baseline. Its expected gradient is the outcome's, whatever
    J."""
    scalar = rows["mrt_scalar"]
    o = rows["outcome"]
    m = rows["mrt"]
    return dict(
        claim="The RL form, one progress bonus for all that follows a cut, beats GRPO (AIME "
        "2024: 47.2 against 44.5).",
        short="MRT's RL form, one bonus after the cut, beats GRPO",
        measured="Our on-policy reading of it pays R - J(cut) to every token after the cut: the "
        "outcome with another baseline, and so the outcome's expected gradient. What "
        "was measured is noise of one objective run twice: regret "
        f"{with_sd(scalar['regret'], scalar['regret_sd'])}, outcome-only "
        f"{o['regret']:.3f}, paired gain "
        f"{with_sd(scalar['gain'], scalar['gain_sd'], signed=True)}, {seeds} seeds; "
        f"credited per episode {with_sd(m['gain'], m['gain_sd'], signed=True)}.",
        holds="not tested",
        fails_when="What the paper adds is left out here: terminated rollouts in the same "
        "group, normalised together with the continued ones.",
    )


# --------------------------------------------------------------------------------------------------
# Figure and files.


def budget_panel(axis, rows):
    """Accuracy when stopped."""
    for name, r in rows.items():
        x = range(len(r["curve"]))
        colour = COLOUR[name]
        label = f"{NAMES[name]} (n={len(r['regret_per_seed'])})"
        axis.plot(x, r["curve"], color=colour, label=label, linewidth=2, drawstyle="steps-post")
        band = dict(color=colour, alpha=0.12, linewidth=0, step="post")
        axis.fill_between(x, r["curve_low"], r["curve_high"], **band)
    axis.set(
        xlabel="tokens of thinking before the time is up",
        ylabel="accuracy of the answer given then",
        ylim=(0, 1.02),
        title="Budget curves (band: worst to best seed)",
    )
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def price_panel(axis, rows):
    """Regret against what was sampled in training."""
    for name, r in rows.items():
        colour = COLOUR[name]
        policy = r["train_tokens"] / 1e3
        total = policy + r["mu_tokens"] / 1e3
        axis.errorbar(total, r["regret"], r["regret_sd"], color=colour, marker="o", capsize=3)
        if r["mu_tokens"]:
            regret = [r["regret"]] * 2
            axis.plot([policy, total], regret, color=colour, linestyle=":", linewidth=1)
            axis.plot(policy, r["regret"], marker="o", markerfacecolor="white", color=colour)
    axis.set(
        xlabel="sampled in training, thousands of tokens (hollow: without mu's)",
        ylabel="normalised regret",
        title="Regret and its price (bars: sd over seeds)",
    )
    axis.set_ylim(bottom=0)
    axis.margins(x=0.08)


def regime_panel(axis, rows, regimes):
    """Regret, both limits and the brisk base."""
    groups = [
        ("63 tokens", rows, "o"),
        (f"{SHORT} tokens", regimes["short"], "s"),
        ("63 tokens, brisk base", regimes.get("brisk"), "^"),
    ][: 1 + len(regimes)]
    for i, (_, group, marker) in enumerate(groups):
        for offset, name in ((-0.12, "outcome"), (0.12, "mrt")):
            values = group[name]["regret_per_seed"]
            style = dict(color=COLOUR[name], alpha=0.7, markersize=6)
            label = NAMES[name] if i == 0 else None
            axis.plot([i + offset] * len(values), values, marker, label=label, **style)
    axis.set_xticks(range(len(groups)), [g[0] for g in groups])
    axis.legend(frameon=False, fontsize=8)
    axis.set(ylabel="normalised regret, a mark a seed", title="Other regimes, same settings")
    axis.set_ylim(bottom=0)


def figure(rows, regimes, path):
    if (plt := pyplot()) is None:
        return
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), constrained_layout=True)
    budget_panel(left, rows)
    price_panel(middle, rows)
    regime_panel(right, rows, regimes)
    finish(plt, fig, (left, middle, right), path)


def write(cfg, root, best, tried, runs, name):
    """runs: {regime: {arm: rows, one a seed}}."""
    out = root / "results" if cfg.smoke else Path(cfg.out)
    regimes = {name: summarise(group) for name, group in runs.items()}
    rows = regimes.pop("")
    limit = int(rows["base"]["budget"])
    titles = [
        f"Limit of {limit} tokens (20 episodes), {cfg.seeds} seeds, {cfg.test_problems} test "
        "problems:",
        f"Limit of {SHORT} tokens (7 episodes), same settings:",
        "Base policy that tests something new in every episode (strength 1), same settings, "
        f"{cfg.brisk_seeds} seeds:",
    ]
    text = "\n\n".join(
        t for title, r in zip(titles, (rows, *regimes.values())) for t in (title, table(r, best))
    )
    details = {
        n: [{k: v for k, v in r.items() if "curve" not in k} for r in rs]
        for n, rs in runs[""].items()
    }
    seconds = cpu_seconds(root.glob("seed*/**/measured*.json"))
    write_results(
        out,
        text,
        name,
        cfg,
        claims_of,
        chosen=best,
        rows=rows,
        **regimes,
        tuning=tried,
        regret="1 - area under J(tokens) / limit; comparator 1; linear between episode ends",
        cpu_seconds=seconds,
        details=details,
    )
    figure(rows, regimes, out / "curves.png")
    print_results(text, out, seconds)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    root = Path("runs/mrt_smoke" if cfg.smoke else "runs/mrt")
    if cfg.smoke:
        cfg.tune = True
        cfg.seeds = 2
        cfg.brisk_seeds = 2
        cfg.sft_steps = 10
        cfg.rl_steps = 1
        cfg.num_prompts = 4
        cfg.test_problems = 8
        cfg.learning_rates = [1e-3]
        cfg.penalties = [0.3]
        cfg.alphas = [1.0]
        cfg.star_steps = [2]
        cfg.star_rounds = 1
    best, tried = tune(cfg, root) if cfg.tune else (COMMON, {})
    seeds = cfg.only if cfg.only != [-1] else range(cfg.seeds)
    regimes = [r for r in REGIMES if r != "brisk" or cfg.brisk_seeds]
    runs = {r: {n: [] for n in (NAMES if not r else ("base", "outcome", "mrt"))} for r in regimes}
    for seed, regime in itertools.product(seeds, runs):
        arms = runs[regime]
        if regime != "brisk" or seed < cfg.brisk_seeds:
            for name, rows in arms.items():
                rows.append(run_arm(cfg, root, name, seed, best[name], **REGIMES[regime]))
            print(
                f"seed {seed} {regime}: regret "
                + "  ".join(f"{NAMES[n]} {r[-1]['regret']:.3f}" for n, r in arms.items()),
                flush=True,
            )
    if cfg.only == [-1]:
        write(cfg, root, best, tried, runs, typed("mrt", argv))


if __name__ == "__main__":
    script(main)
