"""What the driver and a trainer rank say to each other: a call, and the answer that its result or its error makes.

    driver: Call(method, arguments) ---> rank: RankHost.answer(call) ---> driver: Answer(value) or Failure(error, traceback)

Both ends are processes of one run: they were started by it and talk through pipes that no other process holds (or through Ray).
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwench.errors import QwenchError, TrainingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One thing that every rank is asked to do."""

    method: str
    """Of `RankHost`."""
    arguments: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a call returned on one rank; None where only the main rank's result is of use."""

    value: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a call raised on one rank."""

    error: Exception
    trace: str
    """The rank's own traceback."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keep an error as it is if it can travel, else its name and text."""
        trace = "".join(traceback.format_exception(error))
        return cls(error=error if _travels(error) else TrainingError(f"{type(error).__name__}: {error}"), trace=trace)

    def as_raised(self, *, rank: int, num_ranks: int) -> Exception:
        """Return the error to raise in the driver: of the same type, with the rank, caused by the rank's traceback."""
        place = f"trainer rank {rank} of {num_ranks}"
        error = type(self.error)(f"{place}: {self.error}") if isinstance(self.error, QwenchError) else self.error
        if not isinstance(error, QwenchError):
            error.add_note(f"raised on {place}")
        error.__cause__ = RankTraceback(self.trace)
        return error


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """A rank's process ended; there will be no answer."""

    reason: str
    """How: `was ended by SIGKILL`."""
    output: str = ""
    """The last lines it wrote, or where they are."""


News = Answer | Failure | Death
"""What may come from a rank."""


class RankTraceback(Exception):  # noqa: N818 - not an error by itself: the cause of one, so that its traceback is shown
    """The traceback of an error that was raised in another process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _travels(error: Exception) -> bool:
    """Tell whether the error is the same after it went through a pipe."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001 - the border of the process: a foreign error's own pickling may raise anything
        return False
