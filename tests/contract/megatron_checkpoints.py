"""What one rank makes of a checkpoint of several: megatron-core's own reader, and checkpoints that cannot be read."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copyfile, copytree

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.nn import functional

from qwench.checkpoints.formats.dcp_reader import DcpFolder
from qwench.checkpoints.manager import CheckpointManager
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.training.megatron.megatron_trainer import MegatronTrainer
from qwench.training.trainer import Trainer
from tests.contract import train_backend_cases as cases
from tests.contract.train_backend_layouts import megatron
from tests.contract.train_backend_ranks import BUILDERS
from tests.fakes.console import RecordingConsole
from tests.fakes.trainer import take_step


def read_with_megatron_core(folder: Path, saved: str, model: str) -> dict:
    """Load a checkpoint by megatron-core's `dist_checkpointing` and its optimizer, as Megatron-LM does."""

    def load(backend: MegatronTrainer) -> dict:
        stage, optimizer = backend._model, backend._optimizer.sharded
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


def write_with_megatron_core(folder: Path, model: str) -> dict:
    """Train two steps, save as slime does after rollout 1 by megatron-core's `dist_checkpointing`, and take the third step."""

    def train(backend: MegatronTrainer) -> dict:
        steps = [_step(backend) for _ in range(2)]
        stage, optimizer = backend._model, backend._optimizer.sharded
        model_state = stage.sharded_state_dict()
        kind = {"distrib_optim_sharding_type": "fully_reshardable"}
        state = {
            "model": model_state,
            "optimizer": optimizer.sharded_state_dict(model_state, is_loading=False, metadata=kind),
            "iteration": 1,
            "args": Namespace(iteration=1),
        }
        saved = folder / "slime" / "iter_0000001"
        saved.mkdir(parents=True)
        dist_checkpointing.save(state, str(saved))
        (folder / "slime" / "latest_checkpointed_iteration.txt").write_text("1")
        (folder / "slime" / "rollout").mkdir()
        position = {"sample_offset": 4, "epoch_id": 1, "sample_group_index": 12, "sample_index": 24, "metadata": {}}
        torch.save(position, folder / "slime" / "rollout" / "global_dataset_state_dict_1.pt")
        return {"steps": [*steps, _step(backend)]}

    return _alone(folder, model, train)


def resume_what_megatron_core_wrote(folder: Path, model: str, backend: str) -> dict:
    """Restore it in a fresh trainer as a run does, and take the third step."""

    def resume(trainer: Trainer) -> dict:
        rollouts = RecordedState()
        manager = CheckpointManager(CheckpointConfig(load=folder / "slime"), {}, RecordingConsole())
        first = manager.restore(trainer, rollouts)
        return {"first": first, "state": rollouts.state, "train_steps": manager.train_steps(first), "step": _step(trainer)}

    return _alone(folder, model, resume, backend=backend)


class RecordedState:
    """Rollouts that keep the state they are given."""

    state: Mapping[str, object]

    def state_dict(self) -> Mapping[str, object]:
        """Return it."""
        return self.state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Keep it."""
        self.state = state


def _step(trainer: Trainer) -> tuple[float, float]:
    batch = cases.micro_batches(cases.make_batch(), [[0, 1, 2, 3], [4, 5, 6, 7]])
    step = take_step(trainer, batch, cases.clipped_loss, temperature=cases.TEMPERATURE, with_entropy=True)
    return step.loss, step.grad_norm


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


def read_state_of_another_optimizer(folder: Path, saved: str, model: str) -> dict:
    """Try to load a checkpoint of a run with another --optimizer."""

    def load(backend: MegatronTrainer) -> dict:
        before = backend._weight_buffers()[0].clone()
        message = _message_of(backend, folder / f"{saved}.checkpoint")
        return {"message": message, "unchanged": torch.equal(backend._weight_buffers()[0], before)}

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


def _alone(folder: Path, model: str, load: Callable[..., dict], *, backend: str = "megatron") -> dict:
    """Build a backend on one rank for `load`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _, case = megatron("alone", model, on="one")
    with BUILDERS[backend](folder / model, case) as trainer:
        record = load(trainer)
    dist.destroy_process_group()
    return record
