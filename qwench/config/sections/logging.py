"""Messages and metrics: levels, folders and services."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwench.config.limits import MAX_PORT, check_not_negative, check_positive
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Log level, sinks of metrics and optional extra metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the messages on the console, in driver.log and in the logs of the ranks."""
    log_dir: Path | None = None
    """Folder of metrics.jsonl, driver.log and TensorBoard files. None: the folder of --save. Without both, only
    engine servers write logs, into the folder for temporary files that the console names."""
    show_samples: int | None = None
    """Show this many sampled responses of each rollout, with reward and reason. None: 1 on a terminal, else 0."""
    table_interval: int | None = None
    """Show a table of the metrics every this many rollouts (qwench sft: batches). None: no table, one line each."""
    use_tensorboard: bool = False
    """Write TensorBoard files."""
    tensorboard_dir: Path | None = None
    """Folder of the event files of --use-tensorboard. None: tensorboard/ in the run's folder."""
    tb_project_name: str | None = None
    """First level of the TensorBoard folder under --log-dir."""
    tb_experiment_name: str | None = None
    """Second level of the TensorBoard folder under --log-dir."""
    use_wandb: bool = False
    """Log to Weights & Biases. Needs the package wandb and --wandb-project."""
    wandb_project: str | None = None
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group, and the name of the run."""
    wandb_team: str | None = None
    """Weights & Biases team (entity)."""
    wandb_key: str | None = None
    """Weights & Biases API key. The environment variable WANDB_API_KEY is safer."""
    wandb_host: str | None = None
    """URL of a self-hosted Weights & Biases server."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Mode of Weights & Biases. None: its own default."""
    wandb_dir: Path | None = None
    """Folder of the local files of Weights & Biases."""
    wandb_run_id: str | None = None
    """ID of the Weights & Biases run to continue."""
    wandb_always_use_train_step: bool = False
    """Draw every metric of Weights & Biases over the steps of the optimizer, those of rollouts and evaluations, too."""
    use_mlflow: bool = False
    """Log to MLflow. Needs the package mlflow."""
    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server, or a folder. None: MLflow's default, for example MLFLOW_TRACKING_URI of the environment."""
    mlflow_experiment_name: str = "qwench"
    """Experiment of the MLflow run."""
    mlflow_run_name: str | None = None
    """Name of the MLflow run. None: --wandb-group, else one that MLflow makes up."""
    mlflow_run_id: str | None = None
    """ID of the MLflow run to continue."""
    use_prometheus: bool = False
    """Serve the newest value of every metric over HTTP for Prometheus, at /metrics of --prometheus-port."""
    prometheus_port: int = 9090
    """Port of --use-prometheus."""
    prometheus_run_name: str | None = None
    """Label run_name of every value. None: --wandb-group, else qwench."""
    mfu_peak_tflops: float | None = None
    """Peak TFLOP/s of a trainer's GPU. With it perf/actor_train_mfu, the share that training reaches, is logged. None: off."""
    log_passrate: bool = False
    """Log pass@k over the groups of each rollout."""
    log_multi_turn: bool = False
    """Log the number of turns and their lengths."""
    log_correct_samples: bool = False
    """Log the lengths of correct responses separately."""
    log_reward_category: str | None = None
    """Log the share of samples by this entry of the reward's record. None: off."""

    def __post_init__(self) -> None:
        check_not_negative("--show-samples", self.show_samples)
        if not 1 <= self.prometheus_port <= MAX_PORT:
            raise ConfigError(f"--prometheus-port must be from 1 to {MAX_PORT}, got {self.prometheus_port}")
        check_positive("--mfu-peak-tflops", self.mfu_peak_tflops)
        check_positive("--table-interval", self.table_interval)
        if self.use_wandb and self.wandb_project is None:
            raise ConfigError("--use-wandb needs a project; give --wandb-project")
