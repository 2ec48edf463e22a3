import pytest

from qwench.config.command_line.argv import Given, Occurrence, custom_settings, overridden, read_yaml, sort_flags, split_words
from qwench.config.command_line.flags import flag_table
from qwench.config.config import Config
from qwench.config.sections.verbs import MakeModelConfig
from qwench.errors import ConfigError

TABLE = flag_table(Config)


def sort(*words: str) -> Given:
    return sort_flags(split_words(words), TABLE)


def test_words_up_to_the_next_flag_are_the_flags_values():
    assert split_words(["--rollout-stop", "a", "-b", "--top_k=-1", "--colocate", "--x=a=b"]) == [
        Occurrence(name="rollout-stop", values=("a", "-b")),
        Occurrence(name="top-k", values=("-1",)),
        Occurrence(name="colocate", values=()),
        Occurrence(name="x", values=("a=b",)),
    ]


def test_a_word_before_the_first_flag_is_refused():
    with pytest.raises(ConfigError, match="unexpected argument 'model'"):
        split_words(["model", "--lr", "1"])


def test_the_last_of_repeated_flags_wins_also_between_a_switch_and_its_negation():
    given = sort("--lr", "1", "--colocate", "--lr=2", "--no-colocate", "--rollout-stop", "a", "b", "--rollout_stop", "c")
    assert given.flags == {"lr": 2.0, "colocate": False, "rollout-stop": ("c",)}


def test_a_value_that_a_later_one_overrides_is_kept_once():
    words = ["--lr", "1", "--lr", "1", "--top-k-of-others", "3", "--lr", "2", "--lr", "3", "--colocate", "--no-colocate"]
    assert overridden(split_words([*words, "--update-weight-delta-dir", "a", "--update-weight-disk-dir", "b"]), TABLE) == [
        "lr 1",
        "lr 2",
        "colocate true",
        "update-weight-disk-dir a",
    ]


OTHER_NAMES = """
dp-replicate-size dp-replicate
fsdp-cpu-offload optimizer-cpu-offload
load-forge-rollout-data load-debug-rollout-data
rollout-num-gpus-per-node num-gpus-per-node
update-rollout-weights-interval update-weights-interval
update-weight-delta-dir update-weight-disk-dir
update-weight-delta-keep-files update-weight-disk-keep-files
over-sampling-filter-input-size over-sampling-batch-size
sampling-batch-size over-sampling-batch-size
enable-off-policy-correction use-tis
off-policy-correction-clip-threshold tis-clip
tis-upper-bound tis-clip
disable-rollout-trim-samples allow-partial-train-step
balance-by-flops balance-data
profile use-pytorch-profiler
use-checkpoint-lr-scheduler use-checkpoint-opt-param-scheduler
decoder-num-layers num-layers
sglang-router-policy router-policy
sglang-router-port router-port
sglang-router-request-timeout-secs router-request-timeout-secs
"""
OTHER_VALUES = """
chat-template-path autofix chat-template-path None
attn-implementation triton attn-implementation varlen
update-weight-transfer-mode disk-delta update-weight-transport disk
true-on-policy-contract qwen3_dense_true_on_policy_v1 true-on-policy-mode true
sglang-true-on-policy-contract qwen3_dense_true_on_policy_v1 true-on-policy-mode true
use-session-server v1 use-session-server true
ft-components rollout use-fault-tolerance true
rollout-function-path slime.rollout.fully_async_rollout.generate_rollout_fully_async fully-async true
rollout-function-path miles.rollout.fully_async_rollout.generate_rollout_fully_async fully-async true
rollout-function-path miles.rollout.fully_async_rollout.FullyAsyncRolloutFn fully-async true
custom-tis-function-path slime.backends.megatron_utils.loss.icepop_function tis-mode icepop
custom-tis-function-path miles.backends.training_utils.loss_hub.corrections.icepop_function tis-mode icepop
"""


@pytest.mark.parametrize("row", [row.split() for row in OTHER_NAMES.split("\n") if row])
def test_another_name_of_a_flag_is_ours(row):
    theirs, ours = row
    flag = TABLE.get(ours)
    values = [] if flag is not None and flag.is_switch else ["1"]
    assert sort(f"--{theirs}", *values) == sort(f"--{ours}", *values)


@pytest.mark.parametrize("row", [row.split() for row in OTHER_VALUES.split("\n") if row])
def test_another_value_of_a_flag_is_ours(row):
    flag, value, *ours = row
    assert sort(f"--{flag}", value).flags == sort(f"--{ours[0]}", *ours[1:]).flags != {}


def test_a_file_of_an_evaluation_set_without_a_name_is_that_of_aime():
    for file in ("a.jsonl", "a.jsonl@[:2]"):
        assert sort("--eval-prompt-data", file).flags == {"eval-prompt-data": ("aime", file)}
    assert sort("--eval-prompt-data", "b", "a.jsonl").flags == {"eval-prompt-data": ("b", "a.jsonl")}


