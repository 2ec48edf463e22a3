import re
import shlex
from dataclasses import fields

import pytest

from qwench.config.command_line.flags import flag_table
from qwench.config.command_line.parse import EVAL_DEFAULTS, SFT_DEFAULTS, Declared, parse_flags
from qwench.config.command_line.verb_help import PAGES
from qwench.config.config import Config
from qwench.config.sections.convert import ConvertConfig
from qwench.config.sections.verbs import (
    DoctorConfig,
    DownloadConfig,
    MakeModelConfig,
    QuickstartConfig,
    RewardCheckConfig,
    ServeConfig,
)
from qwench.config.verb_checks import check_eval, check_sft, check_train
from qwench.errors import ConfigError
from qwench.estimators import estimator_names

CONFIGS = {
    "qwench serve": ServeConfig,
    "qwench convert": ConvertConfig,
    "qwench reward check FILE": RewardCheckConfig,
    "qwench make-model": MakeModelConfig,
    "qwench download OWNER/NAME ...": DownloadConfig,
    "qwench doctor": DoctorConfig,
    "qwench quickstart": QuickstartConfig,
}


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *words, config_type=Config, prog="qwench train"):
    with pytest.raises(SystemExit) as ended:
        parse_flags(config_type, words, prog=prog)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("prog", ["qwench train", "qwench sft", "qwench eval"])
def test_the_first_page_has_a_command_the_required_flags_and_the_sections(capsys, prog):
    lines = shown(capsys, "--help", prog=prog).splitlines()
    assert lines[0] == f"usage: {prog} [FLAGS]"
    headings = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert headings[-4:] == ["a", "required", "often", "sections"]
    required = lines[lines.index("required") + 1 : lines.index("often used")]
    assert [line.split()[0][2:] for line in required if line.startswith("  --")] == list(PAGES[prog].required)
    assert len(lines) < 112


