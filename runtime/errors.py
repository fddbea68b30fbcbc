"""Expected failures: each is one line on stderr and one exit status. This file imports nothing; all may import it."""


class ExpectedError(Exception):
    """A failure that the program foresaw.

    Its text reads `<config.key or path>: <what is wrong>; <what to do>`; `main` prints it after `error: ` and exits
    with `status`. Anything else that escapes is a bug of ours: traceback and status 1.
    """

    status = 2


class UserError(ExpectedError):
    """Config, flag or input that cannot work: exit status 2."""


class NoCheckpointError(ExpectedError):
    """There is no usable checkpoint: exit status 3."""

    status = 3


class DivergedError(ExpectedError):
    """Losses or gradients became bad and stayed bad: exit status 4."""

    status = 4


class StorageError(ExpectedError):
    """A file could not be written: exit status 5."""

    status = 5


class HungError(ExpectedError):
    """No step finished in time: exit status 6. Never raised: the watchdog ends the process with it."""

    status = 6


class LostPeerError(HungError):
    """Another process of the run never started, or is gone: exit status 6. Never raised either."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run saves its state and exits with 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(f"signal {signum}")
        self.signum = signum


def one_line(error: BaseException, limit: int = 200) -> str:
    """An exception's text on a single line, for the middle of an error message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
