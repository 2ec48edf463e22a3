"""Which checkpoint folders stay."""

from functools import partial
from pathlib import Path

import pytest

from qwench.checkpoints.formats import iterations as module
from qwench.checkpoints.formats.iterations import Iterations, number_of


def saved(root: Path, *numbers: int) -> Iterations:
    iterations = Iterations(root)
    for number in numbers:
        iterations.begin(number)
        iterations.complete(number)
    return iterations


def test_thinning_out_keeps_the_newest_and_the_multiples(tmp_path):
    iterations = saved(tmp_path, 10, 20, 30, 40, 50)
    iterations.thin_out(20)
    assert iterations.newest_first() == [50, 40, 20]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["iter_0000020", "iter_0000040", "iter_0000050"]


def test_a_folder_that_was_put_aside_comes_back_only_where_nothing_replaced_it(tmp_path):
    iterations = saved(tmp_path, 1, 2)
    for name in ("iter_0000001.replaced", "iter_0000003.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    iterations.clean()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "iter_0000001", "iter_0000002", "iter_0000003"
    ]  # fmt: skip
    assert (tmp_path / "iter_0000003" / "old").exists() and not (tmp_path / "iter_0000001" / "old").exists()


def test_pruning_keeps_the_newest(tmp_path):
    iterations = saved(tmp_path, 1, 2, 3)
    iterations.prune(2)
    assert iterations.newest_first() == [3, 2]


def test_of_a_checkpoint_that_lies_elsewhere_only_the_link_is_removed(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "large_disk"
    root.mkdir()
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("old")
    for name in ("iter_0000001", "iter_0000002", "iter_0000007.writing"):
        (root / name).symlink_to(elsewhere)
    iterations = saved(root, 2, 3)
    iterations.prune(2)
    iterations.clean()
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["iter_0000002", "iter_0000003"]
    assert not (root / "iter_0000002").is_symlink() and (elsewhere / "weights").read_text() == "old"


def test_a_checkpoint_begins_in_a_new_folder_without_what_was_begun_before(tmp_path):
    iterations = Iterations(tmp_path / "runs" / "new")
    folder = iterations.temporary(3)
    for _ in range(2):
        iterations.begin(3)
        assert list(folder.iterdir()) == []
        (folder / "half").touch()


@pytest.fixture
def acts(monkeypatch):
    """What is done to the disk, in order."""
    done = []

    def act(name, call, path, *others):
        done.append((name, path.name, *(one.name if isinstance(one, Path) else one for one in others)))
        call(path, *others)

    for name in ("fsync_tree", "rename_durably", "write_atomically", "remove"):
        monkeypatch.setattr(module, name, partial(act, name, getattr(module, name)))
    return done


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_pointer_names_it_last(tmp_path, acts):
    name, pointer = "iter_0000004", "latest_checkpointed_iteration.txt"
    saved(tmp_path, 4)
    first = [
        ("fsync_tree", f"{name}.writing"),
        ("rename_durably", f"{name}.writing", name),
        ("write_atomically", pointer, "4\n"),
        ("remove", f"{name}.replaced"),
    ]
    assert acts == first
    acts.clear()
    saved(tmp_path, 4)
    aside = [("remove", f"{name}.replaced"), ("rename_durably", name, f"{name}.replaced")]
    assert acts == [first[0], *aside, *first[1:]]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]


@pytest.mark.parametrize(
    ("thin", "gone"),
    [
        (lambda made: made.prune(2), [1, 2, 3]),
        (lambda made: made.prune(1, spared=2), [1, 3, 4]),
        (lambda made: made.thin_out(2), [1, 3]),
        (lambda made: made.thin_out(2, first=1), [2, 4]),
        (lambda made: made.thin_out(3, first=1, spared=2), [3]),
        (lambda made: made.thin_out(9), [1, 2, 3, 4]),
    ],
)
def test_the_oldest_go_first_and_are_no_checkpoints_any_more_while_they_do(tmp_path, acts, thin, gone):
    made = saved(tmp_path, 1, 2, 3, 4, 5)
    acts.clear()
    thin(made)
    names = [f"iter_000000{number}" for number in gone]
    assert acts == [
        act for name in names for act in (("rename_durably", name, f"{name}.deleting"), ("remove", f"{name}.deleting"))
    ]


def test_folders_of_seven_digits_or_more_are_checkpoints(tmp_path):
    numbers = {
        "iter_0000007": 7,
        "iter_12345678": 12345678,
        "iter_123456": None,
        "iter_0000007.deleting": None,
        "release": None,
    }
    assert {name: number_of(tmp_path / name) for name in numbers} == numbers
    made = Iterations(tmp_path / "run")
    made.clean()
    assert made.newest_first() == []
    for name in numbers:
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "iter_0000009").touch()
    assert made.newest_first() == [12345678, 7]
