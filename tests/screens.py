"""Record what a person sees: run a command on a terminal of a given width, and write the screen as text.

    python -m tests.screens docs/screens/sft_80.txt --columns 80 -- qwench sft ...

What a terminal keeps is written: lines as it wraps them. Of the bar, which is redrawn in place, one state from the
middle of the run is added. A long record loses its middle.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.cells import cell_len

FIRST_LINES, LAST_LINES = 90, 40
_CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
_BAR = re.compile(r"\S \w+ \d+/\d+ .* left  \w+ [-\d.e]+  \w")


class Screen:
    """A terminal with the few codes that rich sends: cursor up, erase line, colours (which are dropped)."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines = [""]
        self.row = 0
        self.column = 0
        self.bars: list[str] = []
        """States of the run's bar, in order."""

    def feed(self, text: str) -> None:
        """Take output."""
        position = 0
        while position < len(text):
            if code := _CODE.match(text, position):
                self._control(*code.groups())
                position = code.end()
                continue
            self._put(text[position])
            position += 1

    def _control(self, argument: str, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - int(argument or 1), 0)
        elif letter == "K":
            self._note_bar()
            self.lines[self.row] = "" if argument == "2" else self.lines[self.row][: self.column]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._note_bar()
            self.column = 0
            return
        if character == "\n" or self.column + cell_len(character) > self.columns:
            self._note_bar()
            self.row += 1
            self.column = 0
            if self.row == len(self.lines):
                self.lines.append("")
        if character != "\n":
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += cell_len(character)

    def _note_bar(self) -> None:
        if _BAR.match(self.lines[self.row]) and self.bars[-1:] != [self.lines[self.row].rstrip()]:
            self.bars.append(self.lines[self.row].rstrip())


def record(words: list[str], *, columns: int) -> Screen:
    """Run `words` on a terminal."""
    driver, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal, env=environ)
    os.close(terminal)
    screen, rest = Screen(columns), b""
    while chunk := _read(driver):
        rest += chunk
        end = max(rest.rfind(b"\n"), rest.rfind(b"m"), rest.rfind(b"K"), rest.rfind(b"h")) + 1  # not within a code
        screen.feed(rest[:end].decode(errors="replace"))
        rest = rest[end:]
    screen.feed(rest.decode(errors="replace"))
    if process.wait() != 0:
        sys.exit(f"{words} ended with {process.returncode}:\n" + "\n".join(screen.lines[-30:]))
    return screen


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end is closed
        return b""


def as_text(screen: Screen, words: list[str]) -> str:
    """Return the record: command, lines without the middle of a long one, and a state of the bar."""
    lines = [line.rstrip() for line in screen.lines]
    if len(lines) > FIRST_LINES + LAST_LINES:
        left_out = len(lines) - FIRST_LINES - LAST_LINES
        lines = [*lines[:FIRST_LINES], f"[... {left_out} lines ...]", *lines[-LAST_LINES:]]
    shown = ["$ " + " ".join(words), *lines]
    if screen.bars:
        middle = screen.bars[len(screen.bars) // 2]
        shown += ["[while it ran, the last line was this bar]", middle]
    return "\n".join(shown).rstrip() + "\n"


def main() -> None:
    """Record one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("words", nargs="+")
    given = parser.parse_args()
    given.output.write_text(as_text(record(given.words, columns=given.columns), given.words), encoding="utf-8")


if __name__ == "__main__":
    main()
