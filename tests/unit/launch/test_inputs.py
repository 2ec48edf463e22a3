"""What the inputs of a run know of its limits: positions of the model, size of the engine's KV cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.launch.inputs import (
    Inputs,
    local_device,
    plan_inputs,
    read_conversations,
    read_eval_prompts,
    read_training_prompts,
)
from qwench.launch.trainer import make_memory_probe
from tests.contract.engine_hosts import make_model
from tests.unit.launch.test_generation import eval_settings
from tests.unit.launch.test_rewards_of_a_teacher import inputs_of


def inputs_with(tmp_path: Path, *prompts: str, positions: int, response: int, pool: int | None = None) -> Inputs:
    """Return inputs with a file of plain prompts for training and as evaluation set `held_out`; a character is a token."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in prompts))
    made = inputs_of(rm_type="random")
    config: Config = replace(
        made.config,
        data=replace(made.config.data, prompt_data=str(path)),
        rollout=RolloutConfig(rollout_batch_size=1, rollout_max_response_len=response),
        engine=EngineConfig(embedded_kv_cache_tokens=pool),
    )
    model = replace(made.plan.model, max_position_embeddings=positions)
    sets = (eval_settings(name="held_out", input_key="input", path=str(path)),)
    batch = replace(made.plan.batch, rollout_batch_size=1)
    return replace(made, config=config, plan=replace(made.plan, model=model, eval_sets=sets, batch=batch))


def test_prompts_that_leave_no_position_for_a_response_are_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = inputs_with(tmp_path, "a" * 16, "b" * 15, "c", positions=16, response=1)
    assert [prompt.text for prompt in read_training_prompts(inputs).prompts] == ["b" * 15, "c"]
    assert caplog.messages == ["--prompt-data: dropped 1 of 3 prompts longer than 15 tokens"]
    caplog.clear()
    assert [prompt.text for prompt in read_eval_prompts(inputs)["held_out"].prompts] == ["b" * 15, "c"]
    assert caplog.messages == ["evaluation set held_out: dropped 1 of 3 prompts longer than 15 tokens"]


def test_conversations_of_training_and_of_each_set_are_read_by_their_own_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(name: str, key: str, answers: list[str]) -> str:
        path = tmp_path / f"{name}.jsonl"
        rows = [{key: [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]} for text in answers]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    made = inputs_with(tmp_path, "unused", positions=4096, response=1)
    data = replace(made.config.data, prompt_data=write("train", "talk", ["a", "b"]), input_key="talk", loss_mask_type="qwen")
    rollout = replace(made.config.rollout, rollout_max_context_len=40)
    held_out = eval_settings(name="held_out", input_key="turns", path=write("held_out", "turns", ["c", "d" * 50]))
    inputs = replace(
        made,
        config=replace(made.config, data=data, rollout=rollout),
        plan=replace(made.plan, eval_sets=(held_out,)),
    )
    trained, sets = read_conversations(inputs)
    assert (len(trained.examples), trained.num_too_long) == (2, 0)
    assert {name: (len(one.examples), one.num_too_long) for name, one in sets.items()} == {"held_out": (1, 1)}
    trains_on_other_text = (
        "trains on other text than the chat template marks as the assistant's, in 2 conversations, the first at"
    )
    assert [message.partition(trains_on_other_text)[0] for message in caplog.messages] == [
        "--prompt-data: --loss-mask-type qwen ",
        "evaluation set held_out: dropped 1 conversation longer than 40 tokens (--rollout-max-context-len or the model) and 0 "
        "without a token to train on; left: 1",
        "evaluation set held_out: --loss-mask-type qwen ",
    ]


def test_a_rank_computes_on_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == torch.device("cuda", 3)


def test_a_pool_smaller_than_the_longest_prompt_and_one_response_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_training_prompts(inputs_with(tmp_path, "a" * 13, "b", positions=64, response=40, pool=52))
    assert str(caught.value) == (
        "--embedded-kv-cache-tokens 52 cannot hold one response of 40 tokens (--rollout-max-response-len) "
        "behind the longest prompt (13); raise it to 53 or more."
    )
    assert len(read_training_prompts(inputs_with(tmp_path, "a" * 13, "b", positions=64, response=40, pool=53)).prompts) == 2


