import shutil
import subprocess
import sys

import pytest

from qwench import cli
from qwench.commands import completion
from qwench.errors import ConfigError

BASH = shutil.which("bash")
ASK = """
source "$1"; shift
COMP_WORDS=(qwench "$@"); COMP_CWORD=$#
_shtab_qwench
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Return a folder with the script of bash, and the modules that printing it imported."""
    folder = tmp_path_factory.mktemp("completion")
    code = (
        "import sys\nfrom qwench import cli\ntry:\n cli.main(sys.argv[1:])\nfinally:\n sys.stderr.write(' '.join(sys.modules))"
    )
    words = [sys.executable, "-c", code, "completion", "bash"]
    printed = subprocess.run(words, check=True, capture_output=True, text=True)
    (folder / "bash").write_text(printed.stdout)
    (folder / "modules").write_text(printed.stderr)
    return folder


def completed(scripts, *words, cwd=None):
    """Return what bash offers for the last word."""
    finished = subprocess.run([BASH, "-c", ASK, "ask", str(scripts / "bash"), *words], check=True, capture_output=True,
                              text=True, cwd=cwd)  # fmt: skip
    return [line.strip() for line in finished.stdout.splitlines() if line.strip()]


def test_the_script_is_printed_without_torch(scripts):
    modules = set((scripts / "modules").read_text().split())
    assert "qwench.commands.completion" in modules
    assert {"torch", "transformers", "pyarrow"} & modules == set()


def test_bash_completes_verbs(scripts):
    assert set(completed(scripts, "")) >= set(cli.VERBS)
    assert completed(scripts, "quick") == ["quickstart"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["train", "--lr-decay"], {"--lr-decay-style", "--lr-decay-iters"}),
        (["train", "--colo"], {"--colocate"}),
        (["sft", "--no-coloc"], {"--no-colocate"}),
        (["train", "--no-load-o"], {"--no-load-optim"}),
        (["train", "--no-no-"], set()),
        (["eval", "--lr", "1", "--eval-pro"], {"--eval-prompt-data"}),
        (["train", "--lr-decay-style", ""], {"constant", "linear", "cosine", "inverse-square-root", "WSD"}),
        (["train", "--rollout-engine", "s"], {"sglang"}),
        (["convert", "--to", ""], {"hf", "torch_dist", "fsdp", "fp8", "lora"}),
        (["serve", "--po"], {"--port"}),
        (["reward", ""], {"check"}),
        (["completion", "z"], {"zsh"}),
        (["--v"], {"--version"}),
        (["--h"], {"--help"}),
        (["sft", "--help"], {"--help", "--help-all"}),
        (["reward", "check", "--help"], {"--help", "--help-all"}),
        (["serve", "--conf"], set()),
        (["reward", "check", "--response-k"], {"--response-key"}),
    ],
)
def test_bash_completes_flags_and_their_values(scripts, words, offered):
    assert set(completed(scripts, *words)) == offered


def test_bash_completes_files_behind_a_flag_that_takes_one(scripts, tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    paths = ("prompt-data", "eval-prompt-data", "config", "load-debug-rollout-data", "save-debug-rollout-data", "hf-checkpoint")
    for words in (*(["train", f"--{name}", "prom"] for name in paths), ["reward", "check", "prom"]):
        assert completed(scripts, *words, cwd=tmp_path) == ["prompts.jsonl"], words
    assert completed(scripts, "train", "--wandb-project", "prom", cwd=tmp_path) == []


def num_values(parser):
    """Return how many values each flag of a verb takes."""
    return {action.option_strings[0]: action.nargs for action in parser._actions if action.option_strings}


def test_switches_take_no_value_and_lists_take_several():
    parser = completion.build_parser()
    assert num_values(parser) == {"--version": 0, "--help": 0}
    (verbs,) = (action.choices for action in parser._actions if not action.option_strings)
    found = num_values(verbs["train"])
    switches = ("--colocate", "--no-colocate", "--help", "--help-all")
    assert {found[name] for name in switches} == {0}
    assert [found[name] for name in ("--lr", "--lr-decay-style", "--eval-prompt-data")] == [None, None, "*"]


def test_the_script_of_zsh_describes_verbs_and_their_flags(capsys):
    completion.run(["zsh"])
    script = capsys.readouterr().out
    assert script.startswith("#compdef qwench\n") and script.endswith("\n")
    for line in (
        "train:'Train by reinforcement learning: sample responses, grade them, learn, repeat.'",
        "reward:'Grade a file of responses and labels",
        "check:'Grade a file of responses and labels",
        "completion:'Print the completion script of a shell.'",
        '"--no-colocate[Off\\: Trainer and engines share',
    ):
        assert line in script
    assert '"--lr-decay-style[Shape of the decay from --lr to --min-lr.]:lr_decay_style:(constant linear cosine' in script


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_where_the_script_goes(word, capsys):
    completion.run([word])
    said = capsys.readouterr().out
    assert said.startswith("usage: qwench completion bash|zsh\n") and "source <(qwench completion bash)" in said


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(words):
    with pytest.raises(ConfigError, match=r"usage: qwench completion bash\|zsh; got"):
        completion.run(words)
