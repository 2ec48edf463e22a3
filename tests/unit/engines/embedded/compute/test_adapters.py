"""A token gets from each projection what the matrices of its adapter say, of earlier adapters nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwench.engines.embedded.compute.adapters import AdapterStore
from qwench.errors import EngineError
from qwench.models.peft import A, B
from tests.unit.config.architectures import QWEN3_4B

ARCHITECTURE = replace(
    QWEN3_4B, num_layers=1, hidden_size=8, ffn_hidden_size=12, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=16
)
Q, K, V, DOWN = (f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down"))
SIZES = {Q: (8, 8), K: (4, 8), V: (4, 8), DOWN: (8, 12)}
"""(rows, columns)"""


def _store() -> AdapterStore:
    return AdapterStore(ARCHITECTURE, dtype=torch.float32, device=torch.device("cpu"))


def _matrices(seed: int, *, rank: int, modules: tuple[str, ...]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    matrices = dict[str, Tensor]()
    for module in modules:
        rows, columns = SIZES[module]
        matrices[f"{module}.{A}"] = torch.randn(rank, columns, generator=draw)
        matrices[f"{module}.{B}"] = torch.randn(rows, rank, generator=draw)
    return matrices


def _check(store: AdapterStore, name: str | None, matrices: Mapping[str, Tensor], *, scale: float) -> None:
    """Compare what a token with this adapter gets at each projection with scale * B (A x)."""
    mix = store.mix(torch.tensor([store.choose(name).slot]))
    for group in ((Q, K, V), (DOWN,)):
        stack = store.stack(group)
        assert stack is not None
        x = torch.linspace(-1, 1, SIZES[group[0]][1])[None]
        outputs = [torch.zeros(1, SIZES[module][0]) for module in group]
        stack.add(x, outputs, mix)
        for module, output in zip(group, outputs, strict=True):
            wanted = torch.zeros_like(output)
            if f"{module}.{A}" in matrices:
                wanted = scale * (x @ matrices[f"{module}.{A}"].T @ matrices[f"{module}.{B}"].T)
            torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_publication_replaces_the_one_before_after_the_stacks_have_moved(rank: int) -> None:
    store, modules = _store(), (Q, K, V, DOWN)
    first, second = (_matrices(seed, rank=2, modules=modules) for seed in range(2))
    named = _matrices(3, rank=rank, modules=modules)
    store.publish(first, scale=0.5)
    _check(store, None, first, scale=0.5)
    store.add("named", named, scale=2.0, in_use=set())
    _check(store, None, first, scale=0.5)
    store.publish(second, scale=0.25)
    _check(store, None, second, scale=0.25)
    _check(store, "named", named, scale=2.0)


@pytest.mark.parametrize(("rank", "modules"), [(2, (Q, K, V, DOWN)), (3, (Q, DOWN)), (2, (K,))])
def test_nothing_is_left_of_an_unloaded_adapter(rank: int, modules: tuple[str, ...]) -> None:
    store = _store()
    store.add("before", _matrices(0, rank=3, modules=(Q, K, V, DOWN)), scale=1.0, in_use=set())
    slot = store.choose("before").slot
    store.unload("before")
    matrices = _matrices(1, rank=rank, modules=modules)
    store.add("after", matrices, scale=1.5, in_use=set())
    assert store.choose("after").slot == slot
    _check(store, "after", matrices, scale=1.5)


@pytest.mark.parametrize(("number", "fits"), [(3e38, False), (1e32, False), (1e30, True)])
def test_a_finite_matrix_whose_product_would_overflow_in_the_rows_of_others_is_refused(number: float, fits: bool) -> None:
    store = _store()
    matrices = {f"{Q}.{A}": torch.full((2, 8), number), f"{Q}.{B}": torch.full((8, 2), 3e38)}
    if not fits:
        with pytest.raises(EngineError, match=rf"adapter 'large' holds .* in {Q}\.{A}: the product with a token overflows"):
            store.add("large", matrices, scale=1.0, in_use=set())
        return
    store.add("large", matrices, scale=1.0, in_use=set())
    output = torch.zeros(1, 8)
    stack = store.stack((Q, K, V))
    assert stack is not None
    stack.add(torch.full((1, 8), 1e6), [output, torch.zeros(1, 4), torch.zeros(1, 4)], store.mix(torch.tensor([0])))
    assert output.tolist() == [[0.0] * 8]
