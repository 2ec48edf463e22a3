"""The built-in rollout and evaluation, for functions of users that extend them.

    slime.rollout.sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=False)
    miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn       a class to derive from

Both take prompts from the run: its --prompt-data, or the source of --data-source-path.
"""

from __future__ import annotations

from qwench.errors import QwenchError
from qwench.foreign.sample import (
    Foreign,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from qwench.foreign.session import GenerateState, current_session, run


async def make_rollout(rollout_id: int, data_source: Foreign) -> RolloutFnTrainOutput:
    """Return the built-in rollout.

    Raises:
        QwenchError: no rollout function is running, or the prompts are not those of the run.
    """
    session = current_session()
    if session.make_rollout is None:
        raise QwenchError("the built-in rollout is there for functions of --rollout-function-path, while they run.")
    if data_source is not session.given_source:
        raise QwenchError("the built-in rollout takes prompts from the run; give it the data source that the function got.")
    return await session.make_rollout(rollout_id)


async def evaluate() -> RolloutFnEvalOutput:
    """Return the built-in evaluation of all sets.

    Raises:
        QwenchError: no evaluation is running.
    """
    session = current_session()
    if session.evaluate is None:
        raise QwenchError("the built-in evaluation is there for functions of --eval-function-path, while they run.")
    return await session.evaluate()


def generate_rollout(
    args: Foreign, rollout_id: int, data_source: Foreign, evaluation: bool = False
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Make a rollout, or evaluate, from a plain function in a thread."""
    return run(evaluate()) if evaluation else run(make_rollout(rollout_id, data_source))


class InferenceRolloutFn:
    """The built-in rollout as a class of miles' form."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002  # theirs
        self.data_source, self.state = input.data_source, GenerateState(input.args)

    async def __call__(self, input: Foreign) -> RolloutFnTrainOutput | RolloutFnEvalOutput:  # noqa: A002
        """Make a rollout, or evaluate."""
        return await (self._call_eval(input) if input.evaluation else self._call_train(input))

    async def _call_train(self, input: RolloutFnTrainInput) -> RolloutFnTrainOutput:  # noqa: A002
        return await make_rollout(input.rollout_id, self.data_source)

    async def _call_eval(self, input: RolloutFnEvalInput) -> RolloutFnEvalOutput:  # noqa: A002
        return await evaluate()
