import pytest

from qwench.config.command_line.parse import parse_run, parse_serve
from qwench.config.plan import plan_run
from qwench.errors import ConfigError
from tests.unit.config.architectures import QWEN3_4B
from tests.unit.config.words import flat, words_of


def test_a_complete_command_line_passes(files):
    config = parse_run("train", flat(words_of(files)))
    batch = plan_run(config, QWEN3_4B).batch
    assert batch.rollout_batch_size * batch.n_samples_per_prompt == 8


@pytest.mark.parametrize(
    "flag", ["--hf-checkpoint", "--lr", "--num-rollout", "--rollout-batch-size", "--rollout-max-response-len"]
)
def test_a_missing_flag_is_asked_for(files, flag):
    words = words_of(files)
    del words[flag]
    with pytest.raises(ConfigError, match=rf"^{flag}.* is required: "):
        parse_run("train", flat(words))


def test_the_reward_is_asked_for_with_the_data_that_could_have_named_it(files):
    words = words_of(files)
    del words["--prompt-data"]
    with pytest.raises(ConfigError, match=r"^qwench train requires --prompt-data .*, --rm-type or --custom-rm-path "):
        parse_run("train", flat(words))
    with pytest.raises(ConfigError, match=r"^--prompt-data is required: "):
        parse_run("train", [*flat(words), "--rm-type", "math"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--hf-checkpoint", "{}/absent"], "--hf-checkpoint: there is no folder {}/absent"),
        (["--hf-checkpoint", "{}/model/config.json"], "--hf-checkpoint: {}/model/config.json is a file; give the Hugging Face"),
        (["--hf-checkpoint", "{}/empty"], "--hf-checkpoint: {}/empty has no config.json"),
        (["--hf-checkpoint", "{}/adapter"], "--hf-checkpoint: {}/adapter is a LoRA adapter; merge it into its base model"),
        (
            ["--hf-checkpoint", "{}/other"],
            "--hf-checkpoint: {}/other/config.json has model_type 'qwen3_moe'; supported are dense qwen3, qwen2, llama",
        ),
        (
            ["--hf-checkpoint", "{}/gguf"],
            "--hf-checkpoint: {}/gguf has no config.json; it holds GGUF files",
        ),
        (
            ["--prompt-data", "{}/a.xlsx"],
            "--prompt-data: {}/a.xlsx has the unknown format '.xlsx'; convert it to .jsonl",
        ),
        (
            ["--load", "{}/absent", "--exit-on-missing-checkpoint"],
            "--load: {}/absent is missing or empty, and --exit-on-missing-checkpoint is given",
        ),
        (["--prompt-data", "x" * 300 + ".jsonl"], "--prompt-data: 'xxx"),
        (["--prompt-data", "~nobody-of-that-name/a.jsonl"], "--prompt-data: '~nobody-of-that-name/a.jsonl' names no data file"),
        (["--eval-prompt-data", "e", "x" * 300 + ".jsonl"], "--eval-prompt-data: 'xxx"),
        (["--prompt-data", "{}/absent.jsonl@[1:]"], "--prompt-data: there is no file {}/absent.jsonl"),
        (["--eval-prompt-data", "e", "{}/absent.jsonl"], "--eval-prompt-data: there is no file {}/absent.jsonl"),
        (["--load", "{}/absent"], "--load: {}/absent is missing or empty, and there is no --ref-load to start from"),
        (["--load", "{}/empty"], "--load: {}/empty is missing or empty"),
        (["--ref-load", "{}/absent"], "--ref-load: there is no folder {}/absent"),
        (
            ["--save", "{}/s", "--save-trigger-sentinel", "{}/empty"],
            "--save-trigger-sentinel {}/empty is a folder; name a file",
        ),
        (
            ["--save", "{}/s", "--save-trigger-sentinel", "{}/model/config.json/x"],
            "--save-trigger-sentinel {}/model/config.json",
        ),
    ],
)
def test_files_that_are_not_there_are_refused(files, extra, message):
    for name, content in (
        ("adapter/adapter_config.json", "{}"), ("other/config.json", '{"model_type": "qwen3_moe"}'), ("gguf/a.gguf", ""),
        ("a.xlsx", ""),
    ):  # fmt: skip
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_run("train", flat(words_of(files)) + [word.replace("{}", str(files)) for word in extra])
    assert str(caught.value).startswith(message.replace("{}", str(files)))


