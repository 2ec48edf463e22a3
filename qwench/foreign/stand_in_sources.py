"""Stand-ins for the data sources of slime and miles, which classes of users extend."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qwench.data.prompts import load_prompts
from qwench.errors import CheckpointError
from qwench.foreign.sample import Foreign, Sample
from qwench.models.hf import load_tokenizer


class DataSource(ABC):
    """Base class of classes that hand out prompts."""

    @abstractmethod
    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """Return groups of pending samples."""

    @abstractmethod
    def add_samples(self, samples: list[list[Sample]]) -> None:
        """Keep groups for a later rollout."""

    @abstractmethod
    def save(self, rollout_id: int) -> None:
        """Write the position after a rollout."""

    @abstractmethod
    def load(self, rollout_id: int | None = None) -> None:
        """Go to the position after a rollout."""


@dataclass
class Dataset:
    """The samples of a data set in the order of an epoch."""

    origin_samples: list[Sample]
    seed: int
    samples: list[Sample]

    def shuffle(self, new_epoch_id: int) -> None:
        """Put the samples in the order of an epoch."""
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + new_epoch_id).shuffle(order)
        self.samples = [self.origin_samples[position] for position in order]

    def __len__(self) -> int:
        return len(self.samples)


class RolloutDataSource(DataSource):
    """Hands out the rows of --prompt-data, epoch after epoch; classes of users extend it."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.epoch_id = self.sample_group_index = self.sample_index = self.sample_offset = 0
        self.metadata: dict[str, Foreign] = {}
        reads = args.rollout_global_dataset and args.prompt_data is not None
        self.dataset = _read_dataset(args) if reads else None
        if self.dataset is not None and args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """Return the next groups."""
        groups = []
        for _ in range(num_samples):
            prompt, group = self._next(), []
            for _ in range(self.args.n_samples_per_prompt):
                sample = copy.deepcopy(prompt)
                sample.group_index, sample.index = self.sample_group_index, self.sample_index
                self.sample_index += 1
                group.append(sample)
            self.sample_group_index += 1
            groups.append(group)
        return groups

    def add_samples(self, samples: list[list[Sample]]) -> None:
        """Refuse groups: this source only reads."""
        raise RuntimeError(f"{type(self).__name__} takes no samples; extend RolloutDataSourceWithBuffer")

    def save(self, rollout_id: int) -> None:
        """Write the position below --save."""
        if not self.args.rollout_global_dataset:
            return
        names = ("sample_offset", "epoch_id", "sample_group_index", "sample_index", "metadata")
        file = _state_file(self.args.save, rollout_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name) for name in names}, file)

    def load(self, rollout_id: int | None = None) -> None:
        """Read the position below --load of a run that goes on.

        Raises:
            CheckpointError: it is missing.
        """
        if not self.args.rollout_global_dataset or self.args.load is None:
            return
        file = _state_file(self.args.load, rollout_id)
        if not file.is_file():
            raise CheckpointError(
                f"{file}, the position of --data-source-path, is missing; copy it there from the folder that the run saved to."
            )
        self.__dict__.update(torch.load(file))
        if self.dataset is not None and self.args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)

    def _next(self) -> Sample:
        if self.dataset is None:
            return Sample()
        if self.sample_offset == len(self.dataset):
            self.epoch_id, self.sample_offset = self.epoch_id + 1, 0
            if self.args.rollout_shuffle:
                self.dataset.shuffle(self.epoch_id)
        self.sample_offset += 1
        return self.dataset.samples[self.sample_offset - 1]


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """Hands out groups that were given back before those of the data set."""

    def __init__(self, args: Namespace) -> None:
        super().__init__(args)
        self.buffer: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        """Return the next groups."""
        kept, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        return [*kept, *super().get_samples(num_samples - len(kept))]

    def add_samples(self, samples: list[list[Sample]]) -> None:
        """Keep groups."""
        self.buffer += samples

    def get_buffer_length(self) -> int:
        """Return how many groups were given back."""
        return len(self.buffer)

    def update_metadata(self, metadata: Mapping[str, Foreign]) -> None:
        """Keep what a function wants to find again."""
        self.metadata.update(metadata)

    def get_metadata(self) -> dict[str, Foreign]:
        """Return what was kept."""
        return self.metadata


def _read_dataset(args: Namespace) -> Dataset:
    """Read --prompt-data as the flags say."""
    template = args.chat_template_path
    loaded = load_prompts(
        args.prompt_data,
        input_key=args.input_key,
        label_key=args.label_key,
        metadata_key=args.metadata_key,
        tool_key=args.tool_key,
        tokenizer=load_tokenizer(Path(args.hf_checkpoint), chat_template=template and Path(template)),
        apply_chat_template=args.apply_chat_template,
        apply_chat_template_kwargs=args.apply_chat_template_kwargs,
        max_prompt_len=args.rollout_max_prompt_len,
        as_given=not args.apply_chat_template,
    )
    samples = [
        Sample(
            prompt=prompt.text if args.apply_chat_template else prompt.messages,  # type: ignore[arg-type]  # of any JSON type
            label=prompt.label,
            metadata=dict(prompt.metadata),
        )
        for prompt in loaded.prompts
    ]
    return Dataset(origin_samples=samples, seed=args.rollout_seed, samples=list(samples))


def _state_file(folder: str, rollout_id: int | None) -> Path:
    return Path(folder) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
