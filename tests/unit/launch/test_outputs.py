"""What a run writes besides its checkpoints is its own: nothing of another run, or of the user, is replaced."""

import json
import logging
import zlib
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qwench.checkpoints.best import Criterion
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.files import claim_folder
from qwench.launch import outputs
from qwench.launch.inputs import Inputs
from qwench.launch.outputs import claim_outputs, open_logs, own_results, run_identity
from qwench.observability.dumps import save_rollout
from qwench.samples import Rollout
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer
from tests.forked import Forked
from tests.unit.checkpoints.formats.test_sources import CONFIG, MODEL, write_fsdp, write_hf, write_torch_dist
from tests.unit.launch.holder import hold


def claim(
    *,
    save: Path | None = None,
    load: Path | None = None,
    dumps: str | None = None,
    writes: bool = True,
    **logs: Path | str | None,
) -> str:
    return claim_outputs(
        Config(
            checkpoint=CheckpointConfig(save=save, load=load),
            logging=LoggingConfig(use_tensorboard="tensorboard_dir" in logs, **logs),
            debug=DebugConfig(save_debug_rollout_data=dumps),
        ),
        ExitStack(),
        writes=writes,
    )


def test_curves_of_another_run_or_of_no_run_are_not_mixed_with(tmp_path):
    curves = tmp_path / "curves"
    claim(tensorboard_dir=curves)
    claim(tensorboard_dir=curves, writes=False)  # nothing was written yet
    (curves / "train").mkdir()
    for writes in (True, False):
        with pytest.raises(
            ConfigError, match=r"^--tensorboard-dir .*curves holds the curves of another run; give another folder"
        ):
            claim(tensorboard_dir=curves, writes=writes)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    with pytest.raises(ConfigError, match=r"^--tensorboard-dir .*model holds files that no run wrote \(config.json\)"):
        claim(tensorboard_dir=model)


@pytest.mark.parametrize(
    ("flags", "log_dir", "folder"),
    [
        ({}, Path("log"), Path("log/tensorboard")),
        ({"tensorboard_dir": Path("curves")}, Path("log"), Path("curves")),
        ({"tensorboard_dir": Path("curves")}, None, Path("curves")),
        ({}, None, None),
        ({"tensorboard_dir": Path("curves"), "use_tensorboard": False}, Path("log"), None),
        ({"tb_experiment_name": "e"}, Path("log"), Path("log/tensorboard/e")),
        ({"tb_project_name": "p", "tb_experiment_name": "e"}, Path("log"), Path("log/tensorboard/p/e")),
    ],
)
def test_curves_are_in_their_own_folder_or_below_the_logs(flags, log_dir, folder):
    assert outputs.tensorboard_folder(LoggingConfig(**{"use_tensorboard": True, **flags}), log_dir) == folder


def test_curves_may_lie_beside_above_or_below_what_the_run_writes(tmp_path):
    for save, log_dir, curves in (("a", "a/logs", "a"), ("b", "b", "b/curves"), ("c/run", "c/log", "c"), ("d", "e", "e")):
        runs = set()
        for _ in range(2):
            runs.add(claim(save=tmp_path / save, log_dir=tmp_path / log_dir, tensorboard_dir=tmp_path / curves))
            (tmp_path / curves / "train").mkdir(exist_ok=True)
            (tmp_path / log_dir / "metrics.jsonl").write_text('{"train/step": 0}\n')
        assert len(runs) == 1, "the second is the first one, continued"


def test_the_logs_of_a_run_without_save_are_of_that_run_alone(tmp_path):
    claim(log_dir=tmp_path / "log")
    (tmp_path / "log" / "metrics.jsonl").write_text('{"train/step": 0}\n')
    with pytest.raises(ConfigError, match=r"^--log-dir .*log holds the metrics of another run; give another folder"):
        claim(log_dir=tmp_path / "log")


