"""Megatron's torch_dist checkpoints: what they hold beside tensors, and their tensors under Hugging Face names.

    .metadata, __*.distcp   torch.distributed.checkpoint; all layers of one weight are one tensor [num_layers, ...]
    metadata.json           the format's name and version
    common.pt               what is not a tensor; megatron-core 0.16 wants the file, 0.19 reads it but writes common_state

    decoder.layers.mlp.linear_fc2.weight                            weights, see `models/megatron_names.py`
    optimizer.state.param.decoder.layers.mlp.linear_fc2.weight      float32 masters; `fp32_param` of the plain optimizer
    optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight    moments
    decoder.layers.mlp.linear_fc2._extra_state/shard_3_28           of Transformer Engine's layer 3 of 28; None without FP8

Source: megatron-core 0.16, `dist_checkpointing/` and `optimizer/distrib_optimizer.py` (fully_reshardable).
"""

from __future__ import annotations

import io
import json
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwench import __version__
from qwench.checkpoints.formats.dcp_reader import DcpFolder, load_data
from qwench.checkpoints.formats.dcp_writer import DcpWriter
from qwench.errors import CheckpointError, ConfigError
from qwench.models.architecture import Architecture
from qwench.models.hf_weights import check_nothing_more, differing_head
from qwench.models.megatron_names import WeightRule, rules, to_hf
from qwench.models.safetensors_files import TensorSpec
from qwench.models.tensor_parts import HostMemory, Part

CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Of the distributed optimizer, which we write, and of the plain mixed-precision optimizer."""
MOMENTUM_PREFIX = "optimizer.state.momentum."
"""Of --optimizer muon; megatron-core does not know it."""
MOMENT_PREFIXES: Mapping[str, str] = {"exp_avg": "optimizer.state.exp_avg.", "exp_avg_sq": "optimizer.state.exp_avg_sq."}
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_STACKED = "decoder.layers."
_HEAD = "output_layer.weight"
_EMBEDDING = "embedding.word_embeddings.weight"
_MODEL_PARTS = ("decoder.", "embedding.", "output_layer.", "mtp.")
_EXTRA = "._extra_state"


class _Held(threading.local):
    """Hugging Face tensors that were read and not asked for yet, of each thread its own."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}


class TorchDistWeights:
    """The weights, or with `prefix` the optimizer's tensors of one kind, under Hugging Face names."""

    def __init__(self, folder: DcpFolder, model: Architecture, *, prefix: str = "") -> None:
        """Find the tensor of every rule.

        Raises:
            ConfigError: a tensor is missing, of another shape, or of no use to the model.
        """
        self._folder, self._model = folder, model
        self._shapes = model.parameter_shapes()
        self._places: dict[str, tuple[WeightRule, str, int | None]] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.bundles: list[tuple[str, ...]] = []
        for rule in rules(model):
            key, layer = self._find(rule, prefix)
            self.bundles.append(rule.hf_names)
            for name in rule.hf_names:
                self._places[name] = (rule, key, layer)
                self.specs[name] = TensorSpec(shape=self._shapes[name], dtype=folder.tensors[key].dtype)
        self._check_num_layers(prefix)
        self._check_nothing_more(prefix)
        self._held = _Held()

    def read(self, name: str) -> Tensor:
        """See `WeightSource`; the parts of one Megatron tensor are read together and kept until another is asked for."""
        rule, key, layer = self._places[name]
        held = self._held
        if name not in held.parts:
            held.parts = {}  # not two Megatron tensors at a time
            held.parts = to_hf(rule, self._folder.read(key, layer=layer), self._model)
        return held.parts.pop(name)

    def read_part(self, name: str, part: Part, memory: HostMemory) -> Tensor:
        """See `PartReader`; the whole is read, into new memory."""
        return part.of(self.read(name))

    def _find(self, rule: WeightRule, prefix: str) -> tuple[str, int | None]:
        """Return key and index of a tensor: in that of all layers, or on its own, as non-homogeneous layers are written."""
        own = f"{_STACKED}{rule.layer}.{rule.checkpoint_key.removeprefix(_STACKED)}"
        for key, layer in ((prefix + rule.checkpoint_key, rule.layer), (prefix + own, None)):
            if key in self._folder.tensors:
                self._check_shape(rule, key, layer)
                return key, layer
        raise ConfigError(
            f"{self._folder.folder} lacks {prefix}{rule.checkpoint_key} for {rule.hf_names[0]}; "
            "is it of the model whose config.json is used?"
        )

    def _check_shape(self, rule: WeightRule, key: str, layer: int | None) -> None:
        stored = self._folder.tensors[key].shape
        found = stored if layer is None else stored[1:]
        parts = [self._shapes[name] for name in rule.hf_names]
        expected = (sum(part[0] for part in parts), *parts[0][1:])
        padded = rule.kind == "vocab" and len(found) == len(expected) and found[0] >= expected[0]
        if found[1:] != expected[1:] or (found[0] != expected[0] and not padded):
            raise ConfigError(
                f"{self._folder.folder} holds {key} in the shape {list(stored)}, but by config.json it is {list(expected)}"
                f"{'' if layer is None else ' for each layer'}; it is of another model."
            )

    def _check_num_layers(self, prefix: str) -> None:
        """Find layers that config.json does not know; too few would have been missed by `_find` only for own keys."""
        expected = self._model.num_layers
        stacked = {key for _, key, layer in self._places.values() if layer is not None}
        wrong = [key for key in sorted(stacked) if self._folder.tensors[key].shape[0] != expected]
        more = f"{prefix}{_STACKED}{expected}.mlp.linear_fc2.weight"
        if wrong or more in self._folder.tensors:
            number = self._folder.tensors[wrong[0]].shape[0] if wrong else f"more than {expected}"
            raise ConfigError(f"{self._folder.folder} has {number} layers, but config.json describes {expected}.")

    def _check_nothing_more(self, prefix: str) -> None:
        """Refuse tensors of the model that no rule reads; a tied head that equals the embedding is none."""
        read = {key for _, key, _ in self._places.values()}
        parts = tuple(prefix + part for part in _MODEL_PARTS)
        extra = {key for key in self._folder.tensors if key.startswith(parts) and key not in read and _EXTRA not in key}
        if self._model.tied_head and not prefix and _HEAD in extra:
            if not torch.equal(self._folder.read(_HEAD), self._folder.read(_EMBEDDING)):
                raise ConfigError(differing_head(self._folder.folder))
            extra.remove(_HEAD)
        check_nothing_more(extra, self._folder.folder)


