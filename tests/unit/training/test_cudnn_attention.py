"""What cuDNN's attention gets; see tests/gpu/test_packed_decoder.py for what it computes."""

import pytest
import torch
from torch.testing import assert_close

from qwench.models.decoder.gradients import Heads
from qwench.training.cudnn_attention import with_adjacent_heads


@pytest.mark.parametrize(
    ("grouped", "kv_heads", "is_copied"), [(True, 2, True), (False, 2, False), (True, 1, False), (False, 1, False)]
)
def test_values_with_other_heads_between_them_are_copied(grouped: bool, kv_heads: int, is_copied: bool) -> None:
    heads = Heads(heads=4, kv_heads=kv_heads, head_dim=8, grouped=grouped)
    qkv = torch.randn(5, (4 + 2 * kv_heads) * 8)
    values = heads.values(qkv)
    found = with_adjacent_heads(values)
    assert_close(found, values, rtol=0, atol=0)
    assert (found.data_ptr() != values.data_ptr()) == is_copied
    assert kv_heads == 1 or found.stride(1) == 8
