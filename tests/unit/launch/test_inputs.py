"""What the inputs of a run know of its limits: positions of the model, size of the engine's KV cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config
from qwench.config.plan import plan_run
from qwench.config.sections.data import DataConfig
from qwench.config.sections.debug import DebugConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.evaluation import EvalConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.config.sections.training import TrainingConfig
from qwench.data.prompts import LoadedPrompts
from qwench.errors import ConfigError
from qwench.launch import inputs as inputs_module
from qwench.launch.inputs import (
    Inputs,
    local_device,
    plan_inputs,
    read_conversations,
    read_eval_prompts,
    read_training_prompts,
)
from qwench.launch.trainer import make_memory_probe
from qwench.samples import Prompt
from tests.contract.engine_hosts import make_model
from tests.unit.config.architectures import QWEN3_4B
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


DATA = DataConfig(
    prompt_data="rows", input_key="i", label_key="l", metadata_key="m", tool_key="t", apply_chat_template=True,
    apply_chat_template_kwargs={"enable_thinking": False}, rollout_max_prompt_len=9, curriculum_key="c",
    curriculum_band=(0.2, 0.8),
)  # fmt: skip


@pytest.mark.parametrize("own", [{}, {"custom_generate_function_path": "a.b"}, {"rollout_function_path": "a.b"}])
def test_rows_are_read_by_the_columns_of_their_flags(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    found = LoadedPrompts(prompts=[Prompt(text="p", token_ids=(1,))], num_dropped=0)
    monkeypatch.setattr(inputs_module, "load_prompts", lambda path, **options: read.append((path, options)) or found)
    config = Config(
        data=DATA, rollout=RolloutConfig(rollout_batch_size=2, **own),
        reward=RewardConfig(rm_type="math"),
    )  # fmt: skip
    inputs = of_plan(config)
    assert read_training_prompts(inputs) is found
    columns = {"input_key": "i", "label_key": "l", "metadata_key": "m", "tool_key": "t"}
    options = {
        "tokenizer": inputs.tokenizer,
        "apply_chat_template": True,
        "apply_chat_template_kwargs": {"enable_thinking": False},
    }
    limits = {"max_prompt_len": 9, "pass_rate_key": "c", "require_label": True, "as_given": bool(own)}
    assert read == [("rows", {**columns, **options, **limits})]
    read.clear()
    sets = (
        eval_settings(name="one", path="a", input_key="1", label_key="2", metadata_key="3", tool_key="4", max_prompt_len=5),
        eval_settings(
            name="two", path="b", custom_generate_function_path="a.b", rm_type="random", metadata_overrides={"x": 1}
        ),
    )  # fmt: skip
    evaluated = read_eval_prompts(replace(inputs, plan=replace(inputs.plan, eval_sets=sets)))
    (one, given), (two, others) = read
    assert (one, two, [*evaluated]) == ("a", "b", ["one", "two"])
    columns = {"input_key": "1", "label_key": "2", "metadata_key": "3", "tool_key": "4"}
    assert given == {**columns, **options, "max_prompt_len": 5, "require_label": True, "as_given": bool(own)} | {
        "key_flags": config.evaluation.key_flags
    }
    assert (others["as_given"], others["require_label"]) == (True, False), "a set with its own reward needs no label"


def of_plan(config: Config) -> Inputs:
    return replace(inputs_of(rm_type="math"), config=config, plan=plan_run(config, QWEN3_4B))


@pytest.mark.parametrize(
    ("sections", "trains", "expected"),
    [
        ({}, True, False),
        ({"engine": EngineConfig(rollout_engine="sglang")}, False, True),
        (
            {"engine": EngineConfig(rollout_engine="sglang", rollout_external_engine_addrs=("10.0.0.1:80",))},
            True,
            False,
        ),
        ({"training": TrainingConfig(train_backend="megatron")}, True, True),
        ({"training": TrainingConfig(train_backend="megatron")}, False, False),
        ({"model": ModelConfig(attn_implementation="varlen")}, True, True),
        ({"model": ModelConfig(attn_implementation="varlen")}, False, False),
    ],
)
def test_what_only_gpus_run_is_planned_for_gpus_by_a_dry_run_alone(
    sections: dict[str, object], trains: bool, expected: bool
) -> None:
    for dry in (True, False):
        config = Config(debug=DebugConfig(dry_run=dry), **sections)
        assert inputs_module.plans_what_only_gpus_run(config, trains=trains) is (expected and dry)


def test_a_stop_token_outside_the_vocabulary_is_refused_with_its_flag() -> None:
    for token, fits in ((0, True), (151_935, True), (151_936, False), (-1, False)):
        config = Config(rollout=RolloutConfig(rollout_batch_size=2, rollout_stop_token_ids=(1, token)))
        plan = plan_run(config, QWEN3_4B)
        other = replace(plan, eval_sets=(eval_settings(name="a", stop_token_ids=(token,)),))
        if fits:
            inputs_module._check_stop_tokens(config, other)
            continue
        ids = r"is no token of the model, whose ids are 0 to 151935\.$"
        with pytest.raises(ConfigError, match=f"^--rollout-stop-token-ids: {token} {ids}"):
            inputs_module._check_stop_tokens(config, plan)
        with pytest.raises(ConfigError, match=f"^stop_token_ids of evaluation set a: {token} {ids}"):
            inputs_module._check_stop_tokens(Config(), other)


@pytest.mark.parametrize(
    ("asked", "context", "pool", "kind", "expected"),
    [
        (None, None, None, "embedded", 40_959),
        (7, None, None, "embedded", 7),
        (7, 7, None, "embedded", 6),
        (None, 99, 50, "embedded", 49),
        (None, 99, 50, "sglang", 98),
        (50_000, None, None, "embedded", 40_959),
    ],
)
def test_a_prompt_leaves_room_for_one_token(
    asked: int | None, context: int | None, pool: int | None, kind: str, expected: int
) -> None:
    config = Config(
        rollout=RolloutConfig(rollout_batch_size=2, rollout_max_context_len=context),
        engine=EngineConfig(rollout_engine=kind, embedded_kv_cache_tokens=pool if kind == "embedded" else None),
    )
    assert inputs_module.prompt_limit(of_plan(config), asked) == expected


@pytest.mark.parametrize(("rank", "threads"), [("0", None), ("2", "3")])
def test_the_small_files_and_this_machine_are_read_before_anything_is_loaded(
    rank: str, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    tokenizer = SimpleNamespace()
    monkeypatch.setattr(inputs_module, "load_tokenizer", lambda *given, **options: said.append((given, options)) or tokenizer)
    monkeypatch.setattr(inputs_module, "check_vocabulary", lambda *given: said.append(given))
    monkeypatch.setattr(inputs_module, "load_hf_config", lambda folder: ("config of", folder))
    monkeypatch.setattr(inputs_module, "open_console", lambda: "console")
    monkeypatch.setattr(inputs_module, "usable_cores", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    template = Path("chat.jinja")
    config = Config(
        model=ModelConfig(hf_checkpoint=Path("model")), data=DataConfig(chat_template_path=template, apply_chat_template=True),
        rollout=RolloutConfig(rollout_batch_size=2),
    )  # fmt: skip
    plan = plan_run(config, QWEN3_4B)
    inputs = inputs_module.read_inputs(config, plan)
    read = [((Path("model"),), {"chat_template": template}), (Path("model"), tokenizer, QWEN3_4B)]
    assert said == ([5] if threads is None else []) + read
    assert (inputs.config, inputs.plan, inputs.model_folder) == (config, plan, Path("model"))
    assert (inputs.hf_config, inputs.tokenizer, inputs.rank) == (("config of", Path("model")), tokenizer, int(rank))
    assert (inputs.device, inputs.dtype) == (torch.device("cpu"), torch.float32)
    assert inputs.console == "console" if rank == "0" else isinstance(inputs.console, inputs_module.QuietConsole)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"^the environment variable RANK is 'first', which is no number; unset it\.$"):
        inputs_module.read_inputs(config, plan)
