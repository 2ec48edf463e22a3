"""Rollouts from engines in processes of their own: routed, killed while they generate, and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qwench.cluster.gpus import DedicatedGpus
from qwench.config.command_line.parse import parse_run
from qwench.config.sections.engine import EngineConfig
from qwench.data.prompts import PromptSource
from qwench.engines.fleet.pool import EnginePool
from qwench.engines.fleet.servers import ServerProcess
from qwench.engines.kinds.embedded import embedded_command
from qwench.launch.engines import command_makers, server_order
from qwench.launch.inputs import plan_inputs, read_inputs, read_training_prompts
from qwench.launch.rollouts import Generation, build_generation
from qwench.observability.timing import PhaseTimer
from qwench.samples import Rollout, Sample
from qwench.weights.plan import PublicationPlan
from qwench.weights.publisher import Publisher
from qwench.wire.addresses import EngineAddress
from tests.deadlines import patient
from tests.e2e.conftest import DIGITS, ONE_THREAD, InProcess, Workspace, column
from tests.verbs import run_verb

TOKEN = "secret"
DEADLINE_S = patient(90)
NUM_PROMPTS, SIBLINGS = 10, 3
RESPONSE_LEN = 480
WATCHED = {
    "use_fault_tolerance": (), "rollout_health_check_interval": 1, "rollout_health_check_timeout": 10,
    "engine_start_timeout": DEADLINE_S,
}  # fmt: skip


@dataclass
class Scene:
    """Two servers, the pool over them, and a stream of rollouts."""

    generation: Generation
    servers: Sequence[ServerProcess]
    source: PromptSource

    @property
    def pool(self) -> EnginePool:
        return self.generation.engines

    def publisher_of(self, model: PreTrainedModel) -> Publisher:
        """Return what brings a model's weights to both engines over their sockets."""
        plan, gpus = PublicationPlan(engine=EngineConfig(), timeout_s=patient(60)), DedicatedGpus(weights_may_alias=False)
        published = Published(self.pool, model)
        return Publisher(published, self.pool, plan, gpus=gpus, timer=PhaseTimer())  # type: ignore[arg-type]


@dataclass
class Published:
    """A model that sends its weights itself."""

    pool: EnginePool
    model: PreTrainedModel

    def publish(self, addresses: Sequence[EngineAddress], version: int, plan: PublicationPlan) -> None:
        bucket = [(name, parameter.detach()) for name, parameter in self.model.named_parameters()]
        assert len(addresses) == 2
        for engine in self.pool.engines:
            self.pool.run(engine.update_weights([bucket], version=version), label="send", timeout_s=DEADLINE_S)


@pytest.fixture
def scene(request: pytest.FixtureRequest, workspace: Workspace, tmp_path: Path) -> Iterator[Scene]:
    flags = {**WATCHED, "use_sglang_router": () if request.param else None, "deterministic_mode": None, "num_rollout": 2,
             "rollout_batch_size": NUM_PROMPTS, "n_samples_per_prompt": SIBLINGS, "global_batch_size": NUM_PROMPTS * SIBLINGS,
             "rollout_max_response_len": RESPONSE_LEN, "max_tokens_per_gpu": 4096}  # fmt: skip
    config = parse_run("train", workspace.train_argv(tmp_path / "run", **flags)[1:])
    plan = plan_inputs(config, trains=True)
    plan = replace(plan, devices=replace(plan.devices, engine_sizes=(1, 1)))  # one CPU is planned for one engine
    inputs = read_inputs(config, plan)
    makers = command_makers(inputs, num_engines=2, token=TOKEN, with_weights=False, on_gpus=False)
    servers = [ServerProcess(make(gpu_ids=(), environ=ONE_THREAD, host="127.0.0.1")) for make in makers]
    source = PromptSource(read_training_prompts(inputs).prompts, n_samples_per_prompt=SIBLINGS, shuffle=False, seed=0)
    generation = build_generation(inputs, with_weights=False, servers=servers, token=TOKEN)
    try:
        yield Scene(generation, servers, source)
    finally:
        generation.close()
    assert not any(server.is_running() for server in servers)


@pytest.fixture(scope="module")
def models(workspace: Workspace) -> list[PreTrainedModel]:
    """Return the model with the weights of versions 1 and 2, which no checkpoint holds."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(workspace.model, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        models.append(model.eval())
    return models


def kill_while_it_generates(scene: Scene, victim: int, generated: threading.Event) -> None:
    """SIGKILL a server's processes as soon as it has sampled some tokens of unfinished responses."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        stats = scene.pool.run(scene.pool.engines[victim].stats(), label="stats", timeout_s=DEADLINE_S)
        if stats.generated_tokens > 20 and stats.num_running > 0:
            break
        assert time.monotonic() < deadline and not generated.is_set(), f"never caught generating: {stats}"
        time.sleep(0.005)
    group = scene.servers[victim].process_group
    assert group is not None
    os.killpg(group, signal.SIGKILL)


