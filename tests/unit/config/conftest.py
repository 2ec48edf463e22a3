from pathlib import Path

import pytest


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "train.jsonl").write_text('{"input": "1+1", "label": "2"}\n')
    return tmp_path
