"""Whose convention a function follows, and the stand-ins that it may import."""

import sys
import types
from pathlib import Path

import pytest

from qwench.errors import ConfigError, QwenchError
from qwench.foreign.loading import is_foreign, load, takes
from qwench.foreign.modules import MODULES, generate_and_rm, stand_ins, withdraw
from qwench.foreign.sample import Sample
from qwench.plugins import check_signature

FLAG = "--custom-rm-path"


@pytest.fixture(autouse=True)
def without_stand_ins():
    withdraw()
    yield
    withdraw()


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:fn"


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("def fn(sample): ...", False),
        ("fn = max", False),
        ("from math import hypot as fn", False),
        ("def fn(): ...", False),
        ("import slime\ndef fn(): ...", False),
        ("async def fn(sample, context): ...", False),
        ("def fn(args, sample, **kwargs): ...", True),
        ("async def fn(input): ...", True),
        ("class fn: ...", True),
        ("def fn(*args, **kwargs): ...", False),
        ("import slime\ndef fn(*args, **kwargs): ...", True),
        ("def fn(*args, **kwargs):\n    from miles.utils.types import Sample", True),
    ],
)
def test_parameters_and_imports_tell_the_convention(tmp_path, text, foreign):
    function = load(write(tmp_path, text), flag=FLAG)
    assert is_foreign(function, "auto") == foreign
    assert is_foreign(function, "slime") and is_foreign(function, "miles") and not is_foreign(function, "qwench")


def test_a_function_of_qwench_is_its_own_under_any_convention():
    assert not any(is_foreign(generate_and_rm, api) for api in ("auto", "slime", "miles"))


def test_images_are_refused_where_they_are_met_not_where_their_helper_is_imported(tmp_path):
    text = "from slime.utils.processing_utils import encode_image_for_rollout_engine as fn"
    with pytest.raises(QwenchError, match="models read text, and encode_image_for_rollout_engine got bytes"):
        load(write(tmp_path, text), flag=FLAG)(b"")


def test_slime_and_miles_are_one_class_of_samples_and_stay_for_late_imports(tmp_path):
    function = load(
        write(
            tmp_path,
            "from slime.utils.types import Sample\n"
            "def fn(args, sample):\n    from miles.utils.types import Sample as Other\n    return Sample is Other, Sample",
        ),
        flag=FLAG,
    )
    assert function(None, None) == (True, Sample)


def test_stand_ins_stay_for_a_module_that_imports_them_only_when_it_is_called(tmp_path):
    function = load(
        write(tmp_path, "def fn(args, sample):\n    from slime.utils.types import Sample\n    return Sample"), flag=FLAG
    )
    assert function(None, None) is Sample


def test_stand_ins_go_when_nothing_took_one(tmp_path):
    load(write(tmp_path, "def fn(args, sample): ..."), flag=FLAG)
    with pytest.raises(ModuleNotFoundError):
        __import__("slime.utils.types")


def test_stand_ins_that_were_taken_stay_until_they_are_withdrawn(tmp_path):
    load(write(tmp_path, "from slime.utils.types import Sample\ndef fn(args, sample): ..."), flag=FLAG)
    assert __import__("miles.utils.types").__name__ == "miles"
    withdraw()
    for name in ("slime", "miles.utils.types"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name.partition('.')[0]}'"):
            __import__(name)


def test_an_installed_package_wins(tmp_path, monkeypatch):
    real = types.ModuleType("slime")
    monkeypatch.setitem(sys.modules, "slime", real)
    with stand_ins():
        assert __import__("slime") is real


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("from slime.agent import Agent", "slime.agent is not part of Qwench; of slime it has stand-ins of backends"),
        ("from slime.utils.types import Unknown", "slime.utils.types.Unknown is not part of Qwench; this stand-in"),
        ("import miles.ray.rollout", "miles.ray is not part of Qwench"),
    ],
)
def test_what_is_not_offered_fails_with_the_reason(tmp_path, line, reason):
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, f"{line}\ndef fn(args, sample): ..."), flag=FLAG)
    assert reason in str(refused.value) and "mine.py:1" in str(refused.value)


def test_a_function_that_cannot_be_called_is_refused(tmp_path):
    function = load(write(tmp_path, "def fn(args): ..."), flag=FLAG)
    with pytest.raises(ConfigError, match=r"has the signature \(args\), but is called as fn\(args, sample\)"):
        check_signature(function, "mine.fn", flag=FLAG, called_as="fn(args, sample)", num_arguments=2)


def test_every_stand_in_can_be_imported():
    with stand_ins():
        for name, names in MODULES.items():
            module = __import__(f"slime.{name}", fromlist=["*"])
            assert all(getattr(module, one) is value for one, value in names.items())


def test_compiled_code_tells_no_signature_and_is_accepted():
    check_signature(max, "mine.fn", flag=FLAG, called_as="fn(args, sample)", num_arguments=2)
    assert not takes(max, "evaluation")


def test_a_keyword_is_taken_by_its_name_or_with_all_others():
    named = [lambda args, evaluation: None, lambda args, **more: None, lambda args, *more: None]
    assert [takes(function, "evaluation") for function in named] == [True, True, False]


@pytest.mark.parametrize(("text", "said"), [("fn = 3", "is no function but a int"), ("other = 3", "has no 'fn'")])
def test_what_cannot_be_loaded_is_refused_by_its_flag(tmp_path, text, said):
    with pytest.raises(ConfigError, match=f"^{FLAG} .*{said}"):
        load(write(tmp_path, text), flag=FLAG)
