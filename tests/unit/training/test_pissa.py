"""Adapters that begin as principal components, by matrices whose components are known."""

import torch

from qwench.config.sections.lora import LoraConfig
from qwench.training.pissa import as_one, merged_change, part_of, principal

_A, _B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"
_START_A, _START_B = "q_proj.start_A.weight", "q_proj.start_B.weight"


def test_the_scaled_product_is_the_largest_component():
    weight = torch.diag(torch.tensor([3.0, -12.0, 1.0]))
    a, b = principal(weight, LoraConfig(lora_rank=1, lora_alpha=4.0), torch.bfloat16)
    torch.testing.assert_close(4.0 * b @ a, torch.diag(torch.tensor([0.0, -12.0, 0.0])), rtol=0.01, atol=1e-5)
    assert all(torch.equal(one, one.bfloat16().float()) for one in (a, b))


def test_a_folder_holds_matrices_and_negated_starts_and_gives_them_back():
    held = {
        _A: torch.tensor([[1.0, 2.0, 3.0]]),
        _B: torch.tensor([[4.0], [5.0]]),
        _START_A: torch.tensor([[6.0, 7.0, 8.0]]),
        _START_B: torch.tensor([[9.0], [10.0]]),
        "k_proj.lora_A.weight": torch.tensor([[11.0]]),
    }
    folder = as_one(held)
    assert {name: matrix.tolist() for name, matrix in folder.items()} == {
        _A: [[1.0, 2.0, 3.0], [6.0, 7.0, 8.0]],
        _B: [[4.0, -9.0], [5.0, -10.0]],
        "k_proj.lora_A.weight": [[11.0]],
    }
    for name, of in ((_A, _A), (_B, _B), (_START_A, _A), (_START_B, _B)):
        assert torch.equal(part_of(name, folder[of]), held[name])


def test_a_merged_matrix_has_the_scaled_difference_of_both_products():
    """2 x 2 weights of 1 and scale 10: the columns (2, 3) and (1, 1) give 1 + 10 * (2 * 5 - 1 * 7) = 31 and so on."""
    a, b, a_0, b_0 = (torch.tensor(rows) for rows in ([[5.0, 6.0]], [[2.0], [3.0]], [[7.0, 8.0]], [[1.0], [1.0]]))
    merged = merged_change(torch.ones(2, 2), a, b, a_0, b_0, scale=10.0)
    assert merged.tolist() == [[31.0, 41.0], [81.0, 101.0]]