def test_the_log_folder_of_a_run_that_failed_before_its_first_step_may_be_used_again(tmp_path):
    for _ in range(3):
        run = claim(log_dir=tmp_path)
        assert json.loads((tmp_path / "qwench_logs.json").read_text()) == {"run": run}
        for name in ("driver.log", "metrics.jsonl", "qwench_config.yaml", "stacks.txt", "second_grader.jsonl", "qwench.lock"):
            (tmp_path / name).touch()
        for name in ("ranks", "engines"):
            (tmp_path / name).mkdir(exist_ok=True)


def test_driver_log_has_each_line_once_where_save_is_the_folder_of_the_metrics_too(tmp_path):
    config = Config(checkpoint=CheckpointConfig(save=tmp_path))
    package = logging.getLogger("qwench")
    before = list(package.handlers)
    try:
        open_logs(config, tmp_path)
        package.warning("once")
    finally:
        for handler in [handler for handler in package.handlers if handler not in before]:
            package.removeHandler(handler)
            handler.close()
    assert (tmp_path / "driver.log").read_text().count("once") == 1


def test_the_same_save_goes_on_with_its_logs_and_another_one_does_not(tmp_path):
    log = tmp_path / "log"
    for _ in range(2):  # killed before its first checkpoint, and started again
        claim(save=tmp_path / "a", log_dir=log)
    (log / "metrics.jsonl").write_text('{"train/step": 0}\n')
    with pytest.raises(ConfigError, match="another run"):
        claim(save=tmp_path / "b", log_dir=log)


def test_a_run_that_loads_from_the_folder_of_the_logs_may_go_on_with_them(tmp_path):
    log = tmp_path / "log"
    claim(save=tmp_path / "a", log_dir=log)
    (log / "metrics.jsonl").write_text('{"train/step": 0}\n')
    for _ in range(2):
        assert claim(save=tmp_path / "b", load=tmp_path / "a", log_dir=log) == str(tmp_path / "b")
    assert (log / "metrics.jsonl").read_text() == '{"train/step": 0}\n'


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "config.json"])
def test_a_log_folder_with_other_files_is_refused_and_stays_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"^--log-dir .* holds files that no run wrote \({name}\); give an empty or new"):
        claim(log_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folders_of_the_run_itself_may_lie_in_its_log_folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "dumps").mkdir()
    run = claim(save=tmp_path / "checkpoints", log_dir=tmp_path, dumps=str(tmp_path / "dumps" / "{rollout_id}.jsonl"))
    assert run == str(tmp_path / "checkpoints")
    assert json.loads((tmp_path / "qwench_logs.json").read_text()) == {"run": run}


def test_logs_in_the_folder_of_save_need_no_mark(tmp_path):
    (tmp_path / "iter_0000001").mkdir()  # whether --save is ours is checked where it is opened
    claim(save=tmp_path, log_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]


def test_dumps_of_another_run_are_not_replaced(tmp_path):
    dumps = str(tmp_path / "rollout_{rollout_id}.jsonl")
    (tmp_path / "prompts.jsonl").touch()
    run = claim(dumps=dumps)
    save_rollout(dumps, Rollout(rollout_id=7, groups=[]), run=run)
    with pytest.raises(ConfigError, match=r"^--save-debug-rollout-data: .*rollout_7.jsonl is of another run; give another"):
        claim(dumps=dumps)


def test_a_run_that_starts_again_replaces_its_own_dumps(tmp_path):
    dumps = str(tmp_path / "{rollout_id}.jsonl")
    save_rollout(dumps, Rollout(rollout_id=0, groups=[]), run=claim(save=tmp_path / "run", dumps=dumps))
    assert claim(save=tmp_path / "run", dumps=dumps) == str(tmp_path / "run")


def test_a_file_that_no_run_wrote_is_no_dump_to_replace(tmp_path):
    (tmp_path / "3.jsonl").write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"3.jsonl is of another run"):
        claim(save=tmp_path / "run", dumps=str(tmp_path / "{rollout_id}.jsonl"))