@pytest.mark.parametrize("flag", ["config", "custom-config-path"])
def test_a_file_that_names_a_flag_in_both_spellings_is_refused(flag, tmp_path):
    (tmp_path / "a.yaml").write_text("eps_clip: 0.1\neps-clip: 0.3\n")
    with pytest.raises(ConfigError, match=f"^--{flag}: .*a.yaml names eps-clip twice, spelled with - and with _"):
        read_yaml(Occurrence(name=flag, values=(str(tmp_path / "a.yaml"),)))


def test_a_flag_whose_own_name_begins_with_no_is_not_a_negation():
    assert sort("--no-load-optim").flags == {"no-load-optim": True}
    assert sort("--no-no-load-optim").flags == {"no-load-optim": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rat", "1"], "unknown flag --learning-rat; see qwench train --help"),
        (["--max-token-per-gpu", "1"], "unknown flag --max-token-per-gpu; did you mean --max-tokens-per-gpu?"),
        (["--hel"], "unknown flag --hel; did you mean --help or --help-all?"),
        (["--no-lr"], "unknown flag --no-lr"),
        (["--lr"], "--lr expects one value, got none"),
        (["--lr", "1", "2"], "--lr expects one value, got 1 2"),
        (
            ["--target-modules", "q_proj", "v_proj"],
            "--target-modules expects one value, got q_proj v_proj; join them: q_proj,v_proj",
        ),
        (["--seed", "x"], "--seed must be an integer, got 'x'"),
        (["--colocate", "x"], "--colocate takes no value, or true or false; got 'x'"),
        (["--no-colocate", "true"], "--no-colocate takes no value, got true"),
        (["--moe-router-topk", "8"], "--moe-router-topk 8 is not supported: Qwench trains dense models"),
        (["--hidden-dropout", "0.1"], "--hidden-dropout 0.1 is not supported: Qwen3 has no dropout; leave it out or give 0"),
        (["--no-bf16"], "--no-bf16 is not supported: training is in bfloat16"),
        (["--critic-save", "a"], "--critic-save a is not built yet: a place of its own for the critic"),
        (["--sglang-page-size", "big"], "--sglang-page-size must be an integer, got 'big'"),
        (["--custom-rm-path", "slime.rollout.x.y"], "--custom-rm-path slime.rollout.x.y names no built-in function of Qwench"),
        (["--dump-details"], "--dump-details expects one value, got none"),
    ],
)
def test_a_wrong_flag_is_named_with_what_to_do(words, message):
    with pytest.raises(ConfigError) as caught:
        sort(*words)
    assert str(caught.value).startswith(message)


def test_neutral_flags_are_accepted_in_every_spelling_of_their_value_and_leave_nothing():
    assert sort("--attention-dropout", "0.0", "--hidden-dropout=0", "--bf16", "--no-fp16") == Given()


def test_sglang_and_router_flags_pass_through_and_the_last_wins():
    given = sort("--sglang-cuda-graph-bs", "1", "2", "--router-policy", "random", "--sglang-cuda-graph-bs", "4", "--sglang-x")
    assert given.sglang == {"cuda-graph-bs": ("4",), "x": ()}
    assert given.router == {"policy": ("random",)}
    assert given.flags == {}


def test_sglang_flags_that_are_fields_do_not_pass_through():
    given = sort("--sglang-server-concurrency", "8", "--sglang-enable-deterministic-inference")
    assert given.flags == {"sglang-server-concurrency": 8, "sglang-enable-deterministic-inference": True}
    assert given.sglang == {}


def test_a_verb_without_engines_passes_nothing_through():
    with pytest.raises(ConfigError, match="unknown flag --sglang-page-size"):
        sort_flags(split_words(["--sglang-page-size", "1"]), flag_table(MakeModelConfig))


def test_sglang_flags_that_the_embedded_engine_honours_set_its_own_flag_unless_that_is_given():
    assert sort("--sglang-mem-fraction-static", "0.7").flags == {"embedded-mem-fraction": 0.7}
    given = sort("--embedded-mem-fraction", "0.5", "--sglang-mem-fraction-static", "0.7")
    assert given.flags == {"embedded-mem-fraction": 0.5}
    assert given.sglang == {"mem-fraction-static": ("0.7",)}


def test_a_shorthand_gives_way_to_the_flags_it_stands_for_wherever_they_stand():
    trained = {"save-debug-train-data": "d/train_data/{rollout_id}.jsonl"}
    expansion = {"save-debug-rollout-data": "d/rollout_data/{rollout_id}.jsonl", **trained}
    assert sort("--dump-details", "d").flags == expansion
    given = sort("--save-debug-rollout-data", "r/{rollout_id}", "--dump-details", "d")
    assert given.flags == {"save-debug-rollout-data": "r/{rollout_id}", **trained}


def test_a_file_of_evaluation_without_a_name_is_aimes_as_there():
    assert sort_flags(split_words(["--eval-prompt-data", "a/b.jsonl@[:4]"]), TABLE).flags["eval-prompt-data"] == (
        "aime",
        "a/b.jsonl@[:4]",
    )