def test_a_response_longer_than_the_models_positions_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_training_prompts(inputs_with(tmp_path, "a" * 13, positions=53, response=40))
    assert caplog.messages == []
    read_training_prompts(inputs_with(tmp_path, "a" * 13, positions=52, response=40))
    assert caplog.messages == [
        "--rollout-max-response-len 40: the model has 52 positions, so responses end at 52 tokens less the prompt's"
    ]


@pytest.mark.parametrize(("on_gpus", "asked", "probes"), [(True, None, True), (False, None, False), (False, True, True)])
def test_memory_is_probed_on_gpus_unless_a_flag_says_otherwise(
    tmp_path: Path, on_gpus: bool, asked: bool | None, probes: bool
) -> None:
    made = inputs_with(tmp_path, "a", positions=64, response=40)
    config = replace(made.config, training=replace(made.config.training, memory_probe=asked))
    devices = replace(made.plan.devices, on_gpus=on_gpus)
    inputs = replace(made, config=config, plan=replace(made.plan, devices=devices))
    probe = make_memory_probe(inputs, [13, 5])
    assert (probe is not None) == probes
    assert probe is None or max(probe.lengths) == 13 + 40


def test_no_probe_has_a_sequence_longer_than_the_context(tmp_path: Path) -> None:
    made = inputs_with(tmp_path, "a", positions=48, response=40)
    asked = replace(made.config, training=replace(made.config.training, memory_probe=True))
    probe = make_memory_probe(replace(made, config=asked), [13])
    assert probe is not None and max(probe.lengths) == 48


def test_an_fp8_checkpoint_is_refused_for_embedded_engines_of_several_gpus(tmp_path: Path) -> None:
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    described = make_model("qwen3").config.to_dict() | {"quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(described))
    words = ["--hf-checkpoint", str(tmp_path), "--rollout-engine", "embedded", "--rollout-batch-size", "8"]
    words += ["--rollout-num-gpus", "2", "--rollout-num-gpus-per-engine"]
    assert plan_inputs(parse_flags(Config, [*words, "1"], prog="qwench train"), trains=True).devices.engine_sizes == (1, 1)
    with pytest.raises(ConfigError, match="is FP8 and needs embedded engines of one GPU, got --rollout-num-gpus-per-engine 2"):
        plan_inputs(parse_flags(Config, [*words, "2"], prog="qwench train"), trains=True)


@pytest.mark.parametrize(
    ("column", "own", "flag"),
    [
        ("label_key", {"eval_label_key": "absent"}, "--eval-label-key"),
        ("label_key", {"eval_input_key": "input"}, "--label-key"),
        ("input_key", {"eval_input_key": "absent"}, "--eval-input-key"),
        ("input_key", {}, "--input-key"),
    ],
)
def test_a_missing_column_of_an_evaluation_set_is_told_by_the_flag_that_names_it(tmp_path: Path, column, own, flag):
    made = inputs_with(tmp_path, "a", positions=64, response=1)
    sets = tuple(replace(one, **{column: "absent"}) for one in made.plan.eval_sets)
    inputs = replace(made, config=replace(made.config, evaluation=EvalConfig(**own)), plan=replace(made.plan, eval_sets=sets))
    with pytest.raises(ConfigError, match=rf"^evaluation set held_out: .*:1: key 'absent' \({flag}\) is missing"):
        read_eval_prompts(inputs)


def test_fewer_rows_than_a_rollout_takes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = inputs_with(tmp_path, "a", "b", positions=64, response=1)
    three = replace(made, plan=replace(made.plan, batch=replace(made.plan.batch, rollout_batch_size=3)))
    read_training_prompts(three)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": turns}) + "\n")
    read_conversations(replace(three, plan=replace(three.plan, eval_sets=())))
    assert caplog.messages == [
        "--prompt-data has 2 prompts for --rollout-batch-size 3: a rollout has some more than once",
        "--prompt-data has 1 conversation for --rollout-batch-size 3: a rollout has some more than once",
    ]
