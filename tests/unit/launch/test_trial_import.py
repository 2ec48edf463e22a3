"""Modules of the user that end their process when they are imported are named, and what they have started is ended."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwench.config.config import Config
from qwench.config.sections.reward import RewardConfig
from qwench.config.sections.rollout import RolloutConfig
from qwench.errors import ConfigError
from qwench.launch import trial_import
from qwench.launch.trial_import import check_imports
from qwench.plugins import load_object
from tests.deadlines import patient

FUNCTION = "\n\ndef score(sample):\n    return 0.0\n"


def config(*paths: Path) -> Config:
    """Return a run that names a reward, and hooks."""
    reward, *hooks = (f"{path}:score" for path in paths)
    rollout = RolloutConfig(rollout_batch_size=2, rollout_sample_hook_path=tuple(hooks))
    return Config(rollout=rollout, reward=RewardConfig(custom_rm_path=reward))


def module(folder: Path, name: str, code: str) -> Path:
    path = folder / name
    path.write_text(code + FUNCTION)
    return path


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("import os\nos._exit(0)", r"it ended with exit code 0, at {path}:2 in <module>"),
        ("import os\n\ndef go():\n    os._exit(3)\n\ngo()", r"it ended with exit code 3, at {path}:4 in go"),
        ("import ctypes\nctypes.string_at(0)", r"it was ended by SIGSEGV, at {path}:2 in <module>"),
        ("import os\nos.abort()", r"it was ended by SIGABRT, at {path}:2 in <module>"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", r"it was ended by SIGKILL"),
    ],
)
def test_a_module_that_ends_its_process_is_named(code: str, how: str, tmp_path: Path) -> None:
    path = module(tmp_path, "mine.py", code)
    with pytest.raises(ConfigError) as raised:
        check_imports(config(path))
    begin = f"--custom-rm-path '{path}:score' cannot be imported: its module ends the process ("
    assert str(raised.value).startswith(begin + how.format(path=path))


def test_functions_of_qwench_and_those_that_are_loaded_are_not_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(trial_import, "run_child", lambda *given, **options: asked.append((given, options)) or (0, "done", ""))
    for path in ("qwench.nowhere.score", "tests.deadlines.patient"):
        check_imports(Config(reward=RewardConfig(custom_rm_path=path)))
    assert asked == []
    check_imports(Config(reward=RewardConfig(custom_rm_path="qwenchlike.score")))
    assert asked == [(("qwench.launch.trial_import", ["qwenchlike.score"]), {"named": "qwenchlike.score"})]


def test_of_several_modules_the_one_that_ends_it_is_named_by_its_flag(tmp_path: Path) -> None:
    well, ends = module(tmp_path, "well.py", "print('well')"), module(tmp_path, "ends.py", "import os\nos._exit(1)")
    with pytest.raises(ConfigError, match=rf"^--rollout-sample-hook-path '{ends}:score' cannot be imported"):
        check_imports(config(well, well, ends))


@pytest.mark.parametrize(("section", "name"), [
    ("agent", "generate_tool_specs_path"), ("agent", "generate_execute_tool_function_path"),
    ("agent", "custom_agent_function_path"), ("foreign", "custom_advantage_function_path"),
    ("foreign", "rollout_data_postprocess_path"), ("evaluation", "eval_function_path"),
])  # fmt: skip
def test_the_module_of_every_flag_is_tried(section: str, name: str, tmp_path: Path) -> None:
    path = module(tmp_path, "ends.py", "import os\nos._exit(1)")
    named = replace(getattr(Config(), section), **{name: f"{path}:score"})
    flag = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"^--{flag} '{path}:score' cannot be imported"):
        check_imports(replace(Config(), **{section: named}))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ValueError(7)", "ValueError: 7"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_errors_at_import_are_left_to_the_import_itself(code: str, error: str, tmp_path: Path) -> None:
    path = module(tmp_path, "mine.py", code)
    check_imports(config(path))
    with pytest.raises(ConfigError, match=error):
        load_object(f"{path}:score")


def test_what_a_module_starts_neither_holds_the_check_nor_stays(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, threading, time\nfrom pathlib import Path\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "sleeper = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "Path(__file__).with_name('pid').write_text(str(sleeper.pid))\n"
        "if os.fork() == 0:\n    time.sleep(1000)\n"
    )
    check_imports(config(module(tmp_path, "mine.py", code)))
    stat = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    deadline = time.monotonic() + patient(10)
    while stat.exists() and " Z " not in stat.read_text():  # a signal takes a moment
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_module_that_this_process_has_is_not_imported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module(tmp_path, "kept.py", "import os\nos._exit(1)")
    monkeypatch.chdir(tmp_path)
    named = Config(rollout=RolloutConfig(rollout_batch_size=2), reward=RewardConfig(custom_rm_path="kept.score"))
    with pytest.raises(ConfigError, match=r"'kept\.score' cannot be imported: its module ends the process"):
        check_imports(named)
    monkeypatch.setitem(sys.modules, "kept", os)
    check_imports(named)
