"""What breaks: the classic mistakes with process rewards, each against the right way, same seeds, same everything else.

    python experiments/breaks.py              # about 13 minutes of one core
    python experiments/breaks.py --no-transformer                         # the tables alone, under a minute
    python experiments/breaks.py --smoke      # the same road in a few seconds
    -> docs/results/breaks/: results.json, table.md, curves.png

The right way (Setlur et al. 2024, arXiv 2410.08146, eq. 5): a step is paid the outcome of its solution and its own progress
A^mu = V^mu(after) - V^mu(before). The mistakes, each one flag of train_rl.py away from it:

    q           the value itself, V^mu(after): it pays for standing in a good place      --reward q
    q_to_go     the same, summed over all later steps, as rewards usually are            --reward q --credit return-to-go
    to_go       progress, summed over all later steps: V(end) - V(before), a baseline    --credit return-to-go
    group       outcomes over the std of their group                                     --scale-rewards group
    unguarded   a verifier of few solutions that also judges the end                     --no-anchor
    believed    no grader at all, only that verifier's score of the whole                --reward orm
    phantom     the same, over the group's std: a group that agrees has only the         --reward orm --scale-rewards group
                verifier's noise left, and gets it at full size

Task: the planted sub-sequence (tasks/planted.py), V^mu of the scripted prover of strength 16. The first four are paid by its
*exact* values, so what breaks is the reward and not the verifier. The others show the verifier break: a Goodhart plot
(its score of the solutions against the truth), beside the same verifier with the anchor (`guarded`: the value of the end
is the grader's) and the grader alone (`graded`).

Claims: arXiv 2410.08146, section 3.1 and appendix G (Q as the reward is no use, RL on it collapses) and its discount 0; the
telescoping is arithmetic (tests/test_advantages.py); over-optimisation of learned verifiers is Gao et al. 2022 (2210.10760).
What would have falsified them: a mistake whose accuracy is within two standard errors of the right way. Where a mistake
does not hurt is measured too: an easy task (four letters); discount 0, under which q and progress have the same expected
gradient, as V(before) is then only a baseline; and the weak verifier with a policy that already solves a tenth (`able`).
Every arm gets the same grid of learning rates, on a seed that is not reported. Runs stay in runs/breaks: killed, the same
command goes on.
"""

import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from planted_exact import ExactVerifier, scripted, state_values, table_rl, transitions  # noqa: E402
from provers import SMOKE, TUNING, clone, learn_verifier  # noqa: E402

import train_rl  # noqa: E402
from infra.cli import opt, parse, script  # noqa: E402
from infra.runs import mean, read_metrics, write_json  # noqa: E402
from report.figures import COLOURS, finish, machine, print_results, pyplot, spread  # noqa: E402
from tasks import get_task  # noqa: E402

PROVER = 16
# flags of train_rl.py beside the right way's; name in figures; colour
ARMS = {
    "pav": (dict(), "the right way: progress, own step", COLOURS["pav"]),
    "outcome": (dict(reward="outcome"), "outcome only", COLOURS["outcome"]),
    "q": (dict(reward="q"), "value instead of progress, own step", COLOURS["q"]),
    "q_to_go": (dict(reward="q", credit="return-to-go"), "value, return-to-go", "#CC79A7"),
    "to_go": (dict(credit="return-to-go"), "progress, return-to-go", COLOURS["orm"]),
    "group": (dict(scale_rewards="group"), "outcomes over their group's std", COLOURS["constant"]),
}
LEARNED = {
    "graded": (dict(reward="outcome"), "grader alone", COLOURS["outcome"]),
    "guarded": (dict(), "weak verifier with the anchor", COLOURS["pav"]),
    "unguarded": (dict(anchor=False), "weak verifier, no anchor", COLOURS["q"]),
    "believed": (dict(reward="orm"), "weak verifier, no grader", "#CC79A7"),
    "phantom": (dict(reward="orm", scale_rewards="group"), "no grader, over the group's std", COLOURS["constant"]),
}
PANELS = [("Value instead of progress", ("pav", "q", "q_to_go")), ("Return-to-go", ("pav", "to_go", "outcome")),
          ("Outcomes over the group's std", ("pav", "group"))]


