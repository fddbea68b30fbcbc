"""The law of loss against FLOPs: data of a known law, whose numbers lie in the intervals as often as they say."""

import math

import numpy as np
import pytest

from reports import plots
from reports.scaling_law import fit, held_out, told

FLOPS = 1e12 * np.array([1.0, 4.0, 12.0, 30.0, 62.0])
E, A, ALPHA, NOISE = 1.2, 0.5, 0.3, 0.01


def law(flops: np.ndarray, floor: float = E) -> np.ndarray:
    return floor + A * (flops / 1e13) ** -ALPHA


def runs(sizes: int, seeds: int, rng: np.random.Generator | None = None, floor: float = E) -> list[tuple[float, float]]:
    C = np.repeat(FLOPS[:sizes], seeds)
    return list(zip(C, law(C, floor) + (0 if rng is None else NOISE * rng.normal(size=len(C))), strict=True))


def test_numbers_without_noise_come_back():
    found = fit(runs(5, 1))
    assert (found.E.value, found.A.value, found.alpha.value) == pytest.approx((E, A, ALPHA), rel=0.01)
    assert found.unit == 1e13 and (found.sizes, found.runs) == (5, 5)
    assert found.at(1e15).value == pytest.approx(law(1e15), rel=1e-3)
    (flops, loss), predicted = held_out(runs(5, 2))
    assert (flops, loss) == (FLOPS[-1], pytest.approx(law(FLOPS[-1])))
    assert predicted.value == pytest.approx(loss, rel=1e-3)


def test_three_runs_take_the_floor_for_zero():
    found = fit(runs(3, 1, floor=0.0))
    assert found.E is None and (found.A.value, found.alpha.value) == pytest.approx((A, ALPHA), rel=0.01)
    assert "no floor E" in told(runs(3, 1), "nats")[0] and held_out(runs(3, 1)) is None


@pytest.mark.parametrize("sizes, seeds, floor", [(5, 3, E), (3, 3, E), (5, 1, E), (4, 2, 0.0), (3, 1, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(sizes, seeds, floor):
    """A new run of four times the FLOPs, and the held-out mean, are drawn as the others are."""
    rng, larger, draws = np.random.default_rng(0), 4 * FLOPS[-1], 300
    hits = {"E": 0, "A": 0, "alpha": 0, "between": 0, "beyond": 0, "run": 0}
    for _ in range(draws):
        found = fit(runs(sizes, seeds, rng, floor))
        truth = {"E": (floor, found.E), "A": (A, found.A), "alpha": (ALPHA, found.alpha)}
        truth["between"] = law(FLOPS[1], floor), found.at(FLOPS[1])
        truth["beyond"] = law(larger, floor), found.at(larger)
        truth["run"] = law(larger, floor) + NOISE * rng.normal(), found.at(larger, 1)
        for name, (true, interval) in truth.items():
            hits[name] += interval is None or interval.low <= true <= interval.high
    assert min(hits.values()) >= 0.92 * draws, hits
    assert max(hits.values()) < draws or sizes * seeds < 6, hits  # nor are they so wide that they say nothing


def test_the_interval_of_a_mean_shrinks_with_its_runs_to_the_laws():
    found = fit(runs(5, 3, np.random.default_rng(1)))
    widths = [found.at(1e14, n).high - found.at(1e14, n).low for n in (1, 4, math.inf)]
    assert widths == sorted(widths, reverse=True) and widths[0] > 3 * NOISE


def test_a_law_that_breaks_is_seen():
    """The two largest sizes stay where the third ended."""
    broken = [(flops, loss if flops < 20e12 else loss + 0.15) for flops, loss in runs(5, 3, np.random.default_rng(2))]
    whole, found = fit(runs(5, 3, np.random.default_rng(2))), fit(broken)
    assert found.lack_of_fit < 1e-3 < 0.05 < whole.lack_of_fit
    width = lambda law: law.at(2e14).high - law.at(2e14).low
    assert width(found) > 3 * width(whole)
    said = " ".join(told(broken, "nats"))
    assert "stray from it more than seeds explain, so each size counts once" in said
    only_last = [(flops, loss + 0.2 * (flops == FLOPS[-1])) for flops, loss in runs(5, 3, np.random.default_rng(2))]
    assert ", OUTSIDE." in told(only_last, "nats")[-1] and ", inside." in told(runs(5, 3), "nats")[-1]


def test_what_is_not_known_is_said():
    assert fit(runs(2, 3)) is None
    assert told([(c, loss) for c, (_, loss) in zip(FLOPS[::-1], runs(5, 1), strict=True)], "nats") == [
        "The loss does not fall with the FLOPs: there is no law."
    ]
    assert "add sizes" in told(runs(3, 2, np.random.default_rng(3)), "nats")[0]
    assert "add seeds" in told(runs(5, 1, np.random.default_rng(3)), "nats")[0]
    noisy = told([(c, 2 - 0.001 * i + 0.01 * (-1) ** i) for i, c in enumerate(FLOPS)], "nats")[0]
    assert "alpha" in noisy and "not determined" in noisy


def test_the_plot_shows_the_runs_and_what_was_predicted(tmp_path):
    points = runs(4, 2, np.random.default_rng(4))
    drawn = []
    for known in held_out(points), None:
        plots.plot_law(points, fit(points), known, tmp_path / "law.png", "val_loss")
        drawn.append((tmp_path / "law.png").read_bytes())
    assert drawn[0].startswith(b"\x89PNG") and drawn[0] != drawn[1]
