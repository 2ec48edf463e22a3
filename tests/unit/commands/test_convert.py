"""What `qwench convert` says when it has ended."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from qwench.checkpoints.convert import Conversion, Converted, Ranks
from qwench.commands import convert
from qwench.commands.convert import convert_torch_dist_to_hf, run
from qwench.errors import CheckpointError, ConfigError, OutputError
from qwench.launch import conversion as module
from qwench.launch.conversion import PROMPTS, _report, _verify
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import make_checkpoint
from tests.deadlines import patient
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
    with pytest.raises(ConfigError, match=r"^--input .*hf has no checkpoint of iteration 3; it has none"):
        run([*whole, "hf", "--ckpt-step", "3"])
    with pytest.raises(ConfigError, match=r"^--input: there is no folder .*absent$"):
        run(["--input", str(tmp_path / "absent"), "--output", str(tmp_path / "out"), "--to", "hf"])
    assert not (tmp_path / "out").exists()


def test_weights_that_were_not_written_as_they_were_read_are_told_by_the_logits(tmp_path: Path) -> None:
    tokenizer, (one, other) = build_small_tokenizer(), (tmp_path / name for name in ("one", "other"))
    make_checkpoint(one, size="tiny", tokenizer=tokenizer, seed=1)
    shutil.copytree(one, other)
    conversion = Conversion(source=one, output=other, to="hf", hf_folder=one, config=PretrainedConfig())
    console = RecordingConsole()
    _verify(console, conversion, torch.float32)
    assert len(console.lines) == 1 and console.lines[0].startswith("verified: Hugging Face's model computes the same logits")

    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2  # doubles every logit
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)
    with torch.no_grad():
        largest = max(float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits.abs().max()) for text in PROMPTS)
    with pytest.raises(CheckpointError, match=rf"^the logits of {one} and {other} differ by up to {largest:g}; do not use"):
        _verify(console, conversion, torch.float32)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="differ by up to inf"):
        _verify(console, conversion, torch.float32)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Conversion, bool]]:
    """Return what would be converted, and whether it would be verified."""
    made: list[tuple[Conversion, bool]] = []
    monkeypatch.setattr(module, "_run", lambda conversion, *, verify=False: made.append((conversion, verify)))
    return made


def test_flags_of_the_command_and_of_slimes_scripts_say_what_to_convert(
    asked: list[tuple[Conversion, bool]], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    Qwen3Config(vocab_size=64, num_hidden_layers=2).save_pretrained(model)
    (model / "model.safetensors").touch()
    convert.run(["--input", str(model), "--output", str(out), "--to", "torch_dist"])
    words = ["--input", str(model), "--output", str(out), "--to", "hf", "--hf-checkpoint", str(model)]
    convert.run([*words, "--dtype", "float16", "--weights-only", "--max-shard-gb", "0.5", "--verify"])
    for dtype in ("bfloat16", "float32"):
        convert.run([*words, "--dtype", dtype])
    convert.convert_hf_to_torch_dist(["--hf-checkpoint", str(model), "--save", str(out), "--num-layers", "2"])
    places = ["--input-dir", str(model), "--output-dir", str(out), "--origin-hf-dir", str(model)]
    convert_torch_dist_to_hf([*places, "--vocab-size", "64"])
    convert_torch_dist_to_hf([*places, "-f", "--chunk-size", "7"])
    common = {"source": model, "output": out, "hf_folder": model}
    expected = [
        ({"to": "torch_dist", "dtype": None, "with_optimizer": True, "max_shard_bytes": 2 * 10**9, "replace": False}, False),
        ({"to": "hf", "dtype": torch.float16, "with_optimizer": False, "max_shard_bytes": 5 * 10**8}, True),
        ({"to": "hf", "dtype": torch.bfloat16}, False),
        ({"to": "hf", "dtype": torch.float32}, False),
        ({"to": "torch_dist"}, False),
        ({"to": "hf", "replace": False, "max_shard_bytes": 2 * 10**9}, False),
        ({"to": "hf", "replace": True, "max_shard_bytes": 7}, False),
    ]
    assert len(asked) == len(expected)
    for (conversion, verify), (parts, verified) in zip(asked, expected, strict=True):
        assert {name: getattr(conversion, name) for name in (*common, *parts)} == {**common, **parts}
        assert (conversion.config.vocab_size, verify) == (64, verified)
    with pytest.raises(ConfigError, match=r"^--num-layers \(3\) contradicts the checkpoint's config\.json \(2\)"):
        convert.convert_hf_to_torch_dist(["--hf-checkpoint", str(model), "--save", str(out), "--num-layers", "3"])


def test_an_adapter_is_extracted_from_the_model_and_its_base(monkeypatch, capsys, tmp_path: Path) -> None:
    model, base, out = (tmp_path / name for name in ("model", "base", "out"))
    for folder in (model, base):
        Qwen3Config(vocab_size=64, num_hidden_layers=2).save_pretrained(folder)
    asked = []

    def extract(*places: object, rank: int, output: Path) -> SimpleNamespace:
        asked.append((*places[:2], places[2].num_layers, rank, output))
        if len(asked) > 1:
            raise OSError(28, "No space left on device")
        return SimpleNamespace(kept=0.875, num_other=3)

    monkeypatch.setattr(module, "extract_adapter", extract)
    words = ["--input", str(model), "--hf-checkpoint", str(base), "--output", str(out), "--to", "lora", "--lora-rank", "4"]
    run(words)
    assert capsys.readouterr().out == (
        f"wrote {out}: an adapter of rank 4 with 87.50% of the squared change of the projections; "
        "3 other weights differ from the base and are left out\n"
    )
    with pytest.raises(OutputError, match=f"^the output {out} cannot be written to"):
        run(words)
    assert asked == [(model, base, 2, 4, out)] * 2


def test_an_adapter_has_no_logits_to_verify(tmp_path: Path) -> None:
    Qwen3Config(vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--verify compares the logits of two whole models, but --input is an adapter"):
        run(["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--to", "hf", "--verify"])


def test_the_bar_of_all_ranks_advances_by_whole_megabytes_of_one_rank() -> None:
    steps: list[int] = []
    add = module._in_megabytes(steps.append, 4)
    for nbytes in (200_000, 100_000, 1_000_000):
        add(nbytes)
    assert steps == [0, 1, 4]  # 0.8, 1.2 and 5.2 MB of four ranks


@pytest.mark.parametrize("verify", [True, False])
def test_ranks_convert_together_and_the_main_one_reports_and_verifies(
    verify: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "hf", size="tiny", tokenizer=build_small_tokenizer())
    meeting, gathered, own = Barrier(2, timeout=patient(60)), dict[int, object](), local()

    def gather(value: object) -> list[object]:
        gathered[own.rank] = value
        meeting.wait()
        found = [gathered[0], gathered[1]]
        meeting.wait()
        return found

    def work(rank: int) -> None:
        own.rank = rank
        words = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--to", "torch_dist"]
        run([*words, *["--verify"] * verify])

    monkeypatch.setattr(module, "_join_ranks", lambda: Ranks(rank=own.rank, size=2, gather=gather))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    wrote, *verified = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'out'} (torch_dist): {4 * 11 + 2} tensors, ") and " GB per process" in wrote
    assert [line.partition(":")[0] for line in verified] == ["verified"] * verify
    assert {path.name[:4] for path in (tmp_path / "out").rglob("*.distcp")} == {"__0_", "__1_"}
    assert gathered == {0: None, 1: None}, "no rank leaves while the main one verifies"


def test_a_tokenizer_that_a_verification_needs_is_missed_before_the_work(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", size="tiny", tokenizer=build_small_tokenizer())
    for path in (tmp_path / "hf").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        run(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--to", "hf", "--verify"])
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_and_a_full_disk_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion = Conversion(source=Path("a"), output=Path("b"), to="fsdp", hf_folder=Path("hf"), config=PretrainedConfig())

    def damaged(given: Conversion) -> None:
        raise CheckpointError("half a file")

    monkeypatch.setattr(module, "Converter", damaged)
    with pytest.raises(ConfigError, match=r"^half a file$"):
        module._run(conversion)

    def full(ranks: Ranks, advance: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "Converter", lambda given: SimpleNamespace(nbytes=1, run=full))
    with pytest.raises(OutputError, match=r"^the output b cannot be written to"):
        module._run(conversion)
