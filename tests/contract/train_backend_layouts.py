"""Layouts of the Megatron backend, and the checkpoints that pass between them and FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from qwench.config.layout import ParallelLayout
from tests.contract.train_backend_cases import MUON, STATELESS, TRUNCATED
from tests.contract.train_backend_ranks import Case

BINS = {
    1: [[[6, 1], [7, 3, 0, 5], [2, 4]]],
    2: [[[3, 0], [5, 6, 2]], [[7, 1], [4]]],
    4: [[[1, 5], [0]], [[6], [4, 3]], [[], []], [[2], [7]]],
}
"""By the number of data-parallel ranks; with four, one is idle."""
LAYOUTS: Mapping[str, tuple[int, ParallelLayout]] = {
    "one": (1, ParallelLayout()),
    "tp2": (2, ParallelLayout(tp=2)),
    "tp2-sp": (2, ParallelLayout(tp=2, sequence_parallel=True)),
    "pp2": (2, ParallelLayout(pp=2)),
    "cp2": (2, ParallelLayout(cp=2)),
    "dp2": (2, ParallelLayout()),
    "cp4": (4, ParallelLayout(cp=4)),
    "tp2-pp2": (4, ParallelLayout(tp=2, pp=2)),
    "tp2-cp2": (4, ParallelLayout(tp=2, cp=2)),
    "pp2-cp2": (4, ParallelLayout(pp=2, cp=2)),
    "tp2-dp2": (4, ParallelLayout(tp=2, sequence_parallel=True)),
    "dp4": (4, ParallelLayout()),
}
"""World size and layout; data-parallel ranks are what is left of the world."""
DEEP_LAYOUTS: Mapping[str, tuple[int, ParallelLayout]] = {
    "pp4": (4, ParallelLayout(pp=4)),
    "pp2": LAYOUTS["pp2"],
    "pp2-uneven": (2, ParallelLayout(pp=2, last_stage_layers=1)),
}
"""For a model of four layers."""
FSDP_SIZES = {"fsdp": 1, "fsdp-2": 2, "fsdp-4": 4}


def megatron(name: str, model: str, *, on: str, **options: object) -> tuple[int, Case]:
    """Return world size and case."""
    world_size, layout = (DEEP_LAYOUTS if model.startswith("deep") else LAYOUTS)[on]
    bins = BINS[world_size // layout.model_ranks]
    return world_size, Case(name=name, model=model, bins=bins, backend="megatron", layout=layout, **options)  # type: ignore[arg-type]


def fsdp(name: str, model: str, *, on: str, **options: object) -> tuple[int, Case]:
    """Return world size and case of the other backend."""
    world_size = FSDP_SIZES[on]
    return world_size, Case(name=name, model=model, bins=BINS[world_size], **options)  # type: ignore[arg-type]


SMALL, LARGE = (1, 2), (4,)
"""World sizes of the two halves of the suite, which take about as long."""


def layouts_of(sizes: Sequence[int]) -> list[str]:
    """Return the names of the layouts of some world sizes."""
    return [name for name, (world_size, _) in LAYOUTS.items() if world_size in sizes]


TIED = ("tp2-sp", "pp2", "cp2", "dp2", "tp2-pp2", "pp2-cp2", "tp2-dp2")
"""Layouts that train a model with tied embeddings too; `test_megatron_model` compares gradients of one in other layouts."""

TRUNCATED_ON = ("tp2-sp", "tp2-cp2")
"""Layouts that replay truncated sampling with all its scores; `test_methods` steps by it in every layout."""


MUON_ON = ("dp2", "tp2-sp", "pp2-cp2")
"""Layouts that step by Muon: matrices in ranges, and in rows and columns, and on stages."""
PROBED = ("one", "pp2", "dp2")
"""Layouts that run the memory probe too."""


def first_steps(sizes: Sequence[int]) -> Iterator[tuple[int, Case]]:
    """Yield every layout with untied embeddings, which are saved, and some with tied ones."""
    for on in layouts_of(sizes):
        if on in TIED:
            recompute = on in ("tp2-sp", "pp2")
            yield megatron(f"{on}-tied", "tied", on=on, gradient_checkpointing=recompute, save=on == "tp2-pp2")
        yield megatron(f"{on}-untied", "untied", on=on, save=True)
        if on in PROBED:
            yield megatron(f"{on}-probed", "untied", on=on, probe=True)
        if on in TRUNCATED_ON:
            yield megatron(f"{on}-truncated", TRUNCATED, on=on)
        if on in MUON_ON:
            yield megatron(f"{on}-muon", MUON, on=on, save=on == "dp2")
        if on == "tp2-sp":
            yield megatron(f"{on}-stateless", STATELESS, on=on)
    if 4 in sizes:
        yield megatron("deep-pp4-tied", "deep-tied", on="pp4")
        yield megatron("deep-pp4-untied", "deep-untied", on="pp4", save=True)
    if 2 in sizes:
        yield megatron("deep-pp2-uneven-untied", "deep-untied", on="pp2-uneven", save=True)
        yield fsdp("fsdp-tied", "tied", on="fsdp", save=True)
    yield fsdp("fsdp-untied", "untied", on="fsdp-2", save=True)


RESUMED_STEPS = 2
"""Enough to need moments, masters and the step count."""


AFTER_FSDP = ("tp2-sp", "dp2", "tp2-pp2", "tp2-dp2")
"""Layouts that go on from FSDP2's checkpoint: every axis that cuts a parameter or the optimizer."""
BEFORE_FSDP = ("pp2", "cp2", "tp2-pp2", "dp4")
"""Layouts whose checkpoint FSDP2 goes on from."""


