"""How much attention heads give to their sinks over a run: measured at each evaluation, kept in `sinks.jsonl`."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from input_pipeline import Split
from runtime.metrics import MetricsFile
from transformer.model import Transformer, TransformerConfig
from transformer.sinks import sink_shares

TOKENS = 1024  # of the validation split, from its start: always the same ones


def stretch(split: Split, context_len: int) -> np.ndarray:
    """The text that is measured on, in whole windows of at most TOKENS tokens in all: int32 [B, T]."""
    T = min(context_len, TOKENS, split.num_tokens)
    B = min(TOKENS, split.num_tokens) // T
    return np.asarray(split.tokens[: B * T], np.int32).reshape(B, T)


def read_shares(path: Path, model_config: TransformerConfig) -> tuple[list[int], np.ndarray]:
    """The steps and shares [E, L, N] of `sinks.jsonl`; rows that are not this model's are left out."""
    shape = (model_config.num_blocks, model_config.num_heads)
    steps, shares = [], []
    for row in MetricsFile(path).read():
        try:
            shares_LN = np.array(row["shares"], np.float64)
            step = int(row["step"])
        except (KeyError, TypeError, ValueError):
            continue
        if shares_LN.shape == shape and np.isfinite(shares_LN).all():
            steps.append(step)
            shares.append(shares_LN)
    return steps, np.array(shares).reshape(-1, *shape)


class SinkLog:
    """The file of a run that holds the shares, an object a line: `step`, `tokens`, and `shares` by layer and head.

    Args:
      split: of validation.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self._file, self._split = MetricsFile(path), split

    def append(self, model: Transformer, row: dict[str, Any]) -> None:
        """Measure `model`, which lies on one device, at the step and the tokens that `row` of the metrics tells.

        Raises:
          StorageError: the disk did not take it.
        """
        shares_LN = np.asarray(sink_shares(model, jnp.asarray(stretch(self._split, model.config.context_len))))
        shares = [[round(float(share), 7) for share in layer] for layer in shares_LN]
        self._file.append({"step": row["step"], "tokens": row["tokens"], "shares": shares})
