"""Messages between the driver and a trainer rank: a call, and a reply with its result or its error.

    driver: Call(method, arguments) ---> rank: RankHost.answer(call) ---> driver: Answer(value) or Failure(error, traceback)

Both ends are processes of one run. They talk through pipes that no other process holds, or through Ray.
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
    """A method for every rank to run."""

    method: str
    """Of `RankHost`."""
    arguments: Sequence[Any] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The result of a call on one rank; None on ranks whose result is not used."""

    value: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The error of a call on one rank."""

    error: Exception
    trace: str
    """The rank's own traceback."""

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """Keep the error if it can be pickled, else its name and text."""
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
    """A rank's process ended without a reply."""

    reason: str
    """How: `was ended by SIGKILL`."""
    output: str = ""
    """The last lines of its log, or the path of the log."""


RankReply = Answer | Failure | Death
"""What the driver receives from a rank."""


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
