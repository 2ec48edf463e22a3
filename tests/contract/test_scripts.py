"""The recipes under scripts/: the command line each expands to, and that it says what slime's recipes say."""

import json
import os
import re
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qwench.cli import main
from qwench.config.command_line.argv import split_words
from qwench.config.command_line.parse import parse_run
from qwench.config.model_flags import check_model_flags
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.hf import architecture_of, load_hf_config
from qwench.models.random_qwen3 import find_size
from tests.contract.recipes import RUN_QWEN3_4B, RUN_QWEN3_4B_BASE_SFT, RUN_QWEN3_32B
from tests.deadlines import patient

SCRIPTS = Path(__file__).parents[2] / "scripts"
STORED = Path(__file__).parent / "argv"
RUNS = sorted(SCRIPTS.rglob("run-*.sh"))
MODELS = sorted((SCRIPTS / "models").glob("*.sh"))

_SAY_ARGUMENTS = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose `qwench` prints its arguments, one on a line."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "qwench").write_text(_SAY_ARGUMENTS)
    (folder / "qwench").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders that scripts read, with what is looked at before anything is loaded."""
    models, data, tokenizer = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data"), build_small_tokenizer()
    for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B"):
        config = find_size(size).to_config(vocab_size=151936)
        for suffix in ("", "-Base", "-FP8"):
            config.save_pretrained(models / f"Qwen3-{size}{suffix}")
            tokenizer.save_pretrained(models / f"Qwen3-{size}{suffix}")
            (models / f"Qwen3-{size}{suffix}_torch_dist").mkdir()
    question = [{"role": "user", "content": "1+1=?"}]
    for file in ("dapo-math-17k/dapo-math-17k.jsonl", "aime-2024/aime-2024.jsonl"):
        (data / file).parent.mkdir(exist_ok=True)
        (data / file).write_text(json.dumps({"prompt": question, "label": "2"}) + "\n")
    conversation = [*question, {"role": "assistant", "content": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": conversation}]), data / "openhermes2_5.parquet")
    return {"MODEL_DIR": str(models), "DATA_DIR": str(data), "OUTPUT_DIR": str(tmp_path_factory.mktemp("runs"))}


def expand(script: Path, stage: Path, *more: str, **environment: str) -> list[str]:
    """Return the words after `qwench` that the script comes to."""
    environment = {"MODEL_DIR": "/models", "DATA_DIR": "/data", "OUTPUT_DIR": "/runs", **environment}
    path = {"PATH": f"{stage}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, *more], env={**path, **environment}, capture_output=True, text=True, timeout=patient(60)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def flags(words: list[str]) -> dict[str, tuple[str, ...]]:
    """Return what is said of each flag, apart from the places of files."""
    return {flag.name: tuple(re.sub(r"^/.*/", "", value) for value in flag.values) for flag in split_words(words)}


def test_every_recipe_that_users_look_for_is_there():
    sizes = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
    wanted = {f"models/qwen3-{size}.sh" for size in (*sizes, "4B-Instruct-2507")} | {f"run-qwen3-{size}.sh" for size in sizes}
    wanted |= {"run-qwen3-4B_4xgpu.sh", "run-qwen3-4B-fsdp.sh", "run-qwen3-0.6B-fsdp.sh", "run-qwen3-4B-base-sft.sh"}
    wanted |= {"run-qwen3-8B-lora-1gpu.sh", "run-qwen3-4B-lora-24gb.sh", "run-qwen3-32B-lora.sh"}
    wanted |= {"low_precision/run-qwen3-4B-fp8.sh", "amd/run-qwen3-4B-amd.sh"}
    assert wanted == {str(path.relative_to(SCRIPTS)) for path in [*RUNS, *MODELS]}


@pytest.mark.parametrize("script", RUNS, ids=[path.stem for path in RUNS])
def test_a_script_expands_to_the_stored_command_line(script: Path, stage: Path):
    assert expand(script, stage) == (STORED / f"{script.stem}.txt").read_text(encoding="ascii").splitlines()


@pytest.mark.parametrize("script", RUNS, ids=[path.stem for path in RUNS])
def test_a_script_passes_its_dry_run(script: Path, stage: Path, world: dict[str, str], capsys: pytest.CaptureFixture[str]):
    alone = script.stem in ("run-qwen3-8B-lora-1gpu", "run-qwen3-4B-lora-24gb")
    verb, *words = expand(script, stage, "--dry-run", **world)
    with pytest.raises(SystemExit) as ended:
        main([verb, *words])
    assert ended.value.code == 0
    shown = capsys.readouterr()
    # SGLang, Megatron and the attention of these scripts run on GPUs alone, so the plan is theirs on every machine.
    assert "GiB in float32" not in shown.out and "share this CPU" not in shown.err
    config = parse_run(verb, words)
    check_model_flags(config.architecture, architecture_of(load_hf_config(config.model.hf_checkpoint)))
    assert config.cluster.world_size == (4 if "4xgpu" in script.name else 1 if alone else 8)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--hf-checkpoint", "{MODEL_DIR}/Qwen3-8B"), "--hidden-size"),
        (("--norm-epsilon", "1e-5"), "--norm-epsilon"),
        (("--tensor-model-parallel-size", "16", "--actor-num-nodes", "2"), "--tensor-model-parallel-size"),
    ],
    ids=["another model", "norm", "layout"],
)
def test_a_dry_run_finds_what_does_not_fit_the_model(
    more: tuple[str, ...], words: str, stage: Path, world: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    verb, *argv = expand(SCRIPTS / "run-qwen3-4B.sh", stage, *(word.format(**world) for word in more), "--dry-run", **world)
    with pytest.raises(SystemExit) as ended:
        main([verb, *argv])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("script", RUNS, ids=[path.stem for path in RUNS])
def test_flags_after_the_script_win(script: Path, stage: Path):
    assert expand(script, stage, "--num-rollout", "3", "--dry-run")[-3:] == ["--num-rollout", "3", "--dry-run"]


@pytest.mark.parametrize(
    ("name", "theirs", "ours_alone"),
    [
        ("run-qwen3-4B", RUN_QWEN3_4B, {"train-backend", "rollout-engine"}),
        ("run-qwen3-32B", RUN_QWEN3_32B, {"train-backend", "rollout-engine"}),
        # fine-tuning of theirs asks for sequence parallelism at TP1, where it has no effect
        ("run-qwen3-4B-base-sft", RUN_QWEN3_4B_BASE_SFT, {"train-backend"}),
    ],
)
def test_a_recipe_of_slime_says_the_same_here(name: str, theirs: list[str], ours_alone: set[str], stage: Path):
    ours, expected = flags(expand(SCRIPTS / f"{name}.sh", stage)[1:]), flags(theirs)
    for checkpoint in ("load", "save"):
        assert ours.pop(checkpoint) != expected.pop(checkpoint)
    assert ours.keys() - expected.keys() == ours_alone
    assert expected.keys() - ours.keys() <= {"sequence-parallel"}
    assert {flag: values for flag, values in ours.items() if flag in expected} == {
        flag: expected[flag] for flag in ours if flag in expected
    }


def test_amd_counts_the_visible_gpus(stage: Path):
    script = SCRIPTS / "amd" / "run-qwen3-4B-amd.sh"
    seen = [
        flags(expand(script, stage, **environment)[1:])["actor-num-gpus-per-node"]
        for environment in (
            {"HIP_VISIBLE_DEVICES": "0,1,2,3"},
            {"CUDA_VISIBLE_DEVICES": "4,5"},
            {"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
            {"NUM_GPUS": "6"},
            {},
        )
    ]
    assert seen == [("4",), ("2",), ("2",), ("6",), ("8",)]


def test_instruct_2507_differs_from_4b_in_its_rotary_base():
    def arguments(name: str) -> list[str]:
        command = f'source {SCRIPTS}/models/{name}.sh; printf "%s\\n" "${{MODEL_ARGS[@]}}"'
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=patient(60)
        ).stdout.split()

    plain, instruct = arguments("qwen3-4B"), arguments("qwen3-4B-Instruct-2507")
    assert [(a, b) for a, b in zip(plain, instruct, strict=True) if a != b] == [("1000000", "5000000")]


def test_a_script_without_its_folders_says_which_is_missing():
    done = subprocess.run(
        ["bash", SCRIPTS / "run-qwen3-4B.sh"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "MODEL_DIR: set it to the folder of the checkpoints" in done.stderr


def test_a_recipe_s_benchmark_has_no_table_of_a_dry_run(stage: Path, world: dict[str, str]):
    recipe = SCRIPTS.parent / "benchmarks" / "multi_gpu" / "recipe.sh"
    shown = expand(recipe, stage, "4B", "run-qwen3-4B_4xgpu.sh", "--dry-run", **world, PROMPTS="p.jsonl")
    assert shown[0] == "train" and shown[-1] == "--dry-run"


def test_no_script_ends_a_process():
    for script in SCRIPTS.rglob("*.sh"):
        assert not re.search(r"\b(pkill|kill|killall|ray stop)\b", script.read_text(encoding="ascii")), script
