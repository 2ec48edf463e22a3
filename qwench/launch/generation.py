"""Engines, rollouts and evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwench.data.prompts import PromptSource
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.servers import Server
from qwench.launch.engines import build_pool
from qwench.launch.inputs import Inputs
from qwench.rewards.pool import RewardPool
from qwench.rewards.registry import build_pool as build_reward_pool
from qwench.rollout.assembly import Surroundings, build_evaluator, build_stream
from qwench.rollout.evaluate import Evaluator
from qwench.rollout.stream import RolloutStream
from qwench.samples import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """The engines and graders that rollouts and evaluations share."""

    inputs: Inputs
    engines: EnginePool
    grader: RewardPool
    eval_grader: RewardPool
    """The same one, unless evaluations have another --eval-reward-key."""

    def stream(self, source: PromptSource, *, num_rollouts: int) -> RolloutStream:
        """Return the stream of training rollouts over `source`."""
        config = self.inputs.config
        return build_stream(
            config.rollout,
            config.reward,
            config.logging,
            config.debug,
            engines=self.engines,
            source=source,
            grader=self.grader,
            num_rollouts=num_rollouts,
            surroundings=self.surroundings,
        )

    def evaluator(self, prompts: Mapping[str, Sequence[Prompt]]) -> Evaluator:
        """Return the evaluator of the sets in `prompts`."""
        config = self.inputs.config
        return build_evaluator(
            config.evaluation,
            config.rollout,
            config.reward,
            config.logging,
            settings=self.inputs.resolved.eval_sets,
            prompts=prompts,
            grader=self.eval_grader,
            surroundings=self.surroundings,
        )

    @property
    def surroundings(self) -> Surroundings:
        """Return what the flags say of the place where samples are made."""
        config = self.inputs.config
        num_engines = len(self.engines.engines)
        return Surroundings(
            tokenizer=self.inputs.tokenizer,
            console=self.inputs.console,
            model_context_len=self.inputs.hf_config.max_position_embeddings,
            concurrency=config.engine.sglang_server_concurrency * num_engines,
            num_gpus=num_engines * config.cluster.rollout_num_gpus_per_engine,
            seed=config.data.rollout_seed,
            seed_by_position=config.engine.sglang_enable_deterministic_inference,
            deterministic=config.training.deterministic_mode,
        )

    def close(self) -> None:
        """End graders and engines."""
        self.grader.close()
        self.eval_grader.close()
        self.engines.close()


def build_generation(
    inputs: Inputs, *, with_weights: bool, servers: Sequence[Server] | None = None, token: str | None = None
) -> Generation:
    """Make the engines (see `engines.build_pool`) and the graders."""
    reward = inputs.config.reward
    eval_reward = replace(reward, reward_key=inputs.resolved.eval_reward_key)
    engines = build_pool(inputs, with_weights=with_weights, servers=servers, token=token)
    grader = build_reward_pool(reward)
    return Generation(
        inputs=inputs,
        engines=engines,
        grader=grader,
        eval_grader=grader if eval_reward == reward else build_reward_pool(eval_reward),
    )
