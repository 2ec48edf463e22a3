"""Which names of models and data are accepted: paths, patterns and names of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.config.named_files import check_checkpoint, check_data_file, check_starting_point
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.model import ModelConfig
from qwench.errors import ConfigError


def test_names_of_the_hub_are_looked_for_later() -> None:
    check_checkpoint(ModelConfig(hf_checkpoint=Path("owner/model")))
    check_starting_point(CheckpointConfig(ref_load=Path("owner/model")))
    check_data_file("--prompt-data", "owner/sums:test@[:8]")
    part = "owner/model:part"
    with pytest.raises(ConfigError, match=f"^--hf-checkpoint: there is no folder {part}; `qwench download OWNER/NAME"):
        check_checkpoint(ModelConfig(hf_checkpoint=Path(part)))
    with pytest.raises(ConfigError, match=f"^--ref-load: there is no folder {part}; give that of --hf-checkpoint"):
        check_starting_point(CheckpointConfig(ref_load=Path(part)))


def test_data_is_a_file_a_folder_or_a_pattern_that_fits_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.tsv").touch()
    for spec in ("", "/a.jsonl", "/a.jsonl@[2:5]", "/*.jsonl"):
        check_data_file("--prompt-data", f"{tmp_path}{spec}")
    for spec in ("/b.jsonl", "/*.parquet"):
        with pytest.raises(ConfigError) as refused:
            check_data_file("--prompt-data", f"{tmp_path}{spec}")
        assert str(refused.value) == f"--prompt-data: there is no file {tmp_path}{spec}"
    with pytest.raises(ConfigError, match=r"a\.tsv has the unknown format '\.tsv'; convert it to "):
        check_data_file("--prompt-data", f"{tmp_path}/a.tsv")
    with pytest.raises(ConfigError, match=r"^--prompt-data: '~nobody-of-this-name/a\.jsonl' names no data file \("):
        check_data_file("--prompt-data", "~nobody-of-this-name/a.jsonl")
