"""What a start checks, on this machine and where the run's devices are elsewhere."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.config import Config
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.debug import DebugConfig, ProfilingConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.launch import readiness
from qwench.launch.inputs import Inputs
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.launch.test_placement import inputs_of

TWO_RANKS = ClusterConfig(actor_num_gpus_per_node=2)


def of(**sections: object) -> Inputs:
    return inputs_of(Config(**{"rollout": RolloutConfig(rollout_batch_size=4), **sections}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return the checks that were made, each with its arguments; none of them refuses anything."""
    made: list[tuple[object, ...]] = []

    def watch(name: str) -> None:
        monkeypatch.setattr(readiness, name, lambda *given, **options: made.append((name, *given, *options.values())))

    checks = "save_folder load_folder installed weights attention platform transformer_impl turns router_words external port"
    trackers = ("import_tensorboard", "import_mlflow", "import_wandb")
    for name in ("_check_teacher", "enough_gpus", *trackers, *(f"check_{name}" for name in checks.split())):
        watch(name)
    monkeypatch.setattr(readiness, "has_weights", lambda folder: False)
    kind = SimpleNamespace(check_flags=lambda engine: made.append(("check_flags", engine)))
    monkeypatch.setattr(readiness, "KINDS", {"embedded": kind, "sglang": kind})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return made


def test_everything_is_checked_in_order(calls: list[tuple[object, ...]]) -> None:
    inputs = of(lora=LoraConfig(lora_rank=2))
    config = inputs.config
    inputs = replace(inputs, plan=replace(inputs.plan, holds_teacher=True))
    readiness.check_ready(inputs, {"a": 1}, prompts=("rows", "others"))
    assert calls == [
        ("check_turns", config, False),
        ("enough_gpus", inputs),
        ("check_attention", "sdpa", torch.device("cpu"), torch.float32),
        ("check_flags", config.engine),
        ("check_save_folder", config.checkpoint, {"a": 1}),
        ("check_load_folder", config.checkpoint, {"a": 1}),
        ("check_installed", config.reward, "rows"),
        ("check_installed", config.reward, "others"),
        ("check_weights", config.checkpoint, inputs.plan.model, inputs.model_folder, config.lora),
        ("_check_teacher", inputs),
    ]


def test_folders_are_checked_by_the_main_rank_of_a_run_that_saves(calls: list[tuple[object, ...]]) -> None:
    for inputs, identity in ((of(), None), (replace(of(), rank=1), {"a": 1})):
        readiness.check_ready(inputs, identity)
        assert not {"check_save_folder", "check_load_folder"} & {name for name, *_ in calls}


@pytest.mark.parametrize("dry", [False, True])
def test_a_dry_run_needs_no_weights_and_no_devices(
    dry: bool, calls: list[tuple[object, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    inputs = of(debug=DebugConfig(dry_run=dry))
    readiness.check_ready(inputs)
    [(_, _, _, folder, lora)] = [call for call in calls if call[0] == "check_weights"]
    assert (folder, lora) == (None if dry else inputs.model_folder, None)
    calls.clear()
    readiness.check_ready(of(debug=DebugConfig(dry_run=dry), cluster=TWO_RANKS), {}, prompts=("rows",))
    names = [name for name, *_ in calls]
    elsewhere = ["check_turns", "enough_gpus", "check_save_folder", "check_load_folder"]
    assert (names == elsewhere) is dry
    assert [message.partition(" for ")[2] for message in caplog.messages] == (
        ["2: its packages, devices and weights are not checked here"] if dry else []
    )


def test_flags_of_sglang_elsewhere_are_checked_by_name(calls: list[tuple[object, ...]]) -> None:
    engine = EngineConfig(rollout_engine="sglang")
    dry = of(debug=DebugConfig(dry_run=True), engine=engine)
    readiness.check_ready(dry)
    assert "check_flags" not in {name for name, *_ in calls}
    wrong = replace(dry, config=replace(dry.config, engine=replace(engine, sglang_args=("--no-such-flag", "1"))))
    with pytest.raises(ConfigError, match="no-such-flag"):
        readiness.check_ready(wrong)


def test_engines_that_run_already_are_asked(calls: list[tuple[object, ...]]) -> None:
    engine = EngineConfig(rollout_external_engine_addrs=("10.0.0.1:80",))
    inputs = of(engine=engine)
    readiness.check_engines(inputs, elsewhere=False)
    assert calls == [("check_external", inputs)]
    calls.clear()
    none = replace(inputs, plan=replace(inputs.plan, devices=replace(inputs.plan.devices, generates=False)))
    readiness.check_engines(none, elsewhere=False)
    assert calls == []


def test_trackers_are_imported_where_their_flags_ask_for_them(calls: list[tuple[object, ...]]) -> None:
    readiness.check_trackers(LoggingConfig())
    assert calls == []
    readiness.check_trackers(
        LoggingConfig(
            use_tensorboard=True, use_mlflow=True, use_prometheus=True, prometheus_port=91, use_wandb=True, wandb_project="p"
        )
    )
    assert calls == [("import_tensorboard",), ("import_mlflow",), ("check_port", 91), ("import_wandb",)]


def test_the_backend_is_checked_where_the_ranks_are(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = of(training=TrainingConfig(train_backend="megatron"))
    readiness._check_trainer(inputs, "ray")
    assert calls == []
    readiness._check_trainer(inputs, "inside")
    assert calls == [("check_platform",), ("check_transformer_impl", inputs.config.training.transformer_impl)]
    calls.clear()
    monkeypatch.setattr(readiness, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--launcher ray needs Ray"):
        readiness._check_launcher(of(cluster=ClusterConfig(launcher="ray")))
    monkeypatch.setattr(readiness, "find_spec", lambda name: name)
    assert readiness._check_launcher(of(cluster=ClusterConfig(launcher="ray"))) == "ray"
    assert calls == []


def test_the_memory_of_a_gpu_is_not_recorded_where_there_is_none(calls: list[tuple[object, ...]]) -> None:
    inputs = of(profiling=ProfilingConfig(record_memory_history=True))
    with pytest.raises(ConfigError, match=r"^--record-memory-history records the memory of a GPU"):
        readiness.check_ready(inputs)
    readiness.check_ready(replace(inputs, device=torch.device("cuda")))
    assert calls


def test_a_teacher_computes_as_the_policy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(readiness, "open_weights", lambda *given: opened.append(given))
    monkeypatch.setattr(readiness, "load_hf_config", lambda folder: opened.append(folder))
    distillation = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=tmp_path)
    inputs = of(distillation=distillation)
    readiness._check_teacher(inputs)
    assert opened == [(tmp_path, QWEN3_4B)], "a checkpoint of a run has no config.json"
    (tmp_path / "config.json").touch()
    other = replace(QWEN3_4B, max_position_embeddings=9, model_type="qwen2")
    monkeypatch.setattr(readiness, "architecture_of", lambda config: other)
    readiness._check_teacher(inputs)
    assert opened[-1] == tmp_path
    other = replace(other, norm_eps=1e-5, qk_norm=False)
    with pytest.raises(
        ConfigError, match=rf"^--opd-teacher-load: {tmp_path} computes otherwise than .* \(norm_eps, qk_norm\),"
    ):
        readiness._check_teacher(inputs)

    def damaged(*given: object) -> None:
        raise CheckpointError("is cut short")

    monkeypatch.setattr(readiness, "open_weights", damaged)
    with pytest.raises(ConfigError, match=r"^--opd-teacher-load: is cut short$"):
        readiness._check_teacher(inputs)
