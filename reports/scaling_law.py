"""How the loss falls with compute, L = E + A (C / unit)^-alpha, and what runs leave open about it.

At each alpha the law is linear in E and A, so least squares is a search along alpha alone (variable projection, Golub
and Pereyra, 1973). An interval holds all values with which the law fits no worse than chance explains: the profile
likelihood by the F distribution (Bates and Watts, Nonlinear Regression Analysis, 1988), since runs hardly tell E from
alpha, and standard errors do not show that. The runs' deviations are taken for independent, normal and of one size.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from reports.paired import LEVEL

ALPHAS = np.geomspace(0.01, 3, 3000)  # axis G; R runs
Point = tuple[float, float]  # a run's FLOPs, those of the model, and its last loss


class Estimate(NamedTuple):
    """A value, and its interval of 1 - LEVEL. `below`, `above`: the interval is open there."""

    value: float
    low: float
    high: float
    below: bool = False
    above: bool = False

    def __str__(self) -> str:
        low, high = "" if self.below else f"from {self.low:.4g}", "" if self.above else f"to {self.high:.4g}"
        return f"{self.value:.4g} ({f'{low} {high}'.strip() or 'not determined'})"


class Law(NamedTuple):
    unit: float  # FLOPs
    sizes: int
    runs: int
    lack_of_fit: float | None  # p that sizes stray from the law no more than seeds do (F test); None: not testable
    E: Estimate | None  # None: taken for 0, as three runs do not determine three numbers
    A: Estimate
    alpha: Estimate
    at: Callable[..., Estimate]  # FLOPs, and how many new runs -> their mean loss; without a number, the law's


def fit(points: Sequence[Point]) -> Law | None:
    """The law of runs of three sizes or more; None of fewer, and if the loss does not fall."""
    from scipy import stats  # takes a second to load

    C_R, L_R = np.array(points, dtype=float).reshape(-1, 2).T
    sizes, size_R = np.unique(C_R, return_inverse=True)
    n, k, floor = len(L_R), len(sizes), len(L_R) > 3
    if k < 3:
        return None
    unit, parameters, level = 10.0 ** round(float(np.log10(C_R).mean())), 2 + floor, floor * L_R.mean()
    x_GR = (C_R / unit) ** -ALPHAS[:, None]
    mean_G = floor * x_GR.mean(1)
    x_GR -= mean_G[:, None]
    squares_G = (x_GR**2).sum(1)
    A_G = x_GR @ (L_R - level) / squares_G
    E_G = level - A_G * mean_G
    excess_G = ((L_R - level - A_G[:, None] * x_GR) ** 2).sum(1)
    best = excess_G.argmin()
    if A_G[best] <= 0:
        return None

    # The deviations within sizes are chance. If those of the sizes are larger, seeds do not average them out, and each
    # size counts as one observation.
    chance = sum(((L_R[size_R == i] - L_R[size_R == i].mean()) ** 2).sum() for i in range(k))
    strays, spare, p = max(excess_G[best] - chance, 0.0), k - parameters, None
    if spare and chance > 0:
        p = float(stats.f.sf(strays / spare / (chance / (n - k)), spare, n - k))
    alone = p is not None and p < LEVEL
    deviation, freedom = (strays, spare) if alone else (excess_G[best], n - parameters)
    slack_G = excess_G[best] + deviation / freedom * stats.f.isf(LEVEL, 1, freedom) - excess_G
    inside_G = slack_G >= 0

    def estimate(value_G: np.ndarray, variance_G: np.ndarray | float = 0.0) -> Estimate:
        """`variance_G` is the estimate's at a known alpha, as a share of one run's."""
        margin_G = np.sqrt(np.maximum(slack_G, 0) * variance_G)
        low, high = (value_G - margin_G)[inside_G].min(), (value_G + margin_G)[inside_G].max()
        return Estimate(float(value_G[best]), float(low), float(high))

    def at(flops: float, runs: float = math.inf) -> Estimate:
        x_G = (flops / unit) ** -ALPHAS
        return estimate(E_G + A_G * x_G, floor / n + (x_G - mean_G) ** 2 / squares_G + 1 / runs)

    flat, steep = bool(inside_G[0]), bool(inside_G[-1])  # the interval reaches an end of ALPHAS
    E = estimate(E_G, 1 / n + mean_G**2 / squares_G)._replace(below=flat) if floor else None
    A = estimate(A_G, 1 / squares_G)._replace(above=flat)
    return Law(unit, k, n, p, E, A, estimate(ALPHAS)._replace(below=flat, above=steep), at)


def held_out(points: Sequence[Point]) -> tuple[Point, Estimate] | None:
    """The largest size, its FLOPs and mean loss, and what the others, at least three, predict of that."""
    largest = max(flops for flops, _ in points)
    law, ends = fit([p for p in points if p[0] < largest]), [loss for flops, loss in points if flops == largest]
    return law and ((largest, float(np.mean(ends))), law.at(largest, len(ends)))


def told(points: Sequence[Point], unit: str) -> list[str]:
    """What runs of three sizes or more say of the law, in words; `unit` is the losses'."""
    law, farther = fit(points), 4 * max(flops for flops, _ in points)
    if law is None:
        return ["The loss does not fall with the FLOPs: there is no law."]
    if law.E is None:
        tested = "Three runs determine no floor E; if there is one, larger models end above this line. Add seeds"
    elif law.lack_of_fit is None:
        tested = f"Whether it has this form was not tested; for that add {'sizes' if law.sizes == 3 else 'seeds'}"
    else:
        more = "more than seeds explain, so each size counts once in the intervals"
        tested = f"The sizes stray from it {more if law.lack_of_fit < LEVEL else 'no more than seeds explain'}"
        tested += f" (p = {law.lack_of_fit:.2g})"
    floor, E = ("", "") if law.E is None else ("E + ", f"E {law.E}, ")
    lines = [
        f"The loss in {unit} is {floor}A (C / {law.unit:.0e})^-alpha, C the model's FLOPs, by {law.runs} runs of "
        f"{law.sizes} sizes: {E}A {law.A}, alpha {law.alpha}; {100 * (1 - LEVEL):g} % intervals, if it has this form. "
        f"{tested}.",
        f"One run of four times the largest's FLOPs, {farther:.3g}, would end at {law.at(farther, 1)}.",
    ]
    if known := held_out(points):
        (flops, loss), by_others = known
        met = "inside" if by_others.low <= loss <= by_others.high else "OUTSIDE"
        lines.append(f"Held out, the largest, {flops:.3g} FLOPs, is predicted at {by_others}; it is {loss:.4g}, {met}.")
    return lines
