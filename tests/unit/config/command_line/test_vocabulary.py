import re

import pytest

from qwench.config.command_line.argv import sort_flags, split_words
from qwench.config.command_line.compat import FOREIGN_FLAGS, ONE_VALUE, SHORTHANDS
from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.parse import parse_flags
from qwench.config.command_line.vocabulary import _FAMILIES, _OF_VERB, ADVICE, advise
from qwench.config.config import Config
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.verbs import DownloadConfig, MakeModelConfig, RewardCheckConfig, ServeConfig
from qwench.errors import ConfigError

TABLE = flag_table(Config)
TABLES = {
    "qwench eval": TABLE,
    "qwench serve": flag_table(ServeConfig),
    "qwench convert": flag_table(ConvertConfig),
    "qwench reward check": flag_table(RewardCheckConfig),
    "qwench download": flag_table(DownloadConfig),
    "qwench make-model": flag_table(MakeModelConfig),
}


def flags_of(text):
    return re.findall(r"--([a-z][a-z0-9-]+)", re.sub(r"qwench \w+ --\S+ \S+", "", text))


def refusal(*words, config_type=Config, prog="qwench train"):
    with pytest.raises(ConfigError) as caught:
        parse_flags(config_type, words, prog=prog)
    return str(caught.value)


@pytest.mark.parametrize("phrase", sorted({*ADVICE.values(), *(phrase for _, phrase in _FAMILIES)}))
def test_no_phrase_leads_to_a_flag_that_is_unknown_or_refused(phrase):
    assert [flag for flag in flags_of(phrase) if flag not in TABLE or flag in ONE_VALUE or flag in FOREIGN_FLAGS] == []


@pytest.mark.parametrize("verb", _OF_VERB)
def test_the_phrases_of_a_verb_name_its_own_flags(verb):
    for phrase in _OF_VERB[verb].values():
        assert [flag for flag in flags_of(phrase) if flag not in TABLES[verb]] == [], phrase


def test_no_word_is_a_flag_that_is_accepted_already():
    assert [word for word in ADVICE if word in TABLE or word in SHORTHANDS] == []
    for verb, words in _OF_VERB.items():
        if verb != "qwench eval":  # which shares its table with training
            assert [word for word in words if word in TABLES[verb]] == []


@pytest.mark.parametrize(
    ("word", "served_by"),
    [
        ("use-lora", "--lora-rank trains adapters"),
        ("peft-config", "--lora-rank trains adapters"),
        ("save-gguf", "GGUF is neither read nor written"),
        ("load-in-4bit", "weights are not quantised"),
        ("learning-rate", "use --lr"),
        ("learning_rate", "use --lr"),
        ("Learning-Rate", "use --lr"),
        ("batch-size", "use --rollout-batch-size"),
        ("per-device-train-batch-size", "use --micro-batch-size"),
        ("gradient-accumulation-steps", "gradients accumulate over micro-batches"),
        ("num-train-epochs", "use --num-epoch"),
        ("epochs", "use --num-epoch"),
        ("max-steps", "use --num-rollout"),
        ("max-length", "use --rollout-max-context-len"),
        ("max-completion-length", "use --rollout-max-response-len"),
        ("num-generations", "use --n-samples-per-prompt"),
        ("temperature", "use --rollout-temperature"),
        ("model", "use --hf-checkpoint"),
        ("model-name-or-path", "use --hf-checkpoint"),
        ("dataset", "use --prompt-data"),
        ("val-files", "use --eval-prompt-data"),
        ("output-dir", "use --save"),
        ("report-to", "use --use-tensorboard"),
        ("run-name", "use --wandb-group"),
        ("beta", "use --use-kl-loss"),
        ("vllm-mode", "engines are Qwench's own or SGLang"),
        ("use-vllm", "engines are Qwench's own or SGLang"),
        ("deepspeed", "use --train-backend fsdp"),
        ("dpo-beta", "Qwench has no preference optimisation"),
        ("resume-from-checkpoint", "the same command with the same --save"),
        ("reward-funcs", "use --rm-type"),
    ],
)
def test_words_of_other_tools_lead_to_what_serves_them(word, served_by):
    assert refusal(f"--{word}", "1").startswith(
        f"unknown flag --{word.lower() if word[0].islower() else word}".replace("_", "-")
    )
    assert f"; {served_by}" in refusal(f"--{word}", "1")


