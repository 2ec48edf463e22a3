import os
import subprocess
import sys

import pytest

from qwench.commands.download import download
from qwench.errors import ConfigError
from tests.deadlines import patient
from tests.fakes.hub import serve_hub

FILES = {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"weights", "pytorch_model.bin": b"old weights"}


def run(address, *words):
    environ = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "qwench", "download", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=patient(120))


def test_a_repository_arrives_without_what_nobody_reads_and_is_fetched_once(tmp_path):
    with serve_hub("Qwen/Qwen3-Tiny", FILES) as (address, fetched):
        for _ in range(2):
            done = run(address, "Qwen/Qwen3-Tiny", "--output", str(tmp_path))
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == str(tmp_path / "Qwen3-Tiny")
        assert sorted(fetched) == ["config.json", "model.safetensors"]
    assert (tmp_path / "Qwen3-Tiny" / "model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "Qwen3-Tiny" / "pytorch_model.bin").exists()


def test_a_repository_that_is_not_there_is_one_line(tmp_path):
    with serve_hub("Qwen/Qwen3-Tiny", FILES) as (address, _):
        done = run(address, "Qwen/Qwen3-Typo", "--output", str(tmp_path))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("qwench: ")]
    assert line.startswith("qwench: cannot download the model Qwen/Qwen3-Typo (")


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen/", "a/b/c"])
def test_a_name_that_is_no_repository_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name it as owner/name"):
        download([name], output=tmp_path, kind="model")


def test_nothing_to_download_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to download"):
        download([], output=tmp_path, kind="model")
