"""Where messages and metrics go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Log level, sinks of metrics and optional extra metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of messages on the console, in driver.log and in the logs of ranks."""
    log_dir: Path | None = None
    """Folder of metrics.jsonl, driver.log and TensorBoard files. None: the folder of --save, else no files."""
    use_tensorboard: bool = False
    """Write TensorBoard files."""
    tb_project_name: str | None = None
    """First level of the TensorBoard folder under --log-dir."""
    tb_experiment_name: str | None = None
    """Second level of the TensorBoard folder under --log-dir."""
    use_wandb: bool = False
    """Log to Weights & Biases (needs the package wandb)."""
    wandb_project: str | None = None
    """Project."""
    wandb_group: str | None = None
    """Group, and name of the run."""
    wandb_team: str | None = None
    """Team (entity)."""
    wandb_key: str | None = None
    """API key; better given by the environment variable WANDB_API_KEY."""
    wandb_host: str | None = None
    """Address of a server of your own."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """None: Weights & Biases decides."""
    wandb_dir: Path | None = None
    """Folder of its local files."""
    wandb_run_id: str | None = None
    """Run to continue."""
    log_passrate: bool = False
    """Log pass@k over the groups of each rollout."""
    log_multi_turn: bool = False
    """Log the number of turns and their lengths."""
    log_correct_samples: bool = False
    """Log the lengths of correct responses apart."""
    log_reward_category: str | None = None
    """Log the share of samples by this value of their reward's record. None: off."""

    def __post_init__(self) -> None:
        if self.use_wandb and self.wandb_project is None:
            raise ConfigError("--use-wandb needs a project; give --wandb-project")