@pytest.mark.parametrize(
    ("word", "served_by"),
    [
        ("data.train_batch_size=1024", "use --rollout-batch-size"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "use --lr"),
        ("actor_rollout_ref.model.path=Qwen/Qwen3-0.6B", "use --hf-checkpoint"),
        ("actor_rollout_ref.rollout.n=8", "use --n-samples-per-prompt"),
        ("+trainer.total_epochs=3", "use --num-epoch"),
        ("-lr", "use --lr"),
    ],
)
def test_an_override_of_verl_and_a_single_dash_are_told_the_flag(word, served_by):
    said = refusal(word)
    assert said.startswith(f"unexpected argument {word!r}; settings are given as --flag value; {served_by}")


def test_a_model_in_front_of_the_flags_is_told_its_flag(tmp_path):
    for word in ("Qwen/Qwen3-0.6B", str(tmp_path)):
        assert refusal(word).endswith("settings are given as --flag value; use --hf-checkpoint")


def test_a_file_in_front_of_the_flags_gets_no_guess():
    assert refusal("data/train.jsonl").endswith("settings are given as --flag value")


@pytest.mark.parametrize(
    ("config_type", "prog", "word", "said"),
    [
        (Config, "qwench eval", "output-dir", "use --eval-output"),
        (Config, "qwench eval", "temperature", "use --eval-temperature"),
        (ServeConfig, "qwench serve", "model-path", "use --hf-checkpoint"),
        (ServeConfig, "qwench serve", "learning-rate", "use --lr; qwench serve has no such flag, qwench train has"),
        (ServeConfig, "qwench serve", "sampling-backend", "see qwench serve --help"),
        (ConvertConfig, "qwench convert", "output-dir", "use --output"),
        (ConvertConfig, "qwench convert", "format", "use --to"),
        (RewardCheckConfig, "qwench reward check FILE", "workers", "use --reward-num-workers"),
        (RewardCheckConfig, "qwench reward check FILE", "foo", "see qwench reward check --help"),
        (DownloadConfig, "qwench download OWNER/NAME ...", "local-dir", "use --output"),
    ],
)
def test_each_verb_leads_to_its_own_flags(config_type, prog, word, said):
    assert refusal(f"--{word}", "x", config_type=config_type, prog=prog).startswith(f"unknown flag --{word}; {said}")


