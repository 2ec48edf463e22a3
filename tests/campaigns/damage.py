"""Damage each file of a checkpoint in four ways: `python -m tests.campaigns.damage --size 30M`.

A flipped bit, a cut, zeros and bytes at the end must all be found before anything is loaded, and the checkpoint before is used.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from qwench.checkpoints.folders import MARKER
from qwench.checkpoints.manager import CheckpointManager
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.observability.console import QuietConsole
from tests import warm_start
from tests.campaigns.runs import Driver, remove, scratch_folder
from tests.e2e.conftest import as_flags

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        at = rng.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def truncate(path: Path, rng: random.Random) -> None:
    """Cut a part of the end off."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(rng.randrange(size))


def zero(path: Path, rng: random.Random) -> None:
    """Write zeros over up to 4096 bytes that are not all zero: what a lost write leaves."""
    content = path.read_bytes()
    starts = [at for at in range(0, len(content), 4096) if content[at : at + 4096].strip(b"\0")]
    at = rng.choice(starts)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(min(4096, len(content) - at)))


def grow(path: Path, rng: random.Random) -> None:
    """Append some bytes."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


DAMAGES: dict[str, Damage] = {"flip": flip, "truncate": truncate, "zero": zero, "grow": grow}


def make_checkpoints(folder: Path, size: str) -> Path:
    """Fine-tune a model for two steps, with a checkpoint after each, and return where they are."""
    model, data, save = folder / "model", folder / "data.jsonl", folder / "run"
    data.write_text('{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]}\n' * 4)
    made = Driver(["make-model", "--size", size, "--output", str(model), "--seed", "0"], log=folder / "log")
    flags = {"hf_checkpoint": model, "prompt_data": data, "num_rollout": 2, "rollout_batch_size": 2, "global_batch_size": 2}
    train = ["sft", *as_flags({**flags, "lr": 1e-3, "save": save, "save_interval": 1})]
    assert made.wait() == 0 and Driver(train, log=folder / "log").wait() == 0, (folder / "log").read_text()[-3000:]
    return save


def files_of(checkpoint: Path) -> list[Path]:
    """Return every file of a checkpoint."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def is_newest_whole(save: Path) -> bool:
    """Tell whether a run that resumes takes the newest of two checkpoints, and not the one before."""
    identity = json.loads((save / MARKER).read_bytes())
    manager = CheckpointManager(CheckpointConfig(load=save), identity, QuietConsole())
    assert manager.saved is not None, "one of the two is whole"
    return manager.saved.iteration == 2


def damage_all(
    save: Path, *, rng: random.Random, kinds: list[str], say: Callable[[str], None] = print
) -> tuple[int, list[str]]:
    """Damage every file in every way, one at a time; return how many cases there were, and those that were not found."""
    newest, unseen, count = save / "iter_0000002", list[str](), 0
    for path in files_of(newest):
        whole = path.read_bytes()
        for kind in kinds:
            DAMAGES[kind](path, rng)
            assert path.read_bytes() != whole, f"{kind} changed nothing in {path}"
            count += 1
            if is_newest_whole(save):
                unseen.append(f"{kind} of {path.relative_to(save)}")
            path.write_bytes(whole)
        say(f"{path.relative_to(save)} ({len(whole)} bytes): {', '.join(kinds)}")
    return count, unseen


def main(words: list[str]) -> int:
    """Run the campaign and print what was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="30M")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(words)
    warm_start.install()
    folder = scratch_folder()
    save = make_checkpoints(folder, flags.size)
    count, unseen = damage_all(save, rng=random.Random(flags.seed), kinds=list(DAMAGES))
    print(f"{count} cases, {len(unseen)} not found: {unseen}")
    remove(folder)
    return int(bool(unseen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
