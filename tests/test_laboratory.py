"""The laboratory: its arms are configs, its rows are what their commands give, its tables are right."""

import json
import math

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

    def write(cell, losses):
        lines = [{"arm": arm, "seed": seed, "val_loss": x} for arm, xs in losses.items() for seed, x in enumerate(xs)]
        (laboratory.ROWS / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write


def test_every_arm_is_a_config_that_differs_in_its_own_keys():
    for cell in laboratory.cells().values():
        configs = {}
        for arm in cell.arms:
            _, *words = laboratory.command_of(cell, arm, 3)
            config = parse_flags("train", "", words, lambda values: None, config=True).config
            config_lib.check(config)
            configs[arm] = config_lib.to_dict(config)
        first = next(iter(cell.arms))
        for arm, config in configs.items():
            differing = {key for key, value in config.items() if value != configs[first][key]} - {"save_every"}
            assert differing <= cell.arms[arm].keys() | cell.arms[first].keys(), arm


def test_kept_rows_are_those_of_the_commands_of_today():
    cells = laboratory.cells()
    for name, cell in cells.items():
        for row in laboratory.rows_of(name):
            words = ["main.py", *laboratory.command_of(cell, row["arm"], row["seed"])]
            assert row["command"] == " ".join(words), (name, row["arm"])


def test_differences_are_by_seed_and_at_equal_time_the_control_trains_longer(rows):
    first = laboratory.FIRST
    losses = {first: [1.5, 1.6, 1.7], "longer": [1.4, 1.52, 1.61], "sink: zero": [1.47, 1.585, 1.66]}
    rows("main", losses)
    (laboratory.ROWS / "cost.json").write_text(json.dumps({"ratios": {"main": {"sink: zero": 1.05}}}))
    expected = stats.ttest_rel(losses["sink: zero"], losses[first])
    *_, line, _ = laboratory.losses_table("main")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "sink: zero" and cells[2].startswith("-0.0283 ±") and cells[3] == f"{expected.pvalue:.2g}"
    share = math.log(1.05) / math.log(1.1)
    by_hand = [-0.03 + share * 0.1, -0.015 + share * 0.08, -0.04 + share * 0.09]
    found = laboratory.at_equal_time(dict(enumerate(losses["sink: zero"])), 1.05, dict(enumerate(losses[first])))
    assert found == pytest.approx(by_hand)
    assert cells[6].startswith(f"{sum(by_hand) / 3:+.4f}")


def test_optimizers_train_at_their_best_rate_for_equal_time(rows):
    assert "optimizers" not in laboratory.cells()
    rates = laboratory.cells()["rates"].arms
    rows("rates", {arm: [float("0.03" not in arm) + ("Muon by head" in arm)] for arm in rates})
    (laboratory.ROWS / "cost.json").write_text(
        json.dumps({"ratios": {"rates": dict.fromkeys(laboratory.OPTIMIZERS, 1.0) | {"NorMuon": 1.25}}})
    )
    arms = laboratory.cells()["optimizers"].arms
    assert arms["Muon"] == {"muon_lr": 0.03, "max_steps": 1000}
    assert arms["NorMuon"] == {"hidden_optimizer": "normuon", "muon_lr": 0.03, "max_steps": 800}


def test_rows_are_trained_once_and_anew_to_the_same_bits(rows, monkeypatch, capsys):
    text = SCRATCH / "laboratory.txt"
    text.write_text(make_text(300), encoding="utf-8")
    monkeypatch.setattr(laboratory, "ALL", laboratory.ALL | TINY | {"dataset": str(text)})
    arms = {"a": {"attention_sink": "none"}, "b": {"attention_gate": "head"}}
    monkeypatch.setattr(laboratory, "cells", lambda: {"small": laboratory.Cell("", {}, arms, [4])})
    laboratory.train(["small"])
    kept = laboratory.rows_of("small")
    assert [(row["arm"], row["seed"]) for row in kept] == [("a", 4), ("b", 4)]
    assert kept[0]["heads"]["sink_share"] == 0 and set(kept[0]["longer"]) == {"2", "4"}
    assert not list(laboratory.PLACE.iterdir())
    laboratory.again("small", "b", 4)
    assert "the same to the bit" in capsys.readouterr().out
    path = laboratory.ROWS / "small.jsonl"
    path.write_text(path.read_text().replace(str(kept[1]["val_loss"]), "4.5"))
    with pytest.raises(SystemExit, match="other val_loss, curve"):
        laboratory.again("small", "b", 4)
    monkeypatch.setattr(laboratory, "train_one", lambda *point: pytest.fail(f"trained again: {point}"))
    laboratory.train(["small"])


def test_the_page_has_the_tables_of_the_rows():
    page = laboratory.PAGE.read_text()
    assert laboratory.rebuilt(page) == page