def test_yaml_comes_before_the_command_line_wherever_it_is_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "lr: 1e-6\nmax_tokens_per_gpu: 9216\ncolocate: true\nrollout-stop: [a, b]\nsave: null\n"
        "train_env_vars: {A: '1'}\nsglang-attention-backend: fa3\n"
    )
    given = sort("--lr", "2e-6", "--config", str(file))
    assert given.flags == {
        "lr": 2e-6,
        "max-tokens-per-gpu": 9216,
        "colocate": True,
        "rollout-stop": ("a", "b"),
        "save": None,
        "train-env-vars": {"A": "1"},
    }
    assert given.sglang == {"attention-backend": ("fa3",)}


def test_a_flag_that_repeats_another_one_must_agree_with_it():
    words = ["--hf-checkpoint", "/models/Qwen3-4B", "--tokenizer-model", "Qwen/Qwen3-4B", "--weight-decay", "0.1"]
    assert sort(*words, "--start-weight-decay", "1e-1").flags["weight-decay"] == 0.1
    assert sort("--end-weight-decay", "1e-2").flags == {}, "it repeats the default"
    for repeated, problem in (
        (["--end-weight-decay", "0.2"], "--end-weight-decay 0.2 must repeat --weight-decay (0.1): weight decay is constant"),
        (
            ["--sglang-tokenizer-path", "Qwen3-8B"],
            "--sglang-tokenizer-path Qwen3-8B must repeat --hf-checkpoint (/models/",
        ),
        (["--rollout-external"], "--rollout-external must repeat --rollout-external-engine-addrs ("),
    ):
        with pytest.raises(ConfigError) as refused:
            sort(*words, *repeated)
        assert str(refused.value).startswith(problem) and str(refused.value).endswith("; leave it out")
    given = sort("--rollout-external", "--rollout-external-engine-addrs", "a:1")
    assert given.flags == {"rollout-external-engine-addrs": ("a:1",)}


def test_all_refused_flags_are_named_at_once_and_what_is_never_supported_first():
    with pytest.raises(ConfigError) as refused:
        sort("--fp8-recipe", "b", "--critic-save", "a", "--multi-lora-n-adapters", "4", "--multi-lora-n-adapters", "5")
    assert str(refused.value).startswith("--multi-lora-n-adapters 4 is not supported: one run trains one adapter")
    assert str(refused.value).endswith("(refused too: --fp8-recipe --critic-save)")


def test_embedded_engines_read_sglangs_names_unless_their_own_are_given():
    assert sort("--sglang-mem-fraction-static", "0.5").flags == {"embedded-mem-fraction": 0.5}
    both = sort("--sglang-mem-fraction-static", "0.5", "--embedded-mem-fraction", "0.25")
    assert both.flags == {"embedded-mem-fraction": 0.25}


ALL_SETTINGS = ["lr", "tis-clip", "use-rs", "rs-upper-bound"]
BUILT_IN, OWN = "slime.backends.megatron_utils.loss.vanilla_tis_function", "mine.weights"


@pytest.mark.parametrize(
    ("functions", "settings"),
    [
        ([], ALL_SETTINGS), ([BUILT_IN], ALL_SETTINGS), ([OWN], ["lr"]), ([OWN, BUILT_IN], ALL_SETTINGS),
        ([BUILT_IN, OWN], ["lr"]),
    ],
)  # fmt: skip
def test_a_custom_file_sets_flags_but_not_what_the_last_named_function_of_weights_reads_there(functions, settings, tmp_path):
    file = tmp_path / "custom.yaml"
    file.write_text("lr: 0.5\nmine: 3\ntis_clip: 3.0\nuse_rs: true\nrs_upper_bound: 2.0\nseed: null\n")
    words = [word for path in functions for word in ("--custom-tis-function-path", path)]
    words += ["--custom-config-path", str(file), "--rollout-function-path", OWN]
    assert [entry.name for entry in custom_settings(split_words(words), TABLE)] == settings


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("learning_rate: 1\n", "unknown flag --learning-rate; use --lr"),
        ("seed: soon\n", "--seed must be an integer, got 'soon'"),
        ("critic_save: a\n", "--critic-save a is not built yet"),
    ],
)
def test_a_wrong_yaml_key_is_named_with_its_file(tmp_path, content, problem):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        sort("--config", str(file))
    assert str(caught.value).startswith(f"{file}: {problem}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("- lr\n", "must map flag names to values"),
        ("a: [\n", "is not YAML"),
        ("[" * 1000, "is not YAML"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(tmp_path, content, problem):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        sort("--config", str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("values", "got"), [([], "none"), (["a.yaml", "b.yaml"], "a.yaml b.yaml")])
def test_a_file_of_flags_is_one_file(values, got):
    with pytest.raises(ConfigError, match=f"^--config expects one YAML file, got {got}$"):
        sort("--config", *values)
