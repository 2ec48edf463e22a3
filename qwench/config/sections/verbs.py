"""Settings of the verbs that do not train: serve, reward check, make-model, quickstart, download, doctor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qwench.config.limits import MAX_PORT, check_positive
from qwench.config.sections.engine import EngineConfig
from qwench.config.sections.model import ModelConfig
from qwench.config.sections.reward import RewardConfig
from qwench.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where the server listens."""

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine only. 0.0.0.0: all machines."""
    port: int = 30000
    """Port to listen on."""
    num_gpus: int = 1
    """GPUs that hold the model together, a part on each (tensor parallelism); on a CPU, processes."""
    deterministic_mode: bool = False
    """Give a response the same bits in every run: compute one response at a time, without the prefix cache. Much slower."""
    wait_for_weights: bool = False
    """Load no weights: a publication brings them. Requests before it are refused. Training runs start their servers so."""
    lora: tuple[str, ...] = ()
    """LoRA adapters to serve beside the model, as NAME=FOLDER of PEFT, or of a run, whose newest adapter is taken. A
    request names one by `lora_path`, on OpenAI's paths by `model`."""

    def __post_init__(self) -> None:
        check_positive("--port", self.port)
        check_positive("--num-gpus", self.num_gpus)
        if self.num_gpus > 1 and (self.deterministic_mode or self.lora):
            flag = "--deterministic-mode" if self.deterministic_mode else "--lora"
            raise ConfigError(f"{flag} needs an engine of one GPU, got --num-gpus {self.num_gpus}")
        if self.port > MAX_PORT:
            raise ConfigError(f"--port must be at most {MAX_PORT}, got {self.port}")
        if any(not all(one.partition("=")) for one in self.lora) or len(self.adapters) < len(self.lora):
            raise ConfigError(f"--lora takes NAME=FOLDER, each name once; got {' '.join(self.lora)}")

    @property
    def adapters(self) -> dict[str, Path]:
        """Return the folders of --lora by their names."""
        return {name: Path(folder) for name, _, folder in (one.partition("=") for one in self.lora)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Flags of `qwench serve`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Columns of a file of responses."""

    response_key: str = "response"
    """Column of the response."""
    label_key: str = "label"
    """Column of the answer."""
    line: int | None = None
    """Show this line of the file in full, with its verdict. None: count the reasons of all lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCheckConfig:
    """Flags of `qwench reward check`."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeModelConfig:
    """The checkpoint with random weights that `qwench make-model` writes."""

    output: Path
    """Folder to write. Must be new or empty."""
    size: str = "tiny"
    """Size of the model: tiny, 30M, 60M, or a Qwen3 size: 0.6B, 1.7B, 4B, 4B-Instruct-2507, 8B, 14B, 32B."""
    tokenizer: Literal["tiny", "qwen"] = "tiny"
    """Tokenizer. tiny: about 270 tokens. qwen: Qwen3's own, from a tiktoken file."""
    qwen_tiktoken: Path | None = None
    """Tiktoken file of --tokenizer qwen. None: the file in the package dashscope."""
    seed: int = 0
    """Seed of the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartConfig:
    """Where `qwench quickstart` works."""

    output: Path = Path("runs/quickstart")
    """Folder for data, checkpoints and curves. A tour that was interrupted goes on there."""
    seed: int = 0
    """Seed of data, weights and training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownloadConfig:
    """The repositories that `qwench download` fetches, and their folder."""

    output: Path
    """Parent folder; each repository gets a subfolder with its name. Use as MODEL_DIR or DATA_DIR of the recipes."""
    kind: Literal["model", "dataset"] = "model"
    """Kind of the repositories."""
    revision: str | None = None
    """Branch, tag or commit. None: the newest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """The folder that `qwench doctor` checks besides the machine."""

    output: Path = Path("runs")
    """Folder of future runs, whose disk is checked."""


def split_names(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the names out of `NAME ... --flag ...`."""
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return list(words[:first_flag]), list(words[first_flag:])


def split_file(words: Sequence[str]) -> tuple[Path, list[str]]:
    """Take the file out of `FILE --flag ...`; a call for help gets a path that is never read.

    Raises:
        ConfigError: no file is given in front of the flags.
    """
    if words and not words[0].startswith("-"):
        return Path(words[0]), list(words[1:])
    if {"-h", "--help", "--help-all"} & set(words):
        return Path(), list(words)
    raise ConfigError("a file is missing; usage: qwench reward check FILE --rm-type NAME")
