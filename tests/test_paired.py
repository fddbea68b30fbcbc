"""Pairs of seeds: both tests against numbers by hand, other formulas and simulations, and what `compare` says."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from test_compare import cells, compared, fabricate

from reports.paired import EFFECT, POWER, always_valid_p, evidence, losses_at, paired_t


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_a_paired_t_test_worked_out_by_hand():
    """Mean 0.25, deviations -0.15, 0.05, -0.05, 0.15: variance 0.05 / 3, so an error of sqrt(0.05 / 12) = 0.06455.

    t = 3.873; the table of three degrees of freedom has 3.182 at 5 %.
    """
    d = paired_t([0.1, 0.3, 0.2, 0.4])
    assert (d.pairs, d.mean) == (4, pytest.approx(0.25))
    assert d.margin == pytest.approx(3.18245 * 0.0645497, rel=1e-5)
    assert d.p == pytest.approx(stats.ttest_rel([1.1, 2.3, 3.2, 4.4], [1.0, 2.0, 3.0, 4.0]).pvalue)
    assert d.p == pytest.approx(0.0305, abs=5e-5)
    assert paired_t([0.0, 0.0])[1:] == (0, 0, 1, 0) and paired_t([0.5, 0.5]).p == 0


@pytest.mark.parametrize("pairs, level", [(2, 0.05), (5, 0.05), (12, 0.01)])
def test_the_detectable_difference_is_found_as_often_as_it_says(pairs, level):
    x = normal(0, pairs)
    d = paired_t(x / x.std(ddof=1), level)
    drawn = normal(1, 20_000, pairs) + d.detectable
    found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < level
    assert found.mean() == pytest.approx(POWER, abs=0.01)


@pytest.mark.parametrize("x", [[0.3], [0.5, -0.1, 0.2, 0.35], [0.01, 0.03, 0.02]])
def test_evidence_is_the_mixture_of_t_densities(x):
    """The t statistic has all that a sample says whatever its scale: noncentral t over t, averaged over the effects."""
    for n in range(1, len(x) + 1):
        if n == 1:
            assert evidence(x)[0] == pytest.approx(1)
            continue
        t = stats.ttest_1samp(x[:n], 0).statistic
        ratio = lambda e, t=t, n=n: stats.norm.pdf(e, scale=EFFECT) * stats.nct.pdf(t, n - 1, e * math.sqrt(n))
        mixed, _ = integrate.quad(ratio, -10 * EFFECT, 10 * EFFECT)
        assert evidence(x)[n - 1] == pytest.approx(mixed / stats.t.pdf(t, n - 1), rel=1e-5)


def test_no_more_than_one_in_a_hundred_null_sweeps_stops_and_real_differences_are_found():
    """A plain p below 0.01, looked at after each pair, would be wrong too often."""
    null = normal(2, 10_000, 12)
    stopped = (evidence(null) >= 100).any(axis=1)
    plain = [stats.ttest_1samp(null[:, :n], 0, axis=1).pvalue < 0.01 for n in range(2, 13)]
    assert 0 < stopped.mean() <= 0.01 < np.any(plain, axis=0).mean()
    assert (evidence(normal(3, 1_000, 400)) >= 100).any(axis=1).mean() <= 0.015  # as well if many more follow
    real = evidence(null + 2) >= 100
    assert real.any(axis=1).mean() > 0.9 and (np.argmax(real, axis=1) + 1)[real.any(axis=1)].mean() < 9
    np.testing.assert_allclose(evidence(1e6 * null[:5]), evidence(null[:5]))


def test_always_valid_p_remembers_the_highest_evidence():
    x = [1.0, 1.1, 0.9, 1.05, 1.0]
    assert always_valid_p([]) == always_valid_p([0.0, 0.0]) == always_valid_p([3.0]) == 1
    assert always_valid_p([*x, -40.0]) == always_valid_p(x) == 1 / evidence(x)[-1] < 0.02


def test_losses_are_read_between_evaluations_where_all_runs_have_some():
    row = lambda x, loss: {"x": x, "val_loss": loss}
    a, b = [row(1, 4.0), row(3, 3.0), {"x": 4}, row(5, 1.0)], [row(2, 2.0), row(4, 1.5)]
    assert losses_at([a, b], "x", "val_loss") == (4, [2.0, 1.5])
    assert losses_at([a, [row(6, 1.0)]], "x", "val_loss") is None
    assert losses_at([a, []], "x", "val_loss") is None and losses_at([a, [row(None, 1.0)]], "x", "val_loss") is None


# --- In compare ---------------------------------------------------------------------------------------------------


def arms(folder, changes, losses):
    """Runs of some seeds each: (final losses by seed); the slower ones take their rows' times as they are."""
    return [
        fabricate(folder / f"{name}-seed{seed}", {20: 3.0, 40: loss}, seed=seed, **changes[name])
        for name, ends in losses.items()
        for seed, loss in ends.items()
    ]


