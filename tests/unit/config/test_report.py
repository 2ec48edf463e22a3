from qwench.config import Config, EngineConfig, LoggingConfig, RolloutConfig
from qwench.config.report import Setting, settings_by_section

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


def test_a_key_is_never_shown():
    shown = settings_by_section(Config(logging=LoggingConfig(wandb_key="s3cret")))
    assert Setting(flag="--wandb-key", value="(not shown)", is_default=False) in shown["logging"]
    assert "s3cret" not in str(shown)
