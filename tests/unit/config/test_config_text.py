import pytest
import yaml

from qwench.config.command_line.parse import parse_run
from qwench.config.config import Config
from qwench.config.config_text import Setting, as_typed, as_yaml, flag_values, replaced_values, settings_by_section
from qwench.config.sections.cluster import ClusterConfig
from qwench.config.sections.data import DataConfig
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.config.sections.logging import LoggingConfig
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from tests.unit.config.words import flat, words_of

ROLLOUT = RolloutConfig(rollout_batch_size=32, n_samples_per_prompt=8, num_rollout=5)


def test_every_section_is_shown_and_what_was_changed_is_marked():
    shown = settings_by_section(Config(rollout=ROLLOUT, engine=EngineConfig(sglang_args=("--x", "1"))))
    assert list(shown)[:4] == ["model", "architecture", "data", "rollout"]
    changed = [setting for settings in shown.values() for setting in settings if not setting.is_default]
    assert changed == [
        Setting(flag="--num-rollout", value="5", is_default=False),
        Setting(flag="--rollout-batch-size", value="32", is_default=False),
        Setting(flag="--n-samples-per-prompt", value="8", is_default=False),
        Setting(flag="--sglang-args", value="--x 1", is_default=False),
    ]
    assert [as_typed(setting) for setting in changed[-2:]] == ["--n-samples-per-prompt 8", "--sglang-x 1"]
    both = Setting(flag="--router-args", value="--policy a-b --port 1", is_default=False)
    assert as_typed(both) == "--router-policy a-b --router-port 1"


def test_a_key_is_never_shown():
    shown = settings_by_section(Config(logging=LoggingConfig(wandb_key="s3cret")))
    assert Setting(flag="--wandb-key", value="(not shown)", is_default=False) in shown["logging"]
    assert "s3cret" not in str(shown)


SECRETS = Config(
    rollout=ROLLOUT,
    logging=LoggingConfig(use_wandb=True, wandb_project="p", wandb_key="s3cret", wandb_host="https://me:s3cret@wandb.here"),
    cluster=ClusterConfig(train_env_vars={"HF_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "NCCL_DEBUG": "INFO"}),
    engine=EngineConfig(sglang_args=("--metrics-key", "s3cret", "--page-size", "4", "--enable-metrics")),
    reward=RewardConfig(rm_type="remote_rm", rm_url="http://me:s3cret@grader:80/score"),
    data=DataConfig(input_key="question", apply_chat_template_kwargs={"enable_thinking": False}),
)


@pytest.mark.parametrize("written", [as_yaml, flag_values, settings_by_section])
def test_no_secret_is_kept_or_shown(written):
    text = str(written(SECRETS))
    assert "s3cret" not in text
    assert "question" in text
    assert "NCCL_DEBUG" in text


def test_a_secret_that_a_later_one_replaces_is_not_shown():
    flags = ("wandb-key s3cret", "sglang-metrics-key s3cret", 'train-env-vars {"HF_TOKEN": "s3cret"}', "input-key question")
    config = Config(foreign=ForeignConfig(overridden_flags=(*flags, "rm-url http://me:s3cret@grader/", "colocate true")))
    assert replaced_values(config) == [
        *(f"--{name} (not shown)" for name in ("wandb-key", "sglang-metrics-key", "train-env-vars")),
        "--input-key question",
        "--rm-url http://(not shown)@grader/",
        "--colocate true",
    ]


def test_neither_a_key_nor_what_the_parser_adds_is_a_value_of_a_run():
    values = flag_values(SECRETS)
    assert {"--wandb-key", "--engine-reason", "--unused-flags", "--overridden-flags"} & values.keys() == set()
    kept = list(yaml.safe_load(as_yaml(SECRETS)))
    assert kept.index("train-env-vars") < kept.index("sglang-page-size"), "cluster comes before engine"


def test_the_configuration_of_a_run_can_be_given_back(files, tmp_path):
    words = flat(words_of(files))
    words += ["--sglang-page-size", "4", "--eval-prompt-data", "a", str(files / "train.jsonl"), "--adam-beta2", "0.95"]
    words += ["--apply-chat-template-kwargs", '{"enable_thinking": false}', "--rollout-stop", "1", "--rollout-shuffle"]
    config = parse_run("train", words)
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(config))
    assert parse_run("train", ["--config", str(path)]) == config


def test_other_alphabets_are_written_as_they_are():
    assert "\nprompt-data: /数据/a.jsonl\n" in as_yaml(Config(data=DataConfig(prompt_data="/数据/a.jsonl")))


def test_what_is_passed_to_engines_is_kept_under_its_flags():
    kept = yaml.safe_load(as_yaml(SECRETS))
    assert {name: value for name, value in kept.items() if name.startswith("sglang-")}.items() >= {
        "sglang-page-size": ["4"],
        "sglang-enable-metrics": [],
    }.items()
    assert "sglang-metrics-key" not in kept
    assert kept["train-env-vars"]["NCCL_DEBUG"] == "INFO"