def test_compare_pairs_by_seed_and_says_what_may_be_concluded(tmp_path, capsys):
    """The differences are those by hand above, of seeds in another order, and one seed more without a partner."""
    ends = {"a": {3: 2.0, 0: 1.0, 1: 1.5, 2: 1.25, 9: 7.0}, "b": {0: 1.1, 1: 1.8, 2: 1.45, 3: 2.4}}
    changes = {"a": {}, "b": {"lr": 0.5}}
    text = compared(capsys, *arms(tmp_path, changes, ends), f"--out={tmp_path / 'out'}")
    rows = cells(text, "Differences by seed")
    assert rows == [
        ["b - a", where, "4", "+0.2500", "+0.0446 to +0.4554", "0.03", rows[0][-1]]
        for where in ("4.0k tokens", "20.0 s")
    ]
    assert "b against a: the loss is higher at equal tokens, time, by more than chance explains" in text
    assert "They differ in" not in text and "Differences by seed" in (tmp_path / "out" / "compare.html").read_text()


def test_compare_says_what_must_not_be_concluded(tmp_path, capsys):
    ends = {"a": {0: 1.0, 1: 1.5}, "b": {0: 1.1, 1: 1.4}, "c": {0: 2.0}}
    changes = {"a": {}, "b": {"lr": 0.5, "mlp_dim": 16}, "c": {"lr": 0.7}}
    paths = arms(tmp_path, changes, ends)
    for path in paths:  # what a token takes is noted by newer runs
        file = path / "config.json"
        file.write_text(file.read_text().replace('"device_kind"', '"flops_per_token": 10.0, "device_kind"'))
    file.write_text(file.read_text().replace('"cpu"', '"H100"'))
    text = compared(capsys, *paths, f"--out={tmp_path / 'out'}")
    assert [row[1] for row in cells(text, "Differences by seed")] == ["4.0k tokens", "20.0 s", "4e+04 FLOPs"]
    assert "b against a: nothing can be concluded at equal tokens, time, FLOPs, not that they are equal" in text
    assert "They differ in mlp_dim, lr" in text or "They differ in lr, mlp_dim" in text
    assert "c-seed0 against a: 1 pair of the same seed, so nothing tells chance" in text
    assert "judged at 0.025" in text and "97.5 % interval" in text
    early = (
        fabricate(tmp_path / "b-seed2", {20: 0.1}, seed=2, lr=0.5, mlp_dim=16),
        fabricate(tmp_path / "a-seed2", {40: 1}, seed=2),
    )
    text = compared(capsys, *paths, *early, f"--out={tmp_path / 'out'}")
    assert "Not among the pairs, as they ended early: b-seed2." in text
    assert [row[2] for row in cells(text, "Differences by seed")] == ["2"] * 3
    other = fabricate(tmp_path / "d-seed1", {40: 1.0}, seed=1, lr=0.7)
    text = compared(capsys, *paths, other, f"--out={tmp_path / 'out'}")
    assert "Their device_kind differ too" in text