def check_rollout(rollout: Rollout, model: PreTrainedModel, *, version: int) -> None:
    """Every prompt has its group, no sample is there twice, and every token was sampled by these weights."""
    assert len(rollout.groups) == NUM_PROMPTS
    assert len({group.group_id for group in rollout.groups}) == NUM_PROMPTS
    assert [len(group.samples) for group in rollout.groups] == [SIBLINGS] * NUM_PROMPTS
    assert len({sample.sample_id for sample in rollout.samples}) == NUM_PROMPTS * SIBLINGS
    assert {one for sample in rollout.samples for one in sample.weight_versions} == {version}
    for sample in rollout.samples:
        expected = log_probs(model, sample)
        torch.testing.assert_close(torch.tensor(sample.rollout_log_probs), expected, atol=2e-4, rtol=0)


def log_probs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """Return the log-probs of a response under Hugging Face's own forward pass."""
    tokens = torch.tensor([sample.tokens])
    start = len(sample.tokens) - sample.response_length
    with torch.no_grad():
        logits = model(tokens).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, tokens[0, start:, None])[:, 0]


@pytest.mark.parametrize("scene", [False], indirect=True, ids=["least loaded"])
def test_a_rollout_survives_the_death_of_a_server_which_comes_back_with_current_weights(
    scene: Scene, models: list[PreTrainedModel]
) -> None:
    stream = scene.generation.stream(scene.source, num_rollouts=2)
    scene.publisher_of(models[0]).publish(version=1)
    generated = threading.Event()
    with ThreadPoolExecutor() as threads:
        taken = threads.submit(stream.take, 0)
        taken.add_done_callback(lambda _: generated.set())
        kill_while_it_generates(scene, 0, generated)
        first = taken.result(DEADLINE_S)
    check_rollout(first, models[0], version=1)

    scene.publisher_of(models[1]).publish(version=2)
    assert scene.pool.num_restarts == 1
    assert all(server.is_running() for server in scene.servers)
    before = [scene.pool.run(engine.stats(), label="stats", timeout_s=DEADLINE_S) for engine in scene.pool.engines]
    check_rollout(stream.take(1), models[1], version=2)
    after = [scene.pool.run(engine.stats(), label="stats", timeout_s=DEADLINE_S) for engine in scene.pool.engines]
    assert all(late.generated_tokens > early.generated_tokens for early, late in zip(before, after, strict=True))
    stream.close()


@pytest.mark.parametrize("scene", [True], indirect=True, ids=["router"])
def test_a_rollout_survives_the_death_of_all_servers_and_gets_its_weights_again(
    scene: Scene, models: list[PreTrainedModel]
) -> None:
    publisher = scene.publisher_of(models[0])
    stream = scene.generation.stream(scene.source, num_rollouts=1, waiter=publisher)
    publisher.publish(version=1)
    generated = threading.Event()
    with ThreadPoolExecutor() as threads:
        taken = threads.submit(stream.take, 0)
        taken.add_done_callback(lambda _: generated.set())
        for victim in range(2):
            kill_while_it_generates(scene, victim, generated)
        rollout = taken.result(DEADLINE_S)
    check_rollout(rollout, models[0], version=1)
    assert scene.pool.num_restarts == 2
    stream.close()


@dataclass
class Served:
    """A `qwench serve` process."""

    address: str
    process: ServerProcess


