"""Errors that cross module borders, and how their messages count; each says what, got, why and what to do."""

import os


def counted(count: int, noun: str) -> str:
    """Return such as `1 step` and `2,000 steps`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def cannot_listen(what: str, host: str, port: int, cause: OSError, *, flag: str | None = None) -> str:
    """Say that a port cannot be listened on, and by which flag another is chosen; None: by no flag."""
    advice = f"choose another with {flag}" if flag is not None else "end what holds it"
    # Python's own text repeats the address; errors of names have negative numbers.
    why = os.strerror(cause.errno) if cause.errno is not None and cause.errno > 0 else cause.strerror or cause
    return f"{what} cannot listen on {host} port {port} ({why}); {advice}."


class QwenchError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(QwenchError):
    """The user's mistake, raised before any model is loaded or device is taken."""


class EngineError(QwenchError):
    """An inference engine failed, answered nonsense or missed its deadline."""


class EngineLostError(EngineError):
    """An engine cannot be reached, broke the connection, or did not answer in time. Another engine may take its requests."""


class WeightSyncError(QwenchError):
    """A publication of weights did not arrive whole at every engine."""


class CheckpointError(QwenchError):
    """A checkpoint is missing, incomplete or of another run."""


class OutputError(QwenchError):
    """Files could not be written: their disk is full, read-only or gone."""


class DownloadError(QwenchError):
    """The Hugging Face hub could not be reached, or does not have the repository."""


class RewardError(QwenchError):
    """A reward function crashed or answered with something that is not a verdict."""


class TrainingError(QwenchError):
    """A training step cannot go on, for instance because its loss is not finite."""


class Stopped(BaseException):
    """A signal asked the process to end (`observability.stopping`)."""

    def __init__(self, number: int, outcome: str = "") -> None:
        """Keep what the command line reports.

        Args:
            number: of the signal.
            outcome: what was saved, as sentences; empty where the verb saves nothing.
        """
        super().__init__(number, outcome)
        self.number = number
        self.outcome = outcome
