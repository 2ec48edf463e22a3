"""What a person sees: lines, and on a terminal a live part below them that is redrawn in place.

Outside a run the live part has a line for each phase and bar. Inside one (`Console.run`) it is a single bar for the whole run,
which also names what the run is doing now:

    rollout 12/24 ------------ 1m03s left  reward 0.438  generate 12/32

Elsewhere (CI, log files) each event is one plain line. Lines are never broken by newlines that were not said: the terminal
wraps them, so that paths and commands can be copied.
"""

from __future__ import annotations

import io
import logging
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Protocol

import rich.console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

_PLAIN_LINES_EVERY_S = 30.0
_BAR_WIDTH = 12
_UNSEEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that move the cursor, turn the direction of writing, or cannot be written at all."""


def visible(text: str) -> str:
    r"""Return text with its control characters as escapes, so that a model's text moves no cursor. Line ends and tabs stay.

    >>> visible("a\x1b[2Jb\n\u202ec")
    'a\\x1b[2Jb\n\\u202ec'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _UNSEEN else c.encode("unicode_escape").decode("ascii") for c in text
    )


class Progress(Protocol):
    """A bar that fills up."""

    def advance(self, count: int = 1) -> None:
        """Count `count` more of the total as done; any thread may call it."""
        ...


class RunBar(Protocol):
    """The bar of a whole run."""

    def show(self, done: int, *, left: str, note: str) -> None:
        """Show how many of the run's units are done, the time left and the newest figure."""
        ...


class Console(Protocol):
    """See the module docstring; any thread may call any method."""

    @property
    def width(self) -> int | None:
        """Return the columns of the terminal; None: there is none, and lines may have any length."""
        ...

    def say(self, text: str | Text) -> None:
        """Show lines of text, without what is not `visible`."""
        ...

    def show(self, table: rich.console.RenderableType) -> None:
        """Show a table."""
        ...

    def run(self, unit: str, *, done: int, total: int) -> AbstractContextManager[RunBar]:
        """Show one bar for the run inside the context; phases and bars inside it name what the run is doing."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show `name` as what is done now, inside the context."""
        ...

    def progress(self, description: str, *, total: int) -> AbstractContextManager[Progress]:
        """Show a bar of `total` units inside the context."""
        ...

    def log_handler(self) -> logging.Handler:
        """Return a handler that shows each log record as a line."""
        ...


class StandardOutput(rich.console.Console):
    """rich's console, with an error and not the end of the process where the reader of a pipe has gone."""

    def on_broken_pipe(self) -> None:
        """Leave it to the command line (`qwench train | head`)."""
        raise


def open_console() -> Console:
    """Return a console for standard output: live on a terminal, plain lines elsewhere."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # no character of a response may end the run
    output = StandardOutput()
    if output.width < 1:  # COLUMNS=0; rich would print nothing
        output = StandardOutput(width=80)
    return LiveConsole(output) if output.is_terminal else PlainConsole(output)


class PlainConsole:
    """Write plain lines: what is said, and how far a long phase is every half minute."""

    width: int | None = None

    def __init__(self, output: rich.console.Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock

    def say(self, text: str | Text) -> None:
        """Print the text; the terminal wraps it."""
        shown = visible(text) if isinstance(text, str) else text
        self._output.print(shown, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def show(self, table: rich.console.RenderableType) -> None:
        """Print the table."""
        self._output.print(table)

    def run(self, unit: str, *, done: int, total: int) -> AbstractContextManager[RunBar]:
        """Show nothing: each unit is a line that says how far the run is."""
        return nullcontext(_QuietBar())

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show nothing: the metrics say how long each phase took."""
        return nullcontext()

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[Progress]:
        """Print how far it is, at most every 30 seconds."""
        yield _PlainBar(self, description, total, self._clock)

    def log_handler(self) -> logging.Handler:
        """Return a handler that prints one line for each record."""
        return _LineHandler(self)


