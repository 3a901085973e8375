"""A server of the report of running runs. It listens on 127.0.0.1 only, so nothing leaves the machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from scripts.reporting.page import to_html
from scripts.reporting.read import Run, RunReader
from util.errors import UserError

MakeData = Callable[[list[Run]], dict[str, Any]]


class Source:
    """The current data of the page. It is computed again when a file of a run has changed, and only then."""

    def __init__(self, readers: list[RunReader], others: list[Run], make: MakeData):
        self._readers, self._others, self._make = readers, others, make
        self._lock = threading.Lock()
        self._version, self._data = 0, {}  # type: int, dict[str, Any]

    def current(self) -> dict[str, Any]:
        """Returns the data, after reading what was added to the runs. Its `version` grows with each change."""
        with self._lock:
            changed = [reader.update() for reader in self._readers]
            if any(changed) or not self._version:
                self._version += 1
                runs = [reader.run for reader in self._readers] + self._others
                self._data = self._make(runs) | {"version": str(self._version)}
            return self._data


def make_server(source: Source, port: int) -> ThreadingHTTPServer:
    """Returns a server of the page at / and its data at /data.json; the caller starts it.

    Requests that name another host are refused: a web page on a domain that resolves to 127.0.0.1 could otherwise read
    the report (DNS rebinding).
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in ("127.0.0.1", "localhost"):
                return self.reply(403, "text/plain", b"this server answers for 127.0.0.1 and localhost only\n")
            url = urlparse(self.path)
            if url.path == "/":
                return self.reply(200, "text/html; charset=utf-8", to_html(source.current(), live=True).encode())
            if url.path != "/data.json":
                return self.reply(404, "text/plain", b"not found\n")
            data = source.current()
            if parse_qs(url.query).get("have") == [data["version"]]:
                return self.reply(204, "application/json", b"")
            body = json.dumps(data, allow_nan=False).encode()
            return self.reply(200, "application/json", body)

        def reply(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            if code != 204:
                self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *words: Any) -> None:
            """Prints nothing: a page that follows a run asks every few seconds."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as e:
        raise UserError(f"--serve={port}: cannot listen on 127.0.0.1:{port} ({e.strerror}); give another port") from e


def serve(readers: list[RunReader], others: list[Run], port: int, make: MakeData) -> None:
    """Serves the report until Ctrl-C."""
    source = Source(readers, others, make)
    source.current()  # errors are reported before the address is printed
    with make_server(source, port) as server:
        server.daemon_threads = True
        print(f"http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
