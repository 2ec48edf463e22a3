"""What Megatron's schedules are given, and what every stage has of the last one's results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from qwench.algorithms.columns import TokenLoss
from qwench.training.megatron import megatron_trainer, pipeline
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from qwench.training.megatron.model import TokenScores


class Stage:
    """A model whose scores are the batch's number of tokens times the temperature; entropy is ten times that."""

    def __init__(self) -> None:
        self.config = SimpleNamespace()

    def __call__(self, batch: SimpleNamespace, *, temperature: float, with_entropy: bool) -> TokenScores:
        scores = torch.full((batch.num_tokens,), batch.num_tokens * temperature)
        return TokenScores(log_probs=scores, entropy=10 * scores if with_entropy else None)

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])


BATCHES = [SimpleNamespace(num_tokens=2), SimpleNamespace(num_tokens=3)]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Replace Megatron's schedule by a plain loop; return its arguments."""
    said = list[dict[str, object]]()

    def schedule(*, forward_step_func: Any, data_iterator: Any, model: list[Stage], **options: Any) -> tuple[object, ...]:
        said.append(options)
        kept = []
        for _ in range(options["num_microbatches"]):
            output, judge = forward_step_func(data_iterator, model[0])
            kept.append(judge(output, non_loss_data=True) if options["collect_non_loss_data"] else judge(output))
        return tuple(kept)

    monkeypatch.setattr(pipeline, "get_forward_backward_func", lambda: schedule)
    return said


def test_micro_batches_go_through_in_order_and_gradients_are_summed_undivided(
    given: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, places, finalized = Stage(), list[int](), list[object]()
    monkeypatch.setattr(pipeline, "finalize_model_grads", lambda *given, **groups: finalized.append((*given, groups)))
    found = pipeline.run(
        stage,
        BATCHES,
        lambda batch, scores: (batch.num_tokens, scores.log_probs.tolist(), scores.entropy),
        temperature=0.5,
        with_entropy=False,
        forward_only=False,
        before_each=places.append,
    )
    assert found == [(2, [1.0] * 2, None), (3, [1.5] * 3, None)] and places == [0, 1]
    sizes = {"num_microbatches": 2, "seq_length": 2, "micro_batch_size": 1}
    assert given == [{**sizes, "forward_only": False, "collect_non_loss_data": False}]
    stage.config.finalize_model_grads_func(["stage"], torch.tensor(7), pg="group")
    assert finalized == [(["stage"], None, {"pg": "group"})]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("last", [True, False])
def test_every_stage_gets_the_scores_of_the_last_one(
    given: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, with_entropy: bool, last: bool
) -> None:
    shapes = list[tuple[int, ...]]()

    def broadcast(values: Tensor) -> Tensor:
        shapes.append(tuple(values.shape))
        return values if last else torch.arange(values.numel()).view(values.shape).float()

    monkeypatch.setattr(pipeline, "is_last_stage", lambda: last)
    monkeypatch.setattr(pipeline, "broadcast_from_last_stage", broadcast)
    log_probs, entropy = pipeline.score(Stage(), BATCHES, temperature=0.5, with_entropy=with_entropy)
    assert shapes == [(1 + with_entropy, 5)] and given[0]["forward_only"] and given[0]["collect_non_loss_data"]
    expected = [[1.0] * 2, [1.5] * 3] if last else [[0.0, 1.0], [2.0, 3.0, 4.0]]
    assert [one.tolist() for one in log_probs] == expected
    more = [[10.0] * 2, [15.0] * 3] if last else [[5.0, 6.0], [7.0, 8.0, 9.0]]
    assert entropy is None if not with_entropy else [one.tolist() for one in entropy] == more


@pytest.mark.parametrize("num_stages", [1, 2])
def test_values_and_names_come_from_the_last_of_several_stages(monkeypatch: pytest.MonkeyPatch, num_stages: int) -> None:
    said = list[object]()
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: num_stages)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_last_rank", lambda: 6)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_group", lambda: "stages")

    def broadcast(values: Any, *, src: int, group: str) -> None:
        said.append((src, group))
        if isinstance(values, list):
            values[0] = ["last"]
        else:
            values.fill_(9.0)

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    values = torch.zeros(2)
    assert pipeline.broadcast_from_last_stage(values) is values
    assert values.tolist() == ([9.0] * 2 if num_stages == 2 else [0.0] * 2)
    assert pipeline.broadcast_names_from_last_stage(("own",)) == (["last"] if num_stages == 2 else ["own"])
    assert said == [(6, "stages")] * 2 * (num_stages - 1)


def _trainer(adapters: object = None) -> MegatronTrainer:
    trainer = object.__new__(MegatronTrainer)
    trainer._asleep, trainer._adapters, trainer.device = None, adapters, torch.device("cpu")
    trainer._ddp, trainer._optimizer = "ddp", SimpleNamespace(sharded="sharded", schedule="schedule")
    return trainer


def test_functions_of_the_user_get_the_model_the_optimizer_and_the_schedule() -> None:
    assert _trainer().parts == ("ddp", "sharded", "schedule")


def test_a_trainer_scores_through_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[object]()
    monkeypatch.setattr(pipeline, "score", lambda *given, **options: said.append((*given, options)) or (["log"], ["entropy"]))
    scores = _trainer().forward(["batch"], temperature=0.5)
    assert (scores.log_probs, scores.entropy) == (["log"], ["entropy"])
    _trainer().forward([], temperature=0.5, with_entropy=True)
    assert said == [("ddp", [*batches], {"temperature": 0.5, "with_entropy": bool(not batches)}) for batches in (["batch"], [])]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_is_the_sum_of_what_the_last_stage_keeps_of_each_loss(monkeypatch: pytest.MonkeyPatch, adapted: bool) -> None:
    said, weight = list[object](), torch.tensor(2.0, requires_grad=True)
    scores = TokenScores(log_probs="log-probs", entropy="entropy")
    batch = SimpleNamespace(to=lambda device: ("batch on", device.type))

    def run(ddp: str, batches: list[object], judge: Any, **options: Any) -> list[TokenLoss]:
        drop = options.pop("before_each")
        assert (ddp, options) == ("ddp", {"temperature": 0.5, "with_entropy": True, "forward_only": False})
        drop(3)
        loss, scale, kept = judge(batches[0], scores)
        assert loss.requires_grad and (scale.item(), scale.dtype) == (0, torch.int)
        assert not kept.loss.requires_grad and kept.loss.item() == 6.0
        return [kept]

    def loss(log_probs: str, entropy: str, moved: tuple[str, str]) -> TokenLoss:
        assert (log_probs, entropy, moved) == ("log-probs", "entropy", ("batch on", "cpu"))
        said.append("loss")
        return TokenLoss(loss=3 * weight, metrics={"m": torch.tensor(1.0)})

    switch = SimpleNamespace(keep=lambda: said.append("keep"))
    trainer = _trainer(SimpleNamespace(switch=switch) if adapted else None)
    monkeypatch.setattr(megatron_trainer.pipeline, "run", run)
    trainer._drop_inputs = said.append
    trainer._sum_over_step = lambda contributions: contributions
    options = {"temperature": 0.5, "with_entropy": True, "after_each": lambda: said.append("after")}
    (kept,) = trainer.forward_backward([batch], loss, **options)
    assert kept.metrics == {"m": torch.tensor(1.0)}
    assert said == [3, "loss", "after", *["keep"] * adapted]
