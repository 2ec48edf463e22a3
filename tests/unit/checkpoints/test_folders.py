import errno
import fcntl
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwench.checkpoints.convert import RunState
from qwench.checkpoints.folders import (
    check_base,
    check_identity,
    check_load_folder,
    check_weights,
    frozen_form,
    open_save_folder,
    starting_adapter,
    starting_weights,
    teacher_weights,
)
from qwench.checkpoints.formats.sources import fingerprint
from qwench.checkpoints.manager import CheckpointManager
from qwench.checkpoints.manifest import amend_manifest, write_manifest
from qwench.config.sections.checkpoint import CheckpointConfig
from qwench.config.sections.distillation import DistillationConfig
from qwench.config.sections.lora import LoraConfig
from qwench.errors import CheckpointError, ConfigError
from qwench.files import FolderLock
from tests.fakes.console import RecordingConsole
from tests.fakes.learner import CountingLearner, CountingRollouts
from tests.unit.config.architectures import QWEN3_4B

IDENTITY = {"algorithm": "grpo", "num_layers": 2}


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_and_empty_folders_are_marked_and_accepted_again(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "deep" / "new", tmp_path / "empty"):
        config = CheckpointConfig(save=folder)
        open_save_folder(config, IDENTITY)
        open_save_folder(config, IDENTITY)
        assert sorted(path.name for path in folder.iterdir()) == ["qwench.lock", "qwench_run.json"]


def test_foreign_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--save .* not of a Qwench run \(thesis.tex\)"):
        open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(("fact", "other"), [("algorithm", "sft"), ("num_layers", 28), ("hidden_size", 64)])
def test_folder_of_another_run_is_refused_by_the_fact_that_differs(tmp_path, fact, other):
    open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    (tmp_path / "qwench.lock").unlink()
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"--save .* is of a run with {fact} .*, this one has {other!r}"):
        open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY | {fact: other})
    assert content_of(tmp_path) == before


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"--save .* cannot be written to"):
            open_save_folder(CheckpointConfig(save=folder), IDENTITY)


@pytest.mark.parametrize("marker", ["not json", "[1]"])
def test_damaged_marker_is_refused(tmp_path, marker):
    (tmp_path / "qwench_run.json").write_text(marker)
    with pytest.raises(ConfigError, match=r"--save .*: qwench_run.json"):
        open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)


def test_kill_while_the_marker_was_written_leaves_an_empty_folder(tmp_path):
    (tmp_path / "qwench_run.json.writing").write_text('{"algo')
    open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qwench.lock", "qwench_run.json"]


