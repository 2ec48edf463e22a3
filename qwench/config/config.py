"""The whole configuration: one frozen section for each subject. Nothing writes to it after parsing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qwench.config.algorithm import AlgorithmConfig
from qwench.config.architecture import ArchitectureConfig
from qwench.config.checkpoint import CheckpointConfig
from qwench.config.cluster import ClusterConfig
from qwench.config.compat import check_supported
from qwench.config.data import DataConfig
from qwench.config.debug import DebugConfig
from qwench.config.engine import EngineConfig
from qwench.config.evaluation import EvalConfig
from qwench.config.logging import LoggingConfig
from qwench.config.model import ModelConfig
from qwench.config.optimizer import OptimizerConfig
from qwench.config.parallel import ParallelConfig
from qwench.config.resolved import Resolved, resolve
from qwench.config.reward import RewardConfig
from qwench.config.rollout import RolloutConfig
from qwench.config.rules import check_sections
from qwench.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run is told; sections check themselves, and what holds between them is checked here."""

    model: ModelConfig = field(default_factory=ModelConfig)
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        check_supported(self)
        check_sections(self)

    @property
    def backend(self) -> Literal["megatron", "fsdp"]:
        """Return the training backend: the one given, or the one the layout needs."""
        return self.training.train_backend or ("megatron" if self.parallel.model_parallel_size > 1 else "fsdp")

    def resolve(self) -> Resolved:
        """Return the values that follow from those given; needs no device, and no file but that of --eval-config.

        Raises:
            ConfigError: --rollout-batch-size was not given, or --eval-config cannot be read.
        """
        return resolve(self)
