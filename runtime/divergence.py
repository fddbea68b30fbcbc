"""What a step's numbers say about the run: bad gradients and loss spikes are warned of, too many of them end it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import DivergedError


class Divergence:
    """Looks at the metrics of a step and remembers what it has warned of.

    Args:
      parameters: names of the arrays that are trained.
      before: the metrics of the last step before this session.
      warn: takes one line.
    """

    def __init__(
        self,
        max_bad_steps: int,
        skip_spikes: bool,
        parameters: Sequence[str],
        before: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._max_bad_steps, self._skip_spikes, self._warn = max_bad_steps, skip_spikes, warn
        self._places = [*(f"the gradient of {name}" for name in sorted(parameters)), "the loss"]
        self._seen = {name: int(before[name]) for name in ("bad_batches", "loss_spikes")}

    def check(self, step: int, lr: float, metrics: dict[str, Any]) -> None:
        """Takes `bad_leaf` out of the metrics, which is no number to log.

        Raises:
          DivergedError: `max_bad_steps` real steps in a row had no finite gradient.
        """
        place = self._places[metrics.pop("bad_leaf")]
        new = {name: metrics[name] - seen for name, seen in self._seen.items()}
        self._seen = {name: metrics[name] for name in self._seen}
        if metrics["bad_steps"] >= self._max_bad_steps:
            raise DivergedError(
                f"config.lr: no finite gradient in {metrics['bad_steps']} steps in a row, up to step {step} "
                f"(lr {lr:.3g}; in the last of them {place} was not finite); lower lr and muon_lr, or clip harder; "
                "the last checkpoint is good"
            )
        if count := new["bad_batches"]:
            what = "batch" if count == 1 else "batches"
            self._warn(f"step {step}: {count} new {what} dropped, in the last {place} was not finite")
        if count := new["loss_spikes"]:
            what = "spike" if count == 1 else "spikes"
            done = "not applied" if self._skip_spikes else "applied; config.skip_spikes=True leaves such steps out"
            self._warn(f"step {step}: {count} new loss {what}, {done}")
