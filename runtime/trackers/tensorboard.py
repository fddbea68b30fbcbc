"""Event files for TensorBoard, written by tensorboardX: neither TensorFlow nor TensorBoard is needed here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.trackers.service import Service, Tracker


class TensorboardTracker(Service):
    """Hands everything to a SummaryWriter: a curve for each number, the samples and the config as texts."""

    def log(self, row: dict[str, Any], step: int) -> None:
        numbers = {key: value for key, value in row.items() if value is not None and key != "step"}
        self.attempt(lambda writer: [writer.add_scalar(key, value, step) for key, value in numbers.items()])

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        step, text = read()[-1]
        self.attempt(lambda writer: writer.add_text("sample", verbatim(text), step))

    def finish(self) -> None:
        self.attempt(lambda writer: writer.close())


def verbatim(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return "".join(f"    {line}\n" for line in text.split("\n"))


def start_tensorboard(
    name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int
) -> Tracker:
    """A new event file in `tensorboard/`; TensorBoard drops what earlier ones have after `step`."""
    del name
    from tensorboardX import SummaryWriter

    where = workdir / "tensorboard"
    writer = SummaryWriter(str(where), purge_step=step + 1, flush_secs=30)
    writer.add_text("config", verbatim(json.dumps(config, indent=1)), step)
    return TensorboardTracker("tensorboard", writer, f"tensorboard --logdir={where}", warn)
