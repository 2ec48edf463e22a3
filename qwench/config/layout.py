"""How ranks divide the model and its tokens; pure numbers, checked before any process starts.

    world = tp x cp x dp x pp      neighbouring ranks are of one tensor-parallel group, the farthest of one pipeline

tp splits the matrices, pp the layers, cp the tokens of each sequence, dp the micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwench.errors import ConfigError
from qwench.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Sizes of the groups of ranks that hold one copy of the model together."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    """Split activations between the matrices by tokens over the tensor-parallel ranks; no effect with `tp` 1."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage. None: as many as other stages."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage. None: as many as other stages."""

    @property
    def model_ranks(self) -> int:
        """Return how many ranks compute one micro-batch together."""
        return self.tp * self.pp * self.cp

    @property
    def even_stages(self) -> int:
        """Return how many stages share the layers that no flag gives to the first or the last one."""
        return self.pp - (self.first_stage_layers is not None) - (self.last_stage_layers is not None)

    def most_layers(self, num_layers: int) -> int:
        """Return the layers of the largest stage."""
        first, last = self.first_stage_layers or 0, self.last_stage_layers or 0
        return max(first, last, (num_layers - first - last) // max(self.even_stages, 1))

    @property
    def token_multiple(self) -> int:
        """Return what the number of tokens on one rank must be a multiple of."""
        return self.tp if self.sequence_parallel else 1


def check_layout(layout: ParallelLayout, model: Architecture, *, world_size: int) -> None:
    """Make sure that the ranks, and the model's heads and layers, divide evenly.

    Raises:
        ConfigError: they do not, in one line that names the flag and both numbers.
    """
    for flag, size in _flags(layout).items():
        if size < 1:
            raise ConfigError(f"{flag} ({size}) must be at least 1.")
    data_parallel_size(layout, world_size=world_size)
    for what, count in (
        ("attention heads", model.num_heads),
        ("key-value heads", model.num_kv_heads),
        ("columns of the MLP", model.ffn_hidden_size),
    ):
        _check_divides("--tensor-model-parallel-size", layout.tp, what, count)
    _check_stages(layout, model.num_layers)


POLICY_RANKS = "--actor-num-nodes x --actor-num-gpus-per-node"
CRITIC_RANKS = "--critic-num-nodes x --critic-num-gpus-per-node"


def data_parallel_size(layout: ParallelLayout, *, world_size: int, flags: str = POLICY_RANKS) -> int:
    """Return the number of copies of the model.

    Args:
        flags: whose product is the world size.

    Raises:
        ConfigError: the parallel sizes do not divide the world size.
    """
    if world_size % layout.model_ranks:
        sizes = " x ".join(f"{flag} {size}" for flag, size in _flags(layout).items() if size > 1)
        raise ConfigError(
            f"{sizes} ({layout.model_ranks} ranks for one copy of the model) does not divide the {world_size} trainer ranks "
            f"of {flags}; change the layout or the number of GPUs."
        )
    return world_size // layout.model_ranks


def _flags(layout: ParallelLayout) -> dict[str, int]:
    return {
        "--tensor-model-parallel-size": layout.tp,
        "--pipeline-model-parallel-size": layout.pp,
        "--context-parallel-size": layout.cp,
    }


def _check_stages(layout: ParallelLayout, num_layers: int) -> None:
    given = {
        "--decoder-first-pipeline-num-layers": layout.first_stage_layers,
        "--decoder-last-pipeline-num-layers": layout.last_stage_layers,
    }
    sizes = {flag: size for flag, size in given.items() if size is not None}
    if not sizes:
        _check_divides("--pipeline-model-parallel-size", layout.pp, "layers", num_layers)
        return
    said, rest = " ".join(f"{flag} {size}" for flag, size in sizes.items()), num_layers - sum(sizes.values())
    if layout.pp < 2:
        raise ConfigError(f"{said} divides a pipeline, and there is one stage; give --pipeline-model-parallel-size.")
    if rest < 0 or (rest != 0 if layout.even_stages == 0 else rest == 0 or rest % layout.even_stages):
        raise ConfigError(
            f"{said} leaves {rest} of the model's {num_layers} layers to {layout.even_stages} other stages of "
            f"--pipeline-model-parallel-size {layout.pp}, which must have as many each."
        )


def _check_divides(flag: str, size: int, what: str, count: int) -> None:
    if count % size:
        raise ConfigError(f"{flag} ({size}) does not divide the model's {count} {what}; choose a divisor of {count}.")
