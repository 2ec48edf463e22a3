import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from qwench.errors import ConfigError
from qwench.hub import Reference, as_pattern, choose_files, find_reference
from tests.deadlines import patient
from tests.fakes.hub import COMMIT, serve_hub

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: [socratic/train-*]
---
# A data set
"""
GSM8K = [
    "README.md",
    "main/test-00000-of-00001.parquet",
    "main/train-00000-of-00002.parquet",
    "main/train-00001-of-00002.parquet",
    "socratic/train-00000-of-00001.parquet",
]


def ask(address, home, code, **environ):
    """Run code in a process of its own, as the hub's client reads its variables when it is imported."""
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    words = [sys.executable, "-c", f"from pathlib import Path\nfrom qwench import hub\n{code}"]
    return subprocess.run(
        words, env={**os.environ, **variables, **environ}, capture_output=True, text=True, timeout=patient(120)
    )


@pytest.mark.parametrize(
    ("spec", "kind", "reference"),
    [
        ("Qwen/Qwen3-0.6B", "model", Reference(repository="Qwen/Qwen3-0.6B", revision=None, part=None, rows="")),
        ("Qwen/Qwen3-0.6B@v1.0", "model", Reference(repository="Qwen/Qwen3-0.6B", revision="v1.0", part=None, rows="")),
        ("a/b@refs/pr/1", "model", Reference(repository="a/b", revision="refs/pr/1", part=None, rows="")),
        ("Qwen3-0.6B", "model", None),
        ("./Qwen/Qwen3", "model", None),
        ("/models/Qwen3", "model", None),
        ("a/b/c", "model", None),
        ("a/b:train", "model", None),
        ("../b", "model", None),
        ("a/b:test", "dataset", Reference(repository="a/b", revision=None, part="test", rows="")),
        ("a/b@main:c/test@[:9]", "dataset", Reference(repository="a/b", revision="main", part="c/test", rows="@[:9]")),
        ("a/b@[-200:]", "dataset", Reference(repository="a/b", revision=None, part=None, rows="@[-200:]")),
        ("data/train.jsonl", "dataset", None),
        ("data/train.jsonl@[:9]", "dataset", None),
        ("data/*.jsonl", "dataset", None),
        ("data/train.txt", "dataset", Reference(repository="data/train.txt", revision=None, part=None, rows="")),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_path(spec, kind, reference):
    assert find_reference(spec, kind) == reference


def test_what_this_machine_has_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Qwen/Qwen3-0.6B").mkdir(parents=True)
    assert find_reference("Qwen/Qwen3-0.6B", "model") is None
    assert find_reference("Qwen/Qwen3-0.6B@[:3]", "dataset") is None


@pytest.mark.parametrize(
    ("names", "part", "card", "chosen"),
    [
        (GSM8K, "main/test", CARD, GSM8K[1:2]),
        (GSM8K, "main/train", CARD, GSM8K[2:4]),
        (GSM8K, "test", CARD, GSM8K[1:2]),
        (GSM8K, "socratic/train", CARD, GSM8K[4:]),
        (GSM8K, "socratic/train", "", GSM8K[4:]),
        (GSM8K, GSM8K[1], "", GSM8K[1:2]),
        (GSM8K, None, CARD.replace("config_name: main", "config_name: main\n  default: true"), GSM8K[2:4]),
        (["dapo-math-17k.jsonl", "README.md"], None, "", ["dapo-math-17k.jsonl"]),
        (["data/train.parquet", "data/validation.parquet"], None, "", ["data/train.parquet"]),
        (["data/train.parquet", "data/validation.parquet"], "validation", "", ["data/validation.parquet"]),
        (["train/a.csv", "test/a.csv", "dataset_infos.json"], None, "no card", ["train/a.csv"]),
        (["validation/a.csv", "train/a.csv"], "validation", "", ["validation/a.csv"]),
        (["x/y/test.csv", "x/z/test.csv"], "x/y/test", "", ["x/y/test.csv"]),
        (["test.csv"], None, "", ["test.csv"]),
        (["b.csv", "a.csv"], "train", "", ["a.csv", "b.csv"]),
        *((["x-dev.csv", f"my-{word}.csv"], word, "", [f"my-{word}.csv"]) for word in ("train", "test", "valid", "val")),
        (["x-dev.csv", "my-test.csv"], "dev", "", ["x-dev.csv"]),
        *(
            (["a.csv", "b.csv", "c.csv"], part, f"---\nconfigs: [{{{name}data_files: {files}}}]\n---\n", chosen)
            for name, part in (("config_name: d, ", "d/train"), ("", "default/train"))
            for files, chosen in (("a*", ["a.csv"]), ("[c.csv, a.csv]", ["a.csv", "c.csv"]))
        ),
    ],
)
def test_a_split_is_found_by_the_card_or_by_names(names, part, card, chosen):
    assert choose_files(names, part, card, where="w") == chosen


@pytest.mark.parametrize(
    ("names", "part", "said"),
    [
        (GSM8K, None, "w has main/train, main/test, socratic/train; name one of them or a file, as OWNER/NAME:main/train"),
        (GSM8K, "train", "w has main/train, main/test, socratic/train; name one"),
        (GSM8K, "dev", "name one of them or a file, as OWNER/NAME:main/train, not 'dev'"),
        (
            ["data/test.csv", "data/validation.csv"],
            "dev",
            "w has test, validation; name one of them or a file, as OWNER/NAME:test",
        ),
        (["README.md", "data.arrow"], None, "w has no file of .jsonl, .parquet, .json, .csv"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_what_there_is(names, part, said):
    with pytest.raises(ConfigError) as caught:
        choose_files(names, part, CARD, where="w")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "configs", ["[main]", "[{data_files: 3}]", "[{data_files: [{split: train}]}]", "[{data_files: [{split: a, path: 3}]}]"]
)
def test_a_card_whose_configs_are_none_is_one_line_and_a_file_can_be_named(configs):
    card = f"---\nconfigs: {configs}\n---\n"
    with pytest.raises(ConfigError, match=r"w has a card \(README\.md\) whose `configs` are not lists of data files"):
        choose_files(GSM8K, "train", card, where="w")
    assert choose_files(GSM8K, GSM8K[1], card, where="w") == GSM8K[1:2]


def test_a_card_with_a_date_that_is_none_leaves_the_splits_to_the_names():
    assert choose_files(GSM8K, "socratic/train", "---\ndate: 2024-13-45\n---\n", where="w") == GSM8K[4:]


def test_a_split_of_two_configurations_is_not_chosen():
    with pytest.raises(ConfigError) as caught:
        choose_files(["a/test.csv", "b/test.csv"], "test", "", where="w")
    assert str(caught.value) == "w has a/test, b/test; name one of them or a file, as OWNER/NAME:a/test"


def test_several_files_are_one_pattern(tmp_path):
    assert as_pattern(["a/one.csv"], tmp_path) == "a/one.csv"
    for name in ("a/train-0-of-2.parquet", "a/train-1-of-2.parquet", "a/test-0-of-1.parquet", "a/train-x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert as_pattern(["a/train-1-of-2.parquet", "a/train-0-of-2.parquet"], tmp_path) == "a/train-*.parquet"
    with pytest.raises(ConfigError, match="2 files without a common pattern"):
        as_pattern(["a/test-0-of-1.parquet", "a/train-0-of-2.parquet"], tmp_path)


def test_a_model_is_downloaded_into_the_cache_once_and_a_dry_run_leaves_its_weights(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"old"}
    code = "print(hub.model_folder(Path('Qwen/Tiny'), flag='--hf-checkpoint', with_weights={}))"
    with serve_hub("Qwen/Tiny", files) as (address, fetched):
        done = ask(address, tmp_path, code.format(False))
        assert done.returncode == 0, done.stderr
        assert fetched == ["config.json"]
        for _ in range(2):
            done = ask(address, tmp_path, code.format(True))
        assert sorted(fetched) == ["config.json", "model.safetensors"]
    folder = tmp_path / "hub" / "models--Qwen--Tiny" / "snapshots" / COMMIT
    assert done.stdout.strip() == str(folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    offline = ask("http://127.0.0.1:9", tmp_path, code.format(True), HF_HUB_OFFLINE="1")
    assert offline.stdout.strip() == str(folder), offline.stderr


def test_a_data_set_is_downloaded_by_split_with_its_rows_and_read_offline_afterwards(tmp_path):
    rows = {f"main/train-0000{i}-of-00002.jsonl": json.dumps({"q": i}).encode() for i in (0, 1)}
    files = {"README.md": CARD.encode() + b"caf\xe9", **rows, "main/test-00000-of-00001.jsonl": b'{"q": 7}'}
    code = "print(hub.data_files('a/b:main/train@[:9]', flag='--prompt-data'))"
    with serve_hub("a/b", files, kind="dataset") as (address, fetched):
        done = ask(address, tmp_path, code)
        assert done.returncode == 0, done.stderr
    assert sorted(fetched) == ["README.md", *rows]
    folder = tmp_path / "hub" / "datasets--a--b" / "snapshots" / COMMIT
    assert done.stdout.strip() == f"{folder}/main/train-0000*.jsonl@[:9]"
    for environ in ({"HF_HUB_OFFLINE": "1"}, {}):
        assert ask("http://127.0.0.1:9", tmp_path, code, **environ).stdout == done.stdout


def test_a_hub_that_hangs_up_is_asked_for_a_data_set_once(tmp_path):
    calls = []

    def hang_up() -> None:
        with suppress(OSError):
            while True:
                calls.append(listener.accept()[0].close())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=hang_up, daemon=True).start()
        done = ask(f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path, "hub.data_files('a/b', flag='--prompt-data')")
        listener.shutdown(socket.SHUT_RDWR)
    assert "the Hugging Face hub did not give a dataset of that name" in done.stderr
    assert len(calls) == 1


@pytest.mark.parametrize("environ", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_the_error_is_one_sentence(tmp_path, environ):
    code = (
        "for ask in (\n"
        "    lambda: hub.model_folder(Path('Qwen/Tiny'), flag='--hf-checkpoint'),\n"
        "    lambda: hub.data_files('a/b', flag='--prompt-data'),\n"
        "):\n"
        "    try:\n"
        "        ask()\n"
        "    except hub.ConfigError as error:\n"
        "        print(error)"
    )
    model, rows = ask("http://127.0.0.1:9", tmp_path, code, **environ).stdout.splitlines()
    for said, begin in (
        (model, "--hf-checkpoint: there is no folder Qwen/Tiny, and the"),
        (rows, "--prompt-data: there is no file or folder a/b, and the"),
    ):
        assert said.startswith(f"{begin} Hugging Face hub did not give a ")
        assert said.endswith("check the name, the network (HF_ENDPOINT: a mirror), and HF_TOKEN for gated ones.")


def test_a_full_disk_of_the_cache_is_one_sentence_with_its_room(tmp_path):
    code = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    hub.model_folder(Path('Qwen/Tiny'), flag='--hf-checkpoint')\n"
        "except hub.ConfigError as error:\n"
        "    print(error)"
    )
    with serve_hub("Qwen/Tiny", {"config.json": b"{}", "model.safetensors": bytes(100_000)}) as (address, _):
        said = ask(address, tmp_path, code).stdout
    assert said.startswith(f"--hf-checkpoint: Qwen/Tiny cannot be kept in {tmp_path / 'hub'} (File too large; ")
    assert said.endswith("free); make room there, or set HF_HOME to a folder of another disk.\n")


def test_a_name_that_the_hub_does_not_have_is_said(tmp_path):
    with serve_hub("Qwen/Tiny", {"config.json": b"{}"}) as (address, _):
        done = ask(address, tmp_path, "hub.model_folder(Path('Qwen/Typo'), flag='--ref-load')")
    assert "--ref-load: there is no folder Qwen/Typo, and the Hugging Face hub did not give" in done.stderr
