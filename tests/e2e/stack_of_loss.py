"""A reward function that runs on every trainer rank, before the loss: it has the loss write down its stack once."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import qwench
from qwench.algorithms.methods import policy_gradient
from qwench.samples import Sample

FOLDER = "QWENCH_TEST_STACK_FOLDER"
_PACKAGE = str(Path(qwench.__file__).parent)


def post_process(samples: Sequence[Sample]) -> list[float]:
    """Return the raw rewards. The next call of `ppo_clip`, the arithmetic of the loss, leaves its stack in a file."""
    original = policy_gradient.ppo_clip

    def recorded(*arguments, **keywords):
        policy_gradient.ppo_clip = original
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE)]
        names = [f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.name}" for frame in frames]
        file = Path(os.environ[FOLDER]) / f"{os.getpid()}.txt"
        file.write_text("\n".join([*names, "algorithms/losses.py:ppo_clip"]))
        return original(*arguments, **keywords)

    policy_gradient.ppo_clip = recorded
    return [float(sample.reward or 0.0) for sample in samples]
