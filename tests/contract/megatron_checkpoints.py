"""What one rank makes of a checkpoint of several: megatron-core's own reader, and checkpoints that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.nn import functional

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.errors import CheckpointError, ConfigError
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from tests.contract.train_backend_layouts import megatron
from tests.contract.train_backend_ranks import BUILDERS


def read_with_megatron_core(folder: Path, saved: str, model: str) -> dict:
    """Load a checkpoint by megatron-core's `dist_checkpointing` and its optimizer, as Megatron-LM does."""

    def load(backend: MegatronTrainer) -> dict:
        stage, optimizer = backend._model, backend._optimizer._sharded
        model_state = stage.sharded_state_dict()
        kind = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer_state = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=kind)
        loaded = dist_checkpointing.load(
            {"model": model_state, "optimizer": optimizer_state}, str(folder / f"{saved}.checkpoint")
        )
        stage.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        return {
            "weights": {name: weight.clone() for bucket in backend.weights(bucket_bytes=1 << 14) for name, weight in bucket},
            "num_steps": [group["step"] for group in optimizer.param_groups],
            "state": _state(backend),
        }

    return _alone(folder, model, load)


def read_with_the_backend(folder: Path, saved: str, model: str) -> dict:
    """Load the same by the backend's own reader."""

    def load(backend: MegatronTrainer) -> dict:
        backend.load(folder / f"{saved}.checkpoint")
        return {"state": _state(backend)}

    return _alone(folder, model, load)


def read_damaged(folder: Path, saved: str, model: str) -> dict:
    """Try to load checkpoints that are damaged, half-written, without an optimizer, or of another model."""

    def load(backend: MegatronTrainer) -> dict:
        before = backend._weight_buffers()[0].clone()
        messages = {}
        for name, damage in _DAMAGES.items():
            damaged = Path(copytree(folder / f"{saved}.checkpoint", folder / f"{saved}.{name}"))
            damage(damaged)
            messages[name] = _message_of(backend, damaged)
        backend.save(_new_folder(folder / f"{saved}.no-optimizer"), with_optimizer=False)
        messages["no-optimizer"] = _message_of(backend, folder / f"{saved}.no-optimizer")
        messages["another-model"] = _message_of(backend, folder / "deep-pp4-untied.checkpoint")
        return {"messages": messages, "unchanged": torch.equal(backend._weight_buffers()[0], before)}

    return _alone(folder, model, load)


def pad_vocabulary(source: Path, target: Path) -> None:
    """Write the weights of a torch_dist checkpoint with more rows in embedding and head, as Megatron-LM pads them."""
    stored = DcpFolder(source)
    weights = {key: stored.read(key) for key in stored.tensors if not key.startswith("optimizer.")}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        weights[key] = functional.pad(weights[key], (0, 0, 0, 16))
    target.mkdir()
    dcp.save(weights, checkpoint_id=target, no_dist=True)
    for name in ("metadata.json", "common.pt"):
        copyfile(source / name, target / name)


def _truncate(folder: Path) -> None:
    largest = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "file-missing": lambda folder: next(iter(folder.glob("*.distcp"))).unlink(),
    "unfinished": lambda folder: (folder / ".metadata").unlink(),
    "no-step-count": lambda folder: (folder / "common.pt").unlink(),
}


def _message_of(backend: MegatronTrainer, folder: Path) -> str:
    try:
        backend.load(folder)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return ""


def _new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _state(backend: MegatronTrainer) -> list[dict[str, torch.Tensor]]:
    return [{name: values.clone() for name, values in shard.state.items()} for shard in backend._optimizer.owned_shards()]


def _alone(folder: Path, model: str, load: Callable[[MegatronTrainer], dict]) -> dict:
    """Build the backend on one rank for `load`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, case = megatron("alone", model, on="one")
    with BUILDERS["megatron"](folder / model, case) as backend:
        assert isinstance(backend, MegatronTrainer)
        record = load(backend)
    dist.destroy_process_group()
    return record
