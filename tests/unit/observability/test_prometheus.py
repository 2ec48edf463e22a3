"""What Prometheus reads."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest

from qwench.errors import ConfigError
from qwench.observability.metrics import MetricLog
from qwench.observability.prometheus import PrometheusSink, check_port


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def test_the_newest_value_of_every_metric_is_served_until_the_end() -> None:
    port = free_port()
    sink = PrometheusSink(port=port, run_name='a "b"')
    log = MetricLog([sink], num_steps_per_rollout=1)
    log.log(0, {"rollout/raw_reward": 0.25})
    log.log(1, {"rollout/raw_reward": 0.5, "rollout/bad": float("nan")}, steps=[{"train/lr-pg_0": float("inf")}])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        content = answer.read()
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(content)))
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = content.decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'qwench_metric_rollout_bad{run_name="a \\"b\\""} NaN',
        'qwench_metric_rollout_raw_reward{run_name="a \\"b\\""} 0.5',
        'qwench_metric_rollout_step{run_name="a \\"b\\""} 1.0',
        'qwench_metric_train_lr_pg_0{run_name="a \\"b\\""} +Inf',
        'qwench_metric_train_step{run_name="a \\"b\\""} 1.0',
    ]
    assert lines[0] == "# TYPE qwench_metric_rollout_bad gauge"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/etc/passwd", timeout=20)
    log.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20)


def test_a_name_is_written_as_prometheus_reads_it() -> None:
    sink = PrometheusSink(port=0, run_name="a\\b\nc")
    MetricLog([sink], num_steps_per_rollout=1).log(0, {"rollout/worst": -float("inf")})
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/?all", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    sink.close()
    assert lines[-1] == r'qwench_metric_rollout_worst{run_name="a\\b\nc"} -Inf'


def test_a_port_that_another_process_has_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = rf"metrics cannot listen on 0\.0\.0\.0 port {port} \(.*in use\); choose another with --prometheus-port\."
        with pytest.raises(ConfigError, match=f"^{said}$"):
            check_port(port)
    check_port(free_port())