def test_export_over_a_model_of_the_user_is_refused_at_the_start(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    before = content_of(tmp_path)
    with pytest.raises(ConfigError, match=r"--save-hf .*base: .* was not written by an export"):
        open_save_folder(CheckpointConfig(save=tmp_path / "run", save_hf=str(base)), IDENTITY)
    assert content_of(tmp_path) == before


@pytest.mark.parametrize(
    "template",
    [
        "hf_{step}",
        "hf_{rollout_id.__class__}",
        "hf_{rollout_id}_{0}",
        "hf_{",
        "hf_{rollout_id:zz}",
        "hf_{rollout_id:>3000000000}",
        "hf_{rollout_id!r}",
    ],
)
def test_export_template_with_an_unknown_placeholder_is_refused(tmp_path, template):
    with pytest.raises(ConfigError, match=r"placeholder other than \{rollout_id\}"):
        open_save_folder(CheckpointConfig(save=tmp_path / "run", save_hf=template), IDENTITY)


def test_checkpoint_of_another_model_is_refused_by_load_before_anything_is_loaded(tmp_path):
    manager = CheckpointManager(CheckpointConfig(save=tmp_path), IDENTITY | {"num_layers": 28}, RecordingConsole())
    manager.save(1, CountingLearner(), CountingRollouts())
    with pytest.raises(ConfigError, match=r"--load .* is of a run with num_layers 28, this one has 2"):
        check_load_folder(CheckpointConfig(load=tmp_path), IDENTITY)


def test_a_checkpoint_of_another_fsdp_backend_is_refused_by_load(tmp_path):
    checkpoint = tmp_path / "iter_0000007"
    (checkpoint / "model").mkdir(parents=True)
    (checkpoint / "model" / ".metadata").write_bytes(b"")
    (checkpoint / "meta.json").write_text(json.dumps({"iteration": 7, "rollout_id": 7, "global_step": 7, "world_size": 8}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ConfigError, match=r"--load: .*iter_0000007/meta.json is not of Qwench. .* are not read"):
        check_load_folder(CheckpointConfig(load=tmp_path), IDENTITY)
    with pytest.raises(CheckpointError, match=r"meta.json is not of Qwench"):
        RunState.read(checkpoint)


@pytest.mark.parametrize("pointer", [b"\xff", b"9" * 5000])
def test_a_pointer_that_is_no_number_is_one_line_of_its_flag(tmp_path, pointer):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(pointer)
    lora = LoraConfig(lora_rank=4, lora_adapter_path=tmp_path)
    with pytest.raises(ConfigError, match=r"--lora-adapter-path .*iteration.txt says .*; it must be release or a number"):
        starting_adapter(lora)


def test_an_export_folder_of_a_later_rollout_is_checked_at_the_start(tmp_path):
    (tmp_path / "hf_12").mkdir()
    (tmp_path / "hf_12" / "notes.txt").write_text("mine")
    (tmp_path / "hf_last").mkdir()
    (tmp_path / "hf_last" / "notes.txt").write_text("no rollout is called so")
    config = CheckpointConfig(save=tmp_path / "run", save_hf=str(tmp_path / "hf_{rollout_id}"))
    with pytest.raises(ConfigError, match=r"--save-hf .*hf_12 exists and was not written by an export"):
        open_save_folder(config, IDENTITY)


def test_a_lock_that_the_file_system_has_not_is_no_other_process(tmp_path, monkeypatch):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(OSError, match="No locks available"):
        FolderLock(tmp_path, flag="--save")
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_lock_whose_owner_is_not_written_yet_is_another_process(tmp_path, monkeypatch):
    def refuse(descriptor: int, how: int) -> None:
        raise BlockingIOError(errno.EWOULDBLOCK, "")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(ConfigError, match=r"^--save .* is in use by another process; give another folder, or end it first\.$"):
        FolderLock(tmp_path, flag="--save")
    with pytest.raises(ConfigError, match=r"^--save-hf hf is in use by another process"):
        FolderLock(tmp_path, flag="--save-hf", shown="hf")


HOLDS_THE_LOCK = """
import sys, time
from pathlib import Path
from qwench.files import FolderLock
lock = FolderLock(Path(sys.argv[1]), flag="--save")
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_process_writes_to_is_refused_and_free_after_its_kill(tmp_path):
    folder = tmp_path / "run"
    open_save_folder(CheckpointConfig(save=folder), IDENTITY).release()
    (folder / "iter_0000001.writing").mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"--save .* is in use by process {other.pid} on .+ since \d{{4}}-"):
            open_save_folder(CheckpointConfig(save=folder), IDENTITY)
        assert (folder / "iter_0000001.writing").is_dir(), "what the other run writes is not touched"
    finally:
        other.kill()
        other.wait()
    open_save_folder(CheckpointConfig(save=folder), IDENTITY)
    assert not (folder / "iter_0000001.writing").exists()


@pytest.mark.parametrize("damage", ["gone", "rubbish"])
def test_a_folder_without_its_marker_is_known_by_its_checkpoints(tmp_path, damage):
    config = CheckpointConfig(save=tmp_path)
    CheckpointManager(config, IDENTITY, RecordingConsole()).save(1, CountingLearner(), CountingRollouts())
    marker = tmp_path / "qwench_run.json"
    marker.unlink() if damage == "gone" else marker.write_text("rub")
    with pytest.raises(ConfigError, match="is of a run with num_layers 2, this one has 3"):
        open_save_folder(config, IDENTITY | {"num_layers": 3})
    open_save_folder(config, IDENTITY)
    assert json.loads(marker.read_text()) == IDENTITY


@pytest.mark.parametrize("step", [3, 4])
def test_the_folder_and_the_step_that_a_model_starts_from_are_those_of_its_flags(tmp_path, step):
    written = tmp_path / "iter_0000003" / "model"
    written.mkdir(parents=True)
    (written / ".metadata").write_bytes(b"")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    distillation = DistillationConfig(use_opd=True, opd_type="megatron", opd_teacher_load=tmp_path, opd_teacher_ckpt_step=step)
    started = CheckpointConfig(ref_load=tmp_path, ref_ckpt_step=step)
    for flag, find in (
        ("--ref-load", partial(starting_weights, started)),
        ("--opd-teacher-load", partial(teacher_weights, distillation)),
    ):
        if step == 3:
            assert find() == tmp_path / "iter_0000003"
            continue
        with pytest.raises(ConfigError, match=f"^{flag}.* has no checkpoint of iteration 4; it has"):
            find()
    assert starting_weights(CheckpointConfig()) is None
    assert starting_adapter(LoraConfig(lora_rank=4)) is None
    assert starting_adapter(LoraConfig(lora_rank=4, lora_adapter_path=tmp_path)) == tmp_path / "iter_0000003"
    gone = replace(distillation, opd_teacher_load=tmp_path / "gone")
    with pytest.raises(ConfigError, match=f"^--opd-teacher-load: there is no folder {tmp_path}/gone"):
        teacher_weights(gone)


@pytest.mark.parametrize("flag", ["--ref-load", "--load", "--lora-adapter-path", "--hf-checkpoint"])
def test_weights_that_cannot_be_read_are_named_by_their_flag(tmp_path, flag):
    (tmp_path / "config.json").write_text("{}")
    config = CheckpointConfig(ref_load=tmp_path if flag == "--ref-load" else None, load=tmp_path if flag == "--load" else None)
    lora = LoraConfig(lora_rank=4, lora_adapter_path=tmp_path) if flag == "--lora-adapter-path" else None
    hf_checkpoint = tmp_path if flag == "--hf-checkpoint" else None
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        check_weights(config, QWEN3_4B, hf_checkpoint, lora=lora)


@pytest.mark.parametrize(
    ("fact", "name"),
    [
        ("lora_rank", "--lora-rank"),
        ("lora_scale", r"the LoRA scale \(--lora-alpha, --lora-rank, --use-rslora\)"),
        ("lora_init", "--lora-init"),
        ("lora_base", "--lora-base"),
        ("target_modules", "--target-modules"),
        ("base_weights", r"a base model \(--hf-checkpoint\) of checksum"),
        ("num_layers", "num_layers"),
    ],
)
def test_a_fact_that_differs_is_named_by_its_flag(fact, name):
    check_identity({fact: 1}, {fact: 1}, what="here")
    with pytest.raises(ConfigError, match=f"^here is of a run with {name} 1, this one has 'x'; give another folder"):
        check_identity({fact: 1}, {fact: "x"}, what="here")
    with pytest.raises(ConfigError, match=f"with {name} none, this one has 1;"):
        check_identity({}, {fact: 1}, what="here")


def test_adapters_or_none_are_named_before_other_facts_and_their_base_last():
    facts = {"lora_rank": "--lora-rank", "algorithm": "algorithm", "num_layers": "num_layers", "base_weights": "a base model"}
    left = dict.fromkeys(reversed(facts), 1)
    for fact, name in facts.items():
        with pytest.raises(ConfigError, match=f"^here is of a run with {name}"):
            check_identity(left, {}, what="here")
        del left[fact]


@pytest.mark.parametrize(("base", "form"), [("fp8", "fp8"), ("nf4", "nf4"), ("auto", None), (None, None)])
def test_an_adapter_of_a_run_says_its_base_and_its_form(tmp_path, base, form):
    assert frozen_form(tmp_path) is None, "no run wrote it"
    weights = SimpleNamespace(specs={"a.k_proj.weight": None}, read=lambda name: torch.ones(2))
    check_base(tmp_path, Path("base"), weights)
    identity = {"base_weights": fingerprint(weights)} | ({} if base is None else {"lora_base": base})
    write_manifest(tmp_path, {"identity": identity})
    assert frozen_form(tmp_path) == form
    check_base(tmp_path, Path("base"), weights)
    weights.read = lambda name: torch.zeros(2)
    with pytest.raises(ConfigError, match=f"^{tmp_path} was trained on another base than base; give the base of the run"):
        check_base(tmp_path, Path("base"), weights)
    amend_manifest(tmp_path, {"identity": {}})
    check_base(tmp_path, Path("base"), weights)


def test_a_marker_is_written_for_people_and_once(tmp_path):
    open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    marker = tmp_path / "qwench_run.json"
    assert marker.read_text() == json.dumps(IDENTITY, indent=1) + "\n"
    written = marker.stat().st_ino
    open_save_folder(CheckpointConfig(save=tmp_path), IDENTITY)
    assert marker.stat().st_ino == written
    (tmp_path / "other").mkdir()
    for name in "cadb":
        (tmp_path / "other" / name).touch()
    with pytest.raises(ConfigError, match=r"not of a Qwench run \(a, b, c\)"):
        open_save_folder(CheckpointConfig(save=tmp_path / "other"), IDENTITY)
