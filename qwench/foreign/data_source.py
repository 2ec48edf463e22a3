"""Data sources of slime and miles: classes that hand out the prompts of a run.

--data-source-path   class (args): get_samples(n), add_samples(groups), save(rollout_id), load(rollout_id), __len__

The run asks for groups as it asks its own `PromptSource`, numbers them itself, and calls save and load with its checkpoints.
"""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qwench.data.chat import tokenize
from qwench.errors import CheckpointError, ConfigError, QwenchError
from qwench.foreign.loading import load
from qwench.foreign.sample import Foreign, Sample, leaves
from qwench.foreign.translate import from_foreign
from qwench.plugins import check_signature, guarded
from qwench.samples import Group, Json

FLAG = "--data-source-path"
_METHODS = ("get_samples", "add_samples", "save", "load", "__len__")


class ForeignSource:
    """A data source of the user as the source of groups of a run."""

    def __init__(
        self,
        path: str,
        args: Namespace,
        *,
        tokenizer: PreTrainedTokenizerBase,
        n_samples_per_prompt: int,
    ) -> None:
        """Make the user's source.

        Raises:
            ConfigError: it cannot be loaded, or lacks a method.
            QwenchError: its constructor raises.
        """
        self._args, self._tokenizer, self._group_size = args, tokenizer, n_samples_per_prompt
        make = guarded(check_data_source(path), path=path, flag=FLAG)
        self.source: Foreign = make(args)
        self._call = {name: guarded(getattr(self.source, name), path=path, flag=FLAG) for name in _METHODS}
        self._num_groups = self._num_samples = 0
        self._restored_id: int | None = None

    def next_groups(self, n: int) -> list[Group]:
        """Return the next `n` groups; the run numbers them.

        Raises:
            QwenchError: the source gives another number of groups or samples.
        """
        if not n:
            return []
        given = [list(leaves(group)) for group in self._call["get_samples"](n)]
        sizes = {len(group) for group in given}
        if len(given) != n or sizes != {self._group_size}:
            raise QwenchError(
                f"{FLAG} gave {len(given)} groups of {sorted(sizes)} samples for {n} groups of {self._group_size} "
                "(--n-samples-per-prompt)."
            )
        return [self._group(group) for group in given]

    def num_rollouts_per_epoch(self, rollout_batch_size: int) -> int:
        """Return how many whole rollouts an epoch holds; at least 1."""
        return max(1, int(self._call["__len__"]()) // rollout_batch_size)

    def resume_from(self, folder: Path) -> None:
        """Name the folder of --save or --load that has the checkpoint: the source reads its state there."""
        self._args.load = str(folder)

    def state_dict(self, *, last_rollout_id: int | None = None) -> dict[str, Json]:
        """Call save of the source, and return what finds it again."""
        saved = self._restored_id if last_rollout_id is None else last_rollout_id
        if saved is not None:
            self._call["save"](saved)
        return {"saved_by_source": saved, "num_groups": self._num_groups, "num_samples": self._num_samples}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Call load of the source with the rollout that was saved.

        Raises:
            CheckpointError: the checkpoint is of a run that read its prompts itself.
        """
        if "saved_by_source" not in state:
            raise CheckpointError(f"the checkpoint is of a run without {FLAG}; it says nothing to the data source.")
        self._num_groups, self._num_samples = state["num_groups"], state["num_samples"]
        self._restored_id = state["saved_by_source"]
        if self._restored_id is not None:
            self._call["load"](self._restored_id)

    def _group(self, facades: list[Sample]) -> Group:
        samples = []
        for facade in facades:
            if not facade.tokens:
                text = facade.prompt if isinstance(facade.prompt, str) else json.dumps(facade.prompt, ensure_ascii=False)
                facade.tokens = list(tokenize(self._tokenizer, [text])[0])
            if not facade.tokens:
                raise QwenchError(f"{FLAG} gave a sample without a prompt: {facade.prompt!r:.200}.")
            made = from_foreign(facade, like=None, tokenizer=self._tokenizer)
            number = self._num_samples
            samples.append(replace(made, sample_id=number, execution_id=number, group_id=self._num_groups))
            self._num_samples += 1
        self._num_groups += 1
        return Group(group_id=samples[0].group_id, samples=samples)


def check_data_source(path: str) -> Foreign:
    """Load the class and check that it has the methods of a data source.

    Raises:
        ConfigError: it cannot be loaded, or is no such class.
    """
    made = load(path, flag=FLAG)
    if not inspect.isclass(made):
        raise ConfigError(f"{FLAG} {path!r} is no class.")
    check_signature(made, path, flag=FLAG, called_as="cls(args)", num_arguments=1)
    if missing := [name for name in _METHODS if not callable(getattr(made, name, None))]:
        raise ConfigError(f"{FLAG} {path!r} has no {', '.join(missing)}; a data source has {', '.join(_METHODS)}.")
    return made
