import os
import re
import resource
import subprocess
import sys

import pytest

from qwench.commands.download import download
from qwench.errors import ConfigError
from tests.deadlines import patient
from tests.fakes.hub import serve_hub

FILES = {"config.json": b'{"model_type": "qwen3"}', "model.safetensors": b"weights", "pytorch_model.bin": b"old weights"}


def limit_files():
    """Refuse files of more than a page, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def run(address, *words, prepare=None):
    environ = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "qwench", "download", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=patient(120), preexec_fn=prepare)


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


def test_nothing_is_said_to_have_arrived_when_nothing_did(tmp_path):
    done = run("http://127.0.0.1:9", "Qwen/Qwen3-Tiny", "--output", str(tmp_path))
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("qwench: ")]
    assert line.startswith("qwench: cannot download the model Qwen/Qwen3-Tiny (")
    assert "What arrived" not in line
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_with_its_room_and_the_same_command_goes_on(tmp_path):
    with serve_hub("Qwen/Qwen3-Tiny", {**FILES, "model.safetensors": bytes(100_000)}) as (address, _):
        words = ("Qwen/Qwen3-Tiny", "--output", str(tmp_path))
        full = run(address, *words, prepare=limit_files)
        assert full.returncode == 1
        [line] = [line for line in full.stderr.splitlines() if line.startswith("qwench: ")]
        folder = tmp_path / "Qwen3-Tiny"
        assert re.match(rf"qwench: --output {folder} cannot be written to \(File too large; .*iB of .*iB free\)", line)
        assert run(address, *words).returncode == 0
    assert (folder / "model.safetensors").stat().st_size == 100_000


@pytest.mark.parametrize("name", ["Qwen3-4B", "Qwen/", "a/b/c"])
def test_a_name_that_is_no_repository_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="name it as owner/name"):
        download([name], output=tmp_path, kind="model")


def test_nothing_to_download_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to download"):
        download([], output=tmp_path, kind="model")
