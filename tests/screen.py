"""What a terminal shows of what was written to it: as much of one as the live view needs."""

import io
import re
import unicodedata

_PARTS = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|(\x1b.)|([\x00-\x1f])|([^\x00-\x1f])", re.DOTALL)


class Watched(io.StringIO):
    """A stand-in for a stream that a person watches."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Screen:
    """All lines, those that scrolled out too.

    Attributes:
      wrapped: texts that ran past the right edge.
    """

    def __init__(self, text: str, columns: int):
        self.lines: list[list[str]] = [[]]
        self.wrapped: list[str] = []
        self._row = self._column = 0
        for number, command, escape, control, character in _PARTS.findall(text):
            assert not escape, f"unknown escape sequence {escape!r}"
            if command:
                self._obey(command, number)
            elif control == "\n":
                self._down()
            elif control == "\r":
                self._column = 0
            elif character:
                if self._column + width(character) > columns:
                    self.wrapped.append("".join(self.lines[self._row]))
                    self._down()
                line = self.lines[self._row]
                line += [" "] * (self._column - len(line))
                line[self._column : self._column + width(character)] = [character] + [""] * (width(character) - 1)
                self._column += width(character)

    @property
    def text(self) -> list[str]:
        """The lines with something on them."""
        return [text for line in self.lines if (text := "".join(line).rstrip())]

    def _down(self) -> None:  # to the beginning of the line: a terminal's driver makes "\r\n" of "\n"
        self._row, self._column = self._row + 1, 0
        if self._row == len(self.lines):
            self.lines.append([])

    def _obey(self, command: str, number: str) -> None:
        if command == "A":
            self._row -= int(number or 1)
            assert self._row >= 0, "above the top"
        elif command == "K":
            assert number == "2"
            self.lines[self._row] = []
        else:
            assert command == "m" or (command in "hl" and number.startswith("?")), command + number


def width(character: str) -> int:
    """Columns of the terminal that it takes."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
