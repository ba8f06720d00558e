"""Who is the prover? Base and prover side by side, and the verifier's advantage within one prompt.

Called by pav.py at its end, like judge.py, and at about its cost: of eval_problems / 8 held-out
problems the base writes 8 solutions each, and after every first step of them base and prover take
over, eval_mc times each.

A prover that is the base again promises nothing (PAV, arXiv 2410.08146, section 3.2: A^mu must
tell steps apart where A^pi does not), so the table says how often each solves a problem, sampled
and by its likeliest tokens, how often each begins with a step that can still be completed, and how
alike their values are. Two policies that sample alike may differ in what they find likeliest, and
RL sharpens: countdown's prover samples as its base does, and RL starts far better from it
(docs/log.md, 2026-11-28). A verifier is
judged by the first step: all solutions of a prompt share V(prompt) and its error, which a
correlation over the whole batch holds against it and which RL, comparing samples of one prompt,
does not see.
"""

import math
from functools import partial

import torch

from infra.seeds import derive
from report.judge import correlation, exact_values, monte_carlo_value
from rollouts import continue_and_grade, distinct, grades, step_ends
from sample import generate
from verifier import best_of_k_value, step_values

SOLUTIONS = 8  # of one problem


def centred_within(values, prompt):
    """values [N] float, prompt [N] int64, the number of each value's prompt -> [N]: minus the mean
    of its prompt."""
    total = torch.zeros(int(prompt.max()) + 1, dtype=values.dtype).index_add_(0, prompt, values)
    return values - (total / prompt.bincount().clamp(min=1))[prompt]


def share_solvable(task, tokenizer, problems, rollouts):
    """Share of the rows whose first step leaves the problem solvable; None where no solver says."""
    answers = []
    for b, row in enumerate(step_ends(task, rollouts, tokenizer, credit=True)):
        first = rollouts.tokens[b, int(row[0]) : int(row[1])].tolist()
        answers.append(task.solvable(problems[b], tokenizer.decode(first)))
    return None if None in answers else sum(answers) / len(answers)


