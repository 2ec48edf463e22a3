"""Lists that go together have one length: one that is too short is an error, and cuts nothing off."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch, trained
from qwench.algorithms.reduction import staleness_scales
from qwench.foreign.built_in import MultiTurnLossMaskGenerator
from qwench.foreign.losses import responses
from qwench.rewards.scores import combine
from qwench.rollout.probe import GreedyProbe
from qwench.rollout.teacher import weighted_reverse_kl
from qwench.samples import Prompt, Sample, Status, Verdict
from qwench.training.batch import unpack
from qwench.training.optimizers.host_adam import HostAdam
from qwench.training.shaping import Shaping
from qwench.weights.routes import plan_routes
from qwench.wire.addresses import EngineAddress, Placement
from qwench.wire.flat_bucket import copy_all

ONE, TWO = torch.ones(2), [torch.ones(2), torch.ones(3)]
MASKS = [one.bool() for one in TWO]
PLACE = Placement(host="a", devices=("cpu",))
CONSTANTS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


def sample() -> Sample:
    made = Sample(prompt=Prompt(text="", token_ids=(1, 2)), sample_id=0, group_id=0, reward=1.0, status=Status.COMPLETED)
    made.append([3, 4], log_probs=[-0.5, -0.5], version=0)
    return made


def address(port: int) -> EngineAddress:
    return EngineAddress(base_url=f"http://h:{port}", token=None, kind="embedded", placement=None, label="")


def optimizer(groups: int, params: int) -> HostAdam:
    made = HostAdam([{"params": [torch.ones(1) for _ in range(params)]} for _ in range(groups)], **CONSTANTS)
    made.reset()
    return made


def micro_batch(count: int) -> SimpleNamespace:
    return SimpleNamespace(cu_seqlens=torch.tensor([0, 4, 9]), response_lengths=(2,) * count)


CASES: dict[str, Callable[[], object]] = {
    "trained": lambda: trained(TWO, MASKS[:1]),
    "staleness": lambda: staleness_scales(TWO, MASKS, [ONE.long()]),
    "staleness of weights": lambda: staleness_scales(TWO[:1], MASKS, [one.long() for one in TWO]),
    "unpack": lambda: unpack(torch.ones(9), micro_batch(2), [2]),
    "unpacked responses": lambda: responses(torch.ones(9), micro_batch(1)),
    "truncation": lambda: Shaping(masks_truncated=True).apply(RolloutBatch.from_samples([sample()]), [sample(), sample()]),
    "weights of rewards": lambda: combine({name: Verdict(score=1.0, reason="exact") for name in "ab"}, (1.0,)),
    "reverse KL": lambda: weighted_reverse_kl([0.5, 0.5], [0.5], "none", "xor"),
    "probed samples": lambda: GreedyProbe([]).compare([sample(), sample()], [[-0.5, -0.5]]),
    "probed tokens": lambda: GreedyProbe([]).compare([sample()], [[-0.5]]),
    "routes": lambda: plan_routes([address(1), address(2)], [PLACE], [PLACE], transport="nccl"),
    "copies": lambda: copy_all(TWO, TWO[:1]),
    "moments": lambda: HostAdam([ONE], **CONSTANTS, moment_dtypes=(torch.float32,)),
    "groups of parameters": lambda: optimizer(2, 1).load_state_dict(optimizer(1, 1).state_dict()),
    "parameters": lambda: optimizer(1, 2).load_state_dict(optimizer(1, 1).state_dict()),
    "masked text": lambda: MultiTurnLossMaskGenerator.get_text_from_loss_mask(SimpleNamespace(tokenizer=None), [1, 2], [0]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_list_that_is_too_short_is_an_error(case: str):
    with pytest.raises(ValueError, match=r"zip\(\) argument \d is (shorter|longer) than argument"):
        CASES[case]()