@pytest.mark.parametrize("name", ["run", "run/iter_0000002"])
def test_a_checkpoint_of_training_is_told_from_a_model_with_the_command_that_exports_it(files, name):
    (files / "run" / "iter_0000002").mkdir(parents=True)
    folder = files / name
    with pytest.raises(ConfigError) as refused:
        parse_run("train", [*flat(words_of(files)), "--hf-checkpoint", str(folder)])
    assert str(refused.value) == (
        f"--hf-checkpoint: {folder} is a checkpoint of training; "
        f"`qwench convert --input {folder} --to hf --hf-checkpoint MODEL --output {folder}-hf` "
        "exports it, where MODEL is the --hf-checkpoint of that run"
    )


def test_an_empty_load_is_a_fresh_start_with_a_reference_or_when_it_is_the_folder_to_save_to(files):
    words = [*flat(words_of(files)), "--load", str(files / "absent")]
    assert parse_run("train", [*words, "--ref-load", str(files / "model")]).checkpoint.load == files / "absent"
    assert parse_run("train", [*words, "--save", str(files / "absent")]).checkpoint.load == files / "absent"


def test_parts_that_do_not_run_need_nothing(files):
    words = words_of(files)
    del words["--lr"]
    assert parse_run("train", [*flat(words), "--debug-rollout-only"]).optimizer.lr is None
    words = words_of(files)
    del words["--prompt-data"], words["--rollout-max-response-len"]
    config = parse_run("train", [*flat(words), "--debug-train-only", "--load-debug-rollout-data", "r/{rollout_id}.jsonl"])
    assert config.data.prompt_data is None


def test_train_with_the_loss_of_fine_tuning_is_checked_as_fine_tuning(files):
    words = words_of(files)
    del words["--rollout-max-response-len"], words["--n-samples-per-prompt"]
    assert parse_run("train", [*flat(words), "--loss-type", "sft_loss"]).rollout.rollout_max_response_len is None
    assert parse_run("sft", flat(words)).algorithm.loss_type == "sft_loss"
    with pytest.raises(ConfigError, match=r"^--hf-checkpoint: there is no folder .*absent"):
        parse_run("sft", [*flat(words), "--hf-checkpoint", str(files / "absent")])


def test_evaluation_needs_sets_and_a_length_and_may_restrict_sampling(files):
    words = ["--hf-checkpoint", str(files / "model"), "--rollout-top-p", "0.9"]
    with pytest.raises(
        ConfigError, match=r"qwench eval requires --eval-prompt-data or --eval-config .*, --eval-max-response-len "
    ):
        parse_run("eval", words)
    with pytest.raises(ConfigError, match=r"^--eval-prompt-data or --eval-config is required: "):
        parse_run("eval", [*words, "--rollout-max-response-len", "9"])
    words += ["--eval-prompt-data", "e", str(files / "train.jsonl")]
    with pytest.raises(ConfigError, match="--eval-max-response-len is required"):
        parse_run("eval", words)
    words += ["--eval-max-response-len", "9"]
    assert plan_run(parse_run("eval", words), QWEN3_4B).eval_sets[0].top_p == 0.9
    with pytest.raises(ConfigError, match=r"^--eval-output /dev/null/x cannot be .*is a file"):
        parse_run("eval", [*words, "--eval-output", "/dev/null/x"])


def test_sets_of_a_file_are_checked_before_anything_starts(files):
    words = ["--hf-checkpoint", str(files / "model"), "--eval-config", str(files / "sets.yaml")]
    with pytest.raises(ConfigError, match=r"--eval-config: cannot read .*sets\.yaml"):
        parse_run("eval", words)
    (files / "sets.yaml").write_text(f"eval: {{datasets: [{{name: a, path: {files / 'absent.jsonl'}}}]}}")
    with pytest.raises(ConfigError, match=r"--eval-config: .*sets\.yaml: there is no file .*absent\.jsonl"):
        parse_run("eval", words)
    (files / "sets.yaml").write_text(f"eval: {{datasets: [{{name: a, path: {files / 'train.jsonl'}}}]}}")
    with pytest.raises(ConfigError, match="--eval-max-response-len is required"):
        parse_run("eval", words)


