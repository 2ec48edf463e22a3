"""Which layouts are refused before a process starts, and by which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwench.config.layout import ParallelLayout, check_layout, data_parallel_size
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B


@pytest.mark.parametrize(
    ("layout", "world_size", "dp_size"),
    [
        (ParallelLayout(), 1, 1),
        (ParallelLayout(tp=2, sequence_parallel=True), 8, 4),
        (ParallelLayout(tp=8, pp=4, cp=2, sequence_parallel=True), 128, 2),
    ],
)
def test_a_layout_that_divides_leaves_the_rest_to_data_parallelism(layout, world_size, dp_size):
    check_layout(layout, QWEN3_4B, world_size=world_size)
    assert data_parallel_size(layout, world_size=world_size) == dp_size


@pytest.mark.parametrize(
    ("layout", "changes", "world_size", "message"),
    [
        (ParallelLayout(cp=0), {}, 1, r"--context-parallel-size \(0\) must be at least 1"),
        (
            ParallelLayout(tp=2, pp=3),
            {},
            8,
            r"--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 3 \(6 ranks for one copy of the model\) does not "
            r"divide the 8 trainer ranks",
        ),
        (ParallelLayout(cp=4), {}, 2, r"--context-parallel-size 4 .* does not divide the 2 trainer ranks"),
        (ParallelLayout(tp=3), {}, 3, r"--tensor-model-parallel-size \(3\) does not divide the model's 32 attention heads"),
        (ParallelLayout(tp=16), {}, 16, r"\(16\) does not divide the model's 8 key-value heads; choose a divisor of 8"),
        (ParallelLayout(tp=8), {"ffn_hidden_size": 9732}, 8, r"\(8\) does not divide the model's 9732 columns of the MLP"),
        (ParallelLayout(pp=8), {}, 8, r"--pipeline-model-parallel-size \(8\) does not divide the model's 36 layers; choose"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_in_one_line(layout, changes, world_size, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_layout(layout, replace(QWEN3_4B, **changes), world_size=world_size)
    assert "\n" not in str(caught.value)


def test_tokens_are_split_over_tensor_parallel_ranks_with_sequence_parallelism_only():
    assert ParallelLayout(tp=4).token_multiple == 1
    assert ParallelLayout(tp=4, sequence_parallel=True).token_multiple == 4
    assert ParallelLayout(tp=4, pp=2, cp=3).model_ranks == 24


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelLayout(pp=4, last_stage_layers=5), "leaves 31 of the model's 36 layers to 3 other stages"),
        (ParallelLayout(pp=2, first_stage_layers=20, last_stage_layers=15), "leaves 1 of the model's 36 layers to 0 other"),
        (ParallelLayout(pp=2, first_stage_layers=36), "leaves 0 of the model's 36 layers to 1 other stages"),
        (ParallelLayout(pp=2, first_stage_layers=20, last_stage_layers=17), "leaves -1 of the model's 36 layers to 0 other"),
        (ParallelLayout(pp=3, first_stage_layers=38), "^--decoder-first-pipeline-num-layers 38 leaves -2 of the model's 36"),
        (
            ParallelLayout(last_stage_layers=3),
            "^--decoder-last-pipeline-num-layers 3 divides a pipeline, and there is one",
        ),
    ],
)
def test_stages_that_do_not_share_the_layers_are_refused(layout, message):
    with pytest.raises(ConfigError, match=message):
        check_layout(layout, QWEN3_4B, world_size=layout.model_ranks)


def test_the_first_and_the_last_stage_may_have_other_numbers_of_layers():
    uneven = ParallelLayout(pp=4, first_stage_layers=8, last_stage_layers=6)
    check_layout(uneven, QWEN3_4B, world_size=4)
    assert uneven.most_layers(36) == 11
    check_layout(ParallelLayout(pp=2, first_stage_layers=20, last_stage_layers=16), QWEN3_4B, world_size=2)
    assert ParallelLayout(pp=4).most_layers(36) == 9
