import json
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from qwench.errors import ConfigError, OutputError, QwenchError
from qwench.observability import tracking
from qwench.observability.metrics import MetricGate, MetricLog
from qwench.observability.tracking import (
    JsonlSink,
    MlflowSink,
    TensorBoardSink,
    WandbSink,
    check_metrics_file,
    import_mlflow,
    import_tensorboard,
    import_wandb,
)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_rollout(log: MetricLog, rollout_id: int, *, loss: float) -> None:
    metrics = {"rollout/raw_reward": 0.5, "eval/gsm8k": 0.25}
    log.log(rollout_id, metrics, steps=[{"train/loss": loss}, {"train/loss": loss + 1}])


def test_records_go_to_three_axes(tmp_path):
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    log = MetricLog([JsonlSink(path)], num_steps_per_rollout=2)
    log_rollout(log, 3, loss=10.0)
    log.close()
    assert lines_of(path) == [
        {"train/step": 6, "train/loss": 10.0},
        {"train/step": 7, "train/loss": 11.0},
        {"rollout/step": 3, "rollout/raw_reward": 0.5},
        {"eval/step": 3, "eval/gsm8k": 0.25},
    ]


def test_resumed_file_has_each_rollout_once(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    killed = MetricLog([JsonlSink(path)], num_steps_per_rollout=2)
    for rollout_id in range(4):
        log_rollout(killed, rollout_id, loss=10.0)
    with path.open("a") as file:
        file.write('{"rollout/step": 4, "rollout/raw_rew')  # the kill came in the middle of a line

    resumed = MetricLog([JsonlSink(path)], num_steps_per_rollout=2)
    resumed.resume(2, first_step=4)
    for rollout_id in range(2, 5):
        log_rollout(resumed, rollout_id, loss=20.0)
    resumed.close()

    records = lines_of(path)
    assert [r["rollout/step"] for r in records if "rollout/step" in r] == [0, 1, 2, 3, 4]
    assert [r["eval/step"] for r in records if "eval/step" in r] == [0, 1, 2, 3, 4]
    assert [(r["train/step"], r["train/loss"]) for r in records if "train/step" in r] == [
        *[(0, 10.0), (1, 11.0), (2, 10.0), (3, 11.0)],
        *[(4, 20.0), (5, 21.0), (6, 20.0), (7, 21.0), (8, 20.0), (9, 21.0)],
    ]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("content", "line"),
    [(bytes(range(128, 256)), 1), (b"not json\n", 1), (b'{"train/step": 0}\n[1]\n{"train/step": 1}\n', 2)],
)
def test_a_file_of_something_else_is_refused_in_one_sentence_and_kept(content, line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"metrics.jsonl line {line} is not a record of metrics.*--log-dir"):
        check_metrics_file(path)
    with pytest.raises(ConfigError, match="is not a record"):
        MetricLog([JsonlSink(path)], num_steps_per_rollout=1).resume(1, first_step=1)
    assert path.read_bytes() == content


@pytest.mark.parametrize("tail", [b"", b'{"train/step": 1, "tra', b"\0\0\0", b'{"train/x": "\xc3'])
def test_a_line_that_a_kill_or_a_power_cut_left_unfinished_is_no_damage(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"train/step": 0}\n{"of": "no axis"}\n' + tail)
    check_metrics_file(path)
    MetricLog([JsonlSink(path)], num_steps_per_rollout=1).resume(1, first_step=1)
    assert lines_of(path) == [{"train/step": 0}, {"of": "no axis"}]