def holds(folder: DcpFolder, prefix: str) -> bool:
    """Tell whether the folder has tensors of a kind."""
    return any(key.startswith(prefix) for key in folder.tensors)


def read_num_steps(folder: DcpFolder) -> int | None:
    """Return the optimizer steps done; None: there is no optimizer in the checkpoint.

    Raises:
        CheckpointError: its optimizer is stored in a way that depends on the layout it was saved from.
    """
    if not any(key.startswith("optimizer.") for key in [*folder.tensors, *folder.objects]):
        return None
    found = set(_find_steps(_read_common(folder)))
    if len(found) != 1 or not all(holds(folder, prefix) for prefix in MOMENT_PREFIXES.values()):
        raise CheckpointError(
            f"{folder.folder} stores its optimizer in a form that cannot be read in another layout; save it with Megatron's "
            "--dist-ckpt-optim-fully-reshardable, or go without it (--no-load-optim)."
        )
    return found.pop()


def write_common_files(
    folder: Path,
    *,
    num_steps: int | None,
    iteration: int = 0,
    groups: Sequence[Mapping[str, object]] = ({},),
    model: Architecture | None = None,
) -> None:
    """Write what lies beside the tensors, as Megatron-LM does; weights that start a run are of iteration 0.

    Args:
        num_steps: Of the optimizer, if its state is in the checkpoint.
        groups: Constants of the optimizer's parameter groups, by which megatron-core finds its own again.
        model: For the scripts of Megatron-LM, which want its shape; megatron-core does without.
    """
    common: dict[str, object] = {"checkpoint_version": 3.0, "iteration": iteration, "qwench_version": __version__}
    if model is not None:
        common["args"] = megatron_args(model)
    if num_steps is not None:
        common["optimizer"] = {
            "optimizer": {"param_groups": [{**group, "step": num_steps} for group in groups]},
            "param_state_sharding_type": "fully_reshardable",
        }
    torch.save(common, folder / COMMON_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_CONFIG), encoding="utf-8")


def megatron_args(model: Architecture) -> Namespace:
    """Return what Megatron-LM looks up, and compares with its own flags, in the `args` of a checkpoint."""
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        untie_embeddings_and_output_weights=not model.tied_head,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        no_save_optim=True,
        no_save_rng=True,
    )


def write_extra_states(writer: DcpWriter, model: Architecture) -> None:
    """Write the entries that a model of Transformer Engine's or Megatron's own layers asks for at load; all are empty."""
    # Megatron stores a list, with one element for each part of the object that a rank holds.
    for key in extra_states(model):
        writer.add_object(key, [None])


def extra_states(model: Architecture) -> Iterator[str]:
    """Return the keys of the entries that modules ask for beside their tensors."""
    layers = model.num_layers
    modules = ["self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if model.qk_norm else []
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    for module in modules:
        for layer in range(layers):
            yield f"{_STACKED}{module}._extra_state/shard_{layer}_{layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


def _read_common(stored: DcpFolder) -> object:
    """Read what is no tensor: from common.pt, or where megatron-core 0.19 writes it, among the tensors."""
    folder = stored.folder
    try:
        with torch.serialization.safe_globals([Namespace]):
            if not (folder / COMMON_FILE).is_file() and _COMMON_OBJECT in stored.objects:
                return load_data(io.BytesIO(stored.read_object(_COMMON_OBJECT)))
            return load_data(folder / COMMON_FILE)
    except (ValueError, CheckpointError) as error:
        raise CheckpointError(
            f"{folder / COMMON_FILE} cannot be read ({error}), so the optimizer's step is not known; "
            "go without the optimizer (--no-load-optim)."
        ) from error


def _find_steps(content: Any) -> Iterator[int]:  # what Megatron nests is nowhere specified
    """Return every step count of an optimizer in nested dictionaries and lists."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("step", "common_step") and isinstance(value, int | float | Tensor):
                yield int(value)
            else:
                yield from _find_steps(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _find_steps(value)
