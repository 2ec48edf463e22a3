r"""Grade samples without ever stopping the run: quick verdicts here, algebra in worker processes that are killed when late.

    sample -> grader -> Verdict
                    \-> Question -> idle worker -> sympy_equal | wrong | unparseable
                                        |- deadline passed:  killed, `timeout`; the next question starts a fresh one
                                        \- failed or died:   `grader_error`, likewise

The deadline counts from when a worker takes the question, so a long queue makes no timeouts. A worker is started at the first
question it is needed for.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qwench.rewards.custom import CustomReward
from qwench.rewards.expressions import Question
from qwench.rewards.graders import find_grader, is_boxed, is_remote
from qwench.rewards.remote import RemoteReward
from qwench.rewards.scores import pick_score
from qwench.rewards.spec import RewardSpec
from qwench.rewards.worker_process import WorkerProcess
from qwench.samples import Sample, Verdict


class RewardPool:
    """Turns samples into verdicts; owns its worker processes and ends them in `close`."""

    def __init__(self, reward: RewardSpec, *, num_workers: int, timeout_s: float) -> None:
        assert num_workers > 0 and timeout_s > 0, f"a pool needs workers and time, got {num_workers} and {timeout_s} s"
        self._reward = reward
        self._custom = CustomReward(reward.custom_path, key=reward.key, timeout_s=timeout_s) if reward.custom_path else None
        self._remote = RemoteReward(reward.url, key=reward.key) if reward.url else None
        self._workers = [WorkerProcess(timeout_s=timeout_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # As many threads as workers: a thread that runs always finds an idle worker.
        self._threads = ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="reward")

    async def grade(self, sample: Sample) -> Verdict:
        """Return the verdict on one sample.

        Raises:
            RewardError: the sample has no label where one is needed, or a custom function or a reward server failed.
        """
        if self._custom is not None:
            return pick_score(await self._custom.grade(sample), self._reward.key)
        rm_type = self._reward.type_of(sample)
        if self._remote is not None and is_remote(rm_type):
            return pick_score(await self._remote.grade(sample, boxed=is_boxed(rm_type)), self._reward.key)
        outcome = find_grader(rm_type)(sample)
        if isinstance(outcome, Question):
            outcome = await asyncio.get_running_loop().run_in_executor(self._threads, self._settle, outcome)
        return pick_score(outcome, self._reward.key)

    async def grade_group(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Return one verdict for each sample of a group; a custom function gets the whole group at once (`--group-rm`)."""
        if self._custom is None:
            return list(await asyncio.gather(*(self.grade(sample) for sample in samples)))
        return [pick_score(verdict, self._reward.key) for verdict in await self._custom.grade_group(samples)]

    def close(self) -> None:
        """End the workers; a grading under way gets `grader_error`."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.release()

    def _settle(self, question: Question) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.settle(question)
        finally:
            self._idle.put(worker)
