"""The newest value of every metric over HTTP, for Prometheus to read.

GET /metrics  ->  qwench_metric_rollout_raw_reward{run_name="qwench"} 0.5
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qwench.errors import ConfigError, cannot_listen
from qwench.observability.metrics import Axis, Record
from qwench.threads import daemon

_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")
_FLAG = "--prometheus-port"


class PrometheusSink:
    """Serves the values from a thread until it is closed."""

    def __init__(self, *, port: int, run_name: str) -> None:
        """Serve on every address of this machine.

        Raises:
            ConfigError: another process has the port.
        """
        label = run_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        values: dict[str, float] = {}
        self._values = values

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                """Answer with all values."""
                if self.path.partition("?")[0] not in ("/", "/metrics"):
                    self.send_error(404)
                    return
                content = "".join(_lines(name, label, value) for name, value in sorted(values.copy().items())).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Log nothing: Prometheus asks every few seconds."""

        self._server = _open(port, Handler)
        self.port: int = self._server.server_address[1]
        daemon("prometheus", self._server.serve_forever).start()

    def write(self, rollout_id: int, records: Sequence[Record]) -> None:
        """Replace the values by those of the records."""
        for record in records:
            self._values.update({f"qwench_metric_{_NO_NAME.sub('_', name)}": value for name, value in record.metrics.items()})
            self._values[f"qwench_metric_{_NO_NAME.sub('_', record.axis.value)}"] = float(record.step)

    def drop_from(self, first_steps: Mapping[Axis, int]) -> None:
        """Keep everything: nothing was written before."""

    def check(self) -> None:
        """Keep nothing on a disk."""

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()


def check_port(port: int) -> None:
    """Check that the port is free.

    Raises:
        ConfigError: it is not.
    """
    _open(port, BaseHTTPRequestHandler).server_close()


def _open(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer(("", port), handler)
    except OSError as error:
        raise ConfigError(cannot_listen("metrics", "0.0.0.0", port, error, flag=_FLAG)) from error


def _lines(name: str, label: str, value: float) -> str:
    text = "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)
    return f'# TYPE {name} gauge\n{name}{{run_name="{label}"}} {text}\n'
