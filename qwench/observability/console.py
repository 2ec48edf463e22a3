"""What a person sees of a run: one live line with the phase, progress bars, a table per rollout.

On a terminal the live part is redrawn in place; elsewhere (CI, log files) each event is one plain line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Protocol

import rich.console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from qwench.observability.summary import summarize

_SECONDS_BETWEEN_PLAIN_LINES = 30.0


class Progress(Protocol):
    """A bar that fills up."""

    def advance(self, count: int = 1) -> None:
        """Count `count` more of the total as done; any thread may call it."""
        ...


class Console(Protocol):
    """See the module docstring; any thread may call any method."""

    def say(self, text: str, *, markup: bool = False) -> None:
        """Show a line of text, with rich's markup if that is what it has."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show `name` as what the run is doing now, inside the context."""
        ...

    def progress(self, description: str, *, total: int) -> AbstractContextManager[Progress]:
        """Show a bar of `total` units inside the context."""
        ...

    def table(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a rollout that are worth a look."""
        ...

    def log_handler(self) -> logging.Handler:
        """Return a handler that shows log records here."""
        ...


def open_console() -> Console:
    """Return a console for standard output: live on a terminal, plain lines elsewhere."""
    output = rich.console.Console(highlight=False)
    return LiveConsole(output) if output.is_terminal else PlainConsole(output)


class LiveConsole:
    """Draw on a terminal; the live part is there only while a phase or a bar is open."""

    def __init__(self, output: rich.console.Console) -> None:
        self._output = output
        self._lock = RLock()
        self._live: RichProgress | None = None

    def say(self, text: str, *, markup: bool = False) -> None:
        """Print above the live part."""
        self._output.print(text, markup=markup)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a spinner, the name and the seconds so far."""
        with self._task(name, total=None):
            yield

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[Progress]:
        """Show a bar with the count and the time left."""
        with self._task(description, total=total) as bar:
            yield bar

    def table(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Print one row for each group of metrics."""
        groups = summarize(metrics)
        if not groups:
            return
        table = Table(title=f"rollout {rollout_id}", title_justify="left", show_header=False, pad_edge=False)
        for group in groups:
            table.add_row(group.title, "  ".join(f"[dim]{label}[/dim] {value}" for label, value in group.values.items()))
        self._output.print(table)

    def log_handler(self) -> logging.Handler:
        """Return rich's handler, which prints above the live part."""
        return RichHandler(console=self._output, show_path=False, markup=False, highlighter=NullHighlighter())

    @contextmanager
    def _task(self, description: str, *, total: int | None) -> Iterator[_LiveBar]:
        with self._lock:
            if self._live is None:
                self._live = _open_live(self._output)
            live = self._live
            task = live.add_task(description, total=total)
        try:
            yield _LiveBar(live, task)
        finally:
            with self._lock:
                live.refresh()
                live.remove_task(task)
                if not live.tasks:
                    live.stop()
                    self._live = None


class _LiveBar:
    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self._task = live, task

    def advance(self, count: int = 1) -> None:
        self._live.advance(self._task, count)


class _CountColumn(ProgressColumn):
    """Count of a bar; nothing for a phase, which has no total."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


def _open_live(output: rich.console.Console) -> RichProgress:
    live = RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        _CountColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=output,
        transient=True,
        refresh_per_second=4,
    )
    live.start()
    return live


class PlainConsole:
    """Write plain lines: what is said, a line per rollout, and how far a long phase is every half minute."""

    def __init__(self, output: rich.console.Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock

    def say(self, text: str, *, markup: bool = False) -> None:
        """Print the text, unwrapped."""
        self._output.print(text, markup=markup, soft_wrap=True)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show nothing: the rollout's line says how long each phase took."""
        return nullcontext()

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[Progress]:
        """Print how far it is, at most every 30 seconds."""
        yield _PlainBar(self, description, total, self._clock)

    def table(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Print one line."""
        groups = summarize(metrics)
        if groups:
            shown = "; ".join(f"{group.title}: " + " ".join(f"{k} {v}" for k, v in group.values.items()) for group in groups)
            self.say(f"rollout {rollout_id} | {shown}")

    def log_handler(self) -> logging.Handler:
        """Return a handler that prints one line for each record."""
        return _LineHandler(self)


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
            if self._clock() - self._shown_at >= _SECONDS_BETWEEN_PLAIN_LINES:
                self._shown_at = self._clock()
                self._console.say(f"{self._description} {self._done}/{self._total}")


class QuietConsole:
    """Show nothing: for tests and all ranks but the main one."""

    def say(self, text: str, *, markup: bool = False) -> None:
        """Show nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show nothing."""
        return nullcontext()

    def progress(self, description: str, *, total: int) -> AbstractContextManager[Progress]:
        """Show nothing."""
        return nullcontext(_QuietBar())

    def table(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def log_handler(self) -> logging.Handler:
        """Return a handler that shows nothing."""
        return logging.NullHandler()


class _QuietBar:
    def advance(self, count: int = 1) -> None:
        pass
