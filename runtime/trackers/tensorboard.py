"""Event files for TensorBoard, written by tensorboardX: neither TensorFlow nor TensorBoard is needed here."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class TensorboardTracker:
    """A new event file in `tensorboard/`: a curve for each number, the samples and the config as texts.

    TensorBoard drops what earlier files have after `step`.
    """

    def __init__(
        self, name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int
    ) -> None:
        del name, warn
        from tensorboardX import SummaryWriter

        directory = workdir / "tensorboard"
        self.where = f"tensorboard --logdir={directory}"
        self._writer = SummaryWriter(str(directory), purge_step=step + 1, flush_secs=30)
        self._writer.add_text("config", verbatim(json.dumps(config, indent=1)), step)

    def log(self, row: dict[str, Any], step: int) -> None:
        for key, value in row.items():
            if value is not None and key != "step":
                self._writer.add_scalar(key, value, step)

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        step, text = read()[-1]
        self._writer.add_text("sample", verbatim(text), step)

    def finish(self) -> None:
        self._writer.close()


def verbatim(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
