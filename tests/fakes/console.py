"""A console that remembers what it was told."""

from collections.abc import Iterator
from contextlib import contextmanager

import rich.console
from rich.text import Text

from qwench.observability.console import QuietConsole


class RecordingBar:
    def __init__(self, events: list[tuple]) -> None:
        self.events = events

    def show(self, done: int, *, left: str, note: str) -> None:
        self.events.append(("bar", done, left, note))


class RecordingProgress:
    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.steps = description, total, list[int]()

    def advance(self, count: int = 1) -> None:
        self.steps.append(count)


class RecordingConsole(QuietConsole):
    def __init__(self, *, width: int | None = None) -> None:
        self.events: list[tuple] = []
        self.progresses: list[RecordingProgress] = []
        self.width = width

    @property
    def lines(self) -> list[str]:
        return [event[1] for event in self.events if event[0] == "say"]

    def say(self, text: str | Text) -> None:
        self.events.append(("say", text if isinstance(text, str) else text.plain))

    def show(self, table: rich.console.RenderableType) -> None:
        output = rich.console.Console(width=80, force_terminal=False)
        with output.capture() as captured:
            output.print(table)
        self.events.append(("table", captured.get()))

    @contextmanager
    def progress(self, description: str, *, total: int) -> Iterator[RecordingProgress]:
        self.progresses.append(RecordingProgress(description, total))
        yield self.progresses[-1]

    @contextmanager
    def run(self, unit: str, *, done: int, total: int) -> Iterator[RecordingBar]:
        self.events.append(("run", unit, done, total))
        yield RecordingBar(self.events)
        self.events.append(("end of run",))
