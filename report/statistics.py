"""The statistics that every table here uses: two intervals, one majority vote, one spread.

Loads no model: search.py, the evaluation and the experiments import it.
"""

import numpy as np

from infra.runs import mean
from tasks.answers import answers_equal

Z = 1.96  # 95% of a normal distribution
# The same of Student's t with 1, 2, ... 30 degrees of freedom: of five seeds 2.776, not 2.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
T += [2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


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


def margin(values):
    """Half the 95% confidence interval of the mean of independent values, one a seed: Student's t
    times the standard error. Infinite for a single value.

    Two standard errors would do for sixty seeds; of five, one difference of pure noise in nine is
    larger than that. Past 31 values the last t of the table stands: a little too wide.
    """
    values = list(values)
    n = len(values)
    if n < 2:
        return float("inf")
    return T[min(n - 1, len(T)) - 1] * spread(values) / n**0.5
