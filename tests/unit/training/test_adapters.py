"""What adapters do in a pass."""

from __future__ import annotations

import pytest
import torch

from qwench.training.adapters import AdapterSwitch, random_a


def test_adapters_are_on_but_inside_the_context_also_after_an_error():
    switch = AdapterSwitch(0.0, seed=0)
    assert switch.is_on
    with switch.off():
        assert not switch.is_on
    assert switch.is_on
    with pytest.raises(KeyError), switch.off():
        raise KeyError
    assert switch.is_on


def test_inputs_are_dropped_and_scaled_inside_the_context_alone():
    switch, x = AdapterSwitch(0.25, seed=3), torch.full((100, 40), 3.0)
    place = {"step": 1, "micro_batch": 2, "rank": 0}
    assert torch.equal(switch.dropped(x, 0), x)
    with switch.dropping(**place):
        dropped = switch.dropped(x, 0)
        assert torch.equal(switch.dropped(x, 0), dropped), "a layer that is computed again drops the same ones"
        assert not torch.equal(switch.dropped(x, 1), dropped)
    assert torch.equal(switch.dropped(x, 0), x)
    # 4,000 draws: the standard error of the share is 0.007
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    for change in ({"step": 2}, {"micro_batch": 3}, {"rank": 1}):
        with switch.dropping(**{**place, **change}):
            assert not torch.equal(switch.dropped(x, 0), dropped)
    with pytest.raises(KeyError), switch.dropping(**place):
        raise KeyError
    assert torch.equal(switch.dropped(x, 0), x)


def test_a_begins_as_peft_s_does_and_follows_from_the_seed_and_the_name():
    own = random_a("q_proj", (200, 64), seed=1)
    peft_s = torch.nn.init.kaiming_uniform_(torch.empty(200, 64), a=5**0.5, generator=torch.Generator().manual_seed(2))
    # Both are uniform below 1 / 8. The standard errors of 12,800 draws are 0.0006 and 0.0003.
    assert own.dtype == torch.float32 and 0.1249 < own.abs().max().item() <= 0.125
    assert own.mean().item() == pytest.approx(peft_s.mean().item(), abs=0.003)
    assert own.std().item() == pytest.approx(peft_s.std().item(), abs=0.0015)
    assert torch.equal(own, random_a("q_proj", (200, 64), seed=1))
    assert not torch.equal(own, random_a("k_proj", (200, 64), seed=1))
    assert not torch.equal(own, random_a("q_proj", (200, 64), seed=2))


def test_seeds_give_the_same_numbers_in_every_version():
    torch.testing.assert_close(random_a("q_proj", (1, 3), seed=2), torch.tensor([[0.57690936, -0.48468193, -0.02683321]]))
    switch = AdapterSwitch(0.5, seed=3)
    switch.drop(step=1, micro_batch=2, rank=4)
    assert switch.dropped(torch.ones(16), 5).tolist() == [2, 2, 2, 2, 0, 0, 2, 0, 0, 2, 2, 2, 2, 0, 2, 2]
