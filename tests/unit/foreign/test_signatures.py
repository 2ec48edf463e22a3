"""A function whose signature is another one than its flag calls is refused before the run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from qwench.config.sections.agent import AgentConfig
from qwench.config.sections.foreign import ForeignConfig
from qwench.errors import ConfigError
from qwench.foreign.data_source import check_data_source
from qwench.foreign.losses import load_correction, load_loss, load_reduction
from qwench.foreign.megatron_hooks import load_hooks
from qwench.foreign.targets import load_targets
from qwench.rollout.tool_loop import ToolLoop

LOADERS: list[tuple[str, str, Callable[[str], object]]] = [
    ("abcd", "--custom-loss-function-path", lambda path: load_loss(path, "slime", Namespace)),
    ("abc", "--custom-loss-function-path", lambda path: load_loss(path, "qwench", Namespace)),
    ("abcd", "--custom-tis-function-path", lambda path: load_correction(path, "qwench", Namespace)),
    ("abc", "--custom-pg-loss-reducer-function-path", lambda path: load_reduction(path, "qwench", per_token=False)),
    ("abcd", "--custom-pg-loss-reducer-function-path", lambda path: load_reduction(path, "miles", per_token=False)),
    ("ab", "--custom-advantage-function-path", lambda path: load_targets(path, None, Namespace)),
    ("abc", "--rollout-data-postprocess-path", lambda path: load_targets(None, path, Namespace)),
    *(
        (letters, f"--{name.replace('_', '-')}", lambda path, name=name: load_hooks(ForeignConfig(**{name: path})))
        for name, letters in {
            "custom_megatron_init_path": "a",
            "custom_megatron_before_log_prob_hook_path": "abc",
            "custom_megatron_before_train_step_hook_path": "abcdef",
            "custom_megatron_post_save_hook_path": "abcd",
            "custom_update_weight_post_write_path": "abc",
        }.items()
    ),
    (
        "ab",
        "--generate-execute-tool-function-path",
        lambda path: ToolLoop.load(AgentConfig(generate_execute_tool_function_path=path), template_kwargs={}),
    ),
]


@pytest.mark.parametrize(("letters", "flag", "load"), LOADERS)
def test_one_argument_more_or_fewer_is_refused(tmp_path: Path, letters: str, flag: str, load: Callable[[str], object]):
    names = {"right": letters, "more": f"{letters}z", "fewer": letters[:-1]}
    asynchronous = "async " * flag.startswith("--generate")
    code = "".join(f"{asynchronous}def {name}({', '.join(taken)}): ...\n" for name, taken in names.items())
    (tmp_path / "mine.py").write_text(code)
    load(f"{tmp_path}/mine.py:right")
    for name in ("more", "fewer"):
        with pytest.raises(ConfigError, match=rf"^{flag} '.*mine.py:{name}' has the signature .*, but is called as "):
            load(f"{tmp_path}/mine.py:{name}")


def test_a_data_source_takes_args_alone(tmp_path: Path):
    methods = "".join(
        f"    def {name}(self, *given): ...\n" for name in ("get_samples", "add_samples", "save", "load", "__len__")
    )
    code = "".join(f"class {name}:\n    def __init__(self, {taken}): ...\n{methods}" for name, taken in
                   {"Right": "args", "More": "args, other"}.items())  # fmt: skip
    (tmp_path / "mine.py").write_text(code)
    assert check_data_source(f"{tmp_path}/mine.py:Right").__name__ == "Right"
    with pytest.raises(ConfigError, match=r"^--data-source-path '.*mine.py:More' has the signature .*, but is called as cls"):
        check_data_source(f"{tmp_path}/mine.py:More")