def first_steps(prompts, solutions, ends):
    """-> (starts, index): the distinct prefixes after one step as continue_and_grade takes them, and
    which of them each row begins with, [B] int64; -1: its first step is its last."""
    numbers = {}
    starts = []
    index = torch.full((len(solutions),), -1)
    for b, row in enumerate(ends):
        if len(distinct(row)) < 3:
            continue
        problem, _, start = prompts[b // SOLUTIONS]
        ids = solutions.tokens[b, : int(row[1])].tolist()
        index[b] = numbers.setdefault(tuple(ids), len(numbers))
        if len(numbers) > len(starts):
            starts.append((problem, ids, start))
    return starts, index


def solved_greedily(policy, tokenizer, task, cfg, limit):
    """Share of --eval-problems held-out problems that the policy's likeliest tokens solve."""
    problems = task.problems("val", cfg.eval_problems, cfg.seed)
    completions = generate(
        policy,
        [task.prompt_tokens(p, tokenizer) for p in problems],
        max_new_tokens=limit,
        temperature=0.0,
        seed=cfg.seed,
        stop_ids=task.stop_ids(tokenizer),
        slots=cfg.slots,
    )
    return float(grades(task, problems, completions, tokenizer).mean())


def compare(verifier, base, prover, tokenizer, task, cfg):
    """-> dict of numbers; cfg is pav.py's.

    success_base, success_prover: share of their solutions that are right (greedy_*: at temperature
    0); solvable_*: share of their first steps after which the problem can still be solved (None: no
    solver says); corr_policies: correlation of their values after the base's first steps;
    corr_first and corr_first_within: of the verifier's advantage of the first step with that of
    eval_mc continuations, over all samples and centred within each prompt (_exact: with that of the
    scripted demonstrator). A prover that is the base has no numbers of its own.
    """
    if cfg.label == "outcome":
        return {}
    problems = task.problems("val", max(1, cfg.eval_problems // SOLUTIONS), cfg.seed)
    limit = cfg.max_completion_length or task.max_new_tokens
    options = dict(temperature=cfg.temperature, stop_ids=task.stop_ids(tokenizer), slots=cfg.slots)
    prompts = []
    for problem in problems:
        ids = list(task.prompt_tokens(problem, tokenizer))
        prompts.append((problem, ids, len(ids)))
    seed = derive(cfg.seed, "first steps")

    def roll(policy, starts, n, what):
        complete = partial(generate, policy, **options)
        rolled, right, _ = continue_and_grade(
            complete, task, tokenizer, starts, n, limit, derive(seed, what)
        )
        return rolled, right

    solutions, _ = roll(base, prompts, SOLUTIONS, "solutions")
    ends = step_ends(task, solutions, tokenizer, credit=True)
    starts, index = first_steps(prompts, solutions, ends)
    quality = {}
    before = after = None
    for name, policy in [("base", base)] + [("prover", prover)] * (prover is not base):
        rolled, before = roll(policy, prompts, cfg.eval_mc, "prompts")
        asked = [p for p in problems for _ in range(cfg.eval_mc)]
        quality[f"success_{name}"] = float(before.mean())
        quality[f"greedy_{name}"] = solved_greedily(policy, tokenizer, task, cfg, limit)
        quality[f"solvable_{name}"] = share_solvable(task, tokenizer, asked, rolled)
        if starts:
            of_base = after
            _, after = roll(policy, starts, cfg.eval_mc, "first steps")
    if not starts:
        return quality
    rows = (index >= 0).nonzero()[:, 0]
    which = index[rows]
    prompt = rows // SOLUTIONS
    if of_base is not None:
        quality["corr_policies"] = correlation(of_base.mean(1)[which], after.mean(1)[which])
    value = step_values(verifier, solutions.tokens[rows], ends[rows])
    guess = value[:, 1] - value[:, 0]
    truth = monte_carlo_value(after, verifier.k)[which]
    truth = truth - monte_carlo_value(before, verifier.k)[prompt]
    quality |= agreement(guess, truth, prompt, "")
    exact = exact_values(task, tokenizer, [*starts, *prompts], cfg.prover_strength)
    if exact is not None:
        exact = best_of_k_value(exact, verifier.k)
        exact = exact[: len(starts)][which] - exact[len(starts) :][prompt]
        quality |= agreement(guess, exact, prompt, "_exact")
    return quality


def agreement(guess, truth, prompt, suffix):
    """Advantages of first steps [N] and their prompts [N] -> the two correlations, by name."""
    within = correlation(centred_within(guess, prompt), centred_within(truth, prompt))
    return {f"corr_first{suffix}": correlation(guess, truth), f"corr_first_within{suffix}": within}


def describe(summary):
    """What pav.py prints of its summary: base and prover, the first step, the verifier."""
    lines = []
    for name in ("base", "prover"):
        if f"success_{name}" in summary:
            line = f"{name}: solves {summary[f'success_{name}']:.3f}"
            if f"greedy_{name}" in summary:  # not in the summary of an older run
                line += f" ({summary[f'greedy_{name}']:.3f} greedily)"
            if summary[f"solvable_{name}"] is not None:
                line += f", {summary[f'solvable_{name}']:.3f} of first steps keep it solvable"
            # A base that never succeeds has one value everywhere, which correlates with nothing.
            if name == "prover" and math.isfinite(summary.get("corr_policies", math.nan)):
                line += f", its values correlate {summary['corr_policies']:.2f} with the base's"
            lines.append(line)
    if "corr_first" in summary:
        line = (
            f"first step: corr of advantage {summary['corr_first']:.2f} over the batch, "
            f"{summary['corr_first_within']:.2f} within a prompt"
        )
        if "corr_first_exact" in summary:
            line += (
                f"; with the exact one {summary['corr_first_exact']:.2f}, "
                f"{summary['corr_first_within_exact']:.2f}"
            )
        lines.append(line)
    exact = ""
    if "corr_advantage_ceiling" in summary:
        exact = f" (noise allows at most {summary['corr_advantage_ceiling']:.2f})"
    if "corr_advantage_exact" in summary:
        exact += f", with the exact one {summary['corr_advantage_exact']:.2f}"
    lines.append(
        f"verifier: {summary['labels']} labels, AUC {summary['auc']:.3f}, Brier "
        f"{summary['brier']:.4f} (constant: {summary['brier_constant']:.4f}), corr of advantage "
        f"{summary['corr_advantage']:.2f}{exact}"
    )
    return "\n".join(lines)
