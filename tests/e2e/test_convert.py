"""`qwench convert` and the scripts of slime's recipes as a user runs them: alone, on two ranks, and wrongly."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import DIGITS, Workspace, column, read_metrics
from tests.forked import Finished, Forked, fork_qwench, fork_script, ranks_environ
from tests.verbs import run_verb

MODEL_ARGS = shlex.split("""
--swiglu --num-layers 4 --hidden-size 128 --ffn-hidden-size 512 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --use-rotary-position-embeddings --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6
--rotary-base 1000000 --kv-channels 32 --qk-layernorm
""")
HF_TO_DIST, DIST_TO_HF = "tools/convert_hf_to_torch_dist.py", "tools/convert_torch_dist_to_hf.py"


def by_two_ranks(folder: Path, start: Callable[..., Forked], words: Sequence[object]) -> Finished:
    """Run in two processes that torchrun could have started; return what came of the first."""
    ranks = [start(folder / environ["RANK"], [*map(str, words)], environ=environ) for environ in ranks_environ(2)]
    first, second = (rank.end() for rank in ranks)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    return first


@pytest.fixture
def hf(workspace: Workspace) -> Path:
    return workspace.model


def test_the_scripts_of_the_recipes_take_a_model_there_and_back(hf: Path, tmp_path: Path) -> None:
    save, back = tmp_path / "torch_dist", tmp_path / "back"
    by_two_ranks(tmp_path / "there", fork_script, [HF_TO_DIST, *MODEL_ARGS, "--hf-checkpoint", hf, "--save", save])
    assert sorted(path.name for path in (save / "release").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    words = [DIST_TO_HF, "--input-dir", str(save / "release"), "--output-dir", str(back), "--origin-hf-dir", str(hf)]
    assert fork_script(tmp_path / "back_again", words).end().returncode == 0
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert fork_script(tmp_path / "over_it", [*words, "-f"]).end().returncode == 0


def test_two_processes_write_shards_and_logits_agree(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharded"
    words = ["convert", "--input", hf, "--output", out, "--to", "hf", "--max-shard-gb", "0.001", "--verify"]
    result = by_two_ranks(tmp_path / "ranks", fork_qwench, words)
    assert "checksum" in result.stdout and "verified" in result.stdout
    assert "it/s" not in result.stderr
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    original = load_file(hf / "model.safetensors")
    assert weight_map.keys() == original.keys()
    for file in set(weight_map.values()):
        for name, tensor in load_file(out / file).items():
            assert torch.equal(tensor, original[name])


@pytest.mark.parametrize("flag", ["ref_load", "load"])
def test_a_run_starts_from_what_was_converted(workspace: Workspace, tmp_path: Path, flag: str) -> None:
    """Equal metrics mean equal weights: all draws depend on the seed and the weights only."""
    other, converted = tmp_path / "other", tmp_path / "converted"
    run_verb(["make-model", "--size", "tiny", "--output", str(other), "--seed", "1"])
    run_verb(["convert", "--input", str(workspace.model), "--output", str(converted), "--to", "torch_dist"])
    folders = [tmp_path / name for name in ("plain", "from_converted", "from_other")]
    starts = [{}, {"hf_checkpoint": other, flag: converted}, {"hf_checkpoint": other}]
    for folder, start in zip(folders, starts, strict=True):
        run_verb(workspace.train_argv(folder, **DIGITS, num_rollout=1, **start))
    plain, from_converted, from_other = map(read_metrics, folders)
    assert plain == from_converted != from_other


def test_a_run_goes_on_from_its_converted_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    """Optimizer, random numbers and place in the data go along: the second rollout is that of a run that never stopped."""
    whole, begun, converted, resumed = (tmp_path / name for name in ("whole", "begun", "converted", "resumed"))
    run_verb(workspace.train_argv(whole, **DIGITS, num_rollout=2))
    run_verb(workspace.train_argv(begun, **DIGITS, num_rollout=1))
    hf = ["--hf-checkpoint", str(workspace.model)]
    run_verb(["convert", "--input", str(begun), "--output", str(converted), "--to", "torch_dist", *hf])
    run_verb(workspace.train_argv(resumed, **DIGITS, num_rollout=2, load=converted))
    for name in ("train/loss", "train/grad_norm", "rollout/raw_reward"):
        both, second = column(whole, name), column(resumed, name)
        assert second == both[len(both) // 2 :]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-layers", "5"], "--num-layers (5) contradicts the checkpoint's config.json (4)"),
        (["--num-layer", "4"], "unknown flag --num-layer"),
    ],
)
def test_wrong_model_args_are_one_line(hf: Path, tmp_path: Path, words: list[str], message: str) -> None:
    output = tmp_path / "out"
    command = [HF_TO_DIST, *words, "--hf-checkpoint", str(hf), "--save", str(output)]
    result = fork_script(tmp_path / "said", command).end()
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not output.exists()
