"""Joining megatron-core's process groups."""

from __future__ import annotations

import math

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from qwench.config.layout import ParallelLayout
from qwench.training.trainer import ParallelRank


def join_groups(layout: ParallelLayout, *, timeout_s: float) -> ParallelRank:
    """Divide the ranks of the default process group by `layout`, and return this rank's position; collective.

    The groups use the backends of the default group. No groups of gloo are made beside them, as megatron-core would for saving.

    Args:
        timeout_s: Of a collective in these groups.
    """
    assert dist.is_initialized(), "init_process_group comes first"
    assert dist.get_world_size() % layout.model_ranks == 0, "check_layout comes first"
    if not parallel_state.model_parallel_is_initialized():  # a critic uses the groups of the policy
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
            create_gloo_process_groups=False,
        )
        # megatron-core asks for random states, though nothing is drawn from them: there is no dropout.
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return ParallelRank(
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        num_ranks=dist.get_world_size(),
        is_main=dist.get_rank() == 0,
    )


def is_first_stage() -> bool:
    """Tell whether this rank holds the embedding."""
    return bool(parallel_state.is_pipeline_first_stage())


def is_last_stage() -> bool:
    """Tell whether this rank holds the head."""
    return bool(parallel_state.is_pipeline_last_stage())
