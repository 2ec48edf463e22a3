"""A learner whose whole state is one number, saved as real files, and rollouts that only count."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from qwench.samples import Json
from qwench.wire.portions import WeightBucket


class CountingLearner:
    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.loaded: list[str] = []

    def save(self, folder: Path, *, with_optimizer: bool = True) -> None:
        assert not any(folder.iterdir()), "a learner is given an empty folder"
        for part in ("model", "optimizer", "lr_scheduler")[: 3 if with_optimizer else 1]:
            (folder / part).mkdir()
            (folder / part / "__0_0.distcp").write_bytes(f"{self.value}\n".encode() * 100)
        (folder / "rng.pt").write_bytes(b"rng")

    def load(self, folder: Path, *, weights_only: bool = False, with_rng: bool = True) -> None:
        self.value = int((folder / "model" / "__0_0.distcp").read_text().splitlines()[0])
        self.loaded = ["model"]
        if not weights_only:
            self.loaded += ["optimizer"] + ["rng"] * with_rng

    def weights(self, *, bucket_bytes: int, part: str = "merged") -> Iterator[WeightBucket]:
        yield [("value", torch.tensor([self.value]))]


class CountingRollouts:
    def __init__(self, taken: int = 0) -> None:
        self.taken = taken

    def state_dict(self) -> dict[str, Json]:
        return {"taken": self.taken, "partial": [{"tokens": [1, 2], "log_prob": 0.1 + 0.2}]}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        assert state["partial"] == [{"tokens": [1, 2], "log_prob": 0.1 + 0.2}]
        self.taken = state["taken"]
