"""What `qwench convert` says when it has ended."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig, Qwen3Config

from qwench.checkpoints.convert import Conversion, Converted
from qwench.commands.convert import _report, convert_torch_dist_to_hf, run
from qwench.errors import ConfigError
from tests.fakes.console import RecordingConsole


@pytest.mark.parametrize(("with_optimizer", "what"), [(True, "fsdp, with the optimizer's state"), (False, "fsdp")])
def test_the_report_has_format_size_speed_and_the_largest_peak(with_optimizer: bool, what: str) -> None:
    conversion = Conversion(source=Path("a"), output=Path("b"), to="fsdp", hf_folder=Path("hf"), config=PretrainedConfig())
    converted = Converted(num_tensors=7, nbytes=3 * 10**9, with_optimizer=with_optimizer)
    console = RecordingConsole()
    _report(console, conversion, converted, seconds=1.5, peaks=[4 * 10**9, 5 * 10**9])
    assert console.lines == [
        f"wrote b ({what}): 7 tensors, 3.00 GB in 1.5 s (2.00 GB/s); every tensor was read back and has the checksum it was "
        "written with; peak memory 5.00 GB per process"
    ]


def test_what_contradicts_the_models_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    Qwen3Config(vocab_size=64).save_pretrained(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    places = ["--input-dir", str(tmp_path / "empty"), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"^--vocab-size \(65\) contradicts config.json \(64\); correct or remove the flag"):
        convert_torch_dist_to_hf([*places, "--origin-hf-dir", str(tmp_path / "hf"), "--vocab-size", "65"])
    whole = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--to"]
    with pytest.raises(ConfigError, match=r"^--to lora compares --input with its base model; give that with --hf-checkpoint"):
        run([*whole, "lora", "--lora-rank", "2"])
    Qwen3Config(vocab_size=64).save_pretrained(tmp_path / "base")
    occupied = ["--input", str(tmp_path / "hf"), "--hf-checkpoint", str(tmp_path / "base"), "--output", str(tmp_path / "base")]
    with pytest.raises(ConfigError, match=r"base exists and is not an empty folder; choose another place to write to"):
        run([*occupied, "--to", "lora", "--lora-rank", "2"])
    with pytest.raises(ConfigError, match=r"empty has no config\.json; give the model's Hugging Face folder"):
        run([*whole, "torch_dist", "--hf-checkpoint", str(tmp_path / "empty")])
    assert not (tmp_path / "out").exists()
