from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwench.config.command_line.flags import NOT_FLAGS, flag_table
from qwench.config.config import Config
from qwench.config.sections.verbs import ServeConfig
from qwench.config.values import format_value, metavar, parse_value, takes_many


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A dataclass without sections."""

    depth: int
    """How deep."""
    rate: float | None = None
    """How fast;
    None: stands still."""
    names: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    is_open: bool = False


def test_a_plain_dataclass_gives_one_flag_for_each_field_with_the_docstring_below_it_as_help():
    table = flag_table(Plain)
    assert list(table) == ["depth", "rate", "names", "options", "is-open"]
    assert (table["depth"].required, table["rate"].required) == (True, False)
    assert table["rate"].help == "How fast; None: stands still."
    assert table["names"].help == ""
    assert [name for name, flag in table.items() if flag.is_switch] == ["is-open"]
    assert [name for name, flag in table.items() if takes_many(flag.annotation)] == ["names"]
    assert table["options"].default == {}


def test_a_switch_that_is_itself_a_no_offers_no_double_negative():
    table = flag_table(Config)
    assert [table[name].negation for name in ("colocate", "no-load-optim", "lr")] == ["no-colocate", None, None]


@pytest.mark.parametrize("config_type", [Config, ServeConfig])
def test_every_flag_of_a_configuration_is_explained_and_none_is_required(config_type):
    for flag in flag_table(config_type).values():
        assert flag.help.endswith("."), flag.name
        assert not flag.required, flag.name


def test_every_field_of_every_section_has_its_flag():
    config, table = Config(), flag_table(Config)
    for section in fields(config):
        for item in fields(getattr(config, section.name)):
            if item.name not in NOT_FLAGS:
                assert table[item.name.replace("_", "-")].section == section.name
    collecting = ("sglang-args", "router-args", "declared-args", "unused-flags", "overridden-flags", "engine-reason")
    assert not {*collecting} & {*table}


@pytest.mark.parametrize(
    ("annotation", "words", "value"),
    [
        (int, ["-1"], -1),
        (float, ["1e-6"], 1e-6),
        (float, ["-3.4028234663852886e38"], -3.4028234663852886e38),
        *((int, [str(edge)], edge) for edge in (-(2**63), 2**63 - 1)),
        (Path, ["/tmp/" + "x" * 254 + "\udcff"], Path("/tmp/" + "x" * 254 + "\udcff")),
        (str, ["None"], "None"),
        (int | None, ["None"], None),
        (int | None, ["7"], 7),
        (Path | None, ["/a/b"], Path("/a/b")),
        (bool, ["yes"], True),
        (bool | None, ["off"], False),
        (tuple[int, ...], ["1", "2"], (1, 2)),
        (tuple[str, ...], [], ()),
        (Literal["a", "b"] | None, ["b"], "b"),
        (Mapping[str, Any], ['{"a": [1, null]}'], {"a": [1, None]}),
    ],
)
def test_words_become_the_value_of_the_annotation(annotation, words, value):
    assert parse_value(annotation, words) == value


@pytest.mark.parametrize(
    ("annotation", "word", "problem"),
    [
        (int, "1.5", "must be an integer, got '1.5'"),
        (float | None, "fast", "must be a number, got 'fast'"),
        (bool, "maybe", "takes no value, or true or false; got 'maybe'"),
        (Literal["a", "b"], "c", "must be one of a, b; got 'c'"),
        (Mapping[str, Any], "[1]", "must be a JSON object like"),
        (Mapping[str, Any], "{a", "must be a JSON object, got '{a'"),
        (
            Mapping[str, Any],
            '{"a": 1, "b": {"c": 2, "c": 3}}',
            'must be a JSON object, got \'{"a": 1, "b": {"c": 2, "c": 3}}\' (it names the key \'c\' twice)',
        ),
        (Mapping[str, Any], '{"a": ' + "[" * 100_000, "(it is nested too deeply)"),
        (Mapping[str, Any], '{"a": ' + "9" * 5000 + "}", 'must be a JSON object, got \'{"a": 999'),
        (tuple[int, ...], "x", "must be an integer, got 'x'"),
        (Path, "", "must be a path, got nothing"),
        (Path | None, "/tmp/" + "x" * 300, "must be a path of names of at most 255 bytes, got '/tmp/xxx"),
        (str, "a\0b", "must not hold a NUL character"),
        (float, "inf", "must be a finite number, got 'inf'"),
        (float | None, "-inf", "must be a finite number, got '-inf'"),
        (float, "nan", "must be a finite number, got 'nan'"),
        (float, "1e39", "must be a finite number, got '1e39'"),
        (float, "1e400", "must be a finite number, got '1e400'"),
        (int, str(-(2**63) - 1), f"must be an integer of at most 64 bits, got '{-(2**63) - 1}'"),
        (int, str(2**63), f"must be an integer of at most 64 bits, got '{2**63}'"),
        (int, "9" * 5000, f"must be an integer, got '{'9' * 77}...'"),
    ],
)
def test_a_word_that_does_not_fit_says_what_was_expected(annotation, word, problem):
    with pytest.raises(ValueError) as caught:
        parse_value(annotation, [word])
    assert problem in str(caught.value)


_INTEGERS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(
    st.one_of(
        st.tuples(st.just(int), _INTEGERS),
        st.tuples(st.just(float), st.floats(allow_nan=False, allow_infinity=False, width=32)),
        st.tuples(st.just(tuple[int, ...]), st.lists(_INTEGERS).map(tuple)),
        st.tuples(st.just(Mapping[str, Any]), st.dictionaries(st.text(), st.none() | st.integers() | st.text())),
        st.tuples(st.just(int | None), st.none()),
        st.tuples(st.just(bool), st.booleans()),
    )
)
def test_formatted_values_read_back_equal(case):
    annotation, value = case
    assert parse_value(annotation, format_value(value)) == value


def test_help_shows_the_kind_of_value_in_plain_words():
    assert metavar(int | None) == "INT"
    assert metavar(tuple[str, ...]) == "TEXT ..."
    assert metavar(Literal["a", "b"] | None) == "{a,b}"
    assert metavar(Mapping[str, Any]) == "JSON"
    assert metavar(Path) == "PATH"
