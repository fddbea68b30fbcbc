"""How much attention heads give to their sinks over a run: measured at each evaluation, kept in `sinks.jsonl`."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from input_pipeline import Split
from runtime.metrics import MetricsFile
from transformer.model import Transformer
from transformer.sinks import sink_shares

TOKENS = 1024  # of the validation split, from its start: always the same ones


def stretch(split: Split, context_len: int) -> np.ndarray:
    """The text that is measured on, in whole windows of at most TOKENS tokens in all: int32 [B, T]."""
    T = min(context_len, TOKENS, split.num_tokens)
    B = min(TOKENS, split.num_tokens) // T
    return np.asarray(split.tokens[: B * T], np.int32).reshape(B, T)


class SinkLog:
    """The file of a run that holds the shares, an object a line: `step`, `tokens`, and `shares` by layer and head.

    Args:
      split: of validation.
      on: without it, and for a model without sinks, nothing is measured.
    """

    def __init__(self, path: Path, split: Split, on: bool) -> None:
        self._file, self._split, self._on = MetricsFile(path), split, on

    def append(self, model: Transformer, row: dict[str, Any]) -> None:
        """Measure `model`, which lies on one device, at the step and the tokens that `row` of the metrics tells.

        Raises:
          StorageError: the disk did not take it.
        """
        if self._on and model.config.attention_sink:
            shares_LN = np.asarray(sink_shares(model, jnp.asarray(stretch(self._split, model.config.context_len))))
            shares = [[round(float(share), 7) for share in layer] for layer in shares_LN]
            self._file.append({"step": row["step"], "tokens": row["tokens"], "shares": shares})
