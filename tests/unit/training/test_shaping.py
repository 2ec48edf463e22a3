"""The price of length, and what truncated samples keep."""

import pytest
import torch

from qwench.algorithms.columns import RolloutBatch
from qwench.config.config import Config
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.samples import Prompt, Sample, Status
from qwench.training.shaping import Shaping, overlong_penalty


def sample(index: int, length: int, *, reward: float = 1.0, execution: int | None = None, **fields: object) -> Sample:
    made = Sample(prompt=Prompt(text="", token_ids=(1, 2)), sample_id=index, group_id=0, execution_id=execution, reward=reward)
    made.append([3] * length, log_probs=[-0.5] * length, version=0)
    made.status = Status.COMPLETED
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_the_flags_are_read_by_their_names():
    reward = RewardConfig(overlong_buffer_len=20, overlong_penalty_factor=0.5, mask_truncated_completions=True)
    found = Shaping.of(Config(rollout=RolloutConfig(rollout_max_response_len=100), reward=reward))
    assert found == Shaping(max_response_len=100, buffer_len=20, penalty_factor=0.5, masks_truncated=True)


def test_the_price_of_length_in_worked_values():
    """Longest 100, buffer 20: free up to 80, then a twentieth of the factor for each token."""
    lengths = torch.tensor([0, 80, 81, 90, 100, 130])
    got = overlong_penalty(lengths, max_len=100, buffer_len=20, factor=1.0)
    assert got.tolist() == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])
    assert overlong_penalty(lengths, max_len=100, buffer_len=20, factor=0.5).tolist() == pytest.approx((got / 2).tolist())


@pytest.mark.parametrize(("max_len", "buffer_len"), [(16384, 4096), (20480, 4096), (12, 12), (7, 1)])
def test_the_price_equals_the_papers_three_cases(max_len, buffer_len):
    lengths = list(range(0, max_len + 1, max(1, max_len // 97)))
    expected = []
    for length in lengths:
        if length <= max_len - buffer_len:
            expected.append(0.0)
        elif length <= max_len:
            expected.append(((max_len - buffer_len) - length) / buffer_len)
        else:
            expected.append(-1.0)
    got = overlong_penalty(torch.tensor(lengths), max_len=max_len, buffer_len=buffer_len, factor=1.0)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_samples_of_one_execution_pay_for_its_longest():
    samples = [sample(0, 4, execution=7), sample(1, 9, execution=7), sample(2, 8, execution=8)]
    batch = Shaping(max_response_len=10, buffer_len=4).apply(RolloutBatch.from_samples(samples), samples)
    assert batch.rewards.tolist() == [0.25, 0.25, 0.5]
    assert batch.overlong_penalties.tolist() == [-0.75, -0.75, -0.5]
    assert [one.reward for one in samples] == [1.0, 1.0, 1.0]


def test_truncated_samples_keep_their_reward_and_lose_their_tokens():
    samples = [sample(0, 3), sample(1, 2, status=Status.TRUNCATED)]
    batch = RolloutBatch.from_samples(samples)
    masked = Shaping(masks_truncated=True).apply(batch, samples)
    assert [mask.tolist() for mask in masked.loss_mask] == [[True] * 3, [False] * 2]
    assert masked.rewards.tolist() == [1.0, 1.0]
    assert Shaping().apply(batch, samples) is batch
