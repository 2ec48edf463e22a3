"""`qwench convert`, and slime's two converters by their own flags."""

from __future__ import annotations

from collections.abc import Sequence

from qwench.config.command_line.parse import parse_flags
from qwench.config.sections.convert import ConvertConfig, HfToTorchDistConfig, TorchDistToHfConfig

# `launch.conversion` is imported late: it needs PyTorch, and help and mistakes in the flags do not wait for it.


def run(words: Sequence[str]) -> None:
    """Run `qwench convert`."""
    config = parse_flags(ConvertConfig, words, prog="qwench convert")
    from qwench.launch.conversion import convert

    convert(config)


def convert_hf_to_torch_dist(words: Sequence[str]) -> None:
    """Run `tools/convert_hf_to_torch_dist.py`, by slime's command line."""
    config = parse_flags(HfToTorchDistConfig, words, prog="convert_hf_to_torch_dist.py")
    from qwench.launch.conversion import hf_to_torch_dist

    hf_to_torch_dist(config)


def convert_torch_dist_to_hf(words: Sequence[str]) -> None:
    """Run `tools/convert_torch_dist_to_hf.py`, by slime's command line."""
    long_words = ["--force" if word == "-f" else word for word in words]
    config = parse_flags(TorchDistToHfConfig, long_words, prog="convert_torch_dist_to_hf.py")
    from qwench.launch.conversion import torch_dist_to_hf

    torch_dist_to_hf(config)
