"""Engines, rollouts and evaluation of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwench.data.prompts import PromptSource
from qwench.engines.embedded.architecture import architecture_from_config
from qwench.engines.embedded.engine import EmbeddedEngine
from qwench.engines.embedded.settings import EmbeddedSettings
from qwench.engines.event_loop import EventLoopThread
from qwench.engines.pool import EnginePool
from qwench.launch.inputs import Inputs
from qwench.models.hf import stop_token_ids
from qwench.rewards.pool import RewardPool
from qwench.rewards.registry import build_pool
from qwench.rollout.build import Surroundings, build_evaluator, build_stream
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


def build_generation(inputs: Inputs, *, with_weights: bool) -> Generation:
    """Make the embedded engine and the graders.

    Args:
        with_weights: load the checkpoint now; else the first publication brings the weights.
    """
    settings = embedded_settings(inputs)
    if with_weights:
        engine = EmbeddedEngine.from_checkpoint(inputs.model_folder, settings, tokenizer=inputs.tokenizer)
    else:
        engine = EmbeddedEngine(
            architecture_from_config(inputs.hf_config),
            settings,
            eos_ids=frozenset(stop_token_ids(inputs.model_folder, inputs.tokenizer)),
            tokenizer=inputs.tokenizer,
        )
    reward = inputs.config.reward
    eval_reward = replace(reward, reward_key=inputs.resolved.eval_reward_key)
    grader = build_pool(reward)
    return Generation(
        inputs=inputs,
        engines=EnginePool([engine], EventLoopThread()),
        grader=grader,
        eval_grader=grader if eval_reward == reward else build_pool(eval_reward),
    )


def embedded_settings(inputs: Inputs) -> EmbeddedSettings:
    """Translate the flags that concern the embedded engine."""
    engine = inputs.config.engine
    return EmbeddedSettings(
        page_size=engine.embedded_page_size,
        max_running_requests=engine.embedded_max_running_requests,
        prefill_chunk_tokens=engine.embedded_prefill_chunk_tokens,
        kv_cache_tokens=engine.embedded_kv_cache_tokens,
        mem_fraction=engine.embedded_mem_fraction,
        dtype=inputs.dtype,
        device=str(inputs.device),
        inline=inputs.config.training.deterministic_mode,
        seed=inputs.config.data.rollout_seed,
    )
