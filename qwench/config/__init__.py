"""Configuration: one frozen dataclass for each section, turned into flat flags."""

from qwench.config.config import Config
from qwench.config.plan import RunPlan, plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.architecture import ArchitectureConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.optimizer import OptimizerConfig
from qwench.config.sections.parallel import ParallelConfig
from qwench.config.sections.references import ReferencesConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.timeouts import TimeoutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.config.sections.verbs import ServeConfig, ServerConfig

__all__ = [
    "AlgorithmConfig",
    "ArchitectureConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "EngineConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReferencesConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunPlan",
    "ServeConfig",
    "ServerConfig",
    "TimeoutConfig",
    "TrainingConfig",
    "plan_run",
]
