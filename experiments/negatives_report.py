"""Tables, figure and claims of experiments/negatives.py, from the numbers of its result file alone."""

import itertools
import math

from experiments.toolkit import (
    METHOD_COLOURS,
    finish,
    mean_sd,
    opposite,
    pyplot,
    spread,
    together,
    verdict,
    with_sd,
)
from infra.runs import mean

NAMES = {
    "sft": "SFT",
    "rft": "RFT, of SFT's best policy",
    "rft_early": "RFT, of the policy that DPO starts from",
    "dpo_per_step": "per-step DPO",
    "dpo_whole": "whole-solution DPO",
    "dpo_random_cut": "DPO, cut at random (control)",
}


def worth(sizes, sft, size, value):
    """Problems that SFT would need for this accuracy, as a multiple of size: its mean curve,
    linear in log(size). None where the curve does not reach so far up or down."""
    for (a, b), (x, y) in zip(itertools.pairwise(sft), itertools.pairwise(map(math.log, sizes))):
        if min(a, b) <= value <= max(a, b) and a != b:
            return math.exp(x + (y - x) * (value - a) / (b - a)) / size
    return None


def chain_summary(results, sizes):
    """One row per size and method: mean, spread, paired difference to SFT, worth in problems,
    samples, cost."""
    sft = [mean(r["test"] for r in results[str(s)]["sft"]["rows"]) for s in sizes]
    rows = []
    for size in sizes:
        base = [r["test"] for r in results[str(size)]["sft"]["rows"]]
        for name, arm in results[str(size)].items():
            test = [r["test"] for r in arm["rows"]]
            gain = [a - b for a, b in zip(test, base)]
            rows.append(
                dict(
                    size=size,
                    method=name,
                    setting=arm["setting"],
                    policy_test=mean(r.get("policy_test", r["test"]) for r in arm["rows"]),
                    policy_per_seed=[r.get("policy_test", r["test"]) for r in arm["rows"]],
                    test=mean(test),
                    sd=spread(test),
                    per_seed=test,
                    sampled=mean(r["test_sampled"] for r in arm["rows"]),
                    gain=mean(gain),
                    gain_sd=spread(gain),
                    worth=worth(sizes, sft, size, mean(test)),
                    tokens=mean(r.get("sampled_tokens", 0) for r in arm["rows"]),
                )
            )
    return rows


class Rows:
    """The rows of chain_summary, and what the claims ask of them."""

    def __init__(self, results):
        self.at = {(r["size"], r["method"]): r for r in results["rows"]}
        self.sizes = results["settings"]["sizes"]
        self.seeds = results["settings"]["seeds"]
        self.shared = dict(paper="2406.14532", command=results["command"])
        self.where = f"at {', '.join(map(str, self.sizes))} problems"
        self.tuning = results["tuning"]

    def longest(self, size):
        """Whether the most steps of SFT's grid were the best."""
        tried = [setting["steps"] for setting in self.tuning[str(size)]["sft"]]
        return self.at[size, "sft"]["setting"]["steps"] == max(tried)

    def minus(self, a, b):
        """Paired differences of two methods, a list a size."""
        pairs = [(self.at[s, a]["per_seed"], self.at[s, b]["per_seed"]) for s in self.sizes]
        return [[x - y for x, y in zip(*pair)] for pair in pairs]

    def over_policy(self, a):
        """The same of a method and the policy that it sampled and started from."""
        rows = [self.at[s, a] for s in self.sizes]
        return [[x - y for x, y in zip(r["per_seed"], r["policy_per_seed"])] for r in rows]


def show(differences):
    return ", ".join(mean_sd(d, signed=True) for d in differences)


def claims_of(results):
    """What the paper says against the rows of chain_summary."""
    rows = Rows(results)
    rft = "RFT on a policy's own right solutions is worth 2 times the problems of SFT"
    dpo = "per-step DPO on its wrong ones is worth 8 times the problems of SFT"
    rft_short = "RFT on right samples doubles what the problems are worth"
    dpo_short = "Per-step DPO makes the problems worth 8 times as many"
    claims = (
        worth_claim(rows, ["rft", "rft_early"], rft, rft_short),
        worth_claim(rows, ["dpo_per_step"], dpo, dpo_short),
        pit_claim(rows),
        whole_claim(rows),
    )
    return [rows.shared | c for c in claims]


def worth_claim(rows, names, says, short):
    """names: the method's arms, each tuned as SFT is."""
    measured = []
    verdicts = []
    for name in names:
        gains = rows.minus(name, "sft")
        factors = [rows.at[s, name]["worth"] for s in rows.sizes]
        words = ", ".join("off SFT's curve" if f is None else f"{f:.2f}" for f in factors)
        verdicts += [verdict(d) for d in gains]
        measured.append(
            f"{NAMES[name]} minus SFT with as many epochs as help it {show(gains)}, worth {words} "
            "times the problems"
        )
    longest = sum(rows.longest(size) for size in rows.sizes)
    return dict(
        claim=says,
        short=short,
        holds=together(verdicts),
        measured=f"{rows.where}: {'; '.join(measured)} (chain, greedy accuracy, {rows.seeds} "
        "seeds, sd of the paired differences in brackets)",
        fails_when="SFT may train as long as it helps (the longest of its grid won at "
        f"{longest} of {len(rows.sizes)} sizes): on this task that alone goes further, and leaves "
        "hardly a wrong sample to learn from",
    )


