import pytest

from qwench.config import (
    Config,
)
from qwench.config.command_line.compat import EMBEDDED_ALIASES, NEUTRAL, NEUTRAL_BY_NAME, SHORTHANDS, neutral_flag
from qwench.config.command_line.flags import flag_table


def test_no_flag_has_two_fates():
    fields = set(flag_table(Config))
    assert len(NEUTRAL_BY_NAME) == len(NEUTRAL)
    assert not fields & NEUTRAL_BY_NAME.keys()
    assert not fields & SHORTHANDS.keys()
    assert not NEUTRAL_BY_NAME.keys() & SHORTHANDS.keys()


def test_shorthands_and_aliases_stand_for_flags_that_exist():
    table = flag_table(Config)
    assert set(EMBEDDED_ALIASES.values()) <= table.keys()
    assert {name for expansion in SHORTHANDS.values() for name in expansion} <= table.keys()


@pytest.mark.parametrize(
    ("name", "spelled", "values", "accepted"),
    [
        ("value-clip", "value-clip", ("0.20",), True),
        ("value-clip", "value-clip", ("0.3",), False),
        ("value-clip", "value-clip", (), False),
        ("bf16", "bf16", (), True),
        ("bf16", "no-bf16", (), False),
        ("fp16", "no-fp16", (), True),
        ("fp16", "fp16", ("false",), True),
        ("recompute-loss-function", "no-recompute-loss-function", (), True),
        ("attention-backend", "attention-backend", ("flash",), True),
        ("attention-backend", "attention-backend", ("unfused",), False),
        ("num-experts", "num-experts", ("1",), False),
        ("profile-target", "profile-target", ("train_overall", "train_actor"), False),
    ],
)
def test_a_neutral_flag_is_accepted_only_where_it_changes_nothing(name, spelled, values, accepted):
    assert NEUTRAL_BY_NAME[name].accepts(spelled, values) is accepted


def test_whole_families_of_flags_are_refused_by_their_prefix():
    flag = neutral_flag("moe-grouped-gemm")
    assert flag is not None
    assert not flag.accepts("moe-grouped-gemm", ())
    assert neutral_flag("lr") is None
