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


def test_pruning_keeps_the_newest(tmp_path):
    iterations = saved(tmp_path, 1, 2, 3)
    iterations.prune(2)
    assert iterations.newest_first() == [3, 2]