def pit_claim(rows):
    policy = rows.over_policy("dpo_per_step")
    rival = rows.minus("dpo_per_step", "dpo_whole")
    random_cuts = rows.minus("dpo_per_step", "dpo_random_cut")
    return dict(
        claim="negatives cut at the first pit improve the policy they were sampled from, and more "
        "than whole ones",
        short="Negatives cut at the first pit help, and more than whole ones",
        holds=together(verdict(d) for d in policy + rival),
        measured=f"{rows.where}: per-step DPO minus its own policy {show(policy)}; minus "
        f"whole-solution DPO {show(rival)}; minus random cuts, which were not tuned for "
        f"themselves, {show(random_cuts)}",
        fails_when="the policy was trained until it makes few mistakes on its own problems (last "
        "table of the files)",
    )


def whole_claim(rows):
    whole = rows.over_policy("dpo_whole")
    unclear = [str(size) for size, d in zip(rows.sizes, whole) if verdict(d) == "open"]
    return dict(
        claim="whole negatives do not improve the policy they were sampled from",
        short="Whole negatives do not help",
        holds=together(opposite(verdict(d)) for d in whole),
        measured=f"{rows.where}: whole-solution DPO minus its own policy {show(whole)} "
        f"({rows.seeds} seeds, sd)",
        fails_when=f"not shown either way at {', '.join(unclear)} problems" if unclear else "",
    )


def chain_table(rows):
    lines = [
        "| problems | method | setting | greedy accuracy, test (sd) | minus SFT, paired (sd) | "
        "minus its policy | at T=1 | tokens sampled | worth, in SFT's problems |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        setting = ", ".join(
            f"{k.replace('learning_rate', 'lr')} {v:g}"
            for k, v in r["setting"].items()
            if k != "policy"
        )
        gain = ""
        over_policy = ""
        factor = "1"
        if r["method"] != "sft":
            gain = with_sd(r["gain"], r["gain_sd"], signed=True)
            over_policy = f"{r['test'] - r['policy_test']:+.3f}"
            factor = "off SFT's curve" if r["worth"] is None else f"{r['worth']:.2f}"
        lines.append(
            f"| {r['size']} | {NAMES[r['method']]} | {setting} | {with_sd(r['test'], r['sd'])} | "
            f"{gain} | {over_policy} | {r['sampled']:.3f} | {r['tokens'] / 1e3:.0f}k | {factor} |"
        )
    return "\n".join(lines)


def logarithmic(axis, ticks):
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, ticks)
    axis.minorticks_off()


def size_panels(left, middle, rows, clean, sizes):
    """Accuracy against problems; paired gain over SFT, sloppy (full) and clean (hollow)
    demonstrations."""
    for name, label in NAMES.items():
        of = [r for r in rows if r["method"] == name]
        x = [r["size"] for r in of]
        colour = METHOD_COLOURS[name]
        style = dict(color=colour, label=label, linewidth=2, marker="o", markersize=4, capsize=3)
        left.errorbar(x, [r["test"] for r in of], [r["sd"] for r in of], **style)
        if name == "sft":
            continue
        middle.errorbar(x, [r["gain"] for r in of], [r["gain_sd"] for r in of], **style)
        other = [(r["size"], r["gain"]) for r in clean if r["method"] == name]
        hollow = dict(marker="D", markersize=6, markerfacecolor="white", color=colour)
        middle.plot([s for s, _ in other], [g for _, g in other], linestyle="", **hollow)
    for axis in (left, middle):
        logarithmic(axis, sizes)
        axis.set_xlabel("training problems")
    left.set(
        ylabel="greedy accuracy on new problems",
        title="Accuracy (bars: sd over seeds)",
        ylim=(0, 1.02),
    )
    left.legend(frameon=False, fontsize=8)
    middle.axhline(0, color="#aaaaaa", linewidth=1)
    middle.set(
        ylabel="accuracy minus SFT, same seed", title="Gain over SFT (hollow: clean demonstrations)"
    )


def reference_panel(axis, reference, size):
    """Gain against the training of the reference."""
    steps = sorted({r["steps"] for r in reference})
    for name in ("dpo_per_step", "dpo_whole"):
        gains = [[r[name] - r["sft"] for r in reference if r["steps"] == s] for s in steps]
        style = dict(linewidth=2, marker="o", markersize=4, capsize=3)
        bars = [mean(g) for g in gains], [spread(g) for g in gains]
        axis.errorbar(steps, *bars, color=METHOD_COLOURS[name], label=NAMES[name], **style)
    axis.axhline(0, color="#aaaaaa", linewidth=1)
    logarithmic(axis, steps)
    axis.set(
        xlabel="SFT steps of the reference",
        ylabel="accuracy minus that SFT policy",
        title=f"Which reference ({size} problems)",
    )


def chain_figure(rows, clean, reference, sizes, path):
    if (plt := pyplot()) is None:
        return
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14.5, 4.3), constrained_layout=True)
    size_panels(left, middle, rows, clean, sizes)
    reference_panel(right, reference, sizes[len(sizes) // 2])
    finish(plt, fig, (left, middle, right), path)


def reference_table(rows):
    lines = [
        "Other references, same DPO setting:\n",
        "| SFT steps | SFT | per-step DPO minus SFT (sd) | whole minus SFT (sd) | "
        "wrong among the samples | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for steps in sorted({r["steps"] for r in rows}):
        at_steps = [r for r in rows if r["steps"] == steps]
        gain = {n: [r[n] - r["sft"] for r in at_steps] for n in ("dpo_per_step", "dpo_whole")}
        cells = " | ".join(mean_sd(g, signed=True) for g in gain.values())
        sft = mean(r["sft"] for r in at_steps)
        wrong = mean(r["wrong_share"] for r in at_steps)
        pairs = mean(r["pairs"] for r in at_steps)
        lines.append(f"| {steps} | {sft:.3f} | {cells} | {wrong:.2f} | {pairs:.0f} |")
    return "\n".join(lines)
