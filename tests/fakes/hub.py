"""A hub of one repository on loopback, as much of the Hugging Face hub's HTTP API as a snapshot takes."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qwench import cli

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(repository: str, files: Mapping[str, bytes], *, kind: str = "model") -> Iterator[tuple[str, list[str]]]:
    """Serve `files` of a model or dataset repository; yield the address, and the names of the files fetched so far."""
    fetched: list[str] = []
    api = f"/api/{kind}s/{repository}"
    content = f"/{repository}/resolve/{COMMIT}/" if kind == "model" else f"/{kind}s/{repository}/resolve/{COMMIT}/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(content)
            if path.startswith(f"{api}/tree/"):
                rows = [{"type": "file", "path": file, "size": len(data), "oid": _oid(data)} for file, data in files.items()]
                self._send(json.dumps(rows).encode(), with_body=with_body)
            elif path == api or path.startswith(f"{api}/revision/"):
                about = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                self._send(json.dumps(about).encode(), with_body=with_body)
            elif path.startswith(content) and name in files:
                if with_body:
                    fetched.append(name)
                self._send(files[name], with_body=with_body, etag=_oid(files[name]))
            else:
                self.send_error(404)

        def _send(self, body: bytes, *, with_body: bool, etag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if etag:
                self.send_header("ETag", f'"{etag}"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def run_with_new_client(words: Sequence[str]) -> None:
    """Run `qwench WORDS` in a forked process; the hub's client, which reads its variables at import, is imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    cli.main(list(words))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
