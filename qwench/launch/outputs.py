"""What a run writes: checkpoints, logs and recorded rollouts. Nothing of another run, or of the user, is replaced.

A log folder carries `qwench_logs.json` and a recorded rollout a line with the run's name. The name is the folder of --save, so
that the same command goes on with its own files; without --save every start is another run.

A run holds a lock on each of these places while it lives (`files.FolderLock`); beside the files where a flag names a template.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path

from qwench.checkpoints.best import Criterion
from qwench.checkpoints.folders import starting_weights
from qwench.checkpoints.formats.sources import find_format, fingerprint, open_weights
from qwench.checkpoints.manager import CheckpointManager
from qwench.config.config import Config
from qwench.config.config_text import CONFIG_FILE, as_yaml, flag_values
from qwench.config.sections.logging import LoggingConfig
from qwench.errors import ConfigError
from qwench.files import LOCK, FolderLock, claim_folder, foreign_names, trouble, write_atomically, written
from qwench.foreign.args import make_args
from qwench.foreign.megatron_hooks import after_save
from qwench.launch.inputs import Inputs
from qwench.models.hf import write_hf_checkpoint
from qwench.models.hf_weights import has_weights
from qwench.observability.dumps import run_of, save_rollout, save_trajectories
from qwench.observability.log import DRIVER_LOG, write_driver_log
from qwench.observability.metrics import MetricGate, MetricLog, Sink
from qwench.observability.processes import STACKS
from qwench.observability.prometheus import PrometheusSink
from qwench.observability.run_report import RunReport
from qwench.observability.timing import PhaseTimer
from qwench.observability.tracking import METRICS, JsonlSink, MlflowSink, TensorBoardSink, WandbSink, check_metrics_file
from qwench.rewards.second_grader import DISAGREEMENTS, list_disagreements, read_disagreements
from qwench.samples import Json, Rollout
from qwench.training.process_group import barrier
from qwench.wire.portions import WeightBucket

_MARKER = "qwench_logs.json"
_WITHOUT_METRICS = (DRIVER_LOG, CONFIG_FILE, STACKS, DISAGREEMENTS, LOCK, "ranks", "engines")
"""What a run has written into its log folder before its first metrics."""
_DETAILS = ("rollout_data", "train_data")
"""The folders that --dump-details makes for records in the one that it names."""


def open_outputs(inputs: Inputs, timer: PhaseTimer, *, writes: bool = True) -> tuple[CheckpointManager, str, ExitStack]:
    """Open the checkpoints, then the logs: before, a folder may belong to another run.

    Args:
        writes: a dry run checks the folders only.

    Returns:
        The checkpoints; the run's name; the locks of the folders, which it releases when closed.
    """

    def write_hf(folder: Path, buckets: Iterator[WeightBucket]) -> None:
        template = None if inputs.config.data.chat_template_path is None else str(inputs.tokenizer.chat_template)
        write_hf_checkpoint(folder, buckets, source=inputs.model_folder, chat_template=template)

    checkpoints = CheckpointManager(
        inputs.config.checkpoint,
        run_identity(inputs),
        inputs.console,
        write_hf=write_hf,
        timer=timer,
        is_main=inputs.is_main and writes,
        flags=flag_values(inputs.config),
        steps_per_rollout=inputs.plan.batch.num_steps_per_rollout,
        best=_best(inputs),
        barrier=barrier,
        after_save=after_save(inputs.config.foreign, partial(make_args, inputs.config, inputs.plan, host="", port=0)),
    )
    held = ExitStack()
    run_name = claim_outputs(inputs.config, held, writes=writes) if inputs.is_main else ""
    log_dir = inputs.plan.log_dir
    if inputs.is_main and log_dir is not None:
        check_metrics_file(log_dir / METRICS)
        if inputs.config.reward.second_grader is not None and (listed := log_dir / DISAGREEMENTS).is_file():
            list(read_disagreements(listed))  # else the run would end where it first adds to the file
    if inputs.is_main and writes:
        open_logs(inputs.config, log_dir)
    return checkpoints, run_name, held


def claim_outputs(config: Config, held: ExitStack, *, writes: bool = True) -> str:
    """Make the folders of --log-dir and of recorded rollouts this run's, and return the run's name.

    Args:
        held: gives the places free for other processes.
        writes: a dry run checks the folders only.

    Raises:
        ConfigError: they hold what another run, or no run, wrote, or another process has them. Nothing was changed.
    """
    checkpoint, log_dir = config.checkpoint, config.logging.log_dir
    names = [str(folder.resolve()) for folder in (checkpoint.save, checkpoint.load) if folder is not None]
    if checkpoint.save is None:
        since = datetime.now().astimezone().isoformat()
        names.insert(0, f"process {os.getpid()} on {platform.node()} since {since}")
    _check_files(log_dir or checkpoint.save)
    for flag, files in config.debug.records.items():
        _check_dumps(Path(files), names, own=[*_outputs(config)], flag=flag)
    for flag, template in (("--save-hf", checkpoint.save_hf), *config.debug.records.items()):
        if template is not None and writes:
            _lock_template(template, held, flag=flag)
    own = partial(_own, names=names, others=[*_outputs(config)], held=held, writes=writes)
    folder = None if config.logging.tensorboard_dir is None else tensorboard_folder(config.logging, log_dir)
    if folder is not None and not _is_one_of(folder, checkpoint.save, log_dir):
        own(folder, flag="--tensorboard-dir", holds="the curves of another run")
    if log_dir is not None and not _is_one_of(log_dir, checkpoint.save):
        metrics = log_dir / METRICS
        leftovers = _WITHOUT_METRICS if metrics.is_file() and metrics.stat().st_size else (*_WITHOUT_METRICS, METRICS)
        own(log_dir, flag="--log-dir", holds="the metrics of another run", leftovers=leftovers)
    return names[0]


def open_logs(config: Config, log_dir: Path | None) -> None:
    """Write the resolved configuration into --save and the folder of the metrics, and open the log there.

    Raises:
        OutputError: a disk is full.
    """
    for folder, flag in {log_dir: "--log-dir", config.checkpoint.save: "--save"}.items():
        if folder is not None:
            with written(f"{flag} {folder}", folder):
                write_atomically(folder / CONFIG_FILE, as_yaml(config))
                if folder == log_dir:
                    write_driver_log(folder)


def tensorboard_folder(flags: LoggingConfig, log_dir: Path | None) -> Path | None:
    """Return the folder of --use-tensorboard; None: it is not asked for.

    Args:
        log_dir: of the run: --log-dir or --save.
    """
    base = flags.tensorboard_dir or (None if log_dir is None else log_dir / "tensorboard")
    if not flags.use_tensorboard or base is None:
        return None
    return base.joinpath(*(level for level in (flags.tb_project_name, flags.tb_experiment_name) if level is not None))


def recorders(inputs: Inputs, run_name: str) -> Iterator[Callable[[Rollout], object]]:
    """Yield what records each rollout: its dump, its messages, and the answers that two graders judge differently."""
    template, log_dir = inputs.config.debug.save_debug_rollout_data, inputs.plan.log_dir
    if (trajectories := inputs.config.debug.save_debug_trajectory_data) is not None:
        yield partial(save_trajectories, trajectories)
    if template is not None:
        yield partial(save_rollout, template, run=run_name)
    if inputs.config.reward.second_grader is not None and log_dir is not None:
        yield partial(list_disagreements, log_dir / DISAGREEMENTS)


def metric_log(inputs: Inputs, report: RunReport) -> MetricLog:
    """Return the log of the main rank with every sink the flags ask for; other ranks log nothing."""
    flags, sinks = inputs.config.logging, list[Sink]()
    if inputs.is_main:
        sinks.append(report)
        if inputs.plan.log_dir is not None:
            sinks.append(JsonlSink(inputs.plan.log_dir / METRICS, flag="--log-dir" if flags.log_dir else "--save"))
        if (folder := tensorboard_folder(flags, inputs.plan.log_dir)) is not None:
            sinks.append(TensorBoardSink(folder))
        if flags.use_wandb:
            sinks.append(
                WandbSink(
                    project=flags.wandb_project,
                    group=flags.wandb_group,
                    team=flags.wandb_team,
                    mode=flags.wandb_mode,
                    folder=flags.wandb_dir,
                    run_id=flags.wandb_run_id,
                    host=flags.wandb_host,
                    key=flags.wandb_key or os.environ.get("WANDB_API_KEY"),
                    steps_per_rollout=inputs.plan.batch.num_steps_per_rollout if flags.wandb_always_use_train_step else 1,
                )
            )
        if flags.use_mlflow:
            sinks.append(
                MlflowSink(
                    uri=flags.mlflow_tracking_uri,
                    experiment=flags.mlflow_experiment_name,
                    run_name=flags.mlflow_run_name or flags.wandb_group,
                    run_id=flags.mlflow_run_id,
                )
            )
        if flags.use_prometheus:
            name = flags.prometheus_run_name or flags.wandb_group or "qwench"
            sinks.append(PrometheusSink(port=flags.prometheus_port, run_name=name))
    return MetricLog(sinks, gate=_metric_gate(inputs), num_steps_per_rollout=inputs.plan.batch.num_steps_per_rollout)


def _metric_gate(inputs: Inputs) -> MetricGate | None:
    """Return the value that the run must reach; ranks without metrics need not."""
    key, threshold = inputs.config.evaluation.ci_metric_checker_key, inputs.config.evaluation.ci_metric_checker_threshold
    if key is None or threshold is None or not inputs.is_main:
        return None
    return MetricGate(key, threshold)


def _check_files(folder: Path | None) -> None:
    files = [] if folder is None else [folder / METRICS, folder / DRIVER_LOG]
    for path in files:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, and the run writes a file of that name; move it away.")


def _own(
    folder: Path,
    *,
    names: Sequence[str],
    others: Sequence[Path],
    held: ExitStack,
    writes: bool,
    flag: str,
    holds: str,
    leftovers: Sequence[str] = (),
) -> None:
    """Make a folder this run's. It is locked before it is marked, so that of two runs that start at once one is refused.

    Args:
        names: of the run.
        others: where else the run writes.
        holds: what another run has in it.
        leftovers: what a run has written there before its first metrics; the corrected command may have such a folder.
    """
    marker, own = folder / _MARKER, [*others, folder / LOCK]
    claim = partial(claim_folder, folder, [{"run": n} for n in names], marker=_MARKER, flag=flag, held=holds, writer="run")
    if writes:
        if not marker.is_file():
            claim(own=own, writes=False)  # what others have there is not touched
        _lock(folder, held, flag=flag)
    spare = [*own, *(folder / name for name in leftovers)]
    if marker.is_file() and not foreign_names(folder, own=[marker, *spare]):
        if not writes:
            return
        marker.unlink()
        own = spare
    claim(own=own, writes=writes)


def _is_one_of(folder: Path, *others: Path | None) -> bool:
    return any(other is not None and folder.resolve() == other.resolve() for other in others)


def own_results(folder: Path, held: ExitStack) -> None:
    """Lock --eval-output, which was checked.

    Raises:
        ConfigError: another process has it.
    """
    _lock(folder, held, flag="--eval-output")


def _lock(folder: Path, held: ExitStack, *, flag: str, name: str = LOCK, shown: str | None = None) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.callback(FolderLock(folder, flag=flag, name=name, shown=shown).release)
    except OSError as error:
        raise ConfigError(
            f"{flag} {shown or folder} cannot be written to ({trouble(error, folder)}); give another folder."
        ) from error


def _lock_template(template: str, held: ExitStack, *, flag: str) -> None:
    """Lock a file beside those that the template names: another template may share their folder."""
    path = Path(template)
    parent = next(folder for folder in path.parents if "{rollout_id}" not in str(folder))
    name = str(path.relative_to(parent)).replace("/", "-")
    _lock(parent, held, flag=flag, name=f".{name}.{LOCK}", shown=template)


def _outputs(config: Config) -> Iterator[Path]:
    """Yield where the run writes; such a folder inside another one of them is not foreign."""
    for path in (
        config.checkpoint.save,
        config.checkpoint.save_hf,
        *config.debug.records.values(),
        config.logging.log_dir,
        config.logging.tensorboard_dir if config.logging.use_tensorboard else None,
    ):
        if path is not None:
            yield Path(path)


def _check_dumps(template: Path, names: Sequence[str], *, own: Sequence[Path], flag: str) -> None:
    folder = template.parent
    if folder.name in _DETAILS and (foreign := foreign_names(folder.parent, own=own)):
        _refuse_model(folder.parent, flag)
        raise ConfigError(
            f"--dump-details {folder.parent} holds files that no run wrote ({', '.join(foreign[:3])}); "
            "give an empty or new folder."
        )
    _refuse_model(folder, flag)
    pattern = re.compile(re.escape(template.name).replace(re.escape("{rollout_id}"), r"\d+"))
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if pattern.fullmatch(path.name) and run_of(path) not in names:
            raise ConfigError(f"{flag}: {path} is of another run; give another folder.")


def _refuse_model(folder: Path, flag: str) -> None:
    if (folder / "config.json").is_file():
        raise ConfigError(f"{flag}: {folder} is the folder of a model; give another folder.")


def run_identity(inputs: Inputs) -> dict[str, Json]:
    """Return what a run and the checkpoint it resumes from must share."""
    model = inputs.plan.model
    facts: dict[str, Json] = {
        "model_type": model.model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "loss_type": inputs.config.algorithm.loss_type,
    }
    return facts | _adapter_identity(inputs)


def _adapter_identity(inputs: Inputs) -> dict[str, Json]:
    """Return what adapters and the checkpoint they resume from must share, their base model among it."""
    lora = inputs.config.lora
    if not lora.enabled:
        return {}
    base = starting_weights(inputs.config.checkpoint) or inputs.model_folder
    facts: dict[str, Json] = {
        "lora_rank": lora.rank,
        "lora_scale": lora.scale,
        "lora_init": lora.lora_init,
        "target_modules": ",".join(lora.targets),
    }
    if lora.lora_base != "auto":
        facts["lora_base"] = lora.lora_base
    if (form := find_format(base)) in ("fsdp", "torch_dist") or (form == "hf" and has_weights(base)):  # others are refused
        facts["base_weights"] = fingerprint(open_weights(base, inputs.plan.model))
    return facts


def _best(inputs: Inputs) -> Criterion | None:
    """Return by what --keep-best compares checkpoints: the score of the first evaluation set, or its loss."""
    if not inputs.config.checkpoint.keep_best:
        return None
    name, fine_tunes = inputs.plan.eval_sets[0].name, inputs.plan.fine_tunes
    return Criterion(metric=f"eval/{name}/loss" if fine_tunes else f"eval/{name}", higher_is_better=not fine_tunes)
