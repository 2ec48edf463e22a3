"""Which weights score in the place of the policy's: past ones, those without adapters, or another model's."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from qwench.training.reference import BaseModel, FrozenTeacher, Reference


class Policy:
    """Says with which weights it computes."""

    def __init__(self):
        self.weights, self.calls = "own", []

    @contextmanager
    def holding(self, weights):
        before, self.weights = self.weights, weights
        try:
            yield
        finally:
            self.weights = before

    def forward(self, micro_batches, *, temperature, with_entropy):
        return self.weights, micro_batches, temperature, with_entropy

    def copy_held_weights(self):
        copied = f"copy of {self.weights}"
        return type("Copy", (), {"swapped_in": lambda copy: self.holding(copied)})()

    def without_adapters(self):
        return self.holding(f"{self.weights} without adapters")

    def copy_for_frozen(self, folder):
        return type("Other", (), {"swapped_in": lambda other: self.holding(f"those of {folder}")})()

    def save_held_weights(self, folder):
        self.calls.append(("save", folder, self.weights))

    def load(self, folder, *, weights_only):
        self.calls.append(("load", folder, weights_only))
        self.weights = "read"


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (Reference, "copy of own"),
        (BaseModel, "own without adapters"),
        (lambda policy: FrozenTeacher(policy, Path("teacher")), "those of teacher without adapters"),
    ],
)
def test_other_weights_score_and_the_policys_are_held_again(make, weights):
    policy = Policy()
    scorer = make(policy)
    assert scorer.forward(["batch"], temperature=0.5, with_entropy=True) == (weights, ["batch"], 0.5, True)
    assert scorer.forward(["batch"], temperature=0.5) == (weights, ["batch"], 0.5, False)
    assert policy.weights == "own"


def test_a_reference_is_saved_read_and_moved():
    policy = Policy()
    reference = Reference(policy)
    policy.weights = "later"
    reference.save(Path("a"))
    reference.update()
    assert reference.forward([], temperature=1.0)[0] == "copy of later"
    reference.load(Path("a"))
    assert policy.calls == [("save", Path("a"), "copy of own"), ("load", Path("a"), True)]
    assert reference.forward([], temperature=1.0)[0] == "copy of read"
