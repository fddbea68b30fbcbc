"""A terminal for programs under test: what a person types goes in, what would be on the screen comes out."""

import codecs
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from types import TracebackType
from typing import Self

# Makes the terminal the process's own, so that its keys send signals.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program in a terminal of its own; killed on leaving.

    Attributes:
      seen: all that came out so far, escape sequences included.
    """

    def __init__(
        self, *command: str, columns: int = 100, cwd: str | os.PathLike[str] | None = None, **environment: str
    ):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        clean = {name: text for name, text in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKE, *command],
            **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
            start_new_session=True,
            cwd=cwd,
            env={**clean, "TERM": "xterm-256color", **environment},
        )
        os.close(slave)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two reads
        self._from = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What came since the last wait up to and with `text`."""
        end, begin = time.monotonic() + seconds, self._from
        while text not in self.seen[begin:]:
            assert time.monotonic() < end and self._read(end - time.monotonic()), (
                f"no {text!r} in {self.seen[begin:]!r}"
            )
        self._from = self.seen.index(text, begin) + len(text)
        return self.seen[begin : self._from]

    def end(self, seconds: float = 60) -> int:
        """Reads until the program has ended; its status."""
        while self._read(seconds):
            pass
        return self.process.wait(seconds)

    def _read(self, seconds: float) -> bool:
        """Whether something came."""
        if not select.select([self._master], [], [], max(0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's way to say that nobody has the other side any more
            return False
        self.seen += self._decoder.decode(data)
        return bool(data)
