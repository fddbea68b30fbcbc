"""Times of steps, and the time left, by a clock that the tests move."""

import time

import pytest
from helpers import tiny_config

from training.clock import Clock, SideWork
from training.clock import side_work as work_besides


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The time, to be moved."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the wall clock may jump"))
    return moment


def test_the_clock_leaves_compilation_and_pauses_out_of_laps_and_keeps_them_in_elapsed(now):
    clock = Clock(elapsed=50)
    assert clock.lap(0) is None
    now[0] += 30
    clock.start_laps(3)
    assert clock.lap(3) is None
    now[0] += 6
    with clock.pause():
        now[0] += 10
    now[0] += 2
    assert clock.lap(7) == 2
    assert clock.lap(7) is None
    now[0] += 9
    assert clock.lap(10) == 3
    assert clock.elapsed == 50 + 30 + 6 + 10 + 2 + 9


def test_work_ahead_is_counted():
    assert SideWork(10, 2, 7).ahead(0, 100) == (10, 9 * 2 + 7)
    assert SideWork(10, 2, 7).ahead(10, 100) == (9, 8 * 2 + 7)  # that of step 10 itself is done, or nearly
    assert SideWork(10, 2, 7).ahead(95, 99) == (1, 7)
    assert SideWork(0, 2, 7).ahead(95, 99) == (1, 7)
    assert SideWork(10).ahead(99, 99) == (0, 0)


def times_left(now, config, val_tokens, step, compiling, costs) -> list[tuple[int, float, float]]:
    """(step, seconds that were said to be left, seconds that were) of a run at each row, in the trainer's order.

    Args:
      compiling: what the first step and the first evaluation, sample and save take on top.
      costs: seconds of an evaluation of the whole split, of a sample, of a save.
    """
    total, k, beside, clock, said = (
        config.max_steps,
        config.accumulation_steps,
        work_besides(
            config.batch_size * config.context_len * config.accumulation_steps,
            *(val_tokens, config.eval_tokens),
            **{key: config[key] for key in ("eval_every", "sample_every", "save_every")},
        ),
        Clock(),
        [],
    )
    extra = dict(zip(beside, compiling[1:], strict=True))
    for i in range(1, total + 1):
        now[0] += step * k * (0.9 + 0.2 * (i % 2)) + (compiling[0] if i == 1 else 0)
        if i == 1:
            clock.start_laps(k)
        due = lambda every, i=i: i == total or (every > 0 and i % every == 0)
        row = (i, clock.left(i, total, k, beside)) if due(config.log_every) and clock.lap(i * k) is not None else None
        for (name, work), cost in zip(beside.items(), costs, strict=True):
            if due(work.every):
                with clock.pause(name):
                    size = work.last_size if i == total else work.size
                    now[0] += cost * size / work.last_size + extra.pop(name, 0)
        if row:
            said.append((*row, now[0]))
    return [(i, left, now[0] - at) for i, left, at in said]


CPU = (5, 0.6, 3.5, 2)  # what a small model's first step, evaluation, sample and save took on top, on two cores
WARM = (0.9, 0.2, 0.4, 0.2)  # the same from the cache of compiled programs


@pytest.mark.parametrize(
    "changes, val_tokens, step, compiling, costs",
    [
        ({"max_steps": 2600, "eval_every": 650}, 111_539, 0.044, CPU, (1.4, 0.11, 0.1)),  # configs/shakespeare.py
        ({"max_steps": 145, "eval_every": 650}, 111_539, 0.045, CPU, (1.4, 0.11, 0.1)),  # configs/shakespeare_fast.py
        ({"max_steps": 145, "eval_every": 650}, 111_539, 0.045, WARM, (1.4, 0.11, 0.1)),
        # Evaluations that take longer than the steps between them, and saves of half a minute.
        ({"max_steps": 1000, "eval_every": 50}, 4_000_000, 0.9, (90, 20, 40, 5), (1300, 30, 30)),
        # A prefix of the split in training, all of it at the end; a sample now and then.
        (
            *({"max_steps": 400, "eval_every": 40, "sample_every": 20, "eval_tokens": 20_000, "log_every": 5}, 111_539),
            *(0.05, CPU, (1.5, 1.5, 0.1)),
        ),
        ({"max_steps": 300, "eval_every": 30, "accumulation_steps": 3}, 111_539, 0.3, CPU, (9, 0.11, 4)),
    ],
)
def test_the_time_left_is_right_within_a_fifth_after_a_tenth(now, changes, val_tokens, step, compiling, costs):
    usual = {"log_every": 10, "sample_every": 0, "save_every": 0, "context_len": 64, "batch_size": 16}
    config = tiny_config(**(usual | changes))
    late = [
        row for row in times_left(now, config, val_tokens, step, compiling, costs) if row[0] >= config.max_steps / 10
    ]
    assert len(late) > 10 and late[-1][1:] == (0, 0)
    for i, left, real in late:
        assert left == pytest.approx(real, rel=0.2), (i, left, real)
