"""What breaks: the classic mistakes with process rewards, each against the right way.

    python -m experiments.breaks              # about 13 minutes of one core
    python -m experiments.breaks --no-transformer    # the tables alone, under a minute
    python -m experiments.breaks --smoke      # few steps, a few seconds
    -> docs/results/breaks/: results.json, table.md, curves.png

The right way (Setlur et al. 2024, arXiv 2410.08146, eq. 5): a step is paid the outcome of its
solution and its own progress A^mu = V^mu(after) - V^mu(before). The mistakes, each one flag of
train_rl.py away from it:

    q           the value itself, V^mu(after): it pays for standing in a good place (--reward q)
    q_to_go     the same, summed over all later steps, as rewards usually are (--reward q-to-go)
    to_go       progress, summed over all later steps: V(end) - V(before), a baseline (--reward
                pav-to-go)
    group       outcomes over the std of their group (--scale-rewards group)
    unguarded   a verifier of few solutions that also judges the end (--guards center)
    believed    no grader at all, only that verifier's score of the whole (--reward orm)
    phantom     the same, over the group's std: a group that agrees has only the verifier's noise
                left, and gets it at full size (--reward orm --scale-rewards group)

Task: the planted sub-sequence (tasks/planted.py), V^mu of the scripted prover of strength 16. The
first four are paid by its *exact* values, so what breaks is the reward and not the verifier. The
others show the verifier break: a Goodhart plot (its score of the solutions against the truth),
beside the same verifier with the anchor (`guarded`: the value of the end is the grader's) and the
grader alone (`graded`).

Claims: arXiv 2410.08146, section 3.1 and appendix G (Q as the reward is no use, RL on it collapses)
and its discount 0; the telescoping is arithmetic (tests/test_advantages.py); over-optimisation of
learned verifiers is Gao et al. 2022 (2210.10760). What would have falsified them: a mistake whose
accuracy does not differ from that of the right way (the 95% interval of the paired difference holds
0). Where a mistake does not hurt is measured too: an easy task (four letters); discount 0, under
which q and progress have the same expected gradient, as V(before) is then only a baseline; and the
weak verifier with a policy that already solves a tenth (`able`). Every arm gets the same grid of
learning rates, on a seed that is not reported. Runs stay in runs/breaks: killed, the same command
goes on.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_rl
from experiments.planted_exact import scripted, state_values, table_rl, transitions
from experiments.provers import SMOKE, clone, learn_verifier
from experiments.toolkit import (
    COLOURS,
    TUNING,
    ExactVerifier,
    evaluations,
    finish,
    mean_sd,
    print_results,
    pyplot,
    quiet,
    spread,
    together,
    typed,
    verdict,
    with_sd,
    write_results,
)
from infra.cli import opt, parse, script
from infra.runs import mean
from tasks import get_task

PROVER = 16
# flags of train_rl.py beside the right way's; name in figures; colour
ARMS = {
    "pav": (dict(), "the right way: progress, own step", COLOURS["pav"]),
    "outcome": (dict(reward="outcome"), "outcome only", COLOURS["outcome"]),
    "q": (dict(reward="q"), "value instead of progress, own step", COLOURS["q"]),
    "q_to_go": (dict(reward="q-to-go"), "value, return-to-go", "#CC79A7"),
    "to_go": (dict(reward="pav-to-go"), "progress, return-to-go", COLOURS["orm"]),
    "group": (dict(scale_rewards="group"), "outcomes over their group's std", COLOURS["constant"]),
}
LEARNED = {
    "graded": (dict(reward="outcome"), "grader alone", COLOURS["outcome"]),
    "guarded": (dict(), "weak verifier with the anchor", COLOURS["pav"]),
    "unguarded": (dict(guards=["center"]), "weak verifier, no anchor", COLOURS["q"]),
    "believed": (dict(reward="orm"), "weak verifier, no grader", "#CC79A7"),
    "phantom": (
        dict(reward="orm", scale_rewards="group"),
        "no grader, over the group's std",
        COLOURS["constant"],
    ),
}
PANELS = [
    ("Value instead of progress", ("pav", "q", "q_to_go")),
    ("Return-to-go", ("pav", "to_go", "outcome")),
    ("Outcomes over the group's std", ("pav", "group")),
]


@dataclass
class Config:
    learning_rates: list = opt([1e-3, 3e-3], "grid of every arm")
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    table_seeds: int = opt(10, "seeds of every arm with a table as policy", low=2)
    table_rates: list = opt(
        [0.03, 0.1, 0.3], "grid of learning rates of the tables; chosen on 3 other seeds"
    )
    transformer: bool = opt(True, "also train transformers")
    steps: int = opt(60, "RL steps on six letters", low=1)
    easy_letters: int = opt(4, "length of the hidden sequence in the easy regime", low=1, high=12)
    easy_steps: int = opt(40, "RL steps there", low=1)
    learned_steps: int = opt(80, "RL steps of the arms with the weak verifier", low=1)
    weak_problems: int = opt(
        2000, "continuations that the weak verifier is trained on (train_rl.py's own: 40000)", low=1
    )
    eval_problems: int = opt(128, "problems of an evaluation", low=1)
    out: str = opt("docs/results/breaks", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


def tabular(cfg, regime, arm, seed, lr):
    """The same rewards for a table of logits instead of a transformer (planted_exact.table_rl)."""
    letters = "abcdefghijklmn"
    length = 12
    hidden = 6 if regime == "table" else cfg.easy_letters
    step, base = (
        f(letters[:hidden], letters, *more)
        for f, more in ((transitions, ()), (scripted, (5.0, length)))
    )
    V_mu = state_values(step, scripted(letters[:hidden], letters, PROVER, length))
    flags = dict(ARMS[arm][0])
    if flags.get("reward") == "outcome":
        V_mu = None
        flags.pop("reward")
    curve = table_rl(step, base, V_mu, seed, lr, cfg.steps, **flags)
    return dict(
        accuracy=curve,
        score=[None] * len(curve),
        tokens=[i * 10 * 128 * length for i in range(len(curve))],
    )


def task_args(letters):
    """--task-args. Six letters are the task's own: those runs are shared with other experiments."""
    return [] if letters == 6 else [f"length={letters}"]


