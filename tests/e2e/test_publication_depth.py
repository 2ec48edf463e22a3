"""How many functions of ours lie between the main loop and the weight update of an engine that computes with live tensors."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, FrameType

import pytest
from torch import Tensor

import qwench
from qwench.controller import train
from qwench.engines.embedded.compute.weights import WeightStore
from qwench.engines.fleet.event_loop import EventLoopThread
from tests.deadlines import patient
from tests.e2e.conftest import Workspace
from tests.verbs import run_verb

PACKAGE = Path(qwench.__file__).parent
MOST_FUNCTIONS = 7


def ours(frame: FrameType | None) -> list[CodeType]:
    """Return the package's functions on a stack, outermost first."""
    found = []
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            found.append(frame.f_code)
        frame = frame.f_back
    return found[::-1]


def stack_of_waiting_main_thread() -> list[CodeType]:
    """Return its functions once it has given the work to the loop and waits."""
    deadline = time.monotonic() + patient(20)
    while True:
        stack = ours(sys._current_frames()[threading.main_thread().ident])  # type: ignore[index]
        if stack[-1] is EventLoopThread.run.__code__:
            return stack
        assert time.monotonic() < deadline, f"the main thread does not wait: {stack}"
        time.sleep(0.001)


def test_publication_by_alias_takes_at_most_seven_functions(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits in one part of the stack, the engines' event loop runs the other."""
    stacks: list[list[CodeType]] = []
    adopt = WeightStore.adopt

    def observed(store: WeightStore, weights: Mapping[str, Tensor]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        main = stack_of_waiting_main_thread()
        stacks.append([*main[main.index(train.__code__) :], *ours(sys._getframe(1)), adopt.__code__])
        adopt(store, weights)

    monkeypatch.setattr(WeightStore, "adopt", observed)
    run_verb(workspace.train_argv(tmp_path / "run", num_rollout=2))
    names = [[code.co_qualname for code in stack] for stack in stacks]
    assert len(stacks) == 3, "one before the first rollout, one after each"
    for stack in names:
        assert stack[0] == "train" and stack[-1] == "WeightStore.adopt"
        assert len(stack) <= MOST_FUNCTIONS, " -> ".join(stack)