def listed(text):
    """Return the sections that a first page lists."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sections"))
    return {line.split()[0] for line in lines[start:] if line.startswith("  ") and line[2] != " "} - {"for"}


@pytest.mark.parametrize("prog", PAGES)
def test_every_verb_says_what_it_does_and_its_typical_command_is_accepted(prog):
    page, config = PAGES[prog], CONFIGS.get(prog, Config)
    assert page.summary.endswith(".") and set(page.unread) <= {flag.section for flag in flag_table(config).values()}
    assert {*page.alternatives, *page.meanings} <= {*page.required, *page.common}
    words = shlex.split(page.example.replace("\\\n", " "))
    verb = [word for word in prog.split() if word.islower()]
    assert words[: len(verb)] == verb
    flags = words[len(verb) :]
    while flags and not flags[0].startswith("--"):
        del flags[0]  # a file or a repository before the flags
    parse_flags(config, flags, prog=prog)
    asked = {word for word in flags if word.startswith("--")}
    missing = {name for name in page.required if f"--{name}" not in asked}
    assert all("--num-epoch" in page.alternatives[name] for name in missing)


def test_a_verb_lists_the_sections_that_it_reads(capsys):
    everything = listed(shown(capsys, "--help"))
    assert everything == {field.name for field in fields(Config)}
    left_out = {
        "qwench sft": {"agent", "asynchronous", "reward", "critic", "distillation", "engine"},
        "qwench eval": {
            "asynchronous", "algorithm", "critic", "distillation", "lora", "optimizer", "parallel", "checkpoint", "profiling",
        },
    }  # fmt: skip
    for prog, names in left_out.items():
        text = shown(capsys, "--help", prog=prog)
        assert everything - listed(text) == names
        named = " ".join(text.split("for qwench train: ")[1].split()).split(", ")
        assert set(named) == names


def test_fine_tuning_is_explained_without_rollouts_and_groups(capsys):
    page = shown(capsys, "--help", prog="qwench sft").partition("sections ")[0].partition("required")[2]
    meanings = " ".join(line[36:] for line in page.splitlines())
    assert [word for word in ("rollout", "group", "prompts", "responses") if word in meanings] == []


@pytest.mark.parametrize("words", [["--help"], ["--help-all"], ["--help", "data"], ["--help", "lr"]])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(capsys, monkeypatch, words, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    allowed = max(columns, 80)  # a command is not broken
    assert [line for line in shown(capsys, *words).splitlines() if len(line) > allowed] == []


def test_help_on_a_flag_that_a_function_declares_is_that_of_the_functions(capsys):
    words = ["--custom-generate-function-path", "mine.generate", "--help"]
    asked = []

    def ask(paths):
        asked.append(list(paths))
        return Declared(names=frozenset({"max-hops"}), help="options:\n  --max-hops N  how far\n")

    for topic in ("max-hops", "--max_hops"):
        with pytest.raises(SystemExit):
            parse_flags(Config, [*words, topic], prog="qwench train", ask=ask)
        assert capsys.readouterr().out == "options:\n  --max-hops N  how far\n"
    with pytest.raises(ConfigError, match="no section, no flag and no text on 'max-hips'"):
        parse_flags(Config, [*words, "max-hips"], prog="qwench train", ask=ask)
    assert asked == [["mine.generate"]] * 3


def test_every_flag_is_in_the_whole_listing_and_in_its_section(capsys):
    whole = shown(capsys, "--help-all")
    assert "\n\nAlso --flag=value, and --config FILE.yaml. The last one wins.\n" in whole
    assert [line for line in whole.splitlines() if re.search(r"\w-$", line)] == [], "no flag is broken at a hyphen"
    for flag in flag_table(Config).values():
        assert f"  --{flag.name}" in whole
    section = shown(capsys, "--help", "optimizer")
    assert "--weight-decay" in section and "--hf-checkpoint" not in section
    assert shown(capsys, "--help", "weight_decay").splitlines()[0] == "  --weight-decay FLOAT"
    assert shown(capsys, "--help", "--weight-decay") == shown(capsys, "--help", "weight-decay")


@pytest.mark.parametrize(
    ("flag", "said"),
    [("advantage-estimator", "(default: grpo)"), ("rm-url", "(default: None)"), ("opd-teacher-urls", None)],
)
def test_the_help_of_a_flag_ends_with_its_default_where_it_has_one(capsys, flag, said):
    text = " ".join(shown(capsys, "--help", flag).split())
    assert text.endswith(said) if said is not None else "(default" not in text


def test_the_help_of_a_flag_without_a_default_says_that_it_is_required(capsys):
    for words in (["--help"], ["--help", "output"]):
        assert "(required)" in shown(capsys, *words, config_type=ConvertConfig, prog="qwench convert")


def test_an_unknown_topic_is_named_with_the_nearest(capsys):
    with pytest.raises(ConfigError, match="has no section, no flag and no text on 'optimiser'; did you mean optimizer"):
        parse_flags(Config, ["--help", "optimiser"], prog="qwench train")
    with pytest.raises(ConfigError, match="no text on 'paralel'; did you mean parallel"):
        parse_flags(Config, ["--help", "paralel"], prog="qwench train")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("muon", ["optimizer", "muon-momentum", "muon-num-ns-steps"]),
        ("nf4", ["lora-base"]),
        ("check-first", ["rollout-health-check-first-wait"]),
        ("Math_Verify", ["second-grader"]),
    ],
)
def test_a_word_that_is_no_flag_lists_the_flags_that_mention_it(capsys, word, found):
    heading, *rows = shown(capsys, "--help", word).splitlines()
    assert heading.startswith("flags that mention ")
    assert [row.split()[0][2:] for row in rows if row.startswith("  --")] == found


def test_the_first_page_has_no_heading_without_flags(capsys):
    lines = shown(capsys, "--help", config_type=RewardCheckConfig, prog="qwench reward check FILE").splitlines()
    assert "required" not in lines
    assert lines[lines.index("often used") + 1].startswith("  --rm-type TEXT")


@pytest.mark.parametrize("words", [["--help"], ["--help-all"]])
def test_no_choice_is_offered_that_is_refused(capsys, words):
    text = shown(capsys, *words)
    assert [word for word in ("qwen3_5", "sgd") if word in text] == []
    for name in estimator_names():
        assert name in shown(capsys, "--help", "advantage-estimator")


def test_a_small_verb_shows_all_its_flags(capsys):
    text = shown(capsys, "--help", config_type=ConvertConfig, prog="qwench convert")
    assert "--max-shard-gb FLOAT" in text and "a typical command" in text


def test_serve_has_a_first_page_too(capsys):
    text = shown(capsys, "-h", config_type=ServeConfig, prog="qwench serve")
    assert "--port INT" in text and "--embedded-page-size" not in text
    assert "  --lora TEXT ...  " in text
    assert "  --embedded-max-running-requests INT\n" in text


@pytest.mark.parametrize(
    ("prog", "check", "defaults"),
    [("qwench train", check_train, {}), ("qwench sft", check_sft, SFT_DEFAULTS), ("qwench eval", check_eval, EVAL_DEFAULTS)],
)
def test_all_missing_flags_are_named_at_once_and_are_those_of_the_help(prog, check, defaults):
    with pytest.raises(ConfigError) as caught:
        check(parse_flags(Config, [], prog=prog, defaults=defaults))
    said = str(caught.value)
    assert said.startswith(f"{prog} requires --hf-checkpoint (")
    for name in PAGES[prog].required:
        assert f"--{name} " in said or (prog, name) == ("qwench eval", "rm-type")


def test_missing_flags_of_a_small_verb_are_named_at_once():
    with pytest.raises(ConfigError, match=r"qwench convert requires --input .*, --output .*, --to "):
        parse_flags(ConvertConfig, [], prog="qwench convert")
