"""Adapters by the command line: a run learns, exports what it publishes, resumes bit by bit, and refuses another adapter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwench.engines.embedded.http.adapter_routes import AdapterCheck
from qwench.launch import engines
from tests.e2e.conftest import DIGITS, InProcess, Workspace, column
from tests.fakes import cuda_stand_in
from tests.forked import Forked
from tests.verbs import run_verb_without_cuda

LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 2e-2}
RL = {**DIGITS, **LORA, "use_kl_loss": (), "kl_loss_coef": 0.01}


def _adapter(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"iter_{iteration:07d}" / "adapter_model.safetensors")


def test_a_run_of_adapters_learns_and_resumes_bit_by_bit(workspace: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert in_process(workspace.train_argv(whole, **RL, num_rollout=3, save_hf=tmp_path / "hf-{rollout_id}"))[0] == 0
    assert in_process(workspace.train_argv(parts, **RL, num_rollout=1))[0] == 0
    assert in_process(workspace.train_argv(parts, **RL, num_rollout=3))[0] == 0
    one, other = _adapter(whole, 3), _adapter(parts, 3)
    assert one.keys() == other.keys() and all(torch.equal(matrix, other[name]) for name, matrix in one.items())
    assert column(parts, "train/loss") == column(whole, "train/loss")
    assert column(whole, "train/kl_loss")[0] == 0.0  # the policy begins as the reference
    assert column(whole, "train/kl_loss")[-1] > 0.0
    # The export is the base model with the saved adapter merged.
    base, exported = load_file(workspace.model / "model.safetensors"), load_file(tmp_path / "hf-2" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (one[f"base_model.model.{name}.lora_{leaf}.weight"] for leaf in "AB")
    torch.testing.assert_close(exported[f"{name}.weight"], base[f"{name}.weight"].float() + 2.0 * b @ a, rtol=1e-5, atol=1e-6)
    assert torch.equal(exported["model.embed_tokens.weight"], base["model.embed_tokens.weight"].float())
    words = ["convert", "--input", str(whole), "--hf-checkpoint", str(workspace.model), "--output", str(tmp_path / "merged")]
    assert in_process([*words, "--to", "hf", "--dtype", "float32"])[0] == 0
    converted = load_file(tmp_path / "merged" / "model.safetensors")
    assert converted.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in converted.items())
    assert "--verify compares" in in_process([*words, "--to", "hf", "--verify"])[1]


@pytest.mark.parametrize("form", ["fp8", "nf4"])
def test_an_adapter_of_a_rounded_base_is_merged_into_the_base_as_its_run_rounded_it(
    form: str, workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    assert (
        in_process(workspace.sft_argv(tmp_path / "run", **LORA, lora_base=form, num_rollout=1, save_hf=tmp_path / "hf"))[0] == 0
    )
    words = ["convert", "--input", str(tmp_path / "run"), "--hf-checkpoint", str(workspace.model), "--to", "hf"]
    assert in_process([*words, "--dtype", "float32", "--output", str(tmp_path / "merged")])[0] == 0
    exported, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "merged"))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in merged.items())


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"lora_rank": 8}, "--lora-rank 4, this one has 8"),
        ({"lora_alpha": 3}, "the LoRA scale (--lora-alpha, --lora-rank, --use-rslora) "),
        ({"lora_base": "nf4"}, "--lora-base none, this one has 'nf4'"),
        ({"target_modules": "q_proj"}, "--target-modules 'q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj', this one"),
        ({"hf_checkpoint": "other"}, "with a base model (--hf-checkpoint) of checksum"),
        ({"hf_checkpoint": "gone"}, "/gone"),
        ({"lora_rank": None, "lora_alpha": None, "lora_dropout": None}, "--lora-rank 4, this one has none"),
    ],
)
def test_a_resumed_run_with_another_adapter_or_base_is_one_line(
    workspace: Workspace, tmp_path: Path, in_process: InProcess, change: dict[str, object], fact: str
) -> None:
    argv = workspace.sft_argv(tmp_path / "run", **LORA, num_rollout=1)
    assert in_process(argv)[0] == 0
    if "hf_checkpoint" in change:
        change = {"hf_checkpoint": tmp_path / str(change["hf_checkpoint"])}
        assert in_process(["make-model", "--size", "tiny", "--output", str(tmp_path / "other"), "--seed", "7"])[0] == 0
    code, said = in_process(workspace.sft_argv(tmp_path / "run", **{**LORA, **change}, num_rollout=2))
    assert code == 2
    assert len(said.strip().splitlines()) == 1 and fact in " ".join(said.split())


def test_an_adapter_goes_with_the_base_of_its_run_alone(
    workspace: Workspace, tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert in_process(workspace.sft_argv(tmp_path / "run", **LORA, num_rollout=1))[0] == 0
    assert in_process(["make-model", "--size", "tiny", "--output", str(tmp_path / "other"), "--seed", "7"])[0] == 0
    words = ["convert", "--input", str(tmp_path / "run"), "--to", "hf", "--output", str(tmp_path / "merged")]
    for flags, fact in (
        ([], "give the model's Hugging Face folder with --hf-checkpoint"),
        (["--hf-checkpoint", str(tmp_path / "gone")], "/gone"),
        (["--hf-checkpoint", str(tmp_path / "other")], "was trained on another base than"),
    ):
        code, said = in_process([*words, *flags])
        assert code == 2 and len(said.strip().splitlines()) == 1 and fact in said, said
        assert not (tmp_path / "merged").exists()
    other, adapter = tmp_path / "other", tmp_path / "run"
    model, output = ["--hf-checkpoint", str(workspace.model)], tmp_path / "evaluated"
    for words, fact in (
        (workspace.sft_argv(tmp_path / "next", **LORA, num_rollout=1, ref_load=adapter), "--lora-adapter-path "),
        (workspace.eval_argv(workspace.model, output, lora_rank=4, lora_adapter_path=adapter), "merge it by qwench convert"),
        (["serve", *model, "--lora", "a=/absent"], "--lora a=/absent: there is no adapter_config.json in /absent"),
    ):
        code, said = in_process(words)
        assert code == 2 and fact in " ".join(said.split()), said
    continued = workspace.sft_argv(tmp_path / "next", **LORA, num_rollout=1, lora_adapter_path=adapter, hf_checkpoint=other)
    for words in (["serve", "--hf-checkpoint", str(other), "--lora", f"a={adapter}"], continued):
        code, said = in_process(words)
        assert code == 2 and len(said.strip().splitlines()) == 1 and "was trained on another base than" in said, said
    served: list[dict[str, Path]] = []

    def note(*_: object, adapters: dict[str, Path], check_base: AdapterCheck, **__: object) -> None:
        served.append(adapters)
        check_base(adapter / "iter_0000001")  # as when a client loads it

    monkeypatch.setattr(engines, "serve_engine", note)
    code, said = in_process(["serve", "--hf-checkpoint", str(other)])
    assert code == 2 and len(said.strip().splitlines()) == 1 and "was trained on another base than" in said, said
    rounded = tmp_path / "rounded"
    assert in_process(["convert", "--input", str(workspace.model), "--to", "fp8", "--output", str(rounded)])[0] == 0
    assert in_process(["serve", "--hf-checkpoint", str(rounded), "--lora", f"a={adapter}"])[0] == 0
    assert served == [{}, {"a": adapter / "iter_0000001"}]
    code, said = in_process(["serve", "--hf-checkpoint", str(rounded), "--lora", f"a={workspace.model}"])
    assert code == 2 and f"--lora a={workspace.model}: there is no adapter_config.json" in said and len(served) == 2, said


def test_fine_tuning_goes_on_from_a_peft_folder_in_load(workspace: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    assert in_process(workspace.sft_argv(tmp_path / "first", **LORA, num_rollout=2))[0] == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((tmp_path / "first" / "iter_0000002" / name).read_bytes())
    for flag, folder in (("load", adapter), ("lora_adapter_path", tmp_path / "first")):  # a run's newest adapter
        assert in_process(workspace.sft_argv(tmp_path / flag, **LORA, num_rollout=1, **{flag: folder}))[0] == 0
    assert column(tmp_path / "load", "train/loss") == column(tmp_path / "lora_adapter_path", "train/loss")
    assert column(tmp_path / "load", "train/loss")[0] < column(tmp_path / "first", "train/loss")[0]


def test_the_change_of_full_training_becomes_an_adapter_that_merges_back(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    assert in_process(workspace.sft_argv(tmp_path / "full", num_rollout=2, save_hf=tmp_path / "tuned"))[0] == 0
    convert = ["convert", "--hf-checkpoint", str(workspace.model), "--input"]
    adapter, merged = str(tmp_path / "a"), str(tmp_path / "b")
    words = [str(tmp_path / "tuned"), "--to", "lora", "--lora-rank", "64", "--output", adapter]
    assert in_process([*convert, *words])[0] == 0
    assert in_process([*convert, adapter, "--to", "hf", "--dtype", "float32", "--output", merged])[0] == 0
    tuned, back = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "b"))
    base = load_file(workspace.model / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight"  # of 64 rows
    torch.testing.assert_close(back[name], tuned[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(back[name], base[name].float())
    code, said = in_process([*convert, str(tmp_path / "tuned"), "--to", "lora", "--output", str(tmp_path / "c")])
    assert code == 2 and "--to lora and --lora-rank go together" in said


def test_a_published_adapter_makes_the_rollouts_of_merged_weights(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    for publish in ("merged", "adapter"):
        argv = workspace.train_argv(tmp_path / publish, **RL, num_rollout=3, lora_publish=publish)
        assert in_process(argv)[0] == 0
    merged, adapter = (column(tmp_path / publish, "train/loss") for publish in ("merged", "adapter"))
    assert adapter == pytest.approx(merged, rel=1e-3, abs=1e-5)
    for publish in ("merged", "adapter"):
        # The trainer's log-probs of what the engine sampled with these weights.
        assert max(column(tmp_path / publish, "train/train_rollout_logprob_abs_diff")) < 1e-5


def test_megatron_ranks_train_the_adapter_that_one_rank_trains_and_resume(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    flags = {**RL, "lora_dropout": None}
    assert in_process(workspace.train_argv(tmp_path / "one", **flags, num_rollout=3))[0] == 0
    layout = {
        "actor_num_gpus_per_node": 2,
        "train_backend": "megatron",
        "tensor_model_parallel_size": 2,
        "sequence_parallel": (),
    }
    for num_rollout, transport in ((2, "nccl"), (3, "disk")):
        publication = {"lora_publish": "adapter", "update_weight_transport": transport}
        argv = workspace.train_argv(tmp_path / "two", **flags, **layout, **publication, num_rollout=num_rollout)
        environ = cuda_stand_in.environment(os.environ)
        ended = Forked(tmp_path / "output", run_verb_without_cuda, argv, environ=environ).end()
        assert ended.returncode == 0, ended.stderr
    for metric in ("train/loss", "train/kl_loss", "rollout/raw_reward"):
        assert column(tmp_path / "two", metric) == pytest.approx(column(tmp_path / "one", metric), rel=1e-3, abs=1e-5), metric
    one, two = _adapter(tmp_path / "one", 3), _adapter(tmp_path / "two", 3)
    assert one.keys() == two.keys()
    # Adam's first steps are near sign(gradient): rounding differs by backend.
    assert sum(float((matrix - two[name]).norm()) for name, matrix in one.items()) < 1e-2 * sum(
        float(matrix.norm()) for matrix in one.values()
    )
    changed = workspace.train_argv(tmp_path / "two", **{**flags, "lora_rank": 8}, num_rollout=4)
    code, said = in_process(changed)
    assert code == 2 and "--lora-rank 4, this one has 8" in " ".join(said.split())
