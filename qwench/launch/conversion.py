"""One conversion of a checkpoint, alone or shared by the ranks of torchrun."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qwench.checkpoints.convert import Conversion, Converted, Converter, Ranks, check_output
from qwench.checkpoints.extract import extract_adapter
from qwench.checkpoints.folders import frozen_form
from qwench.checkpoints.formats.sources import find_checkpoint, find_format, open_weights
from qwench.config.model_flags import check_model_flags
from qwench.config.sections.convert import ConvertConfig, HfToTorchDistConfig, TorchDistToHfConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.files import written
from qwench.models.hf import architecture_of, load_hf_config, load_model, load_tokenizer, model_of
from qwench.models.peft import is_adapter
from qwench.observability.console import Console, QuietConsole, open_console
from qwench.training.process_group import init_process_group, leave_process_group

_COLLECTIVE_TIMEOUT_S = 3600.0
"""The slowest rank may write its share long after the fastest."""
_DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def convert(config: ConvertConfig) -> None:
    """Convert as the flags of `qwench convert` say.

    Raises:
        ConfigError: the flags do not suit the checkpoint.
        CheckpointError: the output cannot be written, or with --verify computes other logits.
    """
    if not config.input.is_dir():
        raise ConfigError(f"--input: there is no folder {config.input}")
    source = find_checkpoint(config.input, step=config.ckpt_step, flag="--input")
    hf_folder = config.hf_checkpoint or source
    if not (hf_folder / "config.json").is_file():
        raise ConfigError(f"{hf_folder} has no config.json; give the model's Hugging Face folder with --hf-checkpoint.")
    if config.to == "lora":
        _extract(config, source, hf_folder)
        return
    if config.verify and is_adapter(source):
        raise ConfigError("--verify compares the logits of two whole models, but --input is an adapter; leave it out.")
    conversion = Conversion(
        source=source,
        output=config.output,
        to=config.to,
        hf_folder=hf_folder,
        config=load_hf_config(hf_folder),
        dtype=None if config.dtype is None else _DTYPES[config.dtype],
        with_optimizer=not config.weights_only,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )
    _run(conversion, verify=config.verify)


def _extract(config: ConvertConfig, source: Path, base: Path) -> None:
    """Write the change from one model to another as an adapter, and say how much of it the rank holds."""
    assert config.lora_rank is not None, "the section requires it"
    if source == base:
        raise ConfigError("--to lora compares --input with its base model; give that with --hf-checkpoint.")
    check_output(config.output, replace=False, nbytes=0)
    model = architecture_of(load_hf_config(base))
    with written(f"the output {config.output}", config.output):
        extracted = extract_adapter(source, base, model, rank=config.lora_rank, output=config.output)
    open_console().say(
        f"wrote {config.output}: an adapter of rank {config.lora_rank} with {extracted.kept:.2%} of the squared change of the "
        f"projections; {extracted.num_other} other weights differ from the base and are left out"
    )


def hf_to_torch_dist(config: HfToTorchDistConfig) -> None:
    """Convert as slime's `convert_hf_to_torch_dist.py` does."""
    folder = config.files.hf_checkpoint
    hf_config = load_hf_config(folder)
    check_model_flags(config.architecture, architecture_of(hf_config))
    _run(Conversion(source=folder, output=config.files.save, to="torch_dist", hf_folder=folder, config=hf_config))


def torch_dist_to_hf(config: TorchDistToHfConfig) -> None:
    """Convert as slime's `convert_torch_dist_to_hf.py` does."""
    hf_config = load_hf_config(config.origin_hf_dir)
    if config.vocab_size not in (None, hf_config.vocab_size):
        raise ConfigError(
            f"--vocab-size ({config.vocab_size}) contradicts config.json ({hf_config.vocab_size}); correct or remove the flag."
        )
    conversion = Conversion(
        source=find_checkpoint(config.input_dir, flag="--input-dir"),
        output=config.output_dir,
        to="hf",
        hf_folder=config.origin_hf_dir,
        config=hf_config,
        max_shard_bytes=config.chunk_size,
        replace=config.force,
    )
    _run(conversion)


