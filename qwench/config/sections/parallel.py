"""Division of one model over ranks; names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass, fields

from qwench.config.layout import ParallelLayout
from qwench.config.limits import as_flag, check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Parallel sizes. The remaining factor of the world size is data-parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that split each layer's matrices (TP). Needs --train-backend megatron."""
    sequence_parallel: bool = False
    """Split activations between the matrices along the sequence. Always on when --tensor-model-parallel-size is above 1."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the stack of layers (PP). Needs --train-backend megatron."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage. None: as many as other stages."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage. None: as many as other stages."""
    context_parallel_size: int = 1
    """Ranks that split each sequence (CP). Needs --train-backend megatron."""
    expert_model_parallel_size: int = 1
    """Must be 1: only dense models are trained."""
    expert_tensor_parallel_size: int = 1
    """Must be 1: only dense models are trained."""
    dp_replicate: int = 1
    """Copies of the sharded model under FSDP2. Parameters are sharded over the other data-parallel ranks."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "sequence_parallel":
                check_positive(as_flag(item.name), getattr(self, item.name))

    @property
    def layout(self) -> ParallelLayout:
        """Return how the ranks of one copy of the model divide it; activations are always split where matrices are."""
        return ParallelLayout(
            tp=self.tensor_model_parallel_size,
            pp=self.pipeline_model_parallel_size,
            cp=self.context_parallel_size,
            sequence_parallel=self.tensor_model_parallel_size > 1,
            first_stage_layers=self.decoder_first_pipeline_num_layers,
            last_stage_layers=self.decoder_last_pipeline_num_layers,
        )
