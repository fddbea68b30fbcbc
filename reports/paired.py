"""Pairs of runs that share a seed: by what their losses differ, and what may be concluded from that.

Runs of one seed begin with the same weights and see the same batches, so the differences within pairs spread less than
the losses. Both tests take them for independent and normally distributed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.05  # of a table's conclusions at equal tokens, all its comparisons together; and so at equal time and FLOPs
POWER = 0.8
EFFECT = 2.0  # spread of the differences that `evidence` looks for, in standard deviations of one pair's difference


class Difference(NamedTuple):
    """What pairs say of the mean difference of their losses."""

    pairs: int
    mean: float
    margin: float  # half the confidence interval of 1 - level
    p: float  # of the paired t-test, two-sided
    detectable: float  # the true difference that so many pairs of this spread would find with a probability of POWER


def paired_t(differences: Sequence[float], level: float = LEVEL) -> Difference:
    """The paired t-test of two or more differences; it holds for a number of pairs that was fixed beforehand."""
    from scipy import optimize, special, stats  # takes a second to load

    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    quantile = float(stats.t.isf(level / 2, n - 1))
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    # The noncentral t distribution as a mean over the spreads that a sample may have; scipy's own gives NaN in places.
    bounds = quantile * np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, n - 1) / (n - 1))
    missed = lambda shift: float(np.mean(special.ndtr(bounds - shift) - special.ndtr(-bounds - shift)))
    shift = optimize.brentq(lambda shift: missed(shift) - (1 - POWER), 0, 4 + 4 * quantile)
    return Difference(n, mean, quantile * error, p, shift * error)


def evidence(differences: Sequence[float] | np.ndarray) -> np.ndarray:
    """An e-value against "no difference" after each pair (last axis).

    However many pairs follow, it ever reaches 1 / p with a chance of at most p.

    The likelihood of differences whose mean in standard deviations is N(0, EFFECT^2), over that of a mean of 0, either
    with the standard deviation integrated out under its right Haar prior: T. L. Lai's mixture t-test (Communications in
    Statistics A5, 1976). Of any normal differences without a mean it is a martingale that begins at 1, to which Ville's
    inequality applies (H. Wang and A. Ramdas, arXiv:2310.03722).
    """
    x = np.asarray(differences, np.float64)
    n, squares = np.arange(1, x.shape[-1] + 1), np.cumsum(x**2, axis=-1)
    wide = n + EFFECT**-2
    share = np.cumsum(x, axis=-1) ** 2 / np.where(squares > 0, squares * wide, 1.0)
    return np.sqrt(EFFECT**-2 / wide) * (1 - share) ** (-n / 2)


def always_valid_p(differences: Sequence[float]) -> float:
    """A p-value that holds whenever one looks, and stops: one over the highest e-value so far."""
    return min(1.0, 1 / float(evidence(differences).max(initial=1.0)))


def losses_at(curves: Sequence[list[dict[str, Any]]], axis: str, metric: str) -> tuple[float, list[float]] | None:
    """The farthest point of `axis` that all runs' evaluations reach, and the losses there, between two by a line.

    None if the axis is not known of all, or if a run's evaluations begin beyond that point.
    """
    points = [[(row[axis], row[metric]) for row in rows if row.get(metric) is not None] for rows in curves]
    if not all(points) or any(x is None for each in points for x, _ in each):
        return None
    point = min(each[-1][0] for each in points)
    if point < max(each[0][0] for each in points):
        return None
    return point, [float(np.interp(point, *zip(*each, strict=True))) for each in points]
