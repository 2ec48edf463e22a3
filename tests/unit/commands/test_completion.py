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
    """Return a folder with the script of each shell, and the modules that printing the bash script imported."""
    folder = tmp_path_factory.mktemp("completion")
    code = (
        "import sys\nfrom qwench import cli\ntry:\n cli.main(sys.argv[1:])\nfinally:\n sys.stderr.write(' '.join(sys.modules))"
    )
    for shell in completion.SHELLS:
        words = [sys.executable, "-c", code, "completion", shell]
        printed = subprocess.run(words, check=True, capture_output=True, text=True)
        (folder / shell).write_text(printed.stdout)
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
    ],
)
def test_bash_completes_flags_and_their_values(scripts, words, offered):
    assert set(completed(scripts, *words)) == offered


def test_bash_completes_files_behind_a_flag_that_takes_one(scripts, tmp_path):
    (tmp_path / "prompts.jsonl").touch()
    for words in (["train", "--prompt-data", "prom"], ["train", "--config", "prom"], ["reward", "check", "prom"]):
        assert completed(scripts, *words, cwd=tmp_path) == ["prompts.jsonl"]


def test_the_script_of_zsh_describes_the_flags_of_each_verb(scripts):
    script = (scripts / "zsh").read_text()
    assert script.startswith("#compdef qwench\n")
    assert '"--lr-decay-style[Shape of the decay from --lr to --min-lr.]:lr_decay_style:(constant linear cosine' in script


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(words):
    with pytest.raises(ConfigError, match=r"usage: qwench completion bash\|zsh; got"):
        completion.run(words)
