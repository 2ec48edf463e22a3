"""Loads and saves checkpoints by megatron-core's own functions, with its own model, in many layouts on four gloo ranks.

For every model that was converted to FOLDER/<model>-converted, each layout loads it, compares every parameter with the
Hugging Face checkpoint FOLDER/<model>, and some save it as FOLDER/<model>-tp<t>-pp<p>.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from transformers import PretrainedConfig

from qwench.checkpoints.formats.sources import open_weights
from qwench.config.layout import ParallelLayout
from qwench.config.sections.training import TrainingConfig
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.megatron_names import rules, to_megatron, tp_shard
from qwench.training.megatron.groups import is_first_stage, is_last_stage, join_groups
from qwench.training.megatron.model import transformer_config
from tests.contract.rank_processes import run_ranks
from tests.deadlines import patient
from tests.fakes import cuda_stand_in

WORLD_SIZE = 4
MODELS = ("tied", "untied", "biased")
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))
"""(tp, pp)."""
SAVES = (
    ("tied", (1, 1)),
    ("tied", (2, 2)),
    ("untied", (1, 4)),
    ("untied", (2, 2)),
    ("biased", (2, 1)),
)
"""Not all, because megatron-core starts processes for every save."""
_TIMEOUT_S = patient(270)


def saved_as(model: str, layout: tuple[int, int]) -> str:
    """Return the name of the checkpoint that a layout saves."""
    return f"{model}-tp{layout[0]}-pp{layout[1]}"


def load_and_save(folder: Path) -> None:
    """Run the ranks; a parameter that differs on one of them is an error."""
    run_ranks(_run_rank, [(rank, folder) for rank in range(WORLD_SIZE)], folder=folder, timeout_s=_TIMEOUT_S)


def _run_rank(rank: int, folder: Path) -> None:
    cuda_stand_in.install()
    torch.set_num_threads(1)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    for layout in LAYOUTS:
        join_groups(ParallelLayout(tp=layout[0], pp=layout[1]), timeout_s=_TIMEOUT_S)
        for model in MODELS:
            _load_and_save(folder, model, layout)
        parallel_state.destroy_model_parallel()


def _load_and_save(folder: Path, model: str, layout: tuple[int, int]) -> None:
    stage = _stage(load_hf_config(folder / model), layout)
    _load(stage, folder / f"{model}-converted" / "release")
    _compare(stage, folder / model, layout)
    if (model, layout) not in SAVES:
        return
    target = folder / saved_as(model, layout)
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": stage.sharded_state_dict()}, str(target))
    dist.barrier()


def _stage(config: PretrainedConfig, layout: tuple[int, int]) -> GPTModel:
    """Build this rank's stage of megatron-core's own model."""
    tp, pp = layout
    stage = GPTModel(
        config=transformer_config(
            architecture_of(config), ParallelLayout(tp=tp, pp=pp), TrainingConfig(), param_dtype=torch.bfloat16
        ),
        transformer_layer_spec=get_gpt_layer_local_spec(qk_layernorm=config.model_type == "qwen3", normalization="RMSNorm"),
        vocab_size=config.vocab_size + -config.vocab_size % tp,
        max_sequence_length=32,
        pre_process=is_first_stage(),
        post_process=is_last_stage(),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope",
    )
    return stage.bfloat16()  # the norms too, as in Megatron's training


def _load(stage: GPTModel, folder: Path) -> None:
    """Read everything that the model asks for, extra states included, into weights that were something else."""
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(folder))
    stage.load_state_dict(loaded["model"], strict=True)


def _compare(stage: GPTModel, hf_folder: Path, layout: tuple[int, int]) -> None:
    """Compare every parameter of the stage with the Hugging Face checkpoint, bit by bit."""
    config = load_hf_config(hf_folder)
    source = open_weights(hf_folder, architecture_of(config))
    by_name = dict(stage.named_parameters())
    first = stage.decoder.layers[0].layer_number - 1
    compared = 0
    for rule in rules(architecture_of(config)):
        local = rule.megatron_name
        if rule.layer is not None:
            local = local.replace(f"layers.{rule.layer}.", f"layers.{rule.layer - first}.", 1)
        tied_copy = "output_layer.weight" if rule.kind == "vocab" and config.tie_word_embeddings else local
        for name in {local, tied_copy} & by_name.keys():
            whole = to_megatron(rule, [source.read(hf_name) for hf_name in rule.hf_names], architecture_of(config))
            expected = tp_shard(rule, whole, parallel_state.get_tensor_model_parallel_rank(), layout[0])
            assert torch.equal(by_name[name], expected), f"{name} of {hf_folder.name} in {layout} differs"
            compared += 1
    assert compared == len(by_name), f"compared {compared} of {len(by_name)} parameters"
