from qwench.config import AlgorithmConfig, ClusterConfig, Config, EngineConfig, LoggingConfig, RolloutConfig, TrainingConfig
from qwench.config.report import Setting, derived_lines, settings_by_section

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


def test_derived_lines_state_the_identities_with_their_numbers():
    config = Config(
        rollout=ROLLOUT,
        training=TrainingConfig(global_batch_size=64, micro_batch_size=4),
        cluster=ClusterConfig(actor_num_gpus_per_node=2),
        algorithm=AlgorithmConfig(use_kl_loss=True),
    )
    assert list(derived_lines(config, config.resolve())) == [
        "rollout_batch_size 32 x n_samples_per_prompt 8 = global_batch_size 64 x num_steps_per_rollout 4",
        "world_size 2 = TP 1 x PP 1 x CP 1 x DP 2",
        "micro-batches: 8 of 4 samples in each step on each of the 2 DP ranks",
        "rollouts: 5",
        "devices: shared by trainer and engines",
        "reference model: held",
    ]
    packed = Config(rollout=ROLLOUT, training=TrainingConfig(use_dynamic_batch_size=True, max_tokens_per_gpu=100))
    assert "micro-batches: packed up to 100 tokens, as many on each of the 1 DP ranks" in derived_lines(
        packed, packed.resolve()
    )