def resumed(sizes: Sequence[int]) -> Iterator[tuple[int, Case]]:
    """Yield every layout from the checkpoint of the one before it, so that each writes and reads, and some from FSDP2's."""
    names = layouts_of(sizes)
    for before, on in zip([names[-1], *names], names, strict=False):
        yield megatron(f"{on}-after-{before}", "untied", on=on, load=f"{before}-untied", num_steps=RESUMED_STEPS)
        if on in AFTER_FSDP:
            yield megatron(f"{on}-after-fsdp", "untied", on=on, load="fsdp-untied", num_steps=RESUMED_STEPS)
        if on in BEFORE_FSDP:
            yield fsdp(f"fsdp-after-{on}", "untied", on="fsdp-2", load=f"{on}-untied", num_steps=RESUMED_STEPS)
    if 2 in sizes:
        yield megatron("muon-tp2-sp-after-dp2", MUON, on="tp2-sp", load="dp2-muon", num_steps=RESUMED_STEPS)
        yield megatron("pp2-tied-after-fsdp", "tied", on="pp2", load="fsdp-tied", num_steps=RESUMED_STEPS)
    if 4 in sizes:
        yield megatron("pp2-tied-after-tp2-pp2", "tied", on="pp2", load="tp2-pp2-tied", num_steps=RESUMED_STEPS)
        yield fsdp("fsdp-tied-after-tp2-pp2", "tied", on="fsdp", load="tp2-pp2-tied", num_steps=RESUMED_STEPS)
        yield megatron("deep-pp2-after-pp4", "deep-untied", on="pp2", load="deep-pp4-untied", num_steps=RESUMED_STEPS)


def weights_only(source: str) -> tuple[tuple[int, Case], tuple[int, Case]]:
    """Return runs of both backends that start from the weights of a checkpoint, with a fresh optimizer."""
    return (
        megatron(f"weights-of-{source}", "untied", on="tp2", load=source, weights_only=True),
        fsdp(f"fsdp-weights-of-{source}", "untied", on="fsdp", load=source, weights_only=True),
    )


def of_padded() -> tuple[tuple[int, Case], tuple[int, Case]]:
    """Return a run from a padded vocabulary, of which two of four stages see nothing, and one from it unpadded."""
    return (
        megatron("padded-on-pp4", "deep-untied", on="pp4", load="padded", weights_only=True),
        megatron("unpadded-on-pp2", "deep-untied", on="pp2", load="deep-pp4-untied", weights_only=True),
    )


def bf16() -> Iterator[tuple[int, Case]]:
    """Yield runs in bfloat16 of which each must be exactly the first, or go on exactly as it does."""
    for offload_fraction in (0.0, 0.5, 1.0):
        yield megatron(
            f"bf16-offload-{offload_fraction}", "bf16", on="tp2-dp2", bf16=True, offload_fraction=offload_fraction, num_steps=4
        )


def bf16_halves() -> tuple[tuple[int, Case], tuple[int, Case]]:
    """Return two steps that are saved, and the next two."""
    return (
        megatron("bf16-first-half", "bf16", on="tp2-dp2", bf16=True, num_steps=2, save=True),
        megatron("bf16-second-half", "bf16", on="tp2-dp2", bf16=True, num_steps=2, load="bf16-first-half"),
    )


def non_finite(sizes: Sequence[int]) -> Iterator[tuple[int, Case]]:
    """Yield runs in which one data-parallel rank has a loss of NaN, or the only one has."""
    for on in ("dp2", "pp2", "cp2") if 2 in sizes else ("tp2-dp2",):
        yield megatron(f"{on}-nan", "tied", on=on, non_finite=True)
