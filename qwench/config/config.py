"""The whole configuration: one frozen section for each subject. Nothing writes to it after parsing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwench.config.sections.agent import AgentConfig
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig, ProfilingConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.model import ArchitectureConfig, ModelConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import AsyncConfig, RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The configuration of a run. Sections check themselves; `rules` has the rules between them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    asynchronous: AsyncConfig = field(default_factory=AsyncConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    timeouts: TimeoutConfig = field(default_factory=TimeoutConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    foreign: ForeignConfig = field(default_factory=ForeignConfig)

    @property
    def generates(self) -> bool:
        """Tell whether the run needs engines: not to fine-tune, and not to learn from recorded rollouts."""
        return self.algorithm.loss_type != "sft_loss" and self.debug.load_debug_rollout_data is None

    @property
    def generates_ahead(self) -> bool:
        """Tell whether engines generate while the trainer learns, so that neither can lend the other its devices."""
        return self.rollout.rollouts_ahead > 0 or self.asynchronous.fully_async

    @property
    def max_staleness(self) -> int:
        """Return how many weight versions a token may be older than the policy that learns from it."""
        asked = self.asynchronous.max_weight_staleness
        if not self.asynchronous.fully_async:
            return self.rollout.rollouts_ahead
        return 1 if asked is None else asked

    @property
    def max_age(self) -> int:
        """Return how many versions a token may be older where not each of them is published (--update-weights-interval)."""
        return self.max_staleness + self.rollout.update_weights_interval - 1

    @property
    def num_past_policies(self) -> int:
        """Return how many versions before the policy's own wait on the host, to score what they sampled."""
        if not self.algorithm.keep_old_actor:
            return 0
        return self.max_age

    @property
    def changes_finished_groups(self) -> bool:
        """Tell whether a function of the user sees groups between their filter and the learner: it may change their samples."""
        rollout = self.rollout
        return any(
            (
                rollout.rollout_function_path,
                rollout.rollout_sample_filter_path,
                rollout.rollout_all_samples_process_path,
                rollout.custom_rollout_log_function_path,
                self.foreign.custom_convert_samples_to_train_data_path,
            )
        )

    @property
    def critic_gpus(self) -> tuple[int, ...]:
        """Return the GPUs of the critic's own on each of its nodes; empty: it shares the policy's, or there is none."""
        nodes, per_node = self.critic.critic_num_nodes, self.critic.critic_num_gpus_per_node
        if nodes is None and per_node is None:
            return ()
        return (per_node or self.cluster.actor_num_gpus_per_node,) * (nodes or self.cluster.actor_num_nodes)

    @property
    def num_ranks(self) -> int:
        """Return the number of all trainer ranks: the policy's, then those of the critic's own."""
        return self.cluster.world_size + sum(self.critic_gpus)

    @property
    def embeds_engine(self) -> bool:
        """Tell whether the process of the only rank holds the engine. Several ranks on GPUs, and Ray, have engine servers."""
        alone = self.num_ranks == 1 and self.cluster.launcher != "ray"
        return alone and self.cluster.shares_devices and self.engine.facts.runs_in_process

    @property
    def keeps_requests(self) -> bool:
        """Tell whether publications change the weights of engines that have requests; adapters come apart from the weights."""
        is_kept = self.asynchronous.fully_async and self.asynchronous.pause_generation_mode != "abort"
        return is_kept and not self.training.deterministic_mode and self.lora.lora_publish != "adapter"

    @property
    def backend(self) -> Literal["megatron", "fsdp"]:
        """Return the training backend: the one given, or the one the layout needs."""
        return self.training.train_backend or ("megatron" if self.parallel.layout.model_ranks > 1 else "fsdp")
