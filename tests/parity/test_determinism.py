"""The recipe of configs/shakespeare.py: twice the same bits, and the losses it had when they were written down here."""

import signal
from pathlib import Path

import pytest
from helpers import ROOT, rows, run_main

STEPS = 20

# Losses of the first steps, on an Intel Xeon with AVX-512. They are right to change when the recipe, the data's order,
# the initial weights or the mathematics of a step change on purpose, and then the failing test prints the new ones.
# fmt: off
GOLDEN = [
    4.17441, 3.71314, 3.04991, 3.29389, 2.95442, 3.20781, 2.82806, 2.77749, 2.77950, 2.80250,
    2.71506, 2.69682, 2.62909, 2.69164, 2.62269, 2.61505, 2.56903, 2.53738, 2.62663, 2.52263,
]
# fmt: on

# What other processors may do: with XLA held to SSE4.2, AVX and AVX2, and with 2, 4 and 8 devices, the losses moved by
# up to 2.5e-5 of themselves (rounding grows with the steps; the first ten stayed within 6e-6). Four times that.
TOLERANCE = 1e-4


def first_losses(workdir: Path) -> list[float]:
    config = f"--config={ROOT / 'configs' / 'shakespeare.py'}"
    how = "--config.cpu_devices=1", "--config.dtype=float32", "--config.log_every=1"
    arguments = config, *how, f"--workdir={workdir}"
    # Compiled as for a user: the other tests ask XLA for less.
    stopped = run_main(*arguments, cut=(signal.SIGTERM, STEPS), JAX_PLATFORMS="cpu", XLA_FLAGS="")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    return [row["loss"] for row in rows(workdir)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> list[float]:
    return first_losses(tmp_path_factory.mktemp("golden"))


def test_the_first_losses_are_the_golden_ones(losses):
    assert losses == pytest.approx(GOLDEN, rel=TOLERANCE), f"now: {[round(loss, 5) for loss in losses]}"


def test_the_same_command_twice_gives_the_same_bits(losses, tmp_path):
    assert first_losses(tmp_path) == losses
