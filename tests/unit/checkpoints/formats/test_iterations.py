"""Which checkpoint folders stay."""

from pathlib import Path

from qwench.checkpoints.formats.iterations import Iterations


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