@pytest.fixture(scope="module")
def served(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve the workspace's model, asking for a token."""
    config = parse_run("train", workspace.train_argv(None, save_interval=None, engine_start_timeout=DEADLINE_S)[1:])
    inputs = read_inputs(config, plan_inputs(config, trains=True))
    log_folder = tmp_path_factory.mktemp("logs")
    order = replace(server_order(inputs, token=TOKEN, with_weights=True, on_gpus=False), log_folder=log_folder)
    command = embedded_command(order, index=0, gpu_ids=(), environ=ONE_THREAD)
    process = ServerProcess(command)
    yield Served(process.start().removeprefix("http://"), process)
    process.stop()


def test_a_run_uses_an_engine_that_runs_already_and_leaves_it_running(
    served: Served, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENCH_TOKEN", TOKEN)
    save = tmp_path / "run"
    run_verb(workspace.train_argv(save, rollout_external_engine_addrs=served.address, deterministic_mode=None))
    assert column(save, "rollout/step") == [0, 1, 2]
    assert column(save, "train/train_rollout_logprob_abs_diff") == pytest.approx([0.0] * 6, abs=1e-4)
    assert served.process.is_running()


def test_an_engine_without_the_runs_token_takes_no_weights(
    served: Served, workspace: Workspace, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENCH_TOKEN", "another")
    code, error = in_process(
        workspace.train_argv(None, rollout_external_engine_addrs=served.address, save_interval=None, deterministic_mode=None)
    )
    assert code == 1 and "token" in error, error


def test_an_engine_of_another_vocabulary_is_refused(
    served: Served, workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    other = tmp_path / "other"
    shutil.copytree(workspace.model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 64}))
    argv = workspace.train_argv(
        tmp_path / "run", hf_checkpoint=other, rollout_external_engine_addrs=served.address, deterministic_mode=None
    )
    code, error = in_process(argv)
    assert code == 2, error
    for word in ("--rollout-external-engine-addrs", served.address, "vocab_size", str(config["vocab_size"] + 64)):
        assert word in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_engine_that_accepts_and_never_answers_ends_the_run_at_its_deadline(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        argv = workspace.train_argv(
            tmp_path / "run", rollout_external_engine_addrs=address, rollout_health_check_timeout=1, deterministic_mode=None
        )
        code, error = in_process(argv)
    assert code == 2, error
    assert "--rollout-external-engine-addrs" in error and address in error and "did not end within 1 s" in error


def test_an_engine_that_is_not_there_is_named(workspace: Workspace, tmp_path: Path, in_process: InProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code, error = in_process(
        workspace.train_argv(tmp_path / "run", rollout_external_engine_addrs=address, deterministic_mode=None)
    )
    assert code == 2 and address in error and "cannot be reached" in error, error


def test_a_port_in_use_is_named_before_the_model_is_loaded(workspace: Workspace, in_process: InProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, error = in_process(["serve", "--hf-checkpoint", str(workspace.model), "--port", port])
    assert code == 2 and port in error and "--port" in error, error


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--router-policy", "wisest"), ["--router-policy", "wisest"]),
        (("--router-polcy", "random"), ["--router-polcy"]),
        (("--router-host", "0.0.0.0"), ["--router-host", "not passed on"]),
        (("--router-port", "many"), ["--router-port", "many"]),
    ],
)
def test_flags_that_the_router_does_not_take_are_named(
    extra: tuple[str, ...], words: list[str], workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    argv = [*workspace.train_argv(tmp_path / "run", rollout_num_gpus=1, colocate=None), *extra]
    code, error = in_process(argv)
    assert code == 2, error
    for word in words:
        assert word in error


def test_a_router_port_in_use_is_named_before_an_engine_is_started(
    workspace: Workspace, tmp_path: Path, in_process: InProcess
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        argv = [*workspace.train_argv(tmp_path / "run", rollout_num_gpus=1, colocate=None), "--router-port", port]
        code, error = in_process(argv)
    assert code == 2 and f"127.0.0.1 port {port}" in error and "choose another with --router-port" in error, error
    assert not list((tmp_path / "run").rglob("engine-*.log"))


def test_two_trainer_ranks_learn_from_an_engine_of_two_ranks_and_score_by_the_reference_meanwhile(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = {"rollout_engine": "embedded", "rollout_num_gpus": 2, "rollout_num_gpus_per_engine": 2, "colocate": None}
    # Groups finish one after the other, and each fills the ranks.
    early = {"use_kl_loss": (), "sglang_server_concurrency": 4, "log_probs_max_tokens_per_gpu": 32}
    ranks = {"actor_num_gpus_per_node": 2, "deterministic_mode": None, "num_rollout": 2}
    run_verb(workspace.train_argv(tmp_path / "run", **DIGITS, **layout, **early, **ranks))
    assert "2 trainer ranks (fsdp) and 1 embedded engine of 2 processes\n" in capsys.readouterr().out
    gaps = column(tmp_path / "run", "train/train_rollout_logprob_abs_diff")
    assert gaps == pytest.approx([0.0] * 4, abs=1e-4)
    assert min(column(tmp_path / "run", "train/grad_norm")) > 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [record["perf/early_ref_share"] for record in records if "rollout/step" in record]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares), "the last groups are left to the learner"
    # Before the first step the policy is the reference, whenever that scored.
    first = {name: column(tmp_path / "run", f"rollout/{name}")[0] for name in ("ref_log_probs", "log_probs")}
    assert first["ref_log_probs"] == pytest.approx(first["log_probs"], abs=1e-5)
    assert column(tmp_path / "run", "train/kl_loss")[0] == pytest.approx(0.0, abs=1e-6)
    assert column(tmp_path / "run", "train/kl_loss")[-1] > 1e-6
