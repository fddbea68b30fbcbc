"""The laboratory: its arms are configs, its rows are what their commands give, its tables are right."""

import json
import math
import shlex

import pytest
from helpers import SCRATCH, make_text
from scipy import stats

import config_lib
from benchmarks import laboratory
from commands.flags import parse_flags

TINY = {"num_blocks": 1, "num_heads": 2, "embedding_dim": 16, "mlp_dim": 24, "context_len": 8, "max_steps": 3}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A folder of rows in the place of the kept ones, and a function that writes some of a cell there."""
    monkeypatch.setattr(laboratory, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(laboratory, "PLACE", tmp_path / "runs")
    laboratory.ROWS.mkdir()

    def write(name, losses):
        cell, lines = laboratory.CELLS[name], []
        for arm, xs in losses.items():
            for seed, x in zip(cell.seeds, xs, strict=False):
                command = laboratory.command_of(cell, arm, seed)
                lines.append(json.dumps({"arm": arm, "seed": seed, "val_loss": x, "command": command}) + "\n")
        (laboratory.ROWS / f"{name}.jsonl").write_text("".join(lines))

    return write


def test_every_arm_is_a_config_that_differs_in_its_own_keys():
    for cell in laboratory.CELLS.values():
        configs = {}
        for arm in cell.arms:
            _, _, *words = shlex.split(laboratory.command_of(cell, arm, 3))
            config = parse_flags("train", "", words, lambda values: None, config=True).config
            config_lib.check(config)
            configs[arm] = config_lib.to_dict(config)
        first = next(iter(cell.arms))
        for arm, config in configs.items():
            differing = {key for key, value in config.items() if value != configs[first][key]} - {"save_every"}
            assert differing <= cell.arms[arm].keys() | cell.arms[first].keys(), arm


def test_kept_rows_are_each_there_once_and_of_the_commands_of_today():
    for name in laboratory.CELLS:
        path = laboratory.ROWS / f"{name}.jsonl"
        assert len(laboratory.rows_of(name)) == (len(path.read_text().splitlines()) if path.exists() else 0), name


def test_differences_are_by_seed_and_at_equal_time_the_control_trains_longer(rows, monkeypatch):
    first = laboratory.FIRST
    losses = {first: [1.5, 1.6, 1.7], laboratory.MORE_STEPS: [1.4, 1.52, 1.61]}
    losses |= {"sink: logit": [1.47, 1.585, 1.66], "gate by head": [1.52, 1.621, 1.7195]}
    rows("context", losses)
    ratio = {"median": 1.05, "low": 1.04, "high": 1.07}
    costs = {"context": dict.fromkeys(losses, ratio)}
    (laboratory.ROWS / "cost.json").write_text(json.dumps(costs))
    monkeypatch.setattr(laboratory, "SEEDS", range(3))
    lines = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in laboratory.losses_table("context")}
    found, other = lines["| sink: logit"], lines["| gate by head"]
    expected = stats.ttest_rel(losses["sink: logit"], losses[first])
    interval = expected.confidence_interval(1 - 0.05 / 2)
    assert found[2] == f"-0.0283 ± {(interval.high - interval.low) / 2:.4f}" and found[3] == f"{expected.pvalue:.2g}"
    assert found[4].startswith("not told apart") and other[4] == "higher"
    share = math.log(1.05) / math.log(1.1)
    by_hand = [-0.03 + share * 0.1, -0.015 + share * 0.08, -0.04 + share * 0.09]
    by_seed = [dict(enumerate(losses[arm])) for arm in ("sink: logit", first, laboratory.MORE_STEPS)]
    assert laboratory.at_equal_time(by_seed[0], 1.05, *by_seed[1:]) == pytest.approx(by_hand)
    assert found[5] == "1.050 (1.040 - 1.070)" and found[6].startswith(f"{sum(by_hand) / 3:+.4f}")


def test_optimizers_train_at_their_best_rate():
    losses = laboratory.by_arm("rates")
    for name, optimizer in laboratory.OPTIMIZERS.items():
        at = lambda value, name=name, rate=optimizer.rate: losses[f"{name}, {rate} {value:g}"][laboratory.TUNING]
        assert optimizer.best == min(optimizer.tried, key=at), name
        assert min(optimizer.tried) < optimizer.best < max(optimizer.tried), name


@pytest.mark.slow
def test_what_is_no_longer_timed_keeps_its_time_and_machine(rows, monkeypatch):
    old = {"machine": {"processor": "old"}, "steps": 2, "Gone": {"median": 1.5}, "float32": {"median": 3.0}}
    (laboratory.ROWS / "cost.json").write_text(json.dumps({"half": old, "other": {"steps": 9}}))
    text = SCRATCH / "laboratory_cost.txt"
    text.write_text(make_text(300), encoding="utf-8")
    monkeypatch.setattr(laboratory, "ALL", laboratory.ALL | TINY | {"dataset": str(text)})
    laboratory.cost(["half"], rounds=2, steps=1)
    costs = laboratory.read_costs()
    assert costs["other"] == {"steps": 9} and costs["half"]["steps"] == 1
    assert costs["half"]["Gone"] == {"machine": {"processor": "old"}, "median": 1.5}
    assert costs["half"]["float32"]["median"] == 1 and costs["half"]["machine"]["processor"] != "old"


def test_what_was_taken_out_is_compared_and_shown_with_the_others(rows):
    rows("rates", {arm: [1.0] for arm in laboratory.CELLS["rates"].arms})
    arms = laboratory.CELLS["optimizers"].arms
    rows("optimizers", {arm: [1.5, 1.6, 1.7, 1.8, 1.9] for arm in arms})
    gone = [("optimizers", "Gone", seed, x) for seed, x in enumerate([1.51, 1.62, 1.7, 1.83, 1.9])]
    gone += [("rates", f"Gone, lr {rate}", 5, x) for rate, x in (("0.1", 2.5), ("0.02", 2.25))]
    keys = "cell", "arm", "seed", "val_loss", "command"
    lines = [json.dumps(dict(zip(keys, (*row, "--config.max_steps=640"), strict=True))) + "\n" for row in gone]
    (laboratory.ROWS / "taken_out.jsonl").write_text("".join(lines))
    table = laboratory.losses_table("optimizers")
    expected = stats.ttest_rel([1.51, 1.62, 1.7, 1.83, 1.9], [1.5, 1.6, 1.7, 1.8, 1.9])
    assert f"| at p < {0.05 / len(arms):.2g} |" in table[0]  # it is one of the comparisons
    cells = table[-1].strip("| ").split(" | ")
    assert cells[0] == "Gone (taken out)" and cells[2].startswith("+0.0120") and cells[3] == f"{expected.pvalue:.2g}"
    assert cells[-1] == "640"
    assert laboratory.rates_table("rates")[-1] == "| Gone (taken out) | `lr` | **2.2500** at 0.02, 2.5000 at 0.1 |"


@pytest.mark.slow
def test_rows_are_trained_once_and_anew_to_the_same_bits(rows, monkeypatch, capsys):
    text = SCRATCH / "laboratory.txt"
    text.write_text(make_text(300), encoding="utf-8")
    monkeypatch.setattr(laboratory, "ALL", laboratory.ALL | TINY | {"dataset": str(text)})
    arms = {"a": {"attention_sink": "none"}, "b": {"attention_gate": "head"}}
    monkeypatch.setattr(laboratory, "CELLS", {"small": laboratory.Cell({}, arms, [4])})
    (laboratory.ROWS / "small.jsonl").write_text('{"arm": "a", "seed": 4, "command": "of an earlier day"}\n')
    laboratory.train(["small"])
    assert "earlier" not in (laboratory.ROWS / "small.jsonl").read_text()
    kept = sorted(laboratory.rows_of("small"), key=lambda row: row["arm"])  # they were trained at the same time
    assert [(row["arm"], row["seed"]) for row in kept] == [("a", 4), ("b", 4)]
    assert kept[0]["heads"]["sink_share"] == 0 and set(kept[0]["longer"]) == {"2", "4"}
    assert kept[1]["longer"]["2"][0] != kept[1]["longer"]["2"][1] and kept[0]["curve"][-1] == [3, kept[0]["val_loss"]]
    assert [path.name for path in laboratory.PLACE.iterdir()] == [".lock"]
    laboratory.again("small", "b", 4)
    assert "the same to the bit" in capsys.readouterr().out
    path = laboratory.ROWS / "small.jsonl"
    path.write_text(path.read_text().replace(str(kept[1]["val_loss"]), "4.5"))
    with pytest.raises(SystemExit, match="other val_loss"):
        laboratory.again("small", "b", 4)
    monkeypatch.setattr(laboratory, "train_one", lambda *point: pytest.fail(f"trained again: {point}"))
    laboratory.train(["small"])


def test_the_page_has_the_tables_of_the_rows():
    page = laboratory.PAGE.read_text()
    assert laboratory.rebuilt(page) == page
