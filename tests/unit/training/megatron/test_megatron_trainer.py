"""What a trainer does with weights, optimizer and adapters when it saves, loads and sleeps; a sleeping one refuses work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from qwench.training.megatron import adapter_checkpoint, checkpoint, megatron_trainer
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from qwench.training.offload import HostCopy

FOLDER = Path("folder")


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


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace what reads and writes checkpoints; return what was done, in order."""
    said: list[object] = []

    def keep(name: str, result: object = None) -> Callable[..., object]:
        return lambda *given, **options: said.append((name, *given, *options.values())) or result

    for module, results in (
        (adapter_checkpoint, {"whole_masters": "masters", "save_adapters": None, "save_state": None, "load": None}),
        (checkpoint, {"save": None, "is_stored_alike": True, "load_weights": None, "load_state": None, "convert_state": None,
                      "steps_of_muon": 7}),
        (megatron_trainer, {"save_rng": None, "load_rng": None, "load_weights": None, "open_weights": "source",
                            "open_saved_optimizer": SimpleNamespace(num_steps=5), "read_share": "share"}),
    ):  # fmt: skip
        for name, result in results.items():
            shown = f"copy_{name}" if module is megatron_trainer and name == "load_weights" else name
            monkeypatch.setattr(module, name, keep(shown, result))
    monkeypatch.setattr(dist, "barrier", keep("barrier"))
    return said


def trainer_with(done: list[object], *, adapters: object = None, is_main: bool = True, muon: bool = False) -> MegatronTrainer:
    trainer = object.__new__(MegatronTrainer)
    trainer._asleep, trainer._adapters = None, adapters
    trainer.parallel = SimpleNamespace(is_main=is_main)
    trainer._optimizer = SimpleNamespace(has_momentum=muon, num_steps=3, reset=lambda steps: done.append(("reset", steps)))
    trainer._weights, trainer._loaded, trainer._place = "weights", "loaded", "place"
    trainer._config, trainer._model, trainer._layout = "config", "model", "layout"
    return trainer


@pytest.mark.parametrize("is_main", [True, False])
def test_a_checkpoint_is_whole_on_every_rank_before_it_counts(is_main: bool, done: list[object]) -> None:
    trainer = trainer_with(done, is_main=is_main)
    rng = [("save_rng", FOLDER)] if is_main else []
    trainer.save(FOLDER)
    assert done == [("save", FOLDER, "weights", trainer._optimizer, "place", is_main), *rng, ("barrier",)]
    done.clear()
    trainer.save(FOLDER, with_optimizer=False)
    assert done == [("save", FOLDER, "weights", None, "place", is_main), *rng, ("barrier",)]
    done.clear()
    trainer.save_held_weights(FOLDER)
    assert done == [("save", FOLDER, "weights", None, "place", is_main), ("barrier",)]


@pytest.mark.parametrize("is_main", [True, False])
def test_adapters_are_saved_from_their_masters_or_as_they_are_held(is_main: bool, done: list[object]) -> None:
    adapters = SimpleNamespace(held=lambda: "held")
    trainer = trainer_with(done, adapters=adapters, is_main=is_main)
    rng = [("save_rng", FOLDER)] if is_main else []
    masters = [("whole_masters", trainer._optimizer, adapters), ("save_adapters", FOLDER, "masters", adapters, is_main)]
    trainer.save(FOLDER)
    assert done == [*masters, ("save_state", FOLDER, trainer._optimizer, adapters), *rng, ("barrier",)]
    done.clear()
    trainer.save(FOLDER, with_optimizer=False)
    assert done == [*masters, *rng, ("barrier",)]
    done.clear()
    trainer.save_held_weights(FOLDER)
    assert done == [("save_adapters", FOLDER, "held", adapters, is_main), ("barrier",)]


@pytest.mark.parametrize(
    ("options", "random"),
    [({}, True), ({"with_rng": False}, False), ({"weights_only": True}, False)],
)
def test_random_numbers_go_on_with_the_optimizer(options: dict[str, bool], random: bool, done: list[object]) -> None:
    rng, only = [("load_rng", FOLDER)] if random else [], options.get("weights_only", False)
    adapters = SimpleNamespace()
    trainer = trainer_with(done, adapters=adapters)
    trainer.load(FOLDER, **options)
    assert done == [("load", FOLDER, trainer._optimizer, adapters, only), *rng]
    done.clear()
    trainer = trainer_with(done)
    trainer.load(FOLDER, **options)
    opened = [("open_weights", FOLDER, "config")] + [("open_saved_optimizer", FOLDER, "config")] * (not only)
    read = [("is_stored_alike", FOLDER, "loaded", "place"), ("load_weights", FOLDER, "loaded", "place")]
    state = [("load_state", FOLDER, "loaded", trainer._optimizer, "place")] * (not only)
    assert done == [*opened, *read, ("reset", 0 if only else 5), *state, *rng]


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_of_another_format_is_converted(
    weights_only: bool, done: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "is_stored_alike", lambda *given: False)
    trainer = trainer_with(done)
    trainer.load(FOLDER, weights_only=weights_only, with_rng=False)
    state = megatron_trainer.open_saved_optimizer(FOLDER, "config")
    converted = [("convert_state", state, "loaded", trainer._optimizer, "place")]
    copied = ("copy_load_weights", "model", "source", "config", "layout")
    steps = 0 if weights_only else 5
    opened = [] if weights_only else [("open_saved_optimizer", FOLDER, "config")]
    assert done[:-1] == [
        ("open_weights", FOLDER, "config"), *opened, copied, ("reset", steps), *([] if weights_only else converted),
    ]  # fmt: skip


