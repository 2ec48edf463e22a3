"""Worker processes of one program: each question goes to an idle one, which is killed when it is late.

The deadline counts from when a worker takes the question, so a long queue makes no timeouts. A worker is started at the first
question it is needed for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qwench.rewards.messages import encode
from qwench.rewards.worker_process import WorkerDiedError, WorkerLateError, Workers
from qwench.samples import Verdict

RIGHT = ("sympy_equal", "equal")
"""Reasons of the workers for a score of 1."""


class WorkerPool:
    """Turns pairs of (answer, label) into verdicts; owns its worker processes and ends them in `close`."""

    def __init__(self, module: str, *, num_workers: int, timeout_s: float) -> None:
        """Start no worker yet.

        Args:
            module: its `main` is the workers' program, see `algebra_worker`.
        """
        self._timeout_s = timeout_s
        self._workers = Workers(module, num_workers=num_workers, threads="reward")

    async def settle(self, pairs: Sequence[tuple[str, str]]) -> Verdict:
        """Return the verdict of a worker; `timeout` or `grader_error` where there is none."""
        return await asyncio.get_running_loop().run_in_executor(self._workers.threads, self._ask, pairs)

    def close(self) -> None:
        """End the workers; a question under way gets `grader_error`."""
        self._workers.close()

    def _ask(self, pairs: Sequence[tuple[str, str]]) -> Verdict:
        worker = self._workers.idle.get()
        try:
            answer = worker.ask(encode({"pairs": pairs, "deadline_s": self._timeout_s}), timeout_s=self._timeout_s)
        except WorkerLateError:
            return _ungraded("timeout", f"no verdict within {self._timeout_s:g} s")
        except WorkerDiedError as error:
            return _ungraded("grader_error", str(error))
        finally:
            self._workers.idle.put(worker)
        if "error" in answer:
            return _ungraded("grader_error", answer["error"])
        return Verdict(score=float(answer["reason"] in RIGHT), reason=answer["reason"])


def _ungraded(reason: str, why: str) -> Verdict:
    return Verdict(score=0.0, reason=reason, extra={"error": why})