@pytest.mark.parametrize(
    ("verb", "words", "phrase"),
    [
        ("eval", "output-dir output out out-dir o save save-dir output-path", "use --eval-output"),
        ("eval", "dataset datasets data data-path prompt-data tasks task", "use --eval-prompt-data NAME FILE"),
        ("eval", "max-new-tokens max-tokens max-response-len", "use --eval-max-response-len"),
        ("eval", "top-p", "use --eval-top-p"),
        ("eval", "top-k", "use --eval-top-k"),
        ("eval", "n num-samples n-samples k", "use --n-samples-per-eval-prompt"),
        ("eval", "batch-size", "use --embedded-max-running-requests, the responses decoded at once"),
        ("serve", "max-num-seqs batch-size max-batch-size", "use --embedded-max-running-requests"),
        ("serve", "max-model-len max-length context-length", "use --embedded-kv-cache-tokens"),
        ("serve", "listen", "use --host and --port"),
        ("convert", "source src input-dir input-path load from checkpoint model", "use --input"),
        ("convert", "output-dir output-path out o save dest target", "use --output"),
        ("convert", "format output-format target-format", "use --to"),
        ("convert", "origin-hf-dir config tokenizer", "use --hf-checkpoint"),
        ("reward check", "response-column completion-key output-key input-key", "use --response-key"),
        ("reward check", "workers num-workers processes", "use --reward-num-workers"),
        ("reward check", "timeout", "use --reward-timeout-s"),
        ("download", "local-dir dir cache-dir save out o", "use --output"),
        ("download", "repo-type type", "use --kind"),
        ("download", "dataset", "use --kind dataset"),
        ("make-model", "model model-size num-layers hidden-size vocab-size", "use --size"),
        ("make-model", "save output-dir out o", "use --output"),
        (
            "train",
            "critic-model value-model vf-coef",
            "--advantage-estimator ppo trains a critic; see --critic-lr and --critic-load",
        ),
        (
            "train",
            "orpo-alpha simpo kto",
            "Qwench has no preference optimisation; it has RL (qwench train) and SFT (qwench sft)",
        ),
        ("train", "image-key audio vision-tower video-path", "Qwench trains text models"),
        ("train", "neftune-alpha label-smoothing ema liger-kernel", "Qwench has none; leave it out"),
        ("train", "load-in-4bit awq", "weights are not quantised in training; qwench convert --to fp8 makes FP8 checkpoints"),
        ("train", "zero3 deepspeed-config", "use --train-backend fsdp, which shards parameters, gradients and optimizer state"),
        (
            "train",
            "llama-cpp ggml-type",
            "GGUF is neither read nor written; llama.cpp converts the Hugging Face folders of --save-hf",
        ),
    ],
)
def test_words_of_a_verb_lead_to_what_serves_them_there(verb, words, phrase):
    prog = f"qwench {verb}"
    for word in words.split():
        assert advise(word, prog=prog, offered=TABLES.get(prog, TABLE)) == phrase, word


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("learningrate", "use --lr"),
        ("rollout-temp", "did you mean --rollout-temperature?"),
        ("eval-temp", "did you mean --eval-temperature?"),
        ("kl-loss", "did you mean --kl-loss-coef or --kl-loss-type?"),
        ("custom-rm", "did you mean --custom-rm-path or --custom-rm-in-process?"),
        ("custom-rm-function", "use --rm-type NAME, or --custom-rm-path"),
        ("fault-tolerance", "did you mean --use-fault-tolerance?"),
        ("opd", "did you mean --use-opd?"),
        ("numrollout", "did you mean --num-rollout?"),
        ("help-al", "did you mean --help-all?"),
        ("opd-teacher", "use --opd-teacher-load, or --opd-teacher-urls"),
        ("local-rank", "a run starts its ranks itself"),
        ("rollout-max-tokens", "use --rollout-max-response-len"),
        ("micro-rollout-batch-size", "engines batch requests themselves"),
        ("colocate-all-models", "use --colocate"),
        ("dynamic-filtering", "use --dynamic-sampling-filter-path"),
        ("metric-for-best-model", "use --keep-best"),
        ("patience", "use --early-stopping-patience, or --stop-metric 'eval/NAME>=X'"),
        ("multi-turn", "conversations with tools are a function of yours"),
        ("save-hf-checkpoint", "see qwench train --help"),  # another word, not a slip
    ],
)
def test_a_hint_is_right_or_absent(typed, said):
    assert f"unknown flag --{typed}; {said}" in refusal(f"--{typed}", "1")


@pytest.mark.parametrize(
    ("stray", "hint"), [("-lr", "; use --lr"), ("trainer.save_freq=3", "; use --save-interval"), ("-b", "")]
)
def test_a_word_that_is_no_flag_behind_a_value_is_told_apart(stray, hint):
    said = f"--lr expects one value, got 1e-6 {stray}; unexpected argument {stray!r}; settings are given as --flag value{hint}"
    assert refusal("--lr", "1e-6", stray) == said


@pytest.mark.parametrize("typed", ["num-expert", "optimiser", "opd-kl-coeff", "rollout-top-pp"])
def test_a_refused_flag_is_never_offered(typed):
    said = refusal(f"--{typed}", "1")
    assert [flag for flag in flags_of(said.partition(";")[2]) if flag in ONE_VALUE or flag in FOREIGN_FLAGS] == [], said


def test_an_unknown_word_that_resembles_nothing_gets_no_guess():
    assert refusal("--frobnicate", "1") == "unknown flag --frobnicate; see qwench train --help"
    assert advise("frobnicate", prog="qwench train", offered=TABLE) is None


def test_flags_of_slime_that_change_nothing_belong_to_the_verbs_that_train():
    assert sort_flags(split_words(["--bf16"]), TABLE).flags == {}
    assert refusal("--bf16", config_type=MakeModelConfig, prog="qwench make-model").startswith("unknown flag --bf16")
