"""The statistics that every table here uses: one interval, one majority vote, one spread.

Loads no model: search.py, the evaluation and the experiments import it.
"""

import numpy as np

from infra.runs import mean
from tasks.answers import answers_equal

Z = 1.96  # 95% of a normal distribution


def interval(shares, each=1):
    """95% interval of an accuracy. shares: one number in [0, 1] per problem, the share of its
    `each` samples that are right -> (mean, low, high).

    Problems are independent draws, samples of one problem are not: the variance of the mean is
    that of the shares over problems (clusters). It is put into Wilson's interval (1927) as an
    effective number of draws, so that 0 of 16 is not "0 +- 0" and no bound leaves [0, 1]. With one
    sample per problem this is Wilson's interval. Shares that lie closer together than chance would
    have them (rare successes, one in each of a few problems) count as n * each draws at most.
    """
    n = len(shares)
    p = mean(shares)
    between = sum((s - p) ** 2 for s in shares) / (n - 1) / n if n > 1 else 0.0
    if all(s in (0, 1) for s in shares):
        draws = n
    else:
        draws = max(n, min(n * each, p * (1 - p) / between if between else float("inf")))
    centre = (p + Z**2 / (2 * draws)) / (1 + Z**2 / draws)
    half = Z / (1 + Z**2 / draws) * (p * (1 - p) / draws + Z**2 / (4 * draws**2)) ** 0.5
    return p, max(0.0, centre - half), min(1.0, centre + half)


def vote(answers):
    """Majority vote. answers: strings, or None where a sample has no answer -> index of the first
    sample of the commonest answer, None if no sample has one.

    Two answers are one where the grader says so ("1/2" and "0.5"); of answers that are equally
    common the one that came first wins.
    """
    classes = []  # lists of indices
    for i, answer in enumerate(answers):
        if answer is None:
            continue
        same = next((c for c in classes if answers_equal(answers[c[0]], answer)), None)
        if same:
            same.append(i)
        else:
            classes.append([i])
    return max(classes, key=len)[0] if classes else None


def spread(values):
    """Sample standard deviation over seeds; 0 of one value."""
    values = list(values)
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
