import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config.command_line.parse import parse_flags, parse_run
from qwench.config.config import Config
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.verbs import MakeModelConfig, split_file, split_names
from qwench.errors import ConfigError


def parse(*words: str) -> Config:
    return parse_flags(Config, words, prog="qwench train")


def test_nothing_given_is_the_default_configuration():
    assert replace(parse(), engine=EngineConfig()) == Config()


def test_every_kind_of_value_reaches_its_field():
    config = parse(
        *("--lr", "1e-6", "--rollout-top-k", "-1", "--rollout-stop", "a b", "-c", "--rollout-stop-token-ids", "7", "8"),
        *("--colocate", "--no-offload-train", "--swiglu", "--hf-checkpoint", "/m", "--kl-loss-type", "k3"),
        *("--apply_chat_template_kwargs", '{"enable_thinking": false}', "--eval-prompt-data", "aime", "/d/a.jsonl"),
        *("--save-hf=-odd", "--save", "None", "--save", "/s"),
    )
    assert config.optimizer.lr == 1e-6
    assert config.rollout.rollout_top_k == -1
    assert config.rollout.rollout_stop == ("a b", "-c")
    assert config.rollout.rollout_stop_token_ids == (7, 8)
    assert (config.cluster.colocate, config.cluster.offload_train, config.cluster.offload_rollout) == (True, False, None)
    assert (config.architecture.swiglu, config.architecture.qk_layernorm) == (True, None)
    assert config.model.hf_checkpoint == Path("/m")
    assert config.algorithm.kl_loss_type == "k3"
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    assert config.evaluation.eval_prompt_data == ("aime", "/d/a.jsonl")
    assert (config.checkpoint.save_hf, config.checkpoint.save) == ("-odd", Path("/s"))


def test_pass_through_flags_are_kept_in_the_engine_section_with_their_values():
    config = parse("--sglang-cuda-graph-bs", "1", "2", "--sglang-disable-radix-cache", "--router-policy", "random")
    assert config.engine == EngineConfig(
        rollout_engine="sglang",
        engine_reason="the command line names --sglang-cuda-graph-bs",
        sglang_args=("--cuda-graph-bs", "1", "2", "--disable-radix-cache"),
        router_args=("--policy", "random"),
    )


def test_a_sections_own_check_is_the_users_mistake():
    with pytest.raises(ConfigError, match=r"--eps-clip-c must be greater than 1, got 0.5"):
        parse("--eps-clip-c", "0.5")


def test_a_required_flag_is_asked_for_with_its_meaning():
    with pytest.raises(ConfigError, match="--output is required: Folder to write"):
        parse_flags(MakeModelConfig, ["--size", "tiny"], prog="qwench make-model")
    config = parse_flags(MakeModelConfig, ["--output", "m"], prog="qwench make-model")
    assert config == MakeModelConfig(output=Path("m"))


def test_fine_tuning_has_its_own_defaults_that_flags_win_over(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "d.jsonl").touch()
    words = ["--hf-checkpoint", str(tmp_path), "--prompt-data", str(tmp_path / "d.jsonl"), "--lr", "1", "--num-epoch", "1"]
    config = parse_run("sft", [*words, "--rollout-batch-size", "4"])
    assert (config.algorithm.loss_type, config.algorithm.calculate_per_token_loss) == ("sft_loss", True)
    assert config.data.input_key == "messages"
    config = parse_run("sft", [*words, "--rollout-batch-size", "4", "--no-calculate-per-token-loss", "--input-key", "chat"])
    assert (config.algorithm.calculate_per_token_loss, config.data.input_key) == (False, "chat")
    with pytest.raises(ConfigError, match="got policy_loss; use qwench train"):
        parse_run("sft", [*words, "--rollout-batch-size", "4", "--loss-type", "policy_loss"])


def test_help_lists_the_flags_of_every_section_and_ends_the_process(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--lr", "1", "--help-all")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--hf-checkpoint", "--eps-clip-high", "--max-tokens-per-gpu", "--dry-run"))
    assert "{None}" not in shown
    assert "--sglang-args" not in shown


def test_the_file_stands_in_front_of_the_flags():
    assert split_file(["f.jsonl", "--rm-type", "math"]) == (Path("f.jsonl"), ["--rm-type", "math"])
    assert split_file(["--help"])[1] == ["--help"]
    assert split_names(["a/b", "c/d", "--output", "e"]) == (["a/b", "c/d"], ["--output", "e"])
    assert split_names(["a/b"]) == (["a/b"], []) and split_names(["--output"]) == ([], ["--output"])
    with pytest.raises(ConfigError, match="a file is missing; usage: qwench reward check FILE --rm-type NAME"):
        split_file(["--rm-type", "math"])


def test_configuration_imports_without_torch():
    code = "import sys, qwench.config.command_line.parse, qwench.config.config_text; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "qwench.config.command_line.parse" in modules
    assert {"torch", "transformers"} & set(modules) == set()
