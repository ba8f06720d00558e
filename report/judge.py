"""How good is a verifier on problems that it has not seen? Called by pav.py at its end.

One policy solution a problem, one random step (h-1 -> h) in it, eval_mc fresh continuations of the prover from both
prefixes. The correlation of the *advantage* matters for RL, which is paid by differences: a verifier can rank states well
and steps badly.
"""

import math
from functools import partial

import torch

from infra.seeds import derive
from rollouts import continue_and_grade, grades, pass_at_k, step_ends
from sample import generate
from verifier import best_of_k_value, single_sample_value, step_values


def auc(score, positive):
    """Probability that a random positive scores above a random negative (ties count half); nan if one is empty.
    score [N] float, positive [N] bool."""
    order = score.argsort()
    rank = torch.arange(1, len(score) + 1, dtype=torch.float64)
    _, tie, count = score[order].unique_consecutive(return_inverse=True, return_counts=True)
    mean_rank = torch.zeros(len(count), dtype=torch.float64).scatter_add_(0, tie, rank) / count
    ranks = torch.empty_like(rank).scatter_(0, order, mean_rank[tie])
    n1 = int(positive.sum())
    n0 = int((~positive).sum())
    if not n1 or not n0:
        return float("nan")
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def correlation(a, b):
    """Pearson's r of two [N] tensors; nan where one side is constant."""
    a = a.double() - a.double().mean()
    b = b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return float(a @ b) / norm if norm > 0 else float("nan")


def reliability(prediction, outcome, bins=10):
    """Rows (mean prediction, mean outcome, count) of equal-width bins: the diagonal is perfect calibration."""
    which = (prediction * bins).long().clamp(max=bins - 1)
    inside = [which == i for i in range(bins)]
    return [(float(prediction[i].mean()), float(outcome[i].mean()), int(i.sum())) for i in inside if i.any()]


def judged_steps(ends, seed):
    """One random inner step of every solution that has one: [(row, h, ends without padding)]."""
    steps = []
    for i in range(len(ends)):
        row = sorted(set(ends[i].tolist()))
        if len(row) >= 3:
            steps.append((i, 1 + derive(seed, "judge", i) % (len(row) - 2), row))
    return steps


def monte_carlo_value(right, k):
    """right [...,n] float, grades of n continuations -> [...]: unbiased value under Best-of-k (eq. 30; pass@k)."""
    if k == 1:
        return right.mean(-1)
    n = right.shape[-1]
    counts = right.sum(-1)
    values = [pass_at_k(n, int(c), k) for c in counts.flatten().tolist()]
    return torch.tensor(values).view(counts.shape)


def noise_ceiling(right, k):
    """right [N,2,n], grades of n continuations before and after N steps -> the most that the true advantage could correlate
    with theirs: 95% bound from two halves (split-half reliability, Spearman-Brown; Fisher's z). nan below 2k continuations or
    4 steps."""
    half = right.shape[-1] // 2
    if half < k or len(right) < 4:
        return float("nan")
    values = [monte_carlo_value(part, k) for part in (right[..., :half], right[..., half : 2 * half])]
    r = correlation(*(v[:, 1] - v[:, 0] for v in values))
    if math.isnan(r):
        return r
    r = math.tanh(math.atanh(max(-0.999, min(r, 0.999))) + 1.96 / math.sqrt(len(right) - 3))
    return math.sqrt(max(0.0, 2 * r / (1 + r)))


