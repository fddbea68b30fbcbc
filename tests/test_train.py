"""Whole runs of a small model: what they leave, that they are exact, and that a cut changes nothing."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import input_pipeline
import main
import train_lib
from helpers import (
    ROOT,
    arguments,
    assert_one_line,
    assert_same_bits,
    losses,
    make_text,
    rows,
    run_main,
    saved_state,
    signal_before,
    tiny_config,
)
from runtime.checkpoint import Checkpoints
from runtime.errors import DivergedError, Interrupted, NoCheckpointError, UserError
from transformer.model import loss_sum


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(folder):
    """An uninterrupted run of 30 steps. Nobody changes its directory."""
    return train_lib.train(tiny_config(folder), folder / "finished")


@pytest.fixture(scope="module")
def accumulated(folder):
    """An uninterrupted run with three micro-batches a step and dropout."""
    return train_lib.train(tiny_config(folder, **ACCUMULATED), folder / "accumulated")


ACCUMULATED = {"accumulation_steps": 3, "dropout": 0.2, "max_steps": 20}