def test_serving_needs_a_checkpoint(files):
    with pytest.raises(ConfigError, match="--hf-checkpoint is required"):
        parse_serve([])
    with pytest.raises(ConfigError, match=r"--hf-checkpoint: .*/empty has no config.json"):
        parse_serve(["--hf-checkpoint", str(files / "empty")])
    config = parse_serve(["--hf-checkpoint", str(files / "model"), "--port", "8000", "--sglang-page-size", "4"])
    assert (config.server.port, config.server.host, config.engine.embedded_page_size) == (8000, "127.0.0.1", 4)


@pytest.mark.parametrize(
    ("flag", "below"),
    [("--save", ""), ("--log-dir", "/logs"), ("--load", ""), ("--save-hf", "/{rollout_id}"), ("--save-hf", ""),
     ("--save-debug-rollout-data", "/{rollout_id}.jsonl")],
)  # fmt: skip
def test_a_circle_of_symbolic_links_is_refused(files, flag, below):
    (files / "one").symlink_to(files / "two")
    (files / "two").symlink_to(files / "one")
    words = [*flat(words_of(files)), "--save", str(files / "run"), flag, f"{files}/one{below}"]
    with pytest.raises(ConfigError, match=rf"^{flag} must not lead in a circle of symbolic links, got '.*one"):
        parse_run("train", words)


@pytest.mark.parametrize(
    ("flag", "more"),
    [("--save", ""), ("--log-dir", ""), ("--save-hf", ""), ("--save-debug-rollout-data", "/{rollout_id}.jsonl"),
     ("--dump-details", ""), ("--tensorboard-dir", ""), ("--wandb-dir", ""), ("--memory-snapshot-dir", "")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("place", "why"),
    [("/proc/x", "No such file or directory in /proc"), ("LINK", "is a link that leads nowhere"), ("/dev/null/x", "is a file")],
)
def test_a_place_where_nothing_can_be_written_is_refused(files, flag, more, place, why):
    (files / "link").symlink_to(files / "nowhere")
    place = place.replace("LINK", str(files / "link"))
    others = ["--use-tensorboard", "--use-wandb", "--wandb-project", "p", "--record-memory-history"]
    with pytest.raises(ConfigError, match=rf"^{flag.replace('dump-details', 'save-debug-rollout-data')} .*cannot be .*{why}"):
        parse_run("train", [*flat(words_of(files)), "--save", str(files / "run"), *others, flag, f"{place}{more}"])
    assert not any(path.name.startswith("tmp") for path in files.iterdir())


def test_a_file_is_no_run_to_load(files):
    (files / "weights.pt").touch()
    with pytest.raises(ConfigError, match=r"^--load: .*weights\.pt is a file; give the folder of a run or of a checkpoint"):
        parse_run("train", [*flat(words_of(files)), "--load", str(files / "weights.pt")])


def test_all_that_is_missing_is_named_at_once(files):
    words = words_of(files) | {
        "--hf-checkpoint": ["/gone/m"],
        "--prompt-data": ["gone/a.jsonl"],
        "--ref-load": ["/gone/ref"],
    }
    words |= {"--eval-prompt-data": ["x", "gone/x.jsonl", "y", "gone/y.jsonl"], "--load": [str(files / "train.jsonl")]}
    with pytest.raises(ConfigError) as refused:
        parse_run("train", flat(words))
    assert [problem.partition(";")[0] for problem in str(refused.value).split("; also ")] == [
        "--hf-checkpoint: there is no folder /gone/m",
        "--prompt-data: there is no file gone/a.jsonl",
        "--eval-prompt-data: there is no file gone/x.jsonl",
        "--eval-prompt-data: there is no file gone/y.jsonl",
        "--ref-load: there is no folder /gone/ref",
        f"--load: {files / 'train.jsonl'} is a file",
    ]
    with pytest.raises(ConfigError, match=r"--hf-checkpoint: there is no folder /gone/m; .*; also --eval-prompt-data: there"):
        parse_run("eval", ["--hf-checkpoint", "/gone/m", "--eval-prompt-data", "x", "gone/x.jsonl"])