def policy_and_verifier(cfg, root, regime, seed):
    """-> (folder of the policy that RL starts from, folder of the weak verifier or None)."""
    letters = cfg.easy_letters if regime == "easy" else 6
    name = "sft" if letters == 6 else f"sft{letters}"
    policy = clone(seed, name, 5, cfg.smoke, task_args=task_args(letters))
    if regime not in ("learned", "able"):
        return policy, None
    prover = clone(seed, "prover", PROVER, cfg.smoke)
    run = root / f"seed{seed}" / "weak_verifier"
    verifier = learn_verifier(run, seed, policy, prover, PROVER, cfg.weak_problems, 6, cfg.smoke)
    return (prover if regime == "able" else policy), verifier


def reinforce(cfg, root, regime, arm, seed, lr):
    """One RL run (or the one that is there) -> dict(accuracy, score: curves over evaluations;
    tokens)."""
    if regime.startswith("table"):
        return tabular(cfg, regime, arm, seed, lr)
    policy, learned = policy_and_verifier(cfg, root, regime, seed)
    run = root / f"seed{seed}" / f"{regime}_{arm}_lr{lr:g}"
    steps = dict(main=cfg.steps, easy=cfg.easy_steps).get(regime, cfg.learned_steps)
    settings = dict(
        task="planted",
        task_args=task_args(cfg.easy_letters if regime == "easy" else 6),
        reward="pav",
        seed=seed,
        policy=str(policy),
        verifier=str(learned or ""),
        run_dir=str(run),
        num_prompts=4,
        num_generations=32,
        steps=steps,
        learning_rate=lr,
        eval_problems=cfg.eval_problems,
        eval_split="val" if seed == TUNING else "test",
        eval_steps=max(1, steps // 10),
        save_steps=steps,
        threads=1,
        device="cpu",
    )
    config = train_rl.Config(**(settings | (LEARNED if learned else ARMS)[arm][0]))
    verifier = None
    if not learned and config.reward != "outcome":
        task = get_task(config)
        verifier = ExactVerifier(task, task.tokenizer(), PROVER)
    with quiet():
        train_rl.train(config, verifier)
    rows = evaluations(run)
    return dict(
        accuracy=[r["eval/accuracy"] for r in rows],
        score=[r.get("eval/verifier_score") for r in rows],
        tokens=[r["num_tokens"] for r in rows],
    )


def compare(cfg, root, regime, arms, given=None):
    """Tune every arm on the tuning seed, run it on the others. -> {arm: dict}; given: learning
    rates instead of the search. `minus` is the paired difference to the first arm, the right
    way, of accuracy averaged over the run."""
    out = {}
    cheap = regime.startswith("table")

    def averaged_of(arm, seed, lr):
        return mean(reinforce(cfg, root, regime, arm, seed, lr)["accuracy"][1:])

    for arm in arms:
        tried = {}
        if not given:
            tried = {
                lr: mean(averaged_of(arm, TUNING + s, lr) for s in range(3 if cheap else 1))
                for lr in (cfg.table_rates if cheap else cfg.learning_rates)
            }
        lr = given[arm] if given else max(tried, key=tried.get)
        runs = [
            reinforce(cfg, root, regime, arm, seed, lr)
            for seed in range(cfg.table_seeds if cheap else cfg.seeds)
        ]
        averaged = [mean(r["accuracy"][1:]) for r in runs]
        end = [r["accuracy"][-1] for r in runs]
        right = out[arms[0]]["averaged"] if out else averaged
        minus = [a - b for a, b in zip(averaged, right)]
        out[arm] = dict(
            learning_rate=lr,
            tuning={f"{k:g}": round(v, 4) for k, v in tried.items()},
            runs=runs,
            averaged=averaged,
            mean=mean(averaged),
            mean_sd=spread(averaged),
            start=mean(r["accuracy"][0] for r in runs),
            end=mean(end),
            end_sd=spread(end),
            minus=mean(minus),
            minus_sd=spread(minus),
        )
        print(f"  {regime} {arm}: averaged {mean_sd(averaged)}, end {mean(end):.3f}", flush=True)
    return out


def table(results, names):
    lines = [
        "| arm | learning rate | accuracy, averaged over the run (sd) | minus the first arm, "
        "paired (sd) | first evaluation | last (sd) | last, per seed | verifier's score, first "
        "to last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, r in results.items():
        ends = " ".join(f"{x['accuracy'][-1]:.2f}" for x in r["runs"])
        score = [[x["score"][i] for x in r["runs"]] for i in (0, -1)]
        score = (
            "" if None in score[0] + score[1] else f"{mean(score[0]):.2f} to {mean(score[1]):.2f}"
        )
        lines.append(
            f"| {names[arm][1]} | {r['learning_rate']:g} | {with_sd(r['mean'], r['mean_sd'])} | "
            f"{with_sd(r['minus'], r['minus_sd'], signed=True)} | {r['start']:.3f} | "
            f"{with_sd(r['end'], r['end_sd'])} | {ends} | {score} |"
        )
    return "\n".join(lines)


def draw_curves(axis, results, arms, names, title, weight=2.0):
    for arm in arms:
        runs = results[arm]["runs"]
        x = [t / 1e3 for t in runs[0]["tokens"]]
        y = torch.tensor([r["accuracy"] for r in runs])
        axis.plot(x, y.mean(0), color=names[arm][2], label=names[arm][1], linewidth=weight)
        axis.fill_between(
            x, y.min(0).values, y.max(0).values, color=names[arm][2], alpha=0.15, linewidth=0
        )
    axis.set(
        title=title,
        xlabel="sampled tokens, thousands",
        ylabel="sampled accuracy",
        ylim=(-0.02, 1.02),
    )
    axis.legend(frameon=False, fontsize=7)


def figure(results, path):
    """Small multiples: one mistake a panel, for a table and for a transformer; its easy regime;
    the Goodhart plot."""
    if (plt := pyplot()) is None:
        return
    rows = (
        [("table", "table"), ("main", "transformer")] if "main" in results else [("table", "table")]
    )
    last = len(rows)
    fig, axes = plt.subplots(
        last + 1, 3, figsize=(14.5, 4 * (last + 1)), constrained_layout=True, squeeze=False
    )
    for line, (regime, policy) in zip(axes, rows):
        for axis, (title, arms) in zip(line, PANELS):
            draw_curves(axis, results[regime], arms, ARMS, f"{title} ({policy})")
    easy = "easy" if "easy" in results else "table_easy"
    draw_curves(axes[last][0], results[easy], list(results[easy]), ARMS, "The same on an easy task")
    if "learned" in results:
        draw_curves(
            axes[last][1],
            results["learned"],
            list(results["learned"]),
            LEARNED,
            "A weak verifier, guarded or not",
        )
        draw_goodhart(axes[last][2], results)
    else:
        axes[last][1].set_axis_off()
        axes[last][2].set_axis_off()
    finish(plt, fig, axes.flat, path)


def draw_goodhart(axis, results):
    for regime, style, where in (("learned", "-", "base"), ("able", ":", "able policy")):
        for arm in ("guarded", "unguarded", "believed"):
            for i, r in enumerate(results[regime][arm]["runs"]):
                axis.plot(
                    r["score"],
                    r["accuracy"],
                    style,
                    color=LEARNED[arm][2],
                    linewidth=1,
                    alpha=0.7,
                    label=None if i else f"{LEARNED[arm][1]}, {where}",
                )
                axis.plot(
                    r["score"][-1], r["accuracy"][-1], "o", color=LEARNED[arm][2], markersize=5
                )
    axis.axline((0, 0), slope=1, color="#aaaaaa", linestyle=":", linewidth=1)
    axis.set(
        title="Goodhart plot (a dot where a seed ends)",
        xlabel="verifier's mean score",
        ylabel="sampled accuracy",
        ylim=(-0.02, 1.02),
    )
    axis.legend(frameon=False, fontsize=7)


HARD = ("table", "main")
EASY = ("table_easy", "easy")
POLICY = dict(table="table", main="transformer", table_easy="table", easy="transformer")


def hurts(results, arm):
    """For each policy: is the mistake's accuracy, averaged over the run, below the right way's?
    Paired over seeds."""
    regimes = [results[g] for g in HARD if g in results]
    return [
        verdict(a - b for a, b in zip(r["pav"]["averaged"], r[arm]["averaged"])) for r in regimes
    ]


def show(results, arm, regimes):
    cells = [(POLICY[g], results[g][arm]) for g in regimes if g in results]
    return ", ".join(f"{name} {with_sd(r['mean'], r['mean_sd'], 2)}" for name, r in cells)


def conditions(results):
    seeds = " and ".join(
        f"{len(results[g]['pav']['runs'])} seeds ({POLICY[g]})" for g in HARD if g in results
    )
    return f"Accuracy averaged over the run (sd over {seeds}), exact values:"


def claims_of(record):
    """Of the paper."""
    results = record["results"]
    how = conditions(record["results"])
    shared = dict(paper="2410.08146", command=record["command"])
    return [
        shared
        | dict(
            claim="Process rewards must be progress, not Q: RL on Q^pi + Q^mu collapses "
            "(appendix G).",
            short="Paying Q instead of progress makes RL collapse",
            measured=f"{how} progress: {show(results, 'pav', HARD)}; value, own step: "
            f"{show(results, 'q', HARD)}; value, return-to-go: "
            f"{show(results, 'q_to_go', HARD)}.",
            holds=together([*hurts(results, "q"), *hurts(results, "q_to_go")]),
            fails_when="a step is paid its own value only (discount 0), as its expected "
            "gradient is that of progress, or the prompts share no parameters "
            f"(table). Four letters: progress {show(results, 'pav', EASY)}, value to "
            f"go {show(results, 'q_to_go', EASY)}. Solutions of this task always have "
            "12 steps of one token: a collapse by more and emptier steps, as the "
            "appendix has it, cannot happen here.",
        ),
        shared
        | dict(
            claim="The bonus is paid to its own step (discount 0); summed to the right it "
            "telescopes into a baseline.",
            short="A bonus summed to the right is only a baseline",
            measured=f"{how} own step: {show(results, 'pav', HARD)}; return-to-go: "
            f"{show(results, 'to_go', HARD)}; outcome only: "
            f"{show(results, 'outcome', HARD)}.",
            holds=together(hurts(results, "to_go")),
            fails_when="the outcome alone is enough. Four letters: return-to-go "
            f"{show(results, 'to_go', EASY)}, outcome only "
            f"{show(results, 'outcome', EASY)}, progress {show(results, 'pav', EASY)}.",
        ),
    ]


def last(r):
    return with_sd(r["end"], r["end_sd"], 2)


def lessons_of(record):
    """Further mistakes, which are not claims of the paper."""
    results = record["results"]
    how = conditions(record["results"])
    lessons = [
        dict(
            claim="Outcomes over their group's std beside process rewards (phantom advantages) "
            "hurt.",
            measured=f"{how} as they are: {show(results, 'pav', HARD)}; over the std: "
            f"{show(results, 'group', HARD)}.",
            holds=together(hurts(results, "group")),
            fails_when="a group that agrees gets exactly nothing, scaled or not.",
        )
    ]
    if "learned" in results:
        lessons += learned_lessons(results["learned"], results["able"])
    return [dict(command=record["command"]) | c for c in lessons]


def learned_lessons(weak, able):
    fooled = weak["believed"]
    score = [mean(x["score"][i] for x in fooled["runs"]) for i in (0, -1)]
    rise = verdict(x["score"][-1] - x["score"][0] for x in fooled["runs"])
    truth = verdict(x["accuracy"][-1] - x["accuracy"][0] for x in fooled["runs"])
    phantom = verdict(
        a["accuracy"][-1] - b["accuracy"][-1]
        for a, b in zip(fooled["runs"], weak["phantom"]["runs"])
    )
    return [
        dict(
            claim="Optimised far enough, a learned reward rises while the truth does not "
            "(Goodhart; arXiv 2210.10760).",
            measured="A verifier of few solutions, last evaluation (sd over "
            f"{len(fooled['runs'])} seeds): as the only reward its score goes from "
            f"{score[0]:.2f} to {score[1]:.2f}, accuracy from {fooled['start']:.2f} to "
            f"{last(fooled)}; beside the grader without the anchor "
            f"{last(weak['unguarded'])}, with it {last(weak['guarded'])}, grader alone "
            f"{last(weak['graded'])}.",
            holds=together([rise, truth is not True]),
            fails_when=f"the policy already solves a tenth: from {able['believed']['start']:.2f} "
            f"that verifier alone leads to {last(able['believed'])}, the grader alone "
            f"to {last(able['graded'])}.",
        ),
        dict(
            claim="Dividing a learned, dense reward by its group's std makes phantom advantages.",
            measured="The verifier's score as the reward, last evaluation: as it is "
            f"{last(fooled)}, over the group's std {last(weak['phantom'])}.",
            holds=phantom,
            fails_when="the score as it is does not work either.",
        ),
    ]


def titles_of(cfg):
    return {
        "table": "A table as policy, six letters, exact values:",
        "table_easy": f"A table, {cfg.easy_letters} letters in 12, the same learning rates:",
        "main": "A transformer, six letters, exact values:",
        "easy": f"A transformer, {cfg.easy_letters} letters, the same learning rates:",
        "learned": f"A transformer, six letters, a verifier of {cfg.weak_problems} continuations, "
        "from the base:",
        "able": f"The same, from a policy cloned from strength {PROVER}:",
    }


def compare_all(cfg, root):
    """-> {regime: {arm: dict}}"""

    def rates(regime):
        return {arm: r["learning_rate"] for arm, r in results[regime].items()}

    simple = ["pav", "outcome", "q_to_go", "to_go"]
    able = ["graded", "guarded", "unguarded", "believed"]
    results = {"table": compare(cfg, root, "table", list(ARMS))}
    results["table_easy"] = compare(cfg, root, "table_easy", simple, rates("table"))
    if cfg.transformer:
        results["main"] = compare(cfg, root, "main", list(ARMS))
        results["easy"] = compare(cfg, root, "easy", simple, rates("main"))
        results["learned"] = compare(cfg, root, "learned", list(LEARNED))
        results["able"] = compare(cfg, root, "able", able, rates("learned"))
    return results


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    clock = time.process_time()
    root = SMOKE / "breaks" if cfg.smoke else Path("runs/breaks")
    if cfg.smoke:
        steps = dict(steps=2, easy_steps=2, learned_steps=2)
        seeds = dict(seeds=1, table_seeds=2, learning_rates=[1e-3], table_rates=[0.1])
        vars(cfg).update(steps | seeds, eval_problems=16, out=str(root / "results"))
    results = compare_all(cfg, root)
    name = typed("breaks", argv)
    titles = titles_of(cfg)
    parts = []
    for regime, rows in results.items():
        names = LEARNED if regime in ("learned", "able") else ARMS
        parts.append(f"{titles[regime]}\n\n{table(rows, names)}")
    text = "\n\n".join(parts)
    lessons = lessons_of(dict(results=results, command=f"python -m experiments.{name}"))
    seconds = round(time.process_time() - clock)
    numbers = dict(lessons=lessons, results=results, cpu_seconds_of_this_call=seconds)
    write_results(cfg.out, text, name, cfg, claims_of, **numbers)
    figure(results, Path(cfg.out) / "curves.png")
    print_results(text, cfg.out)


if __name__ == "__main__":
    script(main)
