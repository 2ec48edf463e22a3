"""What a run says before it starts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig

from qwench.checkpoints.best import Best
from qwench.checkpoints.formats.iterations import Iterations
from qwench.config import plan_lines
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.algorithm import AlgorithmConfig
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.critic import CriticConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.lora import LoraConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.errors import EngineError
from qwench.launch import run_facts
from qwench.launch.engines import _start_servers
from qwench.launch.inputs import Inputs
from qwench.launch.run_facts import finish_report, start_report
from tests.fakes.console import RecordingConsole
from tests.fakes.engine import CharTokenizer
from tests.unit.config.architectures import QWEN3_4B


def test_starting_servers_says_where_their_logs_are_in_a_line_of_the_start(tmp_path):
    class Broken:
        label = "engine 0"

        def start(self):
            raise EngineError("no")

        def stop(self):
            pass

        def last_output(self):
            return ""

    inputs = inputs_of(Config(rollout=RolloutConfig(rollout_batch_size=8), logging=LoggingConfig(log_dir=tmp_path)))
    with pytest.raises(EngineError):
        _start_servers(inputs, [Broken()], None)
    assert inputs.console.lines == [f"engines   logs in {tmp_path}/engines"]


def inputs_of(config: Config) -> Inputs:
    """Return inputs with a console that remembers."""
    return Inputs(
        config=config, plan=plan_run(config, QWEN3_4B), model_folder=Path("model"), tokenizer=CharTokenizer(),
        console=RecordingConsole(), hf_config=PretrainedConfig(), device=torch.device("cpu"), dtype=torch.float32, rank=0,
    )  # fmt: skip


def facts_of(config: Config) -> dict[str, str]:
    """Return what the start of a run says, by its titles."""
    inputs = inputs_of(config)
    start_report(inputs, "9 rows")
    lines = [line for text in inputs.console.lines for line in text.splitlines()]
    return {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in lines}


@pytest.mark.parametrize(("interval", "loss", "steps", "expected"), [
    (1, "policy_loss", 2, "after every rollout"),
    (5, "policy_loss", 2, "every 5 rollouts and at the end"),
    (1, "sft_loss", 1, "after every step"),
    (5, "sft_loss", 1, "every 5 steps and at the end"),
    (1, "sft_loss", 2, "after every batch"),
    (5, "sft_loss", 2, "every 5 batches and at the end"),
    (None, "policy_loss", 1, "at the end"),
])  # fmt: skip
def test_the_interval_of_checkpoints_is_said_in_the_units_of_the_run(interval, loss, steps, expected, tmp_path):
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3),
        algorithm=AlgorithmConfig(loss_type=loss),
        training=TrainingConfig(num_steps_per_rollout=steps),
        checkpoint=CheckpointConfig(save=tmp_path, save_interval=interval),
    )
    assert facts_of(config)["saves to"] == f"{tmp_path} {expected}"


def test_a_critic_with_gpus_of_its_own_takes_no_turns():
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=8, n_samples_per_prompt=2, num_rollout=3),
        algorithm=AlgorithmConfig(advantage_estimator="ppo"),
        critic=CriticConfig(critic_num_gpus_per_node=2),
    )
    devices = facts_of(config)["devices"]
    assert (
        devices.split(": ")[1] == "1 trainer rank (fsdp) and 1 embedded engine that take turns, and 2 critic ranks beside them"
    )


def end_of(checkpoint: CheckpointConfig, *, only_rollouts: bool = False, lora_rank: int | None = None) -> dict[str, str]:
    """Return what a finished run says that it has left."""
    lora = LoraConfig(lora_rank=lora_rank)
    debug = DebugConfig(debug_rollout_only=only_rollouts)
    config = Config(rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3), checkpoint=checkpoint, debug=debug, lora=lora)
    inputs = inputs_of(config)
    report = start_report(inputs, "9 rows")
    inputs.console.events.clear()
    finish_report(report, inputs)
    lines = [line for text in inputs.console.lines for line in text.splitlines()]
    return {line.split("  ")[0].strip(): line.split("  ")[-1].strip() for line in lines if not line.startswith("done")}


def test_the_end_says_what_is_left_and_what_to_type_next(tmp_path):
    assert end_of(CheckpointConfig()) == {"saved": "nothing (no --save)"}
    assert end_of(CheckpointConfig(), only_rollouts=True) == {}
    save = tmp_path / "save"
    assert end_of(CheckpointConfig(save=save)) == {"saved": "nothing (the run ended before its first rollout)"}
    for number in (2, 3):
        Iterations(save).begin(number)
        Iterations(save).complete(number)
    convert = f"qwench convert --input {save} --to hf"
    base = f"--hf-checkpoint model --output {save}-hf"
    saved = {"saved": f"{save}/iter_0000003", "next": f"{convert} {base}"}
    assert end_of(CheckpointConfig(save=save)) == saved
    export = f"{tmp_path}/hf-{{rollout_id}}"
    assert end_of(CheckpointConfig(save=save, save_hf=export)) == saved, "the export was not written"
    written = tmp_path / "hf-2"
    written.mkdir()
    serve = {"saved": f"{save}/iter_0000003", "exported": str(written), "next": f"qwench serve --hf-checkpoint {written}"}
    assert end_of(CheckpointConfig(save=save, save_hf=export)) == serve
    Best(iteration=2, metric="eval/a", value=0.123456).write(save)
    assert end_of(CheckpointConfig(save=save, save_hf=export)) == serve, "an older record counts with --keep-best alone"
    assert end_of(CheckpointConfig(save=save, save_hf=export, keep_best=True)) == {
        "saved": f"{save}/iter_0000003",
        "best": f"{save}/iter_0000002 (eval/a 0.1235)",
        "next": f"{convert} --ckpt-step 2 {base}",
    }


def test_adapters_of_another_base_are_merged_into_that_base(tmp_path):
    save, sft, hf = (tmp_path / name for name in ("save", "sft", "hf"))
    for folder in (save, sft):
        Iterations(folder).begin(1)
        Iterations(folder).complete(1)
    (sft / "iter_0000001" / "model").mkdir()
    (sft / "iter_0000001" / "model" / ".metadata").touch()
    hf.mkdir()
    (hf / "config.json").touch()
    merge = f"qwench convert --input {save} --to hf --hf-checkpoint {{}} --output {save}-hf"
    export = f"qwench convert --input {sft}/iter_0000001 --to hf --hf-checkpoint model --output {sft}-hf"
    for base, rank, said in (
        (hf, 4, merge.format(hf)),
        (sft, 4, f"{export} && {merge.format(f'{sft}-hf')}"),
        (sft, None, merge.format("model")),
    ):
        assert end_of(CheckpointConfig(save=save, ref_load=base), lora_rank=rank)["next"] == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(999, "0.999k"), (999_000, "999k"), (1_000_000, "1M"), (596_049_920, "596M"), (10**9, "1B"), (8_190_735_360, "8.19B")],
)
def test_a_model_is_described_with_its_size_as_models_are_named(count, said):
    inputs = inputs_of(Config(rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3)))
    model = SimpleNamespace(model_type="qwen3", parameter_shapes=lambda: {"a": (count - 6,), "b": (3, 2)})
    described = run_facts.describe_model(replace(inputs, plan=replace(inputs.plan, model=model), dtype=torch.bfloat16))
    assert described == f"model: qwen3, {said} parameters, bfloat16"


def test_a_report_counts_the_rollouts_or_the_steps_of_the_run(monkeypatch):
    monkeypatch.setattr(run_facts, "RunReport", lambda console, **options: SimpleNamespace(start=print, **options))
    for loss, unit, total in (("policy_loss", "rollout", 3), ("sft_loss", "step", 6)):
        config = Config(
            rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3), training=TrainingConfig(num_steps_per_rollout=2),
            logging=LoggingConfig(show_samples=4, table_interval=5), algorithm=AlgorithmConfig(loss_type=loss),
        )  # fmt: skip
        report = start_report(inputs_of(config), "9 rows")
        assert (report.unit, report.total, report.show_samples, report.table_interval) == (unit, total, 4, 5)


def test_length_and_devices_are_said_in_the_numbers_of_the_run(monkeypatch):
    monkeypatch.setattr(plan_lines, "find_compilers", lambda: ["/usr/bin/g++"])
    rollout = RolloutConfig(rollout_batch_size=8, n_samples_per_prompt=4, num_rollout=3)
    made = facts_of(Config(rollout=rollout, training=TrainingConfig(global_batch_size=16)))
    assert made["length"] == "3 rollouts of 8 prompts x 4 responses, 2 steps each"
    assert facts_of(Config(rollout=replace(rollout, num_rollout=1)))["length"] == "1 rollout of 8 prompts x 4 responses"
    inputs = inputs_of(Config(rollout=rollout))
    epochs = replace(inputs.plan.schedule, rollouts_per_epoch=2)
    assert run_facts._length(replace(inputs, plan=replace(inputs.plan, schedule=epochs))).endswith(" (1.5 epochs)")
    one = replace(inputs.plan.schedule, rollouts_per_epoch=3)
    assert run_facts._length(replace(inputs, plan=replace(inputs.plan, schedule=one))).endswith(" (1 epoch)")
    only = replace(inputs.plan, devices=replace(inputs.plan.devices, trains=False))
    assert run_facts._length(replace(inputs, plan=only)) == "3 rollouts of 8 prompts x 4 responses"
    two = inputs_of(
        Config(
            rollout=rollout,
            cluster=ClusterConfig(actor_num_gpus_per_node=2, rollout_num_gpus=6, rollout_num_gpus_per_engine=2),
        )
    )
    single = RolloutConfig(rollout_batch_size=1, num_rollout=1)
    assert facts_of(Config(rollout=single))["length"] == "1 rollout of 1 prompt x 1 response"
    alone = Config(rollout=single, algorithm=AlgorithmConfig(loss_type="sft_loss"))
    assert facts_of(alone)["length"] == "1 step of 1 conversation"
    threads = f"CPU with {torch.get_num_threads()} of {os.cpu_count()} threads: "
    assert run_facts._devices(two) == threads + "2 trainer ranks (fsdp) and 3 embedded engines of 2 GPUs"
    on_cpu = replace(two.plan.devices, on_gpus=False, trains=False)
    alone = replace(two, plan=replace(two.plan, devices=on_cpu))
    assert run_facts._devices(alone) == threads + "3 embedded engines of 2 processes"
    monkeypatch.setattr(plan_lines, "find_compilers", list)
    missing = ", without the C++ kernels: no g++ or clang++ is installed"
    assert run_facts._devices(alone) == threads + "3 embedded engines of 2 processes" + missing
    unused = replace(alone.config, engine=replace(alone.config.engine, embedded_native_kernels=False))
    assert run_facts._devices(replace(alone, config=unused)) == threads + "3 embedded engines of 2 processes"
    critic = replace(two.plan.devices, critic=(2, 1), generates=False)
    assert run_facts._devices(replace(two, plan=replace(two.plan, devices=critic))) == (
        threads + "2 trainer ranks (fsdp), and 3 critic ranks beside them"
    )


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, []),
        ({"checkpoint": CheckpointConfig()}, ["nothing is saved: the weights are lost when the run ends; give --save FOLDER"]),
        ({"checkpoint": CheckpointConfig(), "debug": DebugConfig(debug_rollout_only=True)}, []),
        (
            {"data": {"chat_template_path": Path("a")}},
            ["--chat-template-path renders no prompts: --apply-chat-template is"],
        ),
        ({"data": {"chat_template_path": Path("a"), "apply_chat_template": True}}, []),
        ({"data": {"chat_template_path": Path("a")}, "algorithm": AlgorithmConfig(loss_type="sft_loss")}, []),
        ({"data": {"apply_chat_template": True}}, []),
        ({"algorithm": AlgorithmConfig(keep_old_actor=True)}, ["--keep-old-actor has no effect: the weights that sample are"]),
    ],
)
def test_flags_without_an_effect_are_said_at_the_start(sections, expected, caplog):
    given = {"checkpoint": CheckpointConfig(save=Path("run")), **sections, "data": DataConfig(**sections.get("data", {}))}
    inputs = inputs_of(Config(rollout=RolloutConfig(rollout_batch_size=8, num_rollout=3), **given))
    start_report(inputs, "9 rows")
    assert [message[: len(start)] for message, start in zip(caplog.messages, expected, strict=True)] == expected
