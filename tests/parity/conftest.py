"""How parity is measured, and the table of it that every run of these tests ends with."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SCRATCH

Rows = dict[tuple[str, str], tuple[float, float]]  # implementation, what was compared -> largest difference, limit

WITHOUT_TORCH = ("test_determinism.py",)  # all other files here compare with PyTorch, or with models that run on it


class NotComparable(pytest.Module):
    """A file of tests that compare with PyTorch, on a machine without it."""

    def collect(self) -> Any:
        pytest.skip("compares with PyTorch, which is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leaves a file to pytest (None), or stands in for it."""
    if module_path.name in WITHOUT_TORCH or find_spec("torch"):
        return None
    return NotComparable.from_parent(parent, path=module_path)


def difference(ours: Any, theirs: Any) -> float:
    """Relative L2: |ours - theirs| / |theirs|, over all entries, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} is not {theirs.shape}"
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.fixture
def agree(request: pytest.FixtureRequest) -> Callable[..., None]:
    """(implementation, what, ours, theirs, limit): relative L2 of each tensor is at most `limit`; noted for the table.

    `ours` and `theirs` are arrays, or dicts of arrays with the same names.
    """

    def check(implementation: str, what: str, ours: Any, theirs: Any, limit: float) -> None:
        if not isinstance(theirs, Mapping):
            ours, theirs = {what: ours}, {what: theirs}
        assert theirs and ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        found = {name: difference(ours[name], theirs[name]) for name in theirs}
        assert all(value <= limit for value in found.values()), {n: v for n, v in found.items() if not v <= limit}
        row = [implementation, what, max(found.values()), float(limit)]  # plain numbers: they may cross processes
        request.node.user_properties.append(("parity", row))

    return check


@pytest.fixture
def encoded_texts_lie_in_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An imported run looks for its data where the program lies."""
    monkeypatch.setattr("runtime.files.PROGRAM", SCRATCH)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small products in torch gain nothing from more, and on a busy machine its threads wait for each other."""
    import torch  # here, so that the other tests run without it

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def muon_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.optim.Muon but its Newton-Schulz iteration, which rounds to bfloat16."""

    def newton_schulz(grad: Any, coefficients: tuple[float, float, float], steps: int, eps: float) -> Any:
        a, b, c = coefficients
        tall = grad.shape[0] > grad.shape[1]
        x_MN = grad.mT if tall else grad
        x_MN = x_MN / x_MN.norm().clamp(min=eps)
        for _ in range(steps):
            gram_MM = x_MN @ x_MN.mT
            x_MN = a * x_MN + b * gram_MM @ x_MN + c * gram_MM @ gram_MM @ x_MN
        return x_MN.mT if tall else x_MN

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """From the reports, which also come from the processes of pytest-xdist."""
    rows: Rows = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for key, value in getattr(report, "user_properties", []) if getattr(report, "when", "") == "call" else []:
            if key == "parity":
                implementation, what, found, limit = value
                largest, loosest = rows.get((implementation, what), (0.0, 0.0))
                rows[implementation, what] = max(largest, found), max(loosest, limit)
    by_implementation: dict[str, list[str]] = {}
    for (implementation, what), (largest, limit) in sorted(rows.items()):
        by_implementation.setdefault(implementation, []).append(f"{what} {largest:.1e} ({limit:.0e})")
    if by_implementation:
        terminalreporter.section("parity")
        terminalreporter.write_line("| against | largest relative difference (allowed) |")
        terminalreporter.write_line("|---|---|")
    for implementation, cells in by_implementation.items():
        terminalreporter.write_line(f"| {implementation} | {'; '.join(cells)} |")
