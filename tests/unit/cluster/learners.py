"""Learners for tests of the processes around them, and builders that ranks can import."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from qwench.cluster.local import LocalRanks
from qwench.cluster.workers import RemoteLearner, WorkerGroup
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.errors import TrainingError
from qwench.observability.console import QuietConsole
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.training.learner import Learned
from qwench.wire.portions import WeightBucket

OF_RUN = {
    "console": QuietConsole(),
    "timeouts": TimeoutConfig(),
    "unit": "rollout",
    "check": lambda: None,
    "first_critic_rank": None,
}
"""What a run gives a `RemoteLearner`."""

TENSORS = {
    "layer.weight": torch.arange(6, dtype=torch.float32).view(2, 3) / 7,
    "layer.bias": torch.tensor([1.5, -2.25, 3.0], dtype=torch.bfloat16),
    "scale": torch.tensor(5, dtype=torch.int64),
}


def num_frozen(_state: object) -> int:
    """Return how many objects of this process the garbage collector leaves alone."""
    return gc.get_freeze_count()


class ReportingLearner:
    """Answers with what it was asked; a rollout of a certain id goes wrong on rank 1."""

    def __init__(self, timer: PhaseTimer) -> None:
        self.timer = timer
        self.rank = int(os.environ["RANK"])
        self.state = self

    def learn(self, rollout: Rollout) -> Learned:
        if self.rank == 1:
            go_wrong(rollout.rollout_id)
        elif rollout.rollout_id:
            time.sleep(600)  # as in a collective that rank 1 never joins
        with self.timer.phase("actor_train"):
            tokens = sum(len(sample.tokens) for sample in rollout.samples)
        return Learned(metrics={"rollout/tokens": float(tokens), "rank": float(self.rank)}, steps=[])

    def log_probs(self, samples: Sequence[Sample], temperature: float, model: str) -> list[list[float]]:
        return [[float(len(sample.tokens) + len(model)), temperature, float(self.rank)] for sample in samples]

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        if part != "merged":
            yield [(f"{part} in buckets of", torch.tensor(bucket_bytes))]
            return
        for name, tensor in TENSORS.items():
            yield [(name, tensor)]

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        (folder / f"rank_{self.rank}").write_text(str(with_optimizer))

    def close(self) -> None:
        """Close nothing."""


RAISES, DIES, EXITS = 1, 2, 3


def go_wrong(how: int) -> None:
    if how == RAISES:
        raise TrainingError("the loss is nan")
    if how == DIES:
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        sys.stdout.write(f"helper {helper.pid}\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == EXITS:
        sys.stdout.write("about to leave\n")
        sys.stdout.flush()
        os._exit(7)


def build(timer: PhaseTimer) -> ReportingLearner:
    sys.stdout.write(f"rank {os.environ['RANK']} is built\n")
    sys.stdout.flush()
    sys.stderr.write("a library warns\n")
    return ReportingLearner(timer)


def drive_one_rank() -> None:
    """Start a rank, print its process id and the folder of ranks once it has built its learner, and wait."""
    ranks = LocalRanks(1, environ=os.environ, bucket_bytes=64, log_folder=None)
    RemoteLearner(WorkerGroup(ranks), build, **OF_RUN)
    sys.stdout.write(f"{ranks.pids[0]} {ranks._folder}\n")
    sys.stdout.flush()
    time.sleep(600)


def where(learner: ReportingLearner, word: str) -> tuple[int, str, str]:
    return learner.rank, word, os.environ["LOCAL_RANK"]
