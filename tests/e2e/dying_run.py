"""Run a training job that kills itself (SIGKILL) at a chosen moment: `python dying_run.py MOMENT ROLLOUT_ID train ...`.

Moments: generation (in the middle of a rollout), training (before an optimizer step), save (the checkpoint half written),
saved (right after it).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from qwench.cli import parse_config
from qwench.controller import Run, train
from qwench.launch import build


def die() -> None:
    """End this process as an operator or the kernel would: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(run: Run, moment: str, rollout_id: int) -> None:
    """Wrap the one method of `run` in which to die."""
    calls = {"take": -1}

    def counting_take(take: Callable[[int], Any]) -> Callable[[int], Any]:
        def wrapped(taken_id: int) -> Any:
            calls["take"] = taken_id
            return take(taken_id)

        return wrapped

    run.rollouts.take = counting_take(run.rollouts.take)  # type: ignore[method-assign]
    if moment == "generation":
        engine, generate, seen = run.engines.engines[0], run.engines.engines[0].generate, []

        async def dying_generate(request: Any) -> Any:
            if calls["take"] == rollout_id:
                seen.append(request)
                if len(seen) == 10:
                    die()
            return await generate(request)

        engine.generate = dying_generate
    elif moment == "training":
        backend, update = run.learner.backend, run.learner.backend.update

        def dying_update(*args: Any, **kwargs: Any) -> Any:
            if calls["take"] == rollout_id:
                die()
            return update(*args, **kwargs)

        backend.update = dying_update
    else:
        owner, name = (run.learner, "save") if moment == "save" else (run.checkpoints, "save")
        save = getattr(owner, name)

        def dying_save(*args: Any, **kwargs: Any) -> None:
            save(*args, **kwargs)
            if calls["take"] == rollout_id:
                die()

        object.__setattr__(owner, name, dying_save)


if __name__ == "__main__":
    moment, rollout_id, *argv = sys.argv[1:]
    built = build(parse_config(argv))
    arrange_death(built, moment, int(rollout_id))
    train(built)