@pytest.mark.parametrize("content", [None, ""])
def test_a_resumed_run_says_that_its_history_is_gone(content, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    MetricLog([JsonlSink(path)], num_steps_per_rollout=1).resume(3, first_step=3)
    assert f"{path} has no record of the 3 rollouts before" in caplog.text


def test_a_new_run_says_what_it_replaces(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"rollout/step": 0}\n{"rollout/step": 1}\n')
    MetricLog([JsonlSink(path)], num_steps_per_rollout=1).resume(0, first_step=0)
    MetricLog([JsonlSink(tmp_path / "other.jsonl")], num_steps_per_rollout=1).resume(0, first_step=0)
    assert caplog.messages == [f"{path}: 2 records of an earlier run are replaced"]


def test_floats_come_back_bit_for_bit_and_not_finite_ones_as_null_and_are_on_the_disk(tmp_path, monkeypatch):
    kept: list[int] = []
    monkeypatch.setattr(tracking.os, "fsync", lambda descriptor: kept.append(os.fstat(descriptor).st_size))
    log = MetricLog([JsonlSink(tmp_path / "m.jsonl")], num_steps_per_rollout=1)
    log.log(0, {"rollout/a": 0.1 + 0.2, "rollout/b": math.nan, "rollout/c": True})
    assert lines_of(tmp_path / "m.jsonl") == [
        {"rollout/step": 0, "rollout/a": 0.30000000000000004, "rollout/b": None, "rollout/c": 1.0}
    ]
    assert kept == [(tmp_path / "m.jsonl").stat().st_size]


def test_more_steps_than_announced_are_refused():
    with pytest.raises(AssertionError, match="brought 2 steps"):
        MetricLog([], num_steps_per_rollout=1).log(0, {}, steps=[{}, {}])


def test_tensorboard_shows_the_repeated_rollouts_of_a_resumed_run(tmp_path):
    killed = MetricLog([TensorBoardSink(tmp_path)], num_steps_per_rollout=2)
    for rollout_id in range(3):
        log_rollout(killed, rollout_id, loss=10.0)
    killed.close()
    resumed = MetricLog([TensorBoardSink(tmp_path)], num_steps_per_rollout=2)
    resumed.resume(1, first_step=2)
    log_rollout(resumed, 1, loss=20.0)
    resumed.close()

    events = EventAccumulator(str(tmp_path / "train")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(0, 10.0), (1, 11.0), (2, 20.0), (3, 21.0)]


def test_a_file_for_tensorboard_says_its_version_where_it_begins_and_when_each_record_came(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.time, "time", lambda: 12.5)
    log = MetricLog([TensorBoardSink(tmp_path)], num_steps_per_rollout=1)
    log.resume(3, first_step=5)
    log.log(3, {"rollout/raw_reward": 0.5})
    [file] = (tmp_path / "rollout").iterdir()
    version, start, record = EventFileLoader(str(file)).Load()
    assert re.fullmatch(rf"events\.out\.tfevents\.\d{{19}}\.{re.escape(platform.node())}\.{os.getpid()}", file.name)
    assert [event.wall_time for event in (version, start, record)] == [12.5] * 3
    assert (version.file_version, start.step, start.session_log.status, record.step) == (
        "brain.Event:2",
        3,
        SessionLog.START,
        3,
    )


@pytest.mark.parametrize(
    ("load", "package", "install"),
    [
        (import_wandb, "wandb", "pip install wandb"),
        (import_mlflow, "mlflow", "pip install mlflow"),
        (import_tensorboard, "tensorboard", "pip install 'qwench[tensorboard]'"),
    ],
)
def test_a_missing_package_is_the_users_mistake(load, package, install, monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(tracking.importlib, "import_module", missing)
    with pytest.raises(ConfigError) as refused:
        load()
    assert str(refused.value) == f"--use-{package} needs the package {package}, which is not installed; run `{install}`."


def test_a_wandb_whose_own_dependency_is_missing_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import a_dependency_of_wandb\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"--use-wandb: wandb cannot be imported \(No module named 'a_dependency_of_wandb'\)"):
        WandbSink(project="p", steps_per_rollout=1)


def test_a_run_must_reach_the_value_that_it_was_given():
    def log(*values: float) -> MetricLog:
        made = MetricLog([], num_steps_per_rollout=1, gate=MetricGate("eval/gsm8k", 0.5))
        for rollout_id, value in enumerate(values):
            made.log(rollout_id, {"eval/gsm8k": value, "other": 9.0})
        made.log(len(values), {"other": 9.0})
        return made

    log(0.1, 0.5, 0.2).finish()
    with pytest.raises(QwenchError, match=r"eval/gsm8k reached 0\.4; --ci-metric-checker-threshold asks for 0\.5"):
        log(0.4, 0.1).finish()
    with pytest.raises(QwenchError, match="eval/gsm8k was never logged"):
        log().finish()
    MetricLog([], num_steps_per_rollout=1).finish()


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """Refuse to write files beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path, caplog):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    log = MetricLog([sink], num_steps_per_rollout=1)
    with no_file_beyond(100):
        for rollout_id in range(5):
            log.log(rollout_id, {"rollout/raw_reward": 0.5})  # a line has 47 bytes
        assert [record["rollout/step"] for record in lines_of(tmp_path / "metrics.jsonl")] == [0, 1], "whole lines alone"
        with pytest.raises(
            OutputError, match=rf"--log-dir {tmp_path}: metrics.jsonl cannot be .* free\); 141 bytes .* are lost"
        ):
            log.finish()
    log.close()
    log.log(5, {"rollout/raw_reward": 0.5})
    assert [record["rollout/step"] for record in lines_of(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "kept until there is room" in said[0] and "no record is lost" in said[1]


def test_a_history_that_a_full_disk_refuses_names_the_flag_and_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog([JsonlSink(path)], num_steps_per_rollout=2)
    log_rollout(log, 0, loss=10.0)
    before = path.read_bytes()
    with no_file_beyond(1), pytest.raises(OutputError, match=rf"^--log-dir {tmp_path} cannot be written to \(File too large"):
        log.resume(1, first_step=2)
    assert path.read_bytes() == before


def test_curves_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path):
    log = MetricLog([TensorBoardSink(tmp_path)], num_steps_per_rollout=1)
    with no_file_beyond(100):
        for rollout_id in range(5):
            log.log(rollout_id, {"rollout/raw_reward": rollout_id})
        with pytest.raises(OutputError, match=rf"^--tensorboard-dir {tmp_path}/rollout: "):
            log.finish()
    log.close()
    events = EventAccumulator(str(tmp_path / "rollout")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rollout/raw_reward")] == [(i, float(i)) for i in range(5)]


def test_tensorboard_keeps_odd_names_and_values(tmp_path):
    log = MetricLog([TensorBoardSink(tmp_path)], num_steps_per_rollout=1)
    values = {"rollout/\u00fc": 1.0, "rollout/nan": math.nan, "rollout/inf": math.inf, "rollout/huge": 1e300}
    log.log(0, values)
    log.close()
    events = EventAccumulator(str(tmp_path / "rollout")).Reload()
    read = {name: events.Scalars(name)[0].value for name in values}
    assert math.isnan(read.pop("rollout/nan"))
    assert read == {"rollout/\u00fc": 1.0, "rollout/inf": math.inf, "rollout/huge": math.inf}


class FakeRun:
    """What wandb.init returns; `log` fails from the second call on."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Accept an axis."""

    def log(self, values: dict[str, float]) -> None:
        if self.logged:
            raise BrokenPipeError("the service is gone")
        self.logged.append(values)

    def finish(self) -> None:
        raise AssertionError("a service that failed is not asked again")


def test_a_service_that_fails_costs_its_curves_alone(monkeypatch, caplog):
    run = FakeRun()
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": staticmethod(lambda **flags: run)}))
    log = MetricLog([WandbSink(project="p", steps_per_rollout=1)], num_steps_per_rollout=1)
    for rollout_id in range(3):
        log.log(rollout_id, {"rollout/raw_reward": 0.5})
    log.finish()
    log.close()
    assert run.logged == [{"rollout/step": 0, "rollout/raw_reward": 0.5}]
    assert [record.getMessage() for record in caplog.records] == [
        "--use-wandb: Weights & Biases gets no more metrics (BrokenPipeError: the service is gone); the run goes on"
    ]


def test_the_group_of_wandb_names_the_run(monkeypatch):
    asked: dict[str, object] = {}
    axes: list[tuple[str, ...]] = []
    run = type("Run", (), {"define_metric": lambda _, *names, **axis: axes.append((*names, *axis.values()))})()
    init = staticmethod(lambda **flags: asked.update(flags) or run)
    login = staticmethod(lambda **account: asked.update(account))
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": init, "login": login}))
    WandbSink(project="p", group="g", team="t", mode="offline", folder=Path("w"), run_id="7", steps_per_rollout=1)
    assert asked == {
        "project": "p", "group": "g", "name": "g", "entity": "t", "mode": "offline", "dir": "w", "id": "7", "resume": "allow",
    }  # fmt: skip
    assert sorted(axes) == [
        ("*", "rollout/step"), ("eval/*", "eval/step"), ("eval/step",), ("rollout/step",), ("train/*", "train/step"),
        ("train/step",),
    ]  # fmt: skip
    asked.clear()
    WandbSink(project="p", host="http://h", key="k", steps_per_rollout=1)
    assert (asked["host"], asked["key"], asked["id"], asked["resume"], asked["dir"]) == ("http://h", "k", None, None, None)


def test_all_curves_may_count_the_steps_of_the_optimizer(monkeypatch):
    logged: list[dict[str, float]] = []
    members = {"log": lambda _, values: logged.append(values), "finish": lambda _: logged.append({"ended": 1.0})}
    run = type("Run", (), {"define_metric": lambda *_, **__: None, **members})()
    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": staticmethod(lambda **flags: run)}))
    log = MetricLog([WandbSink(project="p", steps_per_rollout=4)], num_steps_per_rollout=4)
    log.log(3, {"rollout/raw_reward": 0.5, "eval/aime": 0.25}, steps=[{"train/loss": 1.0}, {"train/loss": 2.0}])
    log.close()
    assert logged == [
        {"train/step": 12, "train/loss": 1.0},
        {"train/step": 13, "train/loss": 2.0},
        {"rollout/step": 12, "rollout/raw_reward": 0.5},
        {"eval/step": 12, "eval/aime": 0.25},
        {"ended": 1.0},
    ]


def test_a_service_that_does_not_start_is_one_sentence(monkeypatch):
    def init(**flags: object) -> None:
        raise RuntimeError("no network\nand more")

    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": staticmethod(init)}))
    with pytest.raises(
        ConfigError, match=r"Weights & Biases does not start \(RuntimeError: no network\); .*--wandb-mode offline"
    ):
        WandbSink(project="p", steps_per_rollout=1)
    fake = type("mlflow", (), {"set_experiment": staticmethod(lambda _: init())})
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with pytest.raises(ConfigError, match=r"MLflow does not start \(RuntimeError: no network\); check --mlflow-tracking-uri"):
        MlflowSink(uri=None, experiment="e", run_name=None, run_id=None)


class FakeMlflow:
    """The part of the package that is called; `log_metrics` fails from the third call on."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str):
        def call(*args: object, **flags: object) -> None:
            self.calls.append((name, *args, *flags.values()))
            if name == "log_metrics" and len(self.calls) > 5:
                raise ConnectionError("the server is gone")

        return call


def test_mlflow_gets_each_record_at_its_own_step_and_its_end_costs_its_curves_alone(monkeypatch, caplog):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    MetricLog([MlflowSink(uri=None, experiment="e", run_name="n", run_id=None)], num_steps_per_rollout=1).close()
    assert fake.calls == [("set_experiment", "e"), ("start_run", None, "n"), ("end_run",)]
    fake.calls.clear()
    log = MetricLog([MlflowSink(uri="http://h", experiment="e", run_name="n", run_id="7")], num_steps_per_rollout=1)
    log.log(3, {"rollout/reward (mean)": 0.5}, steps=[{"train/loss": 1.0}])
    log.log(4, {"rollout/reward (mean)": 0.5}, steps=[{"train/loss": 1.0}])
    log.finish()
    log.close()
    assert fake.calls == [
        ("set_tracking_uri", "http://h"),
        ("set_experiment", "e"),
        ("start_run", "7", "n"),
        ("log_metrics", {"train/loss": 1.0}, 3),
        ("log_metrics", {"rollout/reward _mean_": 0.5}, 3),
        ("log_metrics", {"train/loss": 1.0}, 4),
    ]
    assert caplog.messages == [
        "--use-mlflow: MLflow gets no more metrics (ConnectionError: the server is gone); the run goes on"
    ]