class LiveConsole(PlainConsole):
    """Draw on a terminal; the live part is there only while a run, a phase or a bar is open."""

    def __init__(self, output: rich.console.Console) -> None:
        super().__init__(output)
        self._lock = RLock()
        self._live: RichProgress | None = None
        self._run: TaskID | None = None
        self._activities: list[_Activity] = []

    @property
    def width(self) -> int | None:  # type: ignore[override]  # a plain console has a constant one
        """Return the columns of the terminal."""
        return self._output.width

    @contextmanager
    def run(self, unit: str, *, done: int, total: int) -> Iterator[RunBar]:
        """Show the run's bar."""
        with self._task(unit, total=total, done=done) as bar:
            with self._lock:
                self._run = bar.task
            try:
                yield bar
            finally:
                with self._lock:
                    self._run = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the name, and outside a run a spinner and the seconds so far."""
        with self._activity(name, total=None):
            yield

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[Progress]:
        """Show the description and the count, and outside a run a bar."""
        with self._activity(description, total=total) as bar:
            yield bar

    @contextmanager
    def _activity(self, description: str, *, total: int | None) -> Iterator[Progress]:
        """Name what the run is doing; outside a run, open a task."""
        with self._lock:
            inside = self._run is not None
            if inside:
                self._activities.append(activity := _Activity(self, description, total))
                self.name_activity(at_once=True)
        if not inside:
            with self._task(description, total=total) as bar:
                yield bar
            return
        try:
            yield activity
        finally:
            with self._lock:
                self._activities.remove(activity)
                self.name_activity()

    def name_activity(self, *, at_once: bool = False) -> None:
        """Show the newest activity on the run's bar, with its next frame or at once."""
        with self._lock:
            if self._live is not None and self._run is not None:
                text = self._activities[-1].text if self._activities else ""
                self._live.update(self._run, activity=text, refresh=at_once)

    @contextmanager
    def _task(self, description: str, *, total: int | None, done: int = 0) -> Iterator[_LiveBar]:
        with self._lock:
            if self._live is None:
                self._live = _open_live(self._output)
            live = self._live
            task = live.add_task(description, total=total, completed=done, left="", note="", activity="")
        try:
            yield _LiveBar(live, task)
        finally:
            with self._lock:
                live.refresh()
                live.remove_task(task)
                if not live.tasks:
                    live.stop()
                    self._live = None


class _Activity:
    """What a run is doing now, with its count."""

    def __init__(self, console: LiveConsole, description: str, total: int | None) -> None:
        self._console, self._description, self._total = console, description, total
        self._done = 0

    @property
    def text(self) -> str:
        return self._description if self._total is None else f"{self._description} {self._done}/{self._total}"

    def advance(self, count: int = 1) -> None:
        self._done += count
        self._console.name_activity()


class _LiveBar:
    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self.task = live, task

    def advance(self, count: int = 1) -> None:
        self._live.advance(self.task, count)

    def show(self, done: int, *, left: str, note: str) -> None:
        self._live.update(self.task, completed=done, left=left, note=note, refresh=True)


class _CountColumn(ProgressColumn):
    """Count of a bar; nothing for a phase, which has no total."""

    def render(self, task: Task) -> Text:
        return Text(_count(task))


class _NewsColumn(ProgressColumn):
    """Time left, newest figure and activity of a run; of other tasks the seconds so far. Cut to what the line has left."""

    def __init__(self, output: rich.console.Console) -> None:
        super().__init__()
        self._output = output

    def render(self, task: Task) -> Text:
        news = [task.fields[name] for name in ("left", "note", "activity") if task.fields[name]]
        text = Text("  ".join(news) if news else f"{task.elapsed or 0:.0f}s")
        taken = 1 + len(task.description) + len(_count(task)) + _BAR_WIDTH + 4  # the spinner, and a space behind each column
        text.truncate(max(self._output.width - taken, 1), overflow="ellipsis")
        return text


def _count(task: Task) -> str:
    return "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"


def _open_live(output: rich.console.Console) -> RichProgress:
    """Start the live part, one line for each task."""
    live = RichProgress(
        SpinnerColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        _CountColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=_BAR_WIDTH),
        _NewsColumn(output),
        console=output,
        transient=True,
        refresh_per_second=4,
    )
    live.start()
    return live


class _LineHandler(logging.Handler):
    """Shows the message, after its level where that is not INFO: `warning: the disk is nearly full`."""

    def __init__(self, console: PlainConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        self._console.say(level + self.format(record))


class _PlainBar:
    def __init__(self, console: PlainConsole, description: str, total: int, clock: Callable[[], float]) -> None:
        self._console, self._description, self._total, self._clock = console, description, total, clock
        self._lock = RLock()
        self._done = 0
        self._shown_at = clock()

    def advance(self, count: int = 1) -> None:
        with self._lock:
            self._done += count
            if self._clock() - self._shown_at >= _PLAIN_LINES_EVERY_S:
                self._shown_at = self._clock()
                self._console.say(f"{self._description} {self._done}/{self._total}")


class QuietConsole:
    """Show nothing: for tests and all ranks but the main one."""

    width: int | None = None

    def say(self, text: str | Text) -> None:
        """Show nothing."""

    def show(self, table: rich.console.RenderableType) -> None:
        """Show nothing."""

    def run(self, unit: str, *, done: int, total: int) -> AbstractContextManager[RunBar]:
        """Show nothing."""
        return nullcontext(_QuietBar())

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def progress(self, description: str, *, total: int) -> AbstractContextManager[Progress]:
        """Show nothing."""
        return nullcontext(_QuietBar())

    def log_handler(self) -> logging.Handler:
        """Return a handler that shows nothing."""
        return logging.NullHandler()


class _QuietBar:
    def advance(self, count: int = 1) -> None:
        pass

    def show(self, done: int, *, left: str, note: str) -> None:
        pass
