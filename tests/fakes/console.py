"""A console that remembers what it was told."""

from collections.abc import Mapping

from qwench.observability.console import QuietConsole


class RecordingConsole(QuietConsole):
    def __init__(self) -> None:
        self.events: list[tuple] = []

    def say(self, text: str) -> None:
        self.events.append(("say", text))

    def table(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("table", rollout_id, dict(metrics)))
