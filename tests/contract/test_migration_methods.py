"""Launch lines of slime and miles choose the methods that they choose there."""

from pathlib import Path

import pytest

from qwench.config.command_line.parse import parse_flags
from qwench.config.config import Config

MIS = """\
use_tis: true
use_rs: true
tis_level: token
rs_level: token
tis_mode: truncate
tis_lower_bound: 0.5
tis_upper_bound: 2.0
rs_lower_bound: null
rs_upper_bound: null
rs_veto_threshold: 0.0001
tis_batch_normalize: true
"""
HELPER = "examples.infra_features.train_infer_mismatch_helper.mis"


@pytest.mark.parametrize("function", ["compute_mis_weights_with_cp", "compute_mis_weights_fsdp", "compute_mis_weights"])
def test_the_mismatch_helper_and_its_file_choose_the_built_in_weights(tmp_path: Path, function: str):
    file = tmp_path / "mis.yaml"
    file.write_text(MIS)
    words = ["--custom-config-path", str(file), "--custom-tis-function-path", f"{HELPER}.{function}"]
    algorithm = parse_flags(Config, words, prog="train.py").algorithm
    assert (algorithm.use_tis, algorithm.tis_mode, algorithm.tis_level, algorithm.tis_bounds) == (
        True,
        "truncate",
        "token",
        (0.0, 2.0),
    )
    assert (algorithm.use_rs, algorithm.rs_level, algorithm.rs_bounds) == (True, "token", (0.5, 2.0))
    assert (algorithm.rs_veto_threshold, algorithm.tis_batch_normalize) == (1e-4, True)


def test_the_file_wins_over_the_command_line_also_by_another_name(tmp_path: Path):
    file = tmp_path / "mis.yaml"
    file.write_text(MIS)
    words = ["--tis-clip", "3", "--custom-config-path", str(file)]
    assert parse_flags(Config, words, prog="train.py").algorithm.tis_clip == 2.0