@pytest.mark.parametrize("dumps", ["{rollout_id}.jsonl", "rollout_data/{rollout_id}.jsonl"])
def test_dumps_do_not_go_into_a_models_folder(tmp_path, dumps):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ConfigError, match=r"^--save-debug-rollout-data: .* is the folder of a model; give another folder"):
        claim(dumps=str(tmp_path / dumps))


def test_the_folder_of_dump_details_holds_nothing_else(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match=r"^--dump-details .* holds files that no run wrote \(thesis.txt\)"):
        claim(dumps=str(tmp_path / "rollout_data" / "{rollout_id}.jsonl"))


def start_other_run(folder: Path) -> Forked:
    """Start a run that holds outputs below the folder; it says nothing before it does."""
    places = {name: folder / name for name in ("log", "curves", "results")} | {"save": folder / "a"}
    templates = {"hf": str(folder / "hf" / "{rollout_id}"), "dumps": str(folder / "dumps" / "{rollout_id}.jsonl")}
    other = Forked(folder / "other", partial(hold, **places, **templates))
    assert other.first_line() == "held"
    return other


def test_what_a_live_run_writes_is_refused_to_another_with_its_owner(tmp_path):
    hf, dumps, log = str(tmp_path / "hf" / "{rollout_id}"), str(tmp_path / "dumps" / "{rollout_id}.jsonl"), tmp_path / "log"
    curves = tmp_path / "curves"
    (tmp_path / "results").mkdir()

    def claim_with(save: str, **flags: object) -> None:
        checkpoint = CheckpointConfig(save=tmp_path / save, save_hf=flags.get("hf"))
        board = flags.get("curves")
        logging = LoggingConfig(log_dir=flags.get("log"), use_tensorboard=board is not None, tensorboard_dir=board)
        debug = DebugConfig(save_debug_rollout_data=flags.get("dumps"))
        with ExitStack() as held:
            claim_outputs(Config(checkpoint=checkpoint, logging=logging, debug=debug), held)

    other = start_other_run(tmp_path)
    try:
        for save, flags, words in (
            ("a", {"log": log}, f"--log-dir {log}"),
            ("b", {"log": log}, f"--log-dir {log}"),  # not yet with metrics: only the lock tells
            ("b", {"hf": hf}, f"--save-hf {hf}"),
            ("b", {"dumps": dumps}, f"--save-debug-rollout-data {dumps}"),
            ("b", {"curves": curves}, f"--tensorboard-dir {curves}"),
        ):
            with pytest.raises(ConfigError) as refused:
                claim_with(save, **flags)
            assert f"{words} is in use by process {other.pid} on " in str(refused.value)
        assert json.loads((curves / "qwench_logs.json").read_text()) == {"run": str(tmp_path / "a")}
        with pytest.raises(ConfigError, match=rf"--eval-output {tmp_path}/results is in use by process {other.pid}"):
            own_results(tmp_path / "results", ExitStack())
        claim_with("b", hf=str(tmp_path / "hf" / "other-{rollout_id}"), log=tmp_path / "other log")
    finally:
        other.kill()
    claim_with("a", hf=hf, dumps=dumps, log=log, curves=curves)  # a killed process leaves no lock behind


@pytest.mark.parametrize("flag", ["log", "curves"])
def test_of_two_runs_that_start_at_once_with_one_folder_the_second_is_refused(tmp_path, monkeypatch, flag):
    places = {"log": tmp_path / "log", "curves": tmp_path / "curves"}
    others: list[Forked] = []

    def check_then_another_run_comes(*args: object, **flags: object) -> None:
        claim_folder(*args, **flags)
        if not others:
            others.append(start_other_run(tmp_path))

    monkeypatch.setattr(outputs, "claim_folder", check_then_another_run_comes)
    mine = {"log_dir": places["log"]} if flag == "log" else {"log_dir": tmp_path / "b", "tensorboard_dir": places["curves"]}
    try:
        with pytest.raises(ConfigError, match=f"{places[flag]} is in use by process"):
            claim(save=tmp_path / "b", **mine)
    finally:
        for other in others:
            other.kill()
    assert json.loads((places[flag] / "qwench_logs.json").read_text()) == {"run": str(tmp_path / "a")}


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--save-debug-rollout-data .* cannot be written to"):
        claim(dumps=str(tmp_path / "file" / "{rollout_id}.jsonl"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "driver.log"])
