"""Weights & Biases.

Its settings are its own variables (`WANDB_API_KEY`, `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE`, `WANDB_BASE_URL` and
so on), from the environment or a `.env` file in the current directory.
"""

import netrc
import os
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.errors import one_line
from runtime.files import read_text, write_text

ID_FILE = "wandb_id.txt"  # in the workdir
_PROBE_SECONDS = 3
_MOST_SAMPLES = 100  # in a table: W&B stores every table that a run logs
_DEFAULTS = {  # for variables that the environment does not set
    "WANDB_PROJECT": "transformer",
    "WANDB_SILENT": "true",  # the console is the run's own
    "WANDB_CONSOLE": "off",
    "WANDB_INIT_TIMEOUT": "5",  # seconds
    "WANDB_FINISH_TIMEOUT": "30",  # seconds; what is not uploaded by then stays in the workdir
    "WANDB_ERROR_REPORTING": "false",  # its reports on itself delay the exit by 20 s when the server hangs
    "WANDB_DISABLE_CODE": "true",  # nothing of the source is sent: the commit is in the config
    "WANDB_DISABLE_GIT": "true",
}


class WandbTracker:
    """Starts W&B, or continues the W&B run that the workdir names, in 10 seconds at most.

    The mode is chosen before W&B starts, because W&B itself would ask for a key, or wait long for a server: it is
    offline without a key or when no server answers. It keeps the steps that were logged twice.
    """

    def __init__(
        self, name: str, config: dict[str, Any], workdir: Path, warn: Callable[[str], None], step: int
    ) -> None:
        del step
        _load_settings()
        import wandb

        mode, problem = _choose_mode(wandb.setup().settings)
        keep = {"name": name, "config": config, "dir": str(workdir), "id": _run_id(workdir)}
        if mode == "online":
            try:
                self._run = wandb.init(mode=mode, resume="allow", **keep)
            except Exception as error:  # the key is refused, or the server accepts connections and hangs
                wandb.teardown()
                mode, problem = "offline", one_line(error)
        if mode != "online":
            self._run = wandb.init(mode=mode, **keep)
        self._run.define_metric("*", step_metric="step")
        if problem is not None:
            warn(f"wandb is offline: {problem}; send the run later with `wandb sync {workdir}/wandb/offline-run-*`")
        self.where = self._run.url if mode == "online" else f"{mode}, {workdir}/wandb"

    def log(self, row: dict[str, Any], step: int) -> None:
        # The step is a value like the others, not W&B's own count: that refuses to go back, and a run killed between
        # two checkpoints logs some steps twice.
        self._run.log({**row, "step": step})

    def samples(self, read: Callable[[], Sequence[tuple[int, str]]]) -> None:
        import wandb

        rows = [list(sample) for sample in read()[-_MOST_SAMPLES:]]
        self._run.log({"samples": wandb.Table(columns=["step", "sample"], data=rows), "step": rows[-1][0]})

    def finish(self) -> None:
        self._run.finish()


def _load_settings() -> None:
    """Sets W&B's variables in the environment: those set there stay, then come those of `.env`, then our defaults."""
    from dotenv import dotenv_values

    for settings in (dotenv_values(".env"), _DEFAULTS):
        for key, value in settings.items():
            if key.startswith("WANDB_") and value:  # a .env may hold others' secrets too
                os.environ.setdefault(key, value)


def _run_id(workdir: Path) -> str:
    """The id by which a resumed run continues the same W&B run."""
    path = workdir / ID_FILE
    found = read_text(path) if path.exists() else ""
    if not re.fullmatch(r"[0-9a-f]{8}\n", found):  # it becomes part of W&B's paths and addresses
        found = secrets.token_hex(4) + "\n"
        write_text(path, found)
    return found.strip()


def _choose_mode(settings: Any) -> tuple[str, str | None]:
    """The mode to start W&B in, and the reason if it is not the one that was asked for."""
    if settings.mode != "online":
        return settings.mode, None
    if not (settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _key_in_netrc(settings.base_url)):
        return "offline", "no API key; set WANDB_API_KEY or run `wandb login`"
    if not _answers(settings.base_url):
        return "offline", f"{settings.base_url} does not answer"
    return "online", None


def _key_in_netrc(url: str) -> bool:
    """Whether `wandb login` left a key for the server, or for the public one behind another of its names."""
    paths = [Path(path).expanduser() for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc") if path]
    try:
        there = [netrc.netrc(path) for path in paths if path.exists()][:1]
    except (OSError, ValueError, netrc.NetrcParseError):  # W&B itself passes over such a file
        return False
    return any(keys.authenticators(host) for keys in there for host in (urlsplit(url).netloc, "api.wandb.ai"))


def _answers(url: str) -> bool:
    """Whether a server answers in time, with any answer. The environment's proxies are used."""
    import requests  # which W&B itself needs

    from runtime.signals import attempt

    answered = threading.Event()

    def ask() -> None:
        try:
            requests.get(url, timeout=_PROBE_SECONDS, stream=True).close()
        except requests.exceptions.SSLError:
            pass  # W&B judges certificates itself
        except (OSError, ValueError):
            return
        answered.set()

    attempt(ask, _PROBE_SECONDS)  # looking up a name has no time-out
    return answered.is_set()
