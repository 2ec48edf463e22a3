"""Configuration: one frozen dataclass for each section, turned into flat flags."""

from qwench.config.algorithm import AlgorithmConfig
from qwench.config.architecture import ArchitectureConfig
from qwench.config.checkpoint import CheckpointConfig
from qwench.config.cluster import ClusterConfig
from qwench.config.config import Config
from qwench.config.data import DataConfig
from qwench.config.debug import DebugConfig
from qwench.config.engine import EngineConfig
from qwench.config.evaluation import EvalConfig
from qwench.config.logging import LoggingConfig
from qwench.config.model import ModelConfig
from qwench.config.optimizer import OptimizerConfig
from qwench.config.parallel import ParallelConfig
from qwench.config.resolved import Resolved
from qwench.config.reward import RewardConfig
from qwench.config.rollout import RolloutConfig
from qwench.config.serve import ServeConfig, ServerConfig
from qwench.config.training import TrainingConfig

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
    "Resolved",
    "RewardConfig",
    "RolloutConfig",
    "ServeConfig",
    "ServerConfig",
    "TrainingConfig",
]
