"""Trainer ranks that publish the weights of a checkpoint to engines: one process per rank, all publications in one launch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from qwench.config.sections.training import TrainingConfig
from qwench.errors import QwenchError
from qwench.training.fsdp.fsdp_trainer import FsdpTrainer
from qwench.weights.plan import PublicationPlan
from qwench.weights.remote import publish_from_rank
from qwench.wire.addresses import EngineAddress
from tests.contract.rank_processes import run_ranks
from tests.deadlines import patient
from tests.fakes.sections import adamw

_TIMEOUT_S = patient(120)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """One publication that all ranks take part in."""

    addresses: Sequence[EngineAddress]
    version: int
    plan: PublicationPlan


def publish_from_ranks(
    folder: Path, publications: Sequence[Publication], *, num_ranks: int, work_folder: Path
) -> list[list[str]]:
    """Return for each rank what came of each publication: `ok` or the error."""
    store = work_folder / "store"
    ranks = [(folder, publications, rank, num_ranks, store) for rank in range(num_ranks)]
    run_ranks(_run, ranks, folder=work_folder, timeout_s=_TIMEOUT_S)
    return [json.loads(_answer_of(rank, store).read_text()) for rank in range(num_ranks)]


def _answer_of(rank: int, store: Path) -> Path:
    return store.with_name(f"{store.name}.{rank}.json")


def _run(folder: Path, publications: Sequence[Publication], rank: int, num_ranks: int, store: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), num_ranks), rank=rank, world_size=num_ranks, timeout=timeout
    )
    backend = FsdpTrainer.build(
        folder,
        training=TrainingConfig(),
        optimizer=adamw(),
        total_steps=1,
        param_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    outcomes = []
    for publication in publications:
        try:
            publish_from_rank(backend, publication.addresses, publication.version, publication.plan)
            outcomes.append("ok")
        except QwenchError as failure:
            outcomes.append(str(failure))
    _answer_of(rank, store).write_text(json.dumps(outcomes))
    dist.destroy_process_group()
