"""How one model is spread over ranks; names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qwench.config.checks import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Parallel sizes; what is left of the world is data-parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    sequence_parallel: bool = False
    """Split activations outside the matrices along the sequence; always so where --tensor-model-parallel-size is over 1."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers (PP)."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    expert_model_parallel_size: int = 1
    """Must be 1: dense models only."""
    expert_tensor_parallel_size: int = 1
    """Must be 1: dense models only."""
    dp_replicate: int = 1
    """FSDP2: copies of the sharded model; parameters are sharded over the remaining data-parallel ranks."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "sequence_parallel":
                check_positive(f"--{item.name.replace('_', '-')}", getattr(self, item.name))

    @property
    def splits_sequence(self) -> bool:
        """Tell whether the ranks of a tensor-parallel group share the activations between the matrices."""
        return self.tensor_model_parallel_size > 1

    @property
    def model_parallel_size(self) -> int:
        """Return the number of ranks that hold one copy of the model and one sequence."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