@pytest.mark.parametrize("flag", ["save", "log_dir"])
def test_a_folder_with_the_name_of_a_file_of_the_run_is_named(tmp_path, flag, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder, and the run writes a file of that name; move it away"):
        claim(**{flag: tmp_path})


def inputs_with(folder: Path, **sections: object) -> Inputs:
    """Return the inputs of a run of a tiny model in `folder`."""
    config = Config(rollout=RolloutConfig(rollout_batch_size=2), **sections)
    return Inputs(
        config=config, plan=plan_run(config, MODEL), model_folder=folder, tokenizer=CharTokenizer(), hf_config=CONFIG,
        console=RecordingConsole(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip


def test_a_checkpoint_names_the_model_the_algorithm_and_the_adapters_of_its_run(tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")  # engines may have the weights
    model = {"model_type": "qwen3", "num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 12}
    assert run_identity(inputs_with(tmp_path)) == {**model, "loss_type": "policy_loss"}
    sft = AlgorithmConfig(loss_type="sft_loss")
    lora = LoraConfig(lora_rank=2, lora_alpha=6, target_modules="q_proj,down_proj")
    facts = {**model, "loss_type": "sft_loss", "lora_rank": 2, "lora_scale": 3.0, "lora_init": "kaiming"}
    facts |= {"target_modules": "q_proj,down_proj"}
    assert run_identity(inputs_with(tmp_path / "bare", algorithm=sft, lora=lora)) == facts

    def random_weights(seed: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in MODEL.parameter_shapes().items()}

    def checksum(weights: dict[str, torch.Tensor]) -> str:
        keys = [weights[f"model.layers.{layer}.self_attn.k_proj.weight"].flatten() for layer in (0, 2)]
        return f"{zlib.crc32(torch.cat(keys).float().numpy().tobytes()):08x}"

    given, *others = (random_weights(seed) for seed in range(3))
    folder = write_hf(tmp_path / "hf", given)
    rounded = inputs_with(folder, algorithm=sft, lora=replace(lora, lora_base="nf4"))
    assert run_identity(rounded) == {**facts, "lora_base": "nf4", "base_weights": checksum(given)}
    for write, weights in zip((write_fsdp, write_torch_dist), others, strict=True):
        start = CheckpointConfig(ref_load=write(tmp_path / write.__name__, weights))
        started = inputs_with(folder, algorithm=sft, lora=lora, checkpoint=start)
        assert run_identity(started) == {**facts, "base_weights": checksum(weights)}


def test_the_best_checkpoint_is_that_of_the_first_evaluation_set(tmp_path):
    data = {"eval_prompt_data": ("first", "a.jsonl", "second", "b.jsonl")}
    flags = {"evaluation": EvalConfig(eval_interval=1, **data)}
    kept = CheckpointConfig(save=tmp_path, keep_best=True)
    assert outputs._best(inputs_with(tmp_path, **flags)) is None
    assert outputs._best(inputs_with(tmp_path, **flags, checkpoint=kept)) == Criterion(
        metric="eval/first", higher_is_better=True
    )
    sft = inputs_with(tmp_path, **flags, checkpoint=kept, algorithm=AlgorithmConfig(loss_type="sft_loss"))
    assert outputs._best(sft) == Criterion(metric="eval/first/loss", higher_is_better=False)


class Sink:
    def __init__(self, *given, **options):
        self.made = (*given, options)


TRACKED = LoggingConfig(
    use_wandb=True, wandb_project="p", wandb_group="g", wandb_team="t", wandb_mode="offline", wandb_dir=Path("w"),
    wandb_run_id="i", wandb_host="h", wandb_key="k", use_mlflow=True, mlflow_tracking_uri="u", mlflow_experiment_name="e",
    mlflow_run_id="m", use_prometheus=True, prometheus_port=91, use_tensorboard=True, tensorboard_dir=Path("curves"),
    log_dir=Path("logs"),
)  # fmt: skip


def sinks_of(monkeypatch, *, rank=0, logging=TRACKED):
    """Return the name and arguments of each sink of a run's metrics, after the report's own."""
    for name in ("JsonlSink", "TensorBoardSink", "WandbSink", "MlflowSink", "PrometheusSink"):
        monkeypatch.setattr(outputs, name, type(name, (Sink,), {}))
    monkeypatch.setattr(outputs, "MetricLog", lambda sinks, **options: (sinks, options))
    inputs = replace(inputs_with(Path("model"), logging=logging), rank=rank)
    sinks, options = outputs.metric_log(inputs, "report")
    assert options == {"gate": None, "num_steps_per_rollout": inputs.plan.batch.num_steps_per_rollout}
    assert sinks[:1] == (["report"] if rank == 0 else [])
    return {type(sink).__name__: sink.made for sink in sinks[1:]}


def test_every_tracker_is_opened_with_its_flags(monkeypatch):
    wandb = {"project": "p", "group": "g", "team": "t", "mode": "offline", "folder": Path("w"), "run_id": "i", "host": "h"}
    expected = {
        "JsonlSink": (Path("logs/metrics.jsonl"), {"flag": "--log-dir"}),
        "TensorBoardSink": (Path("curves"), {}),
        "WandbSink": ({**wandb, "key": "k", "steps_per_rollout": 1},),
        "MlflowSink": ({"uri": "u", "experiment": "e", "run_name": "g", "run_id": "m"},),
        "PrometheusSink": ({"port": 91, "run_name": "g"},),
    }
    assert sinks_of(monkeypatch) == expected
    assert sinks_of(monkeypatch, rank=1) == {}
    assert sinks_of(monkeypatch, logging=LoggingConfig()) == {}
    monkeypatch.setenv("WANDB_API_KEY", "of the environment")
    names = replace(TRACKED, wandb_key=None, mlflow_run_name="own", prometheus_run_name="own")
    named = sinks_of(monkeypatch, logging=names)
    assert named["WandbSink"][0]["key"] == "of the environment"
    assert (named["MlflowSink"][0]["run_name"], named["PrometheusSink"][0]["run_name"]) == ("own", "own")
    assert sinks_of(monkeypatch, logging=replace(TRACKED, wandb_group=None))["PrometheusSink"][0]["run_name"] == "qwench"


def test_the_metric_of_a_check_is_watched_on_the_main_rank():
    evaluation = EvalConfig(ci_metric_checker_key="eval/x", ci_metric_checker_threshold=0.5)
    inputs = inputs_with(Path("model"), evaluation=evaluation)
    gate = outputs._metric_gate(inputs)
    assert (gate._key, gate._threshold) == ("eval/x", 0.5)
    assert outputs._metric_gate(replace(inputs, rank=1)) is None
    assert outputs._metric_gate(inputs_with(Path("model"))) is None


def test_each_rollout_is_recorded_where_the_flags_say():
    records = DebugConfig(save_debug_rollout_data="{rollout_id}.jsonl", save_debug_trajectory_data="{rollout_id}.json")
    inputs = inputs_with(
        Path("model"), debug=records, logging=LoggingConfig(log_dir=Path("logs")),
        reward=RewardConfig(rm_type="math", second_grader="math-verify"),
    )  # fmt: skip
    found = [(record.func.__name__, record.args, record.keywords) for record in outputs.recorders(inputs, "run")]
    assert found == [
        ("save_trajectories", ("{rollout_id}.json",), {}),
        ("save_rollout", ("{rollout_id}.jsonl",), {"run": "run"}),
        ("list_disagreements", (Path("logs") / outputs.DISAGREEMENTS,), {}),
    ]
    assert list(outputs.recorders(inputs_with(Path("model")), "run")) == []