def judge(verifier, base, prover, tokenizer, task, cfg):
    """-> dict of numbers; cfg is pav.py's.

    brier and auc: of single continuations, against the verifier's value of one sample; brier_constant: what the mean alone
    would get; auc_outcome: of whole solutions; corr_value, corr_advantage: against eval_mc fresh continuations (noisy:
    corr_advantage_ceiling is the most that the truth itself would get); corr_*_exact: against the solver's value of the
    scripted demonstrator.
    """
    problems = task.problems("val", cfg.eval_problems, cfg.seed)
    problems = (problems * (1 + cfg.eval_problems // len(problems)))[: cfg.eval_problems]
    limit = cfg.max_completion_length or task.max_new_tokens
    options = dict(temperature=cfg.temperature, stop_ids=task.stop_ids(tokenizer), slots=cfg.slots)
    prompts = [task.prompt_tokens(p, tokenizer) for p in problems]
    seeds = generate(base, prompts, max_new_tokens=limit, seed=derive(cfg.seed, "judge"), **options)
    ends = step_ends(task, seeds, tokenizer, credit=True)  # an EOS alone is no step to judge
    value = step_values(verifier, seeds.tokens, ends)  # (B, S+1)
    auc_outcome = auc(value[:, -1], grades(task, problems, seeds, tokenizer) > 0.5)
    steps = judged_steps(ends, cfg.seed)
    if not steps:  # every solution is one step: only the end can be judged
        names = ("brier", "brier_constant", "auc", "corr_value", "corr_advantage")
        return dict.fromkeys(names, float("nan")) | dict(auc_outcome=auc_outcome, reliability=[], judged_steps=0)
    starts = [(problems[i], seeds.tokens[i, :end].tolist(), row[0]) for i, h, row in steps for end in row[h - 1 : h + 1]]
    complete = partial(generate, prover, **options)
    seed = derive(cfg.seed, "judge continuations")
    _, right, _ = continue_and_grade(complete, task, tokenizer, starts, cfg.eval_mc, limit, seed)
    right = right.view(-1, 2, cfg.eval_mc)  # before and after the step
    truth = monte_carlo_value(right, verifier.k)
    guess = torch.stack([value[i, [h - 1, h]] for i, h, _ in steps])  # (n, 2)
    single = single_sample_value(guess, verifier.k)[:, :, None].expand_as(right).reshape(-1)
    quality = dict(
        brier=float((single - right.reshape(-1)).square().mean()),
        brier_constant=float(right.var(unbiased=False)),
        auc=auc(single, right.reshape(-1) > 0.5),
        auc_outcome=auc_outcome,
        corr_value=correlation(guess[:, 1], truth[:, 1]),
        corr_advantage=correlation(guess[:, 1] - guess[:, 0], truth[:, 1] - truth[:, 0]),
        corr_advantage_ceiling=noise_ceiling(right, verifier.k),
        reliability=reliability(single, right.reshape(-1)),
        judged_steps=len(steps),
    )
    exact = exact_values(task, tokenizer, starts, cfg.prover_strength)
    if exact is not None:
        exact = best_of_k_value(exact.view(-1, 2), verifier.k)
        quality["corr_value_exact"] = correlation(guess[:, 1], exact[:, 1])
        quality["corr_advantage_exact"] = correlation(guess[:, 1] - guess[:, 0], exact[:, 1] - exact[:, 0])
    return quality


def judge_labels(verifier, data):
    """judge() without rollouts, against the labels of solutions that were kept out of the fit. data: a dict of
    rollouts.labelled_solutions. The advantage's correlation leaves first steps out: the bare prompt has no label of its own.
    """
    value = step_values(verifier, data["tokens"], data["ends"])
    target, real = data["target"], data["weight"][:, 1:] > 0
    guess, truth = value[:, 1:][real], target[:, 1:][real]
    gains = [(x[:, 2:] - x[:, 1:-1])[real[:, 1:]] for x in (value, target)]
    return dict(
        brier=float((guess - truth).square().mean()),
        brier_constant=float(truth.var(unbiased=False)),
        auc=auc(guess, truth > 0.5),
        auc_outcome=auc(value[:, -1], target[:, -1] > 0.5),
        corr_value=correlation(guess, truth),
        corr_advantage=correlation(*gains),
        reliability=reliability(guess, truth),
        judged_steps=len(guess),
    )


def exact_values(task, tokenizer, starts, strength):
    """[N] value of the demonstrator of that strength at each start (problem, tokens, prompt length), or None."""
    if strength < 0:
        return None
    values = [task.exact_value(problem, tokenizer.decode(tokens[start:]), strength) for problem, tokens, start in starts]
    return None if None in values else torch.tensor(values)


FEW_LABELS = 1000  # the smallest verifier of docs/results that ranks steps within a problem has more


def shortcomings(cfg, summary):
    """Why RL should not be paid by a verifier as it is -> [one line each, with what to do]; [] where nothing is seen.
    cfg: pav.py's; summary: what it wrote."""
    out = []
    labels = summary.get("labels", FEW_LABELS)
    if labels < FEW_LABELS:
        out.append(f"only {labels} labels, which fit nothing: raise --num-problems (few problems are repeated)")
    if summary.get("brier", 0) >= summary.get("brier_constant", 1):
        out.append("it is no better than a constant (Brier): more labels, or a prover that succeeds more often")
    advantage = summary.get("corr_advantage")
    if cfg.label == "q" and advantage is not None and not advantage > 0:
        out.append(f"its advantage does not correlate with that of fresh rollouts ({advantage:.2f})")
    if cfg.label == "q" and cfg.prover == "base" and cfg.prover_k == 1 and not cfg.labels:
        out.append("the prover is the base policy itself, which is for search (Q^pi); for RL give --prover DIR, the clone "
                   "of a better demonstrator, or --prover-k 4")
    return out
