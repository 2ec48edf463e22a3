"""Flags that a user's generate or rollout function declares by `add_arguments(parser)`."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.commands.start import ask_functions
from qwench.config.command_line.parse import Declared, parse_flags
from qwench.config.config import Config
from qwench.config.config_text import as_yaml, flag_values
from qwench.errors import ConfigError
from qwench.foreign.declared_flags import parse_declared

SOURCE = """
async def generate(args, sample, sampling_params):
    return sample

def add(parser):
    parser.add_argument("--max_hops", type=int, default=3, help="Hops of one sample.")
    parser.add_argument("--my-tools", nargs="*", default=["a"])
    parser.add_argument("--my-switch", action="store_true")
    parser.add_argument("-m", "--my-mode", choices=["x", "-y"], default="x")
    {more}

generate.add_arguments = add
"""
NAMES = Declared(names=frozenset({"max-hops", "my-tools", "my-switch", "my-mode"}), help="")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path)


def write(folder: Path, more: str = "pass") -> str:
    (folder / "mine.py").write_text(SOURCE.format(more=more))
    return f"{folder / 'mine.py'}:generate"


def read(path: str, *words: str, ask=lambda paths: NAMES) -> Config:
    return parse_flags(Config, ["--custom-generate-function-path", path, *words], prog="qwench train", ask=ask)


def test_another_process_names_the_flags_and_shows_their_help(path):
    declared = ask_functions([path])
    assert declared.names == NAMES.names
    assert "--max_hops MAX_HOPS" in declared.help and "Hops of one sample." in declared.help
    assert declared.help.splitlines()[0] == "usage: ", "the flags of the run are not shown here"


def test_values_are_parsed_as_the_function_declares_them(path):
    config = read(path, "--max-hops", "5", "--my-tools", "b", "c", "--my-switch", "--my-mode", "-y")
    assert parse_declared(config) == {"max_hops": 5, "my_tools": ["b", "c"], "my_switch": True, "my_mode": "-y"}
    assert parse_declared(read(path)) == {"max_hops": 3, "my_tools": ["a"], "my_switch": False, "my_mode": "x"}


def test_the_saved_configuration_holds_them_and_gives_them_again(path, tmp_path):
    config = read(path, "--max-hops", "5", "--my-switch", "--my-tools")
    assert flag_values(config)["--declared-args"] == "--max-hops 5 --my-switch --my-tools"
    (tmp_path / "saved.yaml").write_text(as_yaml(config))
    again = parse_flags(Config, ["--config", str(tmp_path / "saved.yaml")], prog="qwench train", ask=lambda paths: NAMES)
    assert parse_declared(again) == parse_declared(config) == {"max_hops": 5, "my_tools": [], "my_switch": True, "my_mode": "x"}
    (tmp_path / "short.yaml").write_text("my-switch: true\nmax-hops: 4\n")
    assert parse_declared(read(path, "--config", str(tmp_path / "short.yaml")))["my_switch"] is True


def test_functions_are_asked_only_where_a_flag_is_unknown(path):
    def ask(paths):
        raise AssertionError("no flag is unknown")

    assert read(path, "--rollout-seed", "3", ask=ask).data.rollout_seed == 3


@pytest.mark.parametrize("words", [("--max-hop", "5"), ("--hops", "5")])
def test_other_flags_stay_unknown(path, words):
    with pytest.raises(ConfigError, match=f"unknown flag {words[0]};"):
        read(path, *words)


def test_nothing_is_asked_without_a_function_of_the_users():
    def ask(paths):
        raise AssertionError(f"asked {paths}")

    for named in ([], ["--custom-generate-function-path", "slime.rollout.sglang_rollout.generate"]):
        with pytest.raises(ConfigError, match="unknown flag --max-hops"):
            parse_flags(Config, [*named, "--max-hops", "1"], prog="qwench train", ask=ask)


def test_a_wrong_value_is_the_users_mistake(path):
    with pytest.raises(ConfigError, match="--max_hops: invalid int value: 'many'"):
        parse_declared(read(path, "--max-hops", "many"))


@pytest.mark.parametrize(
    "name", ["lr", "rollout_seed", "seq-length", "sglang-page-size", "over-sampling-filter-input-size", "moe-router-topk"]
)
def test_a_flag_that_exists_is_refused_by_name(tmp_path, name):
    path = write(tmp_path, f'parser.add_argument("--{name}", default=1)')
    with pytest.raises(ConfigError, match=re.escape(f"declares --{name.replace('_', '-')}, which Qwench has itself")):
        ask_functions([path])
    with pytest.raises(ConfigError, match="which Qwench has itself"):
        parse_declared(read(path))


@pytest.mark.parametrize("name", ["help", "help-all", "config"])
def test_a_flag_of_the_command_line_itself_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"declares --{name}, which Qwench has itself"):
        parse_declared(read(write(tmp_path, f'parser.add_argument("--{name}")')))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("raise ValueError('no tools')", r"add_arguments\(\) of {path} failed \(ValueError: no tools, at {file}:10\)"),
        ("exit(3)", r"add_arguments\(\) of {path} failed \(SystemExit: 3, at {file}:10\)"),
        ("parser.add_argument('--share', help='100% or less')", r"add_arguments\(\) of {path} failed \(TypeError: "),
        ("parser.add_argument('file')", "declares the position 'file'; a flag begins with two dashes"),
        ("parser.add_argument('-z')", "declares -z; a flag begins with two dashes"),
        ("parser.add_argument('--needed', required=True)", "declares by add_arguments.*required: --needed"),
    ],
)
def test_a_function_that_cannot_declare_is_the_users_mistake(tmp_path, more, message):
    path = write(tmp_path, more)
    with pytest.raises(ConfigError, match=message.format(path=re.escape(path), file=tmp_path / "mine.py")):
        parse_declared(read(path))


def test_the_error_of_a_function_that_is_asked_for_flags_is_shown(tmp_path):
    with pytest.raises(ConfigError, match=r"failed \(ValueError: no tools, at .*mine.py:10"):
        ask_functions([write(tmp_path, "raise ValueError('no tools')")])


def test_a_module_that_ends_the_asking_process_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be asked for flags: a module ends the process \(it ended with exit code 4"):
        ask_functions([write(tmp_path, "import os; os._exit(4)")])


def test_what_a_module_has_started_holds_no_answer(tmp_path):
    assert ask_functions([write(tmp_path, "import subprocess; subprocess.Popen(['sleep', '3000'])")]).names == NAMES.names


def test_a_copy_of_a_function_of_miles_shares_the_flags_of_tools(tmp_path):
    path = write(tmp_path, 'parser.add_argument("--generate-max-turns", type=int, default=4)')
    assert read(path, "--generate-max-turns", "7").agent.generate_max_turns == 7
    assert parse_declared(read(path))["max_hops"] == 3


def test_a_rollout_class_declares_flags_too(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Rollout:\n    @classmethod\n    def add_arguments(cls, parser):\n"
        "        parser.add_argument('--depth', type=int, default=1)\n"
    )
    config = Config(rollout=replace(Config().rollout, rollout_function_path=f"{tmp_path / 'mine.py'}:Rollout"))
    declared = replace(config, foreign=replace(config.foreign, declared_args=("--depth", "2")))
    assert parse_declared(declared) == {"depth": 2}
