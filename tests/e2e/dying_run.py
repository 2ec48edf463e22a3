"""A training job that kills itself (SIGKILL) at a chosen moment.

Moments: generation (in the middle of a rollout), training (before an optimizer step), save (the checkpoint half written),
saved (right after it).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from qwench.commands.start import prepare
from qwench.config.command_line.parse import parse_run
from qwench.controller import Run, train
from qwench.launch.build import build

REQUESTS_BEFORE_DEATH = 10


def die() -> None:
    """End this process as an operator or the kernel would: nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(run: Run, moment: str, rollout_id: int) -> None:
    """Wrap the one method of `run` in which to die."""
    taken = [-1]

    def take(next_id: int, original: Callable[[int], Any] = run.rollouts.take) -> Any:
        taken.append(next_id)
        return original(next_id)

    run.rollouts.take = take

    def is_time() -> bool:
        return taken[-1] == rollout_id

    if moment == "generation":
        die_while_generating(run.engines.engines[0], is_time)
    elif moment == "training":
        die_around(run.learner.policy, "forward_backward", is_time, after=False)
    elif moment == "save":
        die_around(run.learner.state, "save", is_time, after=True)  # model and optimizer are written, the rest is not
    else:
        assert moment == "saved", moment
        die_around(run.checkpoints, "save", is_time, after=True)


def die_while_generating(engine: Any, is_time: Callable[[], bool]) -> None:
    """Die when some responses of the rollout are done and others have just begun."""
    generate, seen = engine.generate, []

    async def dying(request: Any) -> Any:
        if is_time():
            seen.append(request)
            if len(seen) == REQUESTS_BEFORE_DEATH:
                die()
        return await generate(request)

    engine.generate = dying


def die_around(owner: Any, name: str, is_time: Callable[[], bool], *, after: bool) -> None:
    """Die before or right after `owner.name(...)`."""
    original = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if after or not is_time() else None
        if is_time():
            die()
        return result

    setattr(owner, name, dying)


def run(moment: str, rollout_id: int, words: Sequence[str]) -> None:
    """Run `qwench WORDS` until death."""
    config = parse_run("train", words[1:])
    built = build(config, prepare(config))
    arrange_death(built, moment, rollout_id)
    train(built)