def test_muon_reads_its_own_state_in_place_alone(done: list[object]) -> None:
    trainer = trainer_with(done, muon=True)
    trainer.load(FOLDER, with_rng=False)
    assert done == [
        ("open_weights", FOLDER, "config"),
        ("is_stored_alike", FOLDER, "loaded", "place"),
        ("steps_of_muon", FOLDER, True),
        ("load_weights", FOLDER, "loaded", "place"),
        ("reset", 7),
        ("load_state", FOLDER, "loaded", trainer._optimizer, "place"),
    ]
    done.clear()
    trainer.load(FOLDER, weights_only=True)
    assert [one[0] for one in done] == ["open_weights", "is_stored_alike", "load_weights", "reset"] and done[-1][1] == 0


def test_another_model_takes_the_places_of_the_frozen_weights(done: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    class Copy:
        def __init__(self, tensors: list[Tensor]) -> None:
            done.append(("copy", *tensors))

        @contextmanager
        def swapped_in(self, *, for_writing: bool) -> Iterator[None]:
            done.append(("swapped in", for_writing))
            yield
            done.append("swapped out")

    layer = SimpleNamespace(on_host=lambda share: {"matrix": (share, "on the host")})
    trainer = trainer_with(done, adapters=SimpleNamespace(quantised=[("rule", layer)]))
    trainer._loaded = [("a", "weight a"), ("b", "weight b")]
    monkeypatch.setattr(megatron_trainer, "HostCopy", Copy)
    other = trainer.copy_for_frozen(FOLDER)
    memory = done[-1][-1]
    assert done == [
        ("open_weights", FOLDER, "config"),
        ("copy", "weight a", "weight b"),
        ("swapped in", True),
        ("copy_load_weights", "model", "source", "config", "layout"),
        "swapped out",
        ("read_share", "rule", "source", "place", layer, memory),
    ]
    assert isinstance(other._whole, Copy) and other._matrices == {"matrix": ("share", "on the host")}


def test_a_sleeping_trainer_has_given_its_memory_back(done: list[object]) -> None:
    trainer = trainer_with(done)
    frozen = torch.full((2,), 4.0)
    trained = torch.nn.Parameter(torch.ones(2))
    trainer._model = SimpleNamespace(parameters=lambda: [torch.nn.Parameter(frozen, requires_grad=False), trained])
    buffer = SimpleNamespace(param_data=torch.full((3,), 2.0), grad_data=torch.full((5,), 1.0, dtype=torch.float32))
    trainer._ddp = SimpleNamespace(buffers=[buffer])
    master = torch.full((3,), 3.0)
    trainer._optimizer.device_tensors = lambda: [master]
    trainer._optimizer.drop_gradients = lambda: done.append("dropped")
    trainer.device = torch.device("cpu")
    trainer.sleep()
    trainer.wake()
    assert trainer._asleep is None and done == [], "on a CPU all stays"
    trainer.device = torch.device("cuda")
    trainer.sleep()
    assert isinstance(trainer._asleep, HostCopy)
    gone = [buffer.param_data, buffer.grad_data, master, frozen]
    assert [one.untyped_storage().nbytes() for one in gone] == [0] * 4 and trained.tolist() == [1.0] * 2
    trainer.wake()
    assert [one.untyped_storage().nbytes() for one in gone] == [12, 20, 12, 8]
    assert [one.tolist() for one in (buffer.param_data, master, frozen)] == [[2.0] * 3, [3.0] * 3, [4.0] * 2]
    assert trainer._asleep is None and done == ["dropped"]


def test_what_is_dropped_differs_by_step_micro_batch_and_rank(done: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        parallel_state, "get_data_parallel_rank", lambda *, with_context_parallel: 4 if with_context_parallel else 0
    )
    trainer = trainer_with(done, adapters=SimpleNamespace(switch=SimpleNamespace(drop=lambda **given: done.append(given))))
    trainer._drop_inputs(2)
    assert done == [{"step": 3, "micro_batch": 2, "rank": 4}]
    trainer_with(done)._drop_inputs(2)
    assert len(done) == 1


@pytest.mark.parametrize(
    ("adapted", "part", "expected"),
    [
        (False, "merged", ["whole"]),
        (True, "merged", ["merged whole"]),
        (True, "adapter", ["adapter"]),
        (True, "apart", ["whole", "adapter"]),
    ],
)
def test_published_are_the_weights_or_the_adapter_or_both(
    adapted: bool, part: str, expected: list[str], done: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_trainer, "bucketed", lambda weights, *, bucket_bytes: (list(weights), bucket_bytes))
    adapters = SimpleNamespace(merged_into=lambda whole: [f"merged {one}" for one in whole], apart=lambda: iter(["adapter"]))
    trainer = trainer_with(done, adapters=adapters if adapted else None)
    trainer._whole = SimpleNamespace(gather=lambda: iter(["whole"]))
    assert trainer.weights(bucket_bytes=9, part=part) == (expected, 9)
