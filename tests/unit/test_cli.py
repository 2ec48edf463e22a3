import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from qwench import __version__, cli
from qwench.errors import ConfigError, EngineError, Stopped
from qwench.models.built_tokenizers import build_small_tokenizer
from qwench.models.random_qwen3 import make_checkpoint


def run(*words: str, command: cli.Command | None = None) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words, command=command)
    return ended.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    make_checkpoint(folder, size="tiny", tokenizer=build_small_tokenizer(), seed=0)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    (tmp_path / "train.jsonl").write_text('{"input": "1+1", "label": "2"}\n')
    return [
        *("--hf-checkpoint", str(model), "--prompt-data", str(tmp_path / "train.jsonl"), "--lr", "1e-6"),
        *("--num-rollout", "3", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2"),
        *("--rollout-max-response-len", "16", "--label-key", "label"),
    ]


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("help",)])
def test_help_names_every_verb(capsys, words):
    assert run(*words) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in cli.VERBS if f"\n  {verb} " not in shown] == []


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"qwench {__version__}\n"


HELPS = """
import sys
from qwench import cli
for words in (["--help"], *([verb, "--help"] for verb in cli.VERBS)):
    try:
        cli.main(words)
    except SystemExit as ended:
        assert not ended.code, words
    heavy = {"torch", "transformers", *({"rich", "yaml", "qwench.config"} if words == ["--help"] else ())}
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""


def test_help_of_no_verb_imports_a_library_that_takes_long():
    ended = subprocess.run([sys.executable, "-c", HELPS], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and "usage: qwench completion" in ended.stdout


@pytest.mark.parametrize(
    "verb",
    [
        ["train"],
        ["sft"],
        ["eval"],
        ["serve"],
        ["reward", "check"],
        ["make-model"],
        ["download"],
        ["doctor"],
        ["quickstart"],
    ],
)
def test_every_verb_explains_its_flags(capsys, verb):
    assert run(*verb, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: qwench {' '.join(verb)}")
    assert "--" in shown


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trian"],
            "qwench: unknown verb 'trian'; did you mean qwench train? known: "
            "train, sft, eval, serve, reward, convert, make-model, download, doctor, quickstart, completion",
        ),
        (["train", "--num-rolout", "3"], "qwench: unknown flag --num-rolout; did you mean --num-rollout?"),
        (["train", "--lr", "high"], "qwench: --lr must be a number, got 'high'"),
        (
            ["convert", "--input", "a", "--to", "hf"],
            "qwench: --output is required: Folder to write. Must be new or empty.",
        ),
        (["reward"], "qwench: qwench reward has one command, check; got none"),
        (["reward", "check"], "qwench: a file is missing; usage: qwench reward check FILE --rm-type NAME"),
    ],
)
def test_the_users_mistake_is_one_line_and_exit_code_2(capsys, words, line):
    assert run(*words) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{line}\n")


def verb_that_raises(error: BaseException):
    def verb(words: list[str]) -> None:
        raise error

    return verb


def test_a_failed_run_is_one_line_and_exit_code_1(capsys):
    assert run(command=verb_that_raises(EngineError("engine 3 did not\nanswer"))) == 1
    assert capsys.readouterr().err == "qwench: engine 3 did not answer\n"


def test_an_error_without_a_message_of_its_own_is_one_line_with_its_place(capsys):
    assert run(command=verb_that_raises(ValueError("odd\nthing"))) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"qwench: ValueError: odd thing \(.*cli\.py:\d+, in .*test_cli\.py:\d+\)\. .* --traceback .*\n", said)
    with pytest.raises(ValueError, match="odd"):
        cli.main(["--traceback"], command=verb_that_raises(ValueError("odd\nthing")))


def test_an_interrupted_run_has_exit_code_130(capsys):
    assert run(command=verb_that_raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "qwench: interrupted\n"


def test_the_whole_traceback_comes_on_request(monkeypatch):
    with pytest.raises(ConfigError):
        cli.main(["train", "--lr", "high", "--traceback"])
    monkeypatch.setenv("QWENCH_TRACEBACK", "0")
    assert run("train", "--lr", "high") == 2
    monkeypatch.setenv("QWENCH_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "--lr", "high"])


def test_a_dry_run_shows_configuration_and_identity_and_starts_nothing(capsys, recipe):
    words = ["--dry-run", "--sequence-parallel", "--rm-type", "math", "--train-dtype", "float32"]
    assert run("train", *recipe, *words) == 0
    shown = capsys.readouterr()
    assert "  --num-rollout 3\n" in shown.out
    assert re.search(r"\n  engine weights: [\d.]+ GiB in float32 on each device\n", shown.out)
    assert "--eps-clip " not in shown.out and "critic\n" not in shown.out  # defaults
    assert "rollout_batch_size 4 x n_samples_per_prompt 2 = global_batch_size 8 x num_steps_per_rollout 1" in shown.out
    assert shown.err == "qwench: warning: --sequence-parallel has no effect without tensor parallelism\n"


def test_a_dry_run_counts_fp8_weights_of_engines(capsys, recipe, model, tmp_path):
    recipe[recipe.index(str(model))] = fp8 = str(tmp_path / "fp8")
    assert run("convert", "--input", str(model), "--to", "fp8", "--output", fp8) == 0
    assert run("train", *recipe, "--dry-run", "--rm-type", "math") == 0
    assert re.search(r"\n  engine weights: [\d.]+ GiB in FP8 on each device\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--custom-rm-path", "nowhere.at_all"], "--custom-rm-path"),
        (["--rm-type", "mathematics"], "--rm-type 'mathematics' is unknown"),
        (["--rollout-function-path", "qwench.samples.nothing"], "--rollout-function-path"),
        (["--custom-reward-post-process-path", "nowhere.at_all"], "--custom-reward-post-process-path"),
        (["--num-layers", "3"], "--num-layers (3) contradicts the checkpoint's config.json (4)"),
    ],
)
def test_a_dry_run_refuses_what_a_start_refuses(capsys, recipe, words, problem):
    assert run("train", *recipe, *words, "--dry-run") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"qwench: {problem}")


def test_a_reader_that_stops_early_ends_the_command_quietly():
    command = [sys.executable, "-m", "qwench", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.EXIT_CLOSED_OUTPUT


def test_the_environment_of_the_trainer_is_set_before_anything_heavy_is_imported(recipe):
    code = (
        "import os, sys, types\n"
        "from qwench import cli\n"
        "inputs = types.ModuleType('qwench.launch.inputs')\n"
        "def plan_inputs(config, trains):\n"
        "    print(os.environ['A'], os.environ['CUBLAS_WORKSPACE_CONFIG'], 'torch' in sys.modules)\n"
        "    sys.exit()\n"
        "inputs.plan_inputs = plan_inputs\n"
        "sys.modules['qwench.launch.inputs'] = inputs\n"
        "cli.main(sys.argv[1:])"
    )
    words = ["train", *recipe, "--deterministic-mode", "--train-env-vars", '{"A": "b"}']
    shown = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True).stdout
    assert shown == "b :4096:8 False\n"


def test_a_crash_of_native_code_says_where_it_was():
    code = "import ctypes\nfrom qwench import cli\n\ndef fall(words):\n    ctypes.string_at(0)\n\ncli.main([], command=fall)\n"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in ended.stderr
    assert 'File "<string>", line 5 in fall' in ended.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "question,answer\n1+1,2\n", "a.csv row 1: key 'input' (--input-key) is missing"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.txt", "1+1", "a.txt has the unknown format '.txt'"),
        ("model/config.json", '{"model_type": "mamba"}', "has model_type 'mamba'; supported are dense qwen3, qwen2, llama"),
    ],
)
def test_a_mistake_in_a_file_is_told_before_pytorch_is_imported(recipe, tmp_path, name, content, said):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    flag = ("--hf-checkpoint", str(tmp_path / "model")) if "/" in name else ("--prompt-data", str(tmp_path / name))
    code = "import sys\nfrom qwench import cli\ntry:\n cli.main(sys.argv[1:])\nfinally:\n print(*sys.modules)"
    recipe[recipe.index(flag[0]) + 1] = flag[1]
    words = ["train", *recipe, "--rm-type", "math"]
    ended = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert said in ended.stderr
    assert {"torch", "transformers"} & set(ended.stdout.split()) == set()


def test_reward_check_grades_a_file(capsys, tmp_path):
    file = tmp_path / "responses.jsonl"
    rows = [("so \\boxed{2}", "2"), ("so \\boxed{3}", "2")]
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    words = ["reward", "check", str(file), "--rm-type", "math", "--response-key", "text", "--reward-num-workers", "1"]
    assert run(*words) == 0
    shown = capsys.readouterr().out
    assert "wrong" in shown
    assert "0.500" in shown


def test_make_model_writes_a_checkpoint_and_refuses_to_write_over_it(capsys, tmp_path):
    assert run("make-model", "--output", str(tmp_path / "m"), "--size", "tiny") == 0
    made = json.loads((tmp_path / "m" / "config.json").read_text())
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"{tmp_path / 'm'}: qwen3 with random weights (--seed 0), ")
    assert f"{made['num_hidden_layers']} layers of {made['hidden_size']}, {len(build_small_tokenizer())} tokens" in said
    assert run("make-model", "--output", str(tmp_path / "m")) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("help", "train"), ("--help", "train"), ("train", "help"), ("train", "-h")])
def test_help_of_a_verb_in_every_order(capsys, words):
    assert run(*words) == 0
    assert capsys.readouterr().out.startswith("usage: qwench train [FLAGS]\n")


@pytest.mark.parametrize(
    "words", [("reward", "--help"), ("help", "reward"), ("help", "reward", "check"), ("reward", "check", "-h")]
)
def test_help_of_reward_is_that_of_its_one_command(capsys, words):
    assert run(*words) == 0
    assert capsys.readouterr().out.startswith("usage: qwench reward check FILE [FLAGS]\n")


@pytest.mark.parametrize(
    ("word", "verb"),
    [
        ("finetune", "sft"), ("fine_tune", "sft"), ("grpo", "train"), ("Train", "train"), ("evaluate", "eval"),
        ("generate", "serve"), ("grade", "reward check"), ("export", "convert"), ("pull", "download"), ("evla", "eval"),
        ("plan", "train --dry-run"),
    ],
)  # fmt: skip
def test_a_wrong_verb_leads_to_the_one_that_is_meant(capsys, word, verb):
    assert run(word) == 2
    assert f"; did you mean qwench {verb}? known: " in capsys.readouterr().err


def test_flags_without_a_verb_are_told_to_come_second(capsys):
    assert run("--lr", "1") == 2
    assert capsys.readouterr().err.startswith("qwench: the verb comes first: qwench VERB --lr ...")


def test_every_word_for_a_verb_leads_to_a_verb():
    assert {verb.split()[0] for verb in cli._WORDS_FOR_VERBS} == set(cli.VERBS)
    words = [word for others in cli._WORDS_FOR_VERBS.values() for word in others.split()]
    assert len(words) == len(set(words))
    assert not set(words) & set(cli.VERBS)


def test_a_run_that_a_signal_ended_says_what_is_saved_and_what_to_type(capsys):
    stopped = Stopped(signal.SIGTERM, "Checkpoint 3 is in --save my runs; the same command continues with it.")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--save", "my runs"], command=verb_that_raises(stopped))
    assert ended.value.code == 143
    assert capsys.readouterr().err == (
        "qwench: stopped by SIGTERM. Checkpoint 3 is in --save my runs; the same command continues with it.\n"
        "  qwench train --save 'my runs'\n"
    )


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM")]
)
def test_a_run_that_a_signal_ended_before_it_had_anything_says_no_more(capsys, number, code, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"], command=verb_that_raises(Stopped(number)))
    assert (ended.value.code, capsys.readouterr().err) == (code, f"qwench: {said}\n")


def test_a_signal_outside_of_training_closes_what_is_open_and_gives_its_exit_code():
    verb = (
        "import contextlib, os, signal, sys, time\nfrom qwench import cli\n"
        "def verb(words):\n"
        "    with contextlib.ExitStack() as stack:\n"
        "        stack.callback(lambda: sys.stderr.write('closed '))\n"
        "        os.kill(os.getpid(), signal.SIGHUP)\n"
        "        time.sleep(60)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "cli.main([], command=verb)"
    )
    finished = subprocess.run([sys.executable, "-c", verb], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (129, "closed qwench: stopped by SIGHUP\n")


BY_RICH = (
    "from qwench import cli\nfrom qwench.observability.console import open_console\n"
    "def verb(words):\n    for i in range(20000):\n        open_console().say('a line')\n"
    "cli.main([], command=verb)"
)


@pytest.mark.parametrize("words", ["-m qwench --help", f"-c {shlex.quote(BY_RICH)}"], ids=["help", "by rich"])
@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        (">&-", 0, ""),
        (
            "> /dev/full",
            1,
            "qwench: standard output cannot be written to (No space left on device); write it to another place.\n",
        ),
    ],
)
def test_standard_output_that_is_closed_or_full_is_one_sentence_at_most(words, redirection, code, said):
    slow = "sleep 0.2; " if "|" in redirection else ""  # so that the reader is gone
    command = f"({slow} {sys.executable} {words}) {redirection}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (code, said)


def test_a_deleted_working_folder_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "qwench: the working folder was deleted; change to another one, or enter it again.\n"
    tmp_path.mkdir()


def test_python_without_docstrings_is_refused_in_one_line():
    ended = subprocess.run(
        [sys.executable, "-OO", "-m", "qwench", "train", "--help"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("qwench: Python runs without docstrings (-OO or PYTHONOPTIMIZE=2)")


def test_a_rank_that_is_no_number_is_named(capsys, recipe, monkeypatch):
    monkeypatch.setenv("RANK", "first")
    assert run("train", *recipe, "--rm-type", "math", "--dry-run") == 2
    assert "the environment variable RANK is 'first', which is no number; unset it." in capsys.readouterr().err


def test_a_stream_that_the_shell_closed_is_there_for_programs_that_a_verb_starts(monkeypatch):
    inherited, kept = [], os.dup(1)
    for name in ("stdout", "__stdout__"):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    os.close(1)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main([], command=lambda words: inherited.append(os.get_inheritable(1)))
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert (inherited, ended.value.code) == ([True], 0)
