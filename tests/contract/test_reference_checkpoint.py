"""A checkpoint that stock megatron-core wrote, with optimizer, goes on here with equal loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import megatron_checkpoints
from tests.contract.megatron_suite import in_a_process, write_models


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_a_run_of_slime_goes_on_where_it_stopped_in_either_backend(tmp_path: Path, model: str) -> None:
    write_models(tmp_path)
    uninterrupted = in_a_process(megatron_checkpoints.write_with_megatron_core, tmp_path, model)["steps"]
    assert uninterrupted[2][0] not in [loss for loss, _ in uninterrupted[:2]], "the third step shows what was restored"
    for backend, tolerance in (("megatron", 0.0), ("fsdp", 1e-5)):
        resumed = in_a_process(megatron_checkpoints.resume_what_megatron_core_wrote, tmp_path, model, backend)
        assert (resumed["first"], resumed["train_steps"]) == (2, 2)
        assert resumed["state"]["source"] == {"offset": 4, "epoch": 1, "group_index": 12, "sample_index": 24}
        assert resumed["step"] == pytest.approx(uninterrupted[2], rel=tolerance, abs=tolerance)