def _run(conversion: Conversion, *, verify: bool = False) -> None:
    """Convert on all ranks, and say on the main rank what was done and how fast."""
    ranks = _join_ranks()
    console = open_console() if ranks.rank == 0 else QuietConsole()
    try:
        converter = Converter(conversion)
    except CheckpointError as error:  # a damaged source, found before any work
        raise ConfigError(str(error)) from error
    if verify:
        load_tokenizer(conversion.hf_folder)  # its absence is the user's mistake, so it is found before the work
    began = time.perf_counter()
    title, total = f"{conversion.source} -> {conversion.output} (MB)", _megabytes(2 * converter.nbytes)
    with console.progress(title, total=total) as bar, written(f"the output {conversion.output}", conversion.output):
        converted = converter.run(ranks, _in_megabytes(bar.advance, ranks.size))
    peaks = ranks.gather_typed(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    _report(console, conversion, converted, seconds=time.perf_counter() - began, peaks=peaks)
    if verify and ranks.rank == 0:
        _verify(console, conversion, converter.weight_dtype)
    ranks.barrier()
    leave_process_group()


def _join_ranks() -> Ranks:
    """Join the other ranks of torchrun, if there are any."""
    if "RANK" not in os.environ:
        return Ranks()
    init_process_group(torch.device("cpu"), environ=os.environ, timeout_s=_COLLECTIVE_TIMEOUT_S)

    def gather(value: object) -> Sequence[object]:
        values: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    return Ranks(rank=dist.get_rank(), size=dist.get_world_size(), gather=gather)


def _in_megabytes(advance: Callable[[int], None], num_ranks: int) -> Callable[[int], None]:
    """Return a function that is told bytes of one rank, and advances the bar of all, which are about equally fast."""
    seen = 0

    def add(nbytes: int) -> None:
        nonlocal seen
        before, seen = _megabytes(seen), seen + nbytes * num_ranks
        advance(_megabytes(seen) - before)

    return add


def _megabytes(nbytes: int) -> int:
    return nbytes // 10**6


def _report(console: Console, conversion: Conversion, converted: Converted, *, seconds: float, peaks: Sequence[int]) -> None:
    optimizer = ", with the optimizer's state" if converted.with_optimizer else ""
    form = frozen_form(conversion.source) if is_adapter(conversion.source) else None
    base = f", over the base rounded to {form} as in its run" if form else ""
    console.say(
        f"wrote {conversion.output} ({conversion.to}{base}{optimizer}): {converted.num_tensors} tensors, "
        f"{converted.nbytes / 1e9:.2f} GB in {seconds:.1f} s ({converted.nbytes / 1e9 / seconds:.2f} GB/s); every tensor was "
        f"read back and has the checksum it was written with; peak memory {max(peaks) / 1e9:.2f} GB per process"
    )


def _verify(console: Console, conversion: Conversion, dtype: torch.dtype) -> None:
    """Compare logits.

    Raises:
        CheckpointError: they differ.
    """
    transformers_logging.disable_progress_bar()
    output = find_checkpoint(conversion.output)
    difference = largest_logit_difference(conversion.source, output, hf_folder=conversion.hf_folder, dtype=dtype)
    if difference != 0.0:
        raise CheckpointError(
            f"the logits of {conversion.source} and {output} differ by up to {difference:g}; do not use the latter."
        )
    console.say("verified: Hugging Face's model computes the same logits, bit by bit, with what was read and what was written")


PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Question: What is 12 + 30?\nAnswer:")


@torch.no_grad()
def largest_logit_difference(folder: Path, other: Path, *, hf_folder: Path, dtype: torch.dtype) -> float:
    """Return the largest difference of a logit over `PROMPTS` in Hugging Face's model; infinite where one is not a number.

    Both checkpoints go into one model, one after the other, so memory is that of one model in `dtype`.
    transformers loads a Hugging Face folder by itself. Only the other checkpoint is read by `sources`.

    Args:
        hf_folder: Has config.json and tokenizer.
    """
    if find_format(folder) != "hf" and find_format(other) == "hf":
        folder, other = other, folder
    tokenizer = load_tokenizer(hf_folder)
    model = _load(folder, hf_folder=hf_folder, dtype=dtype)
    first = _logits(model, tokenizer)
    _fill(model, other, hf_folder=hf_folder)
    differences = [(a.float() - b.float()).abs().max() for a, b in zip(first, _logits(model, tokenizer), strict=True)]
    return float(torch.stack(differences).nan_to_num(nan=float("inf")).max())


def _load(folder: Path, *, hf_folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    if find_format(folder) == "hf":
        return load_model(folder, dtype=dtype)
    config = load_hf_config(hf_folder)
    source = open_weights(folder, architecture_of(config))
    return model_of(config, {name: source.read(name) for name in source.specs}, dtype=dtype)


def _fill(model: nn.Module, folder: Path, *, hf_folder: Path) -> None:
    source = open_weights(folder, architecture_of(load_hf_config(hf_folder)))
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name))


def _logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    return [model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits for prompt in PROMPTS]