@dataclass
class Config:
    learning_rates: list = opt([1e-3, 3e-3], "grid of every arm")
    seeds: int = opt(5, "seeds of the reported numbers (0, 1, ...)", low=2)
    table_seeds: int = opt(10, "seeds of every arm with a table as policy", low=2)
    table_rates: list = opt([0.03, 0.1, 0.3], "grid of learning rates of the tables; chosen on 3 other seeds")
    transformer: bool = opt(True, "also train transformers")
    steps: int = opt(60, "RL steps on six letters", low=1)
    easy_letters: int = opt(4, "length of the hidden sequence in the easy regime", low=1, high=12)
    easy_steps: int = opt(40, "RL steps there", low=1)
    learned_steps: int = opt(80, "RL steps of the arms with the weak verifier", low=1)
    weak_problems: int = opt(2000, "continuations that the weak verifier is trained on (train_rl.py's own: 40000)", low=1)
    eval_problems: int = opt(128, "problems of an evaluation", low=1)
    out: str = opt("docs/results/breaks", "where table, figure and numbers go")
    smoke: bool = opt(False, "a few steps of everything")


def tabular(cfg, regime, arm, seed, lr):
    """The same rewards for a table of logits instead of a transformer (planted_exact.table_rl)."""
    letters, length, hidden = "abcdefghijklmn", 12, 6 if regime == "table" else cfg.easy_letters
    step, base = (f(letters[:hidden], letters, *more) for f, more in ((transitions, ()), (scripted, (5.0, length))))
    V_mu, flags = state_values(step, scripted(letters[:hidden], letters, PROVER, length)), dict(ARMS[arm][0])
    if flags.get("reward") == "outcome":
        V_mu = None
        flags.pop("reward")
    curve = table_rl(step, base, V_mu, seed, lr, cfg.steps, **flags)
    return dict(accuracy=curve, score=[None] * len(curve), tokens=[i * 10 * 128 * length for i in range(len(curve))])


