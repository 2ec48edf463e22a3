"""What `--dry-run` says to lists of launch lines of slime and miles, by hand.

    python -m tests.contract.migration_lists FOLDER [NAME ...]

FOLDER holds `index.json` (name -> program, wanted verdict, flags that a refusal must name), an argv in `NAME.json` for each
entry, and the settings files of the lists in `files/`. Models, data and user functions that the lists name are made: a model
is config.json and a tokenizer without weights. Each list goes through a whole dry run in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from transformers import PretrainedConfig, Qwen2Config

from qwench.commands import train
from qwench.commands.train import SCRIPT_DEFAULTS
from qwench.errors import ConfigError
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import find_size

QWEN3 = {
    "Qwen3-0.6B": "0.6B", "Qwen3-1.7B": "1.7B", "Qwen3-4B": "4B", "Qwen3-4B-Base": "4B", "Qwen3-4B-FP8": "4B",
    "Qwen3-4B-Instruct-2507": "4B-Instruct-2507", "Qwen3-8B": "8B", "Qwen3-8B-Base": "8B", "Qwen3-14B": "14B",
    "Qwen3-32B": "32B", "qwen3-4b-sft": "4B",
}  # fmt: skip
QWEN2 = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, True), "Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, True), "Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, True), "Qwen2.5-3B-Instruct": (2048, 11008, 36, 16, 2, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, False), "Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, False),
    "DeepSeek-R1-Distill-Qwen-7B": (3584, 18944, 28, 28, 4, False),
}  # fmt: skip
"""Hidden and FFN size, layers, heads, KV heads, tied head."""
QUESTION = [{"role": "user", "content": "1+1=?"}]
ROW = {
    "prompt": QUESTION, "messages": QUESTION, "label": "2", "text": "1+1=?", "index": 0,
    "input": "1+1=?", "question": "1+1=?", "answer": "2", "reward_model": {"ground_truth": "2"},
    "metadata": {"instance_id": "a", "instruction_id_list": ["x"], "kwargs": [{"a": 1}]},
}  # fmt: skip
CONVERSATION = {**ROW, "messages": [*QUESTION, {"role": "assistant", "content": "2"}]}
CALLS = {
    "--custom-generate-function-path": "async def {}(args, sample, sampling_params):\n    return sample\n",
    "--custom-rm-path": "async def {}(args, sample, **kwargs):\n    return 0.0\n",
    "--rollout-function-path": "def {}(args, rollout_id, data_source, evaluation=False):\n    return []\n",
    "--eval-function-path": "def {}(args, rollout_id, data_source, evaluation=False):\n    return {{}}\n",
    "--custom-agent-function-path": "async def {}(base_url, prompt, request_kwargs, metadata):\n    return None\n",
    "--generate-execute-tool-function-path": "async def {}(name, params):\n    return ''\n",
    "--generate-tool-specs-path": "{} = []\n",
    "--custom-tis-function-path": "def {}(args, *, pg_loss, **kwargs):\n    return pg_loss, [], {{}}\n",
}
"""Flag -> the source of a function that it may name."""
VARIABLE = re.compile(r"\$\{(\w+)_DIR\}")


def main(folder: Path, names: Sequence[str]) -> None:
    """Print a line for each list that gives another verdict than wanted, and the count."""
    index = json.loads((folder / "index.json").read_text())
    lists = {name: json.loads((folder / f"{name}.json").read_text()) for name in names or sorted(index)}
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        world = Path(place)
        build_world(world, folder, lists.values())
        sys.path.insert(0, str(world / "functions"))
        sys.modules.pop("tests", None)  # a list names a function of the package `tests` of miles
        good = 0
        for name, words in lists.items():
            said = dry_run(index[name]["program"], [fill_in(word, world) for word in words])
            as_wanted = is_wanted(index[name], said)
            good += as_wanted
            got = "accept" if said is None else f"refuse: {said}"
            sys.stdout.write(f"{'ok ' if as_wanted else 'BAD'} {name} | {index[name]['wanted']} | {got[:400]}\n")
            sys.stdout.flush()
        sys.stdout.write(f"{good} of {len(lists)}\n")


def is_wanted(entry: Mapping[str, Any], said: str | None) -> bool:
    """Compare a verdict, None for accepted, with an entry of the index."""
    names_a_flag = said is not None and (not entry["refuses"] or any(flag in said for flag in entry["refuses"]))
    return {"accept": said is None, "refuse": names_a_flag, "either": said is None or names_a_flag}[entry["wanted"]]


def dry_run(program: str, words: Sequence[str]) -> str | None:
    """Return why a dry run refuses the words; None: it accepts them."""
    defaults = SCRIPT_DEFAULTS.get(program, SCRIPT_DEFAULTS["train_async.py"])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            train.run([*words, "--dry-run"], more_defaults=defaults)
        except ConfigError as error:
            return str(error)
    return None


def fill_in(text: str, world: Path) -> str:
    """Replace the variables of a list by folders of the world."""
    return VARIABLE.sub(lambda found: str(world / found[1].lower()), text)


def build_world(world: Path, folder: Path, lists: Sequence[Sequence[str]]) -> None:
    """Make what the lists name."""
    texts = [word for words in lists for word in words]
    settings = {file.name: file.read_text() for file in (folder / "files").iterdir()}
    for name in ("model", "data", "output", "functions"):
        (world / name).mkdir()
    for name in {match[1] for word in texts if (match := re.match(r"\$\{MODEL_DIR\}/([^/]+)$", word))}:
        _write_model(world / "model" / name)
    for path in set(re.findall(r"\$\{DATA_DIR\}/([^\s\"'@]*\.(?:jsonl|parquet))", " ".join([*texts, *settings.values()]))):
        chats = any(f"${{DATA_DIR}}/{path}" in words and "sft_loss" in words for words in lists)
        _write_rows(world / "data" / path, CONVERSATION if chats else ROW)
    for name, text in settings.items():
        (world / "data" / name).write_text(fill_in(text, world))
    for flag, path in {pair for words in lists for pair in pairwise(words) if pair[0] in CALLS}:
        if not path.startswith(("slime.", "miles.")):
            _write_function(world / "functions", flag, path)
    importlib.invalidate_caches()


def _write_model(folder: Path) -> None:
    config: PretrainedConfig
    folder.mkdir()
    name = folder.name.removesuffix("_torch_dist")
    if folder.name != name:
        return
    if name in QWEN3:
        config = find_size(QWEN3[name]).to_config(vocab_size=151936)
    else:
        hidden, ffn, layers, heads, kv_heads, tied = QWEN2[name]
        config = Qwen2Config(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, tie_word_embeddings=tied, vocab_size=151936 if hidden < 3584 else 152064,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0 if name.startswith("DeepSeek") else 1e6},
            max_position_embeddings=32768, rms_norm_eps=1e-6, architectures=["Qwen2ForCausalLM"],
        )  # fmt: skip
    config.save_pretrained(folder)
    build_small_tokenizer().save_pretrained(folder)


def _write_rows(file: Path, row: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".jsonl":
        file.write_text((json.dumps(row) + "\n") * 64)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 64), file)


def _write_function(folder: Path, flag: str, path: str) -> None:
    *packages, module, name = path.split(".")
    for package in packages:
        folder = folder / package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    with (folder / f"{module}.py").open("a") as file:
        if name[0].isupper():
            methods = (f"    def {method}(self, input):\n        pass\n" for method in ("__init__", "__call__"))
            file.write(f"class {name}:\n{''.join(methods)}")
        else:
            file.write(CALLS[flag].format(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
