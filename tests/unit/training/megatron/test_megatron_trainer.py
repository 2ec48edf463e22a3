"""What a trainer that sleeps refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwench.training.megatron.megatron_trainer import MegatronTrainer


def test_a_trainer_that_sleeps_does_nothing_else() -> None:
    trainer = object.__new__(MegatronTrainer)
    trainer._asleep = "a copy on the host"
    scoring = {"temperature": 1.0, "with_entropy": False}
    for work in (
        trainer.sleep,
        lambda: trainer.forward([], **scoring),
        lambda: trainer.forward_backward([], print, **scoring, after_each=print),
        lambda: list(trainer.weights(bucket_bytes=1)),
        trainer.copy_held_weights,
        lambda: trainer.copy_for_frozen(Path("model")),
        lambda: trainer.save(Path("folder")),
        lambda: trainer.save_held_weights(Path("folder")),
        lambda: trainer.load(Path("folder")),
    ):
        with pytest.raises(AssertionError, match=r"^wake\(\) comes first"):
            work()
