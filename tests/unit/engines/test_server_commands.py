"""How servers are started, and which flags the user may pass on to them."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qwench.engines.client import IDLE_TIMEOUT_S
from qwench.engines.fleet.servers import server_environ
from qwench.engines.kinds import sglang
from qwench.engines.kinds.embedded import embedded_command, serve_words
from qwench.engines.kinds.kind import ServerOrder
from qwench.engines.kinds.sglang import check_sglang_words, check_words, sglang_command
from qwench.engines.kinds.sglang_router import check_router_words, router_command
from qwench.errors import ConfigError
from qwench.models.peft import AdapterConfig
from tests.fakes.orders import server_order

PARSER = "parser.add_argument('--size', type=int); parser.add_argument('--fast', action='store_true')"


def order(**changes) -> ServerOrder:
    fields = {"dtype": "bfloat16", "engine_sizes": (2, 2, 2), "sglang_args": ("--mem-fraction-static", "0.7")}
    return server_order(Path("/models/qwen3"), Path("logs"), **(fields | changes))


def command(of: ServerOrder, **changes):
    return sglang_command(of, **({"index": 1, "gpu_ids": (2, 3), "environ": {"PATH": "/bin"}} | changes))


def value_of(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_a_server_that_gives_memory_back_allocates_without_expandable_segments():
    settings = "roundup_power2_divisions:[256:1,512:2],expandable_segments:True,max_split_size_mb:64"
    environ = {"PYTORCH_CUDA_ALLOC_CONF": settings, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    made = command(order(releases_memory=True), environ=environ).environ
    assert made["PYTORCH_CUDA_ALLOC_CONF"] == "roundup_power2_divisions:[256:1,512:2],max_split_size_mb:64"
    assert made["PYTORCH_ALLOC_CONF"] == ""
    assert command(order(), environ=environ).environ["PYTORCH_CUDA_ALLOC_CONF"] == settings


def test_an_sglang_server_gets_its_model_its_gpus_and_the_users_flags():
    made = command(order())
    assert made.argv[1:6] == ("-P", "-m", "sglang.launch_server", "--mem-fraction-static", "0.7")
    expected = {"--model-path": "/models/qwen3", "--tp-size": "2", "--dtype": "bfloat16"}
    assert {flag: value_of(made.argv, flag) for flag in expected} == expected
    assert "secret" not in made.argv
    ((path, text),) = made.private_files.items()
    assert path == Path(f"logs/.engine-1-{os.getpid()}.yaml"), "another run may use the folder"
    assert str(path) == value_of(made.argv, "--config") and yaml.safe_load(text) == {"admin-api-key": "secret"}
    assert made.environ["CUDA_VISIBLE_DEVICES"] == "2,3" and made.environ["PATH"] == "/bin"
    assert made.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "0"
    assert made.label == "SGLang engine 1" and made.log_file == Path("logs/engine-1.log")
    assert pickle.loads(pickle.dumps(made)) == made
    elsewhere = command(order(engine_start_timeout=9.0), host="10.0.0.1", gpu_ids=())
    assert (elsewhere.host, elsewhere.start_timeout_s) == ("10.0.0.1", 9.0)
    assert "CUDA_VISIBLE_DEVICES" not in elsewhere.environ


def test_an_idle_connection_of_an_sglang_server_outlives_a_client_that_is_slow_to_read():
    assert float(command(order()).environ["SGLANG_TIMEOUT_KEEP_ALIVE"]) > 10 * IDLE_TIMEOUT_S
    chosen = command(order(), environ={"SGLANG_TIMEOUT_KEEP_ALIVE": "900"}).environ
    assert chosen["SGLANG_TIMEOUT_KEEP_ALIVE"] == "900"


def test_a_server_that_takes_adapters_has_room_for_the_one_before():
    argv = command(order(adapter=AdapterConfig(rank=8, alpha=16.0, use_rslora=False, targets=("q_proj", "o_proj")))).argv
    words = "--enable-lora --max-lora-rank 8 --max-loras-per-batch 2 --max-loaded-loras 2 --lora-target-modules q_proj o_proj"
    assert words in " ".join(argv) and "--enable-lora" not in command(order()).argv


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("releases_memory", ["--enable-memory-saver"]),
        ("sglang_enable_deterministic_inference", ["--enable-deterministic-inference"]),
        ("serves_checkpoint", ["--weight-version", "0"]),
        ("keeps_requests", ["--disable-radix-cache"]),
        ("ranks_requests", ["--enable-priority-scheduling", "--default-priority-value", "0"]),
    ],
)
def test_what_a_run_needs_is_switched_on(changed, words):
    assert words[0] not in command(order()).argv
    argv = command(order(**{changed: True})).argv
    at = argv.index(words[0])
    assert list(argv[at : at + len(words)]) == words


def test_an_sglang_server_has_room_for_an_adapter_and_the_one_before_it():
    targets = ("q_proj", "down_proj")
    adapter = AdapterConfig(rank=32, alpha=64.0, use_rslora=False, targets=targets)
    argv = command(order(adapter=adapter, sglang_args=("--max-loras-per-batch", "4"))).argv
    assert argv[4:12] == (
        "--enable-lora", "--max-lora-rank", "32", "--max-loras-per-batch", "2", "--max-loaded-loras", "2",
        "--lora-target-modules",
    )  # fmt: skip
    assert argv[12:16] == (*targets, "--max-loras-per-batch", "4")  # the user's comes last and wins


def test_an_sglang_server_takes_texts_as_long_as_yarn_allows_unless_the_user_decides():
    assert "--json-model-override-args" not in command(order()).argv
    made = command(order(stretched_positions=131_072))
    assert value_of(made.argv, "--json-model-override-args") == '{"max_position_embeddings": 131072}'
    for own in (("--context-length", "9000"), ("--json-model-override-args", "{}")):
        argv = command(order(stretched_positions=131_072, sglang_args=own)).argv
        assert [word for word in argv if word in ("--context-length", "--json-model-override-args")] == [own[0]]


def test_engines_draw_apart_from_each_other():
    assert {value_of(command(order(), index=i).argv, "--random-seed") for i in range(3)} == {"42", "43", "44"}


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="SGLang is installed")
def test_without_sglang_the_user_is_told_to_install_it():
    with pytest.raises(ConfigError, match=r"sglang cannot be imported .*install it"):
        check_sglang_words(())


def test_sglangs_parser_is_given_the_model_that_it_insists_on(monkeypatch):
    asked = []
    monkeypatch.setattr(sglang, "check_words", lambda words, **options: asked.append((words, options)))
    check_sglang_words(("--tp-size", "2"))
    ((words, options),) = asked
    assert words == ["--tp-size", "2", "--model-path", "."]
    assert (options["prefix"], options["package"]) == ("sglang", "sglang") and "ServerArgs" in options["parser_program"]


def test_a_parser_that_does_not_end_is_given_up_and_asks_nobody(monkeypatch):
    def run(argv: list[str], **options: object) -> None:
        assert argv[:3] == [sys.executable, "-P", "-c"] and argv[4:] == ["--size", "3"]
        assert (options["stdin"], options["timeout"]) == (subprocess.DEVNULL, 180)
        raise subprocess.TimeoutExpired(argv, 180)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match=r"^xpackage did not read its flags within 180 s; is it installed well\?$"):
        check_words(("--size", "3"), prefix="x", parser_program=PARSER, package="xpackage")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--size", "big"), "argument --x-size: invalid int value: 'big'"),
        (("--fest",), "unrecognized arguments: --x-fest"),
        (("--siz", "3"), "unrecognized arguments: --x-siz 3"),
    ],
)
def test_flags_that_the_other_program_does_not_take_are_named_as_they_were_typed(words, problem):
    with pytest.raises(ConfigError) as refused:
        check_words(words, prefix="x", parser_program=PARSER, package="xpackage")
    assert str(refused.value) == f"the installed xpackage does not take the --x-* flags: {problem}"


def test_flags_that_the_other_program_takes_pass(tmp_path):
    reading = f"{PARSER}; parser.add_argument('--note', type=lambda text: open(text, 'w').write('read'))"
    check_words(
        ("--size", "3", "--fast", "--note", str(tmp_path / "note")), prefix="x", parser_program=reading, package="xpackage"
    )
    assert (tmp_path / "note").read_text() == "read", "the program's parser saw the words"


def test_the_router_takes_the_users_flags_over_our_defaults(tmp_path):
    made = router_command(("--policy", "random", "--port", "3456"), environ={}, log_folder=tmp_path, generate_timeout_s=0.7)
    assert made.port == 3456
    assert value_of(made.argv, "--request-timeout-secs") == "2", "the client's deadline comes first"
    assert made.argv.count("--policy") == 1 and value_of(made.argv, "--policy") == "random"
    assert "--port" not in made.argv
    plain = router_command((), environ={}, log_folder=tmp_path, generate_timeout_s=3600)
    assert value_of(plain.argv, "--policy") == "round_robin"


def test_the_installed_router_takes_our_defaults(tmp_path):
    argv = router_command((), environ={}, log_folder=tmp_path, generate_timeout_s=3600).argv
    ours = argv[argv.index("sglang_router.launch_router") + 1 :]
    check_router_words(ours)
    with pytest.raises(ConfigError, match=r"the installed sglang-router does not take the --router-.* flags: .*no-such-flag"):
        check_router_words([*ours, "--no-such-flag"])


def test_an_embedded_server_gets_its_flags_and_token():
    made = embedded_command(
        server_order(Path("m"), Path("logs"), embedded_page_size=32, engine_start_timeout=9.0), index=0, gpu_ids=(),
        environ={"A": "b", "RANK": "1"},
    )  # fmt: skip
    assert made.argv[1:7] == ("-P", "-m", "qwench", "serve", "--hf-checkpoint", "m")
    assert value_of(made.argv, "--train-dtype") == "float32" and value_of(made.argv, "--embedded-page-size") == "32"
    assert value_of(made.argv, "--num-gpus") == "1"
    assert "--embedded-kv-cache-tokens" not in made.argv and "secret" not in made.argv
    assert made.environ == {"A": "b", "QWENCH_TOKEN": "secret"}
    assert (made.label, made.log_file, made.host) == ("engine server 0", Path("logs/engine-0.log"), "127.0.0.1")
    assert (made.start_timeout_s, made.dumps_stacks) == (9.0, True)


def test_an_embedded_server_computes_with_the_sizes_and_in_the_ways_that_the_flags_say():
    usual = ["--hf-checkpoint", "m", "--train-dtype", "float32", "--num-gpus", "1"]
    sizes = {
        "embedded_page_size": 1, "embedded_max_running_requests": 2, "embedded_prefill_chunk_tokens": 3,
        "embedded_kv_cache_tokens": 4, "embedded_mem_fraction": 0.5,
    }  # fmt: skip
    sized = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    of = server_order(Path("m"), Path("logs"), serves_checkpoint=True, **sizes)
    assert serve_words(of, 0) == usual + sized
    assert serve_words(replace(of, deterministic=True), 0) == [*usual, *sized, "--deterministic-mode"]
    slow = replace(of, engine=replace(of.engine, embedded_native_kernels=False))
    assert serve_words(slow, 0) == [*usual, *sized, "--no-embedded-native-kernels"]
    assert embedded_command(of, index=0, gpu_ids=(), environ={}, host="10.0.0.1").host == "10.0.0.1"


def test_an_embedded_server_reads_no_weights_that_a_publication_replaces():
    adapter = AdapterConfig(rank=8, alpha=16.0, use_rslora=False, targets=("q_proj",))
    for changes, waits in (({}, True), ({"serves_checkpoint": True}, False), ({"adapter": adapter}, False)):
        made = embedded_command(order(**changes), index=0, gpu_ids=(), environ={})
        assert ("--wait-for-weights" in made.argv) == waits


def test_an_embedded_server_gets_all_gpus_of_its_engine():
    order = server_order(Path("m"), Path("logs"), engine_sizes=(2, 2))
    made = embedded_command(order, index=1, gpu_ids=(2, 3), environ={})
    assert value_of(made.argv, "--num-gpus") == "2" and made.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_a_server_gets_the_environment_without_the_runs_secrets_and_its_place_among_the_ranks() -> None:
    secrets = ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "wandb_apikey")
    secrets += ("QWENCH_JUDGE_KEY", "SSH_PRIVATE_KEY", "KEY")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    kept = {
        "PATH": "/bin",
        "HF_HOME": "/models",
        "TOKENIZERS_PARALLELISM": "false",
        "KEYBOARD": "us",
        "MONKEY_MODE": "1",
        "KEYRING_PATH": "x",
    }
    environ = {**dict.fromkeys((*secrets, *ranks), "x"), **kept}
    assert server_environ(environ, OMP_NUM_THREADS="1") == {**kept, "OMP_NUM_THREADS": "1"}
