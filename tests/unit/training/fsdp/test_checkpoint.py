"""Starting FSDP2 from checkpoints of other formats, and in which order a checkpoint is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PretrainedConfig, Qwen3ForCausalLM

from qwench.config.sections.training import TrainingConfig
from qwench.errors import ConfigError
from qwench.models.hf import load_hf_config
from qwench.training.fsdp import checkpoint
from qwench.training.fsdp.checkpoint import load_causal_lm
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.training.process_group import init_process_group, leave_process_group
from tests.deadlines import patient
from tests.fakes.sections import adamw, offloaded
from tests.unit.training.fsdp.tiny import tiny_model
from tests.verbs import run_verb

_CPU = torch.device("cpu")


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = tiny_model(vocab_size=64, tied=False).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def assert_weights_of(
    hf_folder: Path,
    *,
    built_from: Path,
    loaded: Path | None = None,
    config: PretrainedConfig | None = None,
    offload_fraction: float,
) -> None:
    """Check that a trainer built from one folder, which then loads another one, holds the weights of `hf_folder`."""
    init_process_group(_CPU, environ={}, timeout_s=patient(60))
    try:
        backend = FsdpTrainer.build(
            built_from,
            training=TrainingConfig(),
            optimizer=offloaded(adamw(), offload_fraction),
            total_steps=1,
            param_dtype=torch.bfloat16,
            device=_CPU,
            hf_config=config or load_hf_config(built_from),
        )
        if loaded is not None:
            backend.load(loaded, weights_only=True)
        held = {name: tensor.clone() for bucket in backend.weights(bucket_bytes=1 << 20) for name, tensor in bucket}
    finally:
        leave_process_group()
    expected = dict(Qwen3ForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16).named_parameters())
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ["torch_dist", "fsdp"])
@pytest.mark.parametrize("offload_fraction", [0.0, 1.0], ids=["on device", "on host"])
def test_weights_take_no_memory_before_they_are_shards_which_are_those_of_the_checkpoint(
    hf_folder: Path, tmp_path: Path, kind: str, offload_fraction: float
) -> None:
    run_verb(["convert", "--input", str(hf_folder), "--output", str(tmp_path / kind), "--to", kind])
    config = load_hf_config(hf_folder)
    model, source = load_causal_lm(tmp_path / kind, config)
    assert source is not None
    assert {parameter.untyped_storage().nbytes() for parameter in model.parameters()} <= {2, 4}
    assert_weights_of(hf_folder, built_from=tmp_path / kind, config=config, offload_fraction=offload_fraction)


@pytest.mark.parametrize("folder", ["hf", "dist/release"])
@pytest.mark.parametrize("offload_fraction", [0.0, 1.0], ids=["on device", "on host"])
def test_a_trainer_takes_the_weights_of_a_converted_checkpoint(
    hf_folder: Path, tmp_path: Path, folder: str, offload_fraction: float
) -> None:
    run_verb(["convert", "--input", str(hf_folder), "--output", str(tmp_path / "dist"), "--to", "torch_dist"])
    torch.manual_seed(4)
    tiny_model(vocab_size=64, tied=False).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    assert_weights_of(hf_folder, built_from=tmp_path / "other", loaded=tmp_path / folder, offload_fraction=offload_fraction)


class Optimizer:
    """Says what it is given; its masters and moments are named."""

    has_momentum, num_steps = False, 0

    def __init__(self, said: list[object]) -> None:
        self.said = said

    def masters(self) -> dict[str, str]:
        return {"a": "master"}

    def moments(self) -> str:
        return f"moments after {self.num_steps}"

    def reset(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.said.append(("reset", num_steps))

    def set_masters(self, masters: object) -> None:
        self.said.append(("set masters", masters))

    def set_moments(self, moments: object) -> None:
        self.said.append(("set moments", moments))


@pytest.mark.parametrize("weights_only", [True, False])
def test_masters_come_before_the_frozen_weights_and_the_moments(weights_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    state = SimpleNamespace(masters="stored masters", num_steps=7, moments={"exp_avg": "first", "exp_avg_sq": "second"})
    monkeypatch.setattr(checkpoint, "open_weights", lambda *given: ("weights", *given))
    monkeypatch.setattr(checkpoint, "open_saved_optimizer", lambda *given: said.append(given) or state)
    monkeypatch.setattr(checkpoint, "fill_shards", lambda *given, **options: said.append((*given, *options.values())))
    folder, optimizer, masters = Path("folder"), Optimizer(said), {"a": "master"}
    given = {"weights_only": weights_only, "frozen": {"b": "frozen"}}
    checkpoint.load_converted(folder, optimizer, "model", **given)
    weights = ("weights", folder, "model")
    frozen = ({"b": "frozen"}, weights)
    if weights_only:
        assert said == [(masters, weights), ("set masters", masters), frozen]
        return
    assert said == [
        (folder, "model"),
        (masters, "stored masters"),
        ("set masters", masters),
        frozen,
        ("reset", 7),
        ("moments after 7", "first", ".exp_avg"),
        ("moments after 7", "second", ".exp_avg_sq"),
        ("set moments", "moments after 7"),
    ]
    optimizer.has_momentum = True
    with pytest.raises(ConfigError, match=r"^folder has AdamW's state of all weights, and --optimizer muon has its own; give"):
        checkpoint.load_converted(folder, optimizer, "model", **given)


def test_moments_are_read_after_the_steps_that_they_have_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(checkpoint, "load_num_steps", lambda folder: 7 if folder == Path("trained") else 0)
    monkeypatch.setattr(checkpoint, "load_moments", lambda *given: said.append(given))
    monkeypatch.setattr(checkpoint, "save_moments", lambda *given: said.append(given))
    optimizer = Optimizer(said)
    checkpoint.load_optimizer(Path("trained"), optimizer)
    moments = "moments after 7"
    assert said == [("reset", 7), (Path("trained"), moments), ("set moments", moments)]
    said.clear()
    checkpoint.save_optimizer(Path("out"), optimizer)
    assert said == [(Path("out"), moments, 7)]
    said.clear()
    checkpoint.load_optimizer(Path("fresh"), optimizer)
    assert said == [("reset", 0)]