def reinforce(cfg, root, regime, arm, seed, lr):
    """One RL run (or the one that is there) -> dict(accuracy, score: curves over evaluations; tokens)."""
    if regime.startswith("table"):
        return tabular(cfg, regime, arm, seed, lr)
    letters, weak = cfg.easy_letters if regime == "easy" else 6, regime in ("learned", "able")
    more, start = dict(planted_length=letters), clone(seed, f"sft{letters}" if letters != 6 else "sft", 5, cfg.smoke,
                                                      planted_length=letters)
    flags, verifier = (LEARNED if weak else ARMS)[arm][0], None
    if weak:
        prover = clone(seed, "prover", PROVER, cfg.smoke)
        more["verifier"] = str(learn_verifier(root / f"seed{seed}" / "weak_verifier", seed, start, prover, PROVER,
                                              cfg.weak_problems, 6, cfg.smoke))
        start = prover if regime == "able" else start
    run = root / f"seed{seed}" / f"{regime}_{arm}_lr{lr:g}"
    steps = dict(main=cfg.steps, easy=cfg.easy_steps, learned=cfg.learned_steps, able=cfg.learned_steps)[regime]
    config = train_rl.Config(**(dict(
        task="planted", reward="pav", seed=seed, policy=str(start), run_dir=str(run), num_prompts=4, num_generations=32,
        steps=steps, learning_rate=lr, eval_problems=cfg.eval_problems, eval_split="val" if seed == TUNING else "test",
        eval_steps=max(1, steps // 10), save_steps=steps, threads=1, device="cpu") | flags | more))
    if not weak and config.reward != "outcome":
        task = get_task(config)
        verifier = ExactVerifier(task, task.tokenizer(), PROVER)
    with redirect_stdout(StringIO()):
        train_rl.train(config, verifier)
    rows = [r for r in read_metrics(run) if "eval/accuracy" in r]
    return dict(accuracy=[r["eval/accuracy"] for r in rows], score=[r.get("eval/verifier_score") for r in rows],
                tokens=[r["num_tokens"] for r in rows])


def compare(cfg, root, regime, arms, given=None):
    """Tune every arm on the tuning seed, run it on the others. -> {arm: dict}; given: learning rates instead of the search.
    `minus` is the paired difference to the first arm, the right way, of accuracy averaged over the run."""
    out, cheap = {}, regime.startswith("table")
    averaged_of = lambda arm, seed, lr: mean(reinforce(cfg, root, regime, arm, seed, lr)["accuracy"][1:])  # noqa: E731
    for arm in arms:
        tried = {}
        if not given:
            tried = {lr: mean(averaged_of(arm, TUNING + s, lr) for s in range(3 if cheap else 1))
                     for lr in (cfg.table_rates if cheap else cfg.learning_rates)}
        lr = given[arm] if given else max(tried, key=tried.get)
        runs = [reinforce(cfg, root, regime, arm, seed, lr) for seed in range(cfg.table_seeds if cheap else cfg.seeds)]
        averaged, end = [mean(r["accuracy"][1:]) for r in runs], [r["accuracy"][-1] for r in runs]
        right = out[arms[0]]["averaged"] if out else averaged
        minus = [a - b for a, b in zip(averaged, right)]
        out[arm] = dict(learning_rate=lr, tuning={f"{k:g}": round(v, 4) for k, v in tried.items()}, runs=runs, averaged=averaged,
                        mean=mean(averaged), mean_sd=spread(averaged), start=mean(r["accuracy"][0] for r in runs), end=mean(end),
                        end_sd=spread(end), minus=mean(minus), minus_sd=spread(minus))
        print(f"  {regime} {arm}: averaged {mean(averaged):.3f} ({spread(averaged):.3f}), end {mean(end):.3f}", flush=True)
    return out


def table(results, names):
    lines = ["| arm | learning rate | accuracy, averaged over the run (sd) | minus the first arm, paired (sd) | first evaluation "
             "| last (sd) | last, per seed | verifier's score, first to last |", "|---|---|---|---|---|---|---|---|"]
    for arm, r in results.items():
        ends = " ".join(f"{x['accuracy'][-1]:.2f}" for x in r["runs"])
        score = [[x["score"][i] for x in r["runs"]] for i in (0, -1)]
        score = "" if None in score[0] + score[1] else f"{mean(score[0]):.2f} to {mean(score[1]):.2f}"
        lines.append(f"| {names[arm][1]} | {r['learning_rate']:g} | {r['mean']:.3f} ({r['mean_sd']:.3f}) | {r['minus']:+.3f} "
                     f"({r['minus_sd']:.3f}) | {r['start']:.3f} | {r['end']:.3f} ({r['end_sd']:.3f}) | {ends} | {score} |")
    return "\n".join(lines)


def draw_curves(axis, results, arms, names, title, weight=2.0):
    for arm in arms:
        runs = results[arm]["runs"]
        x = [t / 1e3 for t in runs[0]["tokens"]]
        y = torch.tensor([r["accuracy"] for r in runs])
        axis.plot(x, y.mean(0), color=names[arm][2], label=names[arm][1], linewidth=weight)
        axis.fill_between(x, y.min(0).values, y.max(0).values, color=names[arm][2], alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel="sampled tokens, thousands", ylabel="sampled accuracy", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=7)


def figure(results, path):
    """Small multiples: one mistake a panel, for a table and for a transformer; its easy regime; the Goodhart plot."""
    if (plt := pyplot()) is None:
        return
    rows = [("table", "table"), ("main", "transformer")] if "main" in results else [("table", "table")]
    last = len(rows)
    fig, axes = plt.subplots(last + 1, 3, figsize=(14.5, 4 * (last + 1)), constrained_layout=True, squeeze=False)
    for line, (regime, policy) in zip(axes, rows):
        for axis, (title, arms) in zip(line, PANELS):
            draw_curves(axis, results[regime], arms, ARMS, f"{title} ({policy})")
    easy = "easy" if "easy" in results else "table_easy"
    draw_curves(axes[last][0], results[easy], list(results[easy]), ARMS, "The same on an easy task")
    if "learned" in results:
        draw_curves(axes[last][1], results["learned"], list(results["learned"]), LEARNED, "A weak verifier, guarded or not")
        draw_goodhart(axes[last][2], results)
    else:
        axes[last][1].set_axis_off()
        axes[last][2].set_axis_off()
    finish(plt, fig, axes.flat, path)


def draw_goodhart(axis, results):
    for regime, style, where in (("learned", "-", "base"), ("able", ":", "able policy")):
        for arm in ("guarded", "unguarded", "believed"):
            for i, r in enumerate(results[regime][arm]["runs"]):
                axis.plot(r["score"], r["accuracy"], style, color=LEARNED[arm][2], linewidth=1, alpha=0.7,
                          label=None if i else f"{LEARNED[arm][1]}, {where}")
                axis.plot(r["score"][-1], r["accuracy"][-1], "o", color=LEARNED[arm][2], markersize=5)
    axis.axline((0, 0), slope=1, color="#aaaaaa", linestyle=":", linewidth=1)
    axis.set(title="Goodhart plot (a dot where a seed ends)", xlabel="verifier's mean score", ylabel="sampled accuracy",
             ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=7)


def hurts(row):
    """Below the right way by more than two standard errors of the paired difference."""
    return bool(row["minus"] < -2 * row["minus_sd"] / len(row["runs"]) ** 0.5)


def verdict(results, arm):
    """True: the mistake hurts table and transformer; "partly": one of them; False: none. One alone decides if it is alone."""
    found = [hurts(results[regime][arm]) for regime in ("table", "main") if regime in results]
    return True if all(found) else "partly" if any(found) else False


def claims(results, command):
    """(sentences for README's table of claims, further lessons), filled with what was measured."""
    def show(arm, *regimes):
        named = dict(table="table", main="transformer", table_easy="table", easy="transformer")
        found = [(named[g], results[g][arm]) for g in regimes if g in results]
        return ", ".join(f"{name} {r['mean']:.2f} ({r['mean_sd']:.2f})" for name, r in found)

    hard, easy = ("table", "main"), ("table_easy", "easy")
    n = " and ".join(f"{len(results[g]['pav']['runs'])} seeds ({p})" for g, p in (("table", "table"), ("main", "transformer"))
                     if g in results)
    how = f"Accuracy averaged over the run (sd over {n}), exact values:"
    paper = [
        dict(claim="Process rewards must be progress, not Q: RL on Q^pi + Q^mu collapses (appendix G).",
             measured=f"{how} progress: {show('pav', *hard)}; value, own step: {show('q', *hard)}; value, return-to-go: "
                      f"{show('q_to_go', *hard)}.",
             holds=verdict(results, "q_to_go") if verdict(results, "q") else verdict(results, "q_to_go") and "partly",
             fails_when="a step is paid its own value only (discount 0), as its expected gradient is that of progress, or the "
                        f"prompts share no parameters (table). Four letters: progress {show('pav', *easy)}, value to go "
                        f"{show('q_to_go', *easy)}."),
        dict(claim="The bonus is paid to its own step (discount 0); summed to the right it telescopes into a baseline.",
             measured=f"{how} own step: {show('pav', *hard)}; return-to-go: {show('to_go', *hard)}; outcome only: "
                      f"{show('outcome', *hard)}.",
             holds=verdict(results, "to_go"),
             fails_when=f"the outcome alone is enough. Four letters: return-to-go {show('to_go', *easy)}, outcome only "
                        f"{show('outcome', *easy)}, progress {show('pav', *easy)}."),
    ]
    more = [dict(claim="Outcomes over their group's std beside process rewards (phantom advantages) hurt.",
                 measured=f"{how} as they are: {show('pav', *hard)}; over the std: {show('group', *hard)}.",
                 holds=verdict(results, "group"), fails_when="a group that agrees gets exactly nothing, scaled or not.")]
    if "learned" in results:
        last = lambda r: f"{r['end']:.2f} ({r['end_sd']:.2f})"  # noqa: E731
        weak, able = results["learned"], results["able"]
        fooled, score = weak["believed"], [mean(x["score"][i] for x in weak["believed"]["runs"]) for i in (0, -1)]
        more += [
            dict(claim="Optimised far enough, a learned reward rises while the truth does not (Goodhart; arXiv 2210.10760).",
                 measured=f"A verifier of few solutions, last evaluation (sd over {len(fooled['runs'])} seeds): as the only "
                          f"reward its score goes from {score[0]:.2f} to {score[1]:.2f}, accuracy from {fooled['start']:.2f} to "
                          f"{last(fooled)}; beside the grader without the anchor {last(weak['unguarded'])}, with it "
                          f"{last(weak['guarded'])}, grader alone {last(weak['graded'])}.",
                 holds=score[1] > 2 * score[0] and all(r["accuracy"][-1] <= r["accuracy"][0] for r in fooled["runs"]),
                 fails_when=f"the policy already solves a tenth: from {able['believed']['start']:.2f} that verifier alone leads "
                            f"to {last(able['believed'])}, the grader alone to {last(able['graded'])}."),
            dict(claim="Dividing a learned, dense reward by its group's std makes phantom advantages.",
                 measured=f"The verifier's score as the reward, last evaluation: as it is {last(fooled)}, over the group's std "
                          f"{last(weak['phantom'])}.",
                 holds=weak["phantom"]["end"] + 2 * weak["phantom"]["end_sd"] < fooled["end"],
                 fails_when="the score as it is does not work either."),
        ]
    return [dict(paper="2410.08146", command=command) | c for c in paper], [dict(command=command) | c for c in more]


def main(argv=None):
    cfg, clock = parse(Config, argv, __doc__), time.process_time()
    root = SMOKE / "breaks" if cfg.smoke else Path("runs/breaks")
    if cfg.smoke:
        cfg.learning_rates, cfg.seeds, cfg.steps, cfg.easy_steps, cfg.learned_steps, cfg.eval_problems = [1e-3], 1, 2, 2, 2, 16
        cfg.table_seeds, cfg.table_rates, cfg.out = 2, [0.1], str(root / "results")
    simple, rates = ["pav", "outcome", "q_to_go", "to_go"], lambda runs: {arm: r["learning_rate"] for arm, r in runs.items()}
    results = {"table": compare(cfg, root, "table", list(ARMS))}
    results["table_easy"] = compare(cfg, root, "table_easy", simple, rates(results["table"]))
    titles = {"table": "A table as policy, six letters, exact values:",
              "table_easy": f"A table, {cfg.easy_letters} letters in 12, the same learning rates:"}
    if cfg.transformer:
        results["main"] = compare(cfg, root, "main", list(ARMS))
        results["easy"] = compare(cfg, root, "easy", simple, rates(results["main"]))
        results["learned"] = compare(cfg, root, "learned", list(LEARNED))
        results["able"] = compare(cfg, root, "able", ["graded", "guarded", "unguarded", "believed"], rates(results["learned"]))
        titles |= {"main": "A transformer, six letters, exact values:",
                   "easy": f"A transformer, {cfg.easy_letters} letters, the same learning rates:",
                   "learned": f"A transformer, six letters, a verifier of {cfg.weak_problems} continuations, from the base:",
                   "able": f"The same, from a policy cloned from strength {PROVER}:"}
    out = Path(cfg.out)
    command = "python experiments/breaks.py" + " --smoke" * cfg.smoke + " --no-transformer" * (not cfg.transformer)
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{title}\n\n{table(results[name], LEARNED if name in ('learned', 'able') else ARMS)}"
                       for name, title in titles.items())
    (out / "table.md").write_text(text + "\n")
    from_paper, lessons = claims(results, command)
    write_json(out / "results.json", dict(
        claims=from_paper, lessons=lessons, command=command, machine=machine(), torch=torch.__version__, settings=vars(cfg),
        results=results, cpu_seconds_of_this_call=round(time.process_time() - clock)))
    figure(results, out / "curves.png")
    print_results(text, out)


if __name__ == "__main__":
    script(main)
