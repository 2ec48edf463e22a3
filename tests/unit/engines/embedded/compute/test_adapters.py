"""A token gets from each projection what the matrices of its adapter say, of earlier adapters nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qwench.engines.embedded.compute.adapters import AdapterStore, RowAdapters
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


def test_rows_compute_with_the_adapters_of_their_requests_the_last_one_with_none() -> None:
    store = _store()
    rows = RowAdapters(store, 3, torch.device("cpu"))
    assert not rows.seat([])
    for seed, name in enumerate(("first", "second")):
        store.add(name, _matrices(seed, rank=2, modules=(Q,)), scale=1.0, in_use=set())

    def mixed(*names: str | None) -> Tensor:
        return store.mix(torch.tensor([store.choose(name).slot for name in names]))

    def seat(**names: str | None) -> bool:
        return rows.seat(SimpleNamespace(row=int(row[1:]), adapter=store.choose(name)) for row, name in names.items())

    assert seat(r0="second", r1="first")
    assert torch.equal(rows.mix(torch.tensor([1, 0, 2, 1])), mixed("first", "second", None, "first"))
    assert not seat(r0=None)
    assert torch.equal(rows.mix(torch.tensor([0, 1])), mixed(None, "first"))


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


HALF = _matrices(0, rank=2, modules=(Q,))


@pytest.mark.parametrize(
    ("change", "scale", "problem"),
    [
        ({f"{K}.{A}": torch.ones(3, 8), f"{K}.{B}": torch.ones(4, 3)}, 1.0, "has no matrices of one rank."),
        ({f"{Q}.{A}": torch.ones(0, 8)}, 1.0, "has no matrices of one rank."),
        ({f"other.{A}": torch.ones(2, 8)}, 1.0, "does not fit the engine's model, which has no projection 'other'."),
        ({f"{Q}.{A}": torch.ones(2, 7)}, 1.0, f"does not fit the engine's model: {Q}.{A} is not (2, 8)."),
        ({f"{Q}.{B}": torch.ones(8, 3)}, 1.0, f"does not fit the engine's model: {Q}.{B} is not (8, 2)."),
        ({f"{K}.{A}": torch.ones(2, 8)}, 1.0, f"does not fit the engine's model: {K}.{B} is not (4, 2)."),
        ({}, 1e39, "is multiplied by 1e+39, which is no number of torch.float32."),
        ({}, float("nan"), "is multiplied by nan, which is no number of torch.float32."),
        (
            {f"{Q}.{B}": torch.full((8, 2), float("inf"))},
            1.0,
            f"holds numbers that are not finite in torch.float32, in {Q}.{B}.",
        ),
    ],
)
def test_an_adapter_of_another_model_or_of_no_numbers_is_refused_and_changes_nothing(change, scale, problem):
    store = _store()
    with pytest.raises(EngineError, match=re.escape(f"adapter 'mine' {problem}")):
        store.add("mine", HALF | change, scale=scale, in_use=set())
    assert store.is_empty and not store.folders and store.layout == 0


def test_names_are_taken_once_and_slots_wait_for_unfinished_requests():
    store = _store()
    with pytest.raises(EngineError, match=re.escape("there is no adapter 'a'; loaded: none.")):
        store.choose("a")
    store.add("a", HALF, scale=1.0, in_use=set(), folder=Path("f"))
    store.add("b", HALF, scale=1.0, in_use=set())
    assert not store.is_empty and store.folders == {"a": "f", "b": ""}
    for name, problem in (("a", "adapter 'a' is loaded; unload it first."), ("", "an adapter needs a name.")):
        with pytest.raises(EngineError, match=problem):
            store.add(name, HALF, scale=1.0, in_use=set())
    with pytest.raises(EngineError, match=re.escape("there is no adapter 'c'; loaded: a, b.")):
        store.unload("c")
    first = store.choose("a").slot
    store.unload("a")
    store.add("c", HALF, scale=1.0, in_use={first})
    store.add("d", HALF, scale=1.0, in_use=set())
    assert store.choose("d").slot == first
    slots = [store.choose(name).slot for name in ("b", "c", "d")]
    assert len(set(slots)) == 3 and 0 not in slots and store.choose(None).slot == 0
    roots = [store.choose(name).cache_root for name in ("b", "c", "d")]
    assert len(set(roots)) == 3 and max(roots) < 0
