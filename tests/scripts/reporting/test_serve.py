"""The served report: it follows a run, answers on this machine only, and a mistake is one line."""

import json
import threading
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from scripts.reporting.page import page_data
from scripts.reporting.read import open_runs
from scripts.reporting.serve import Source, make_server
from tests.scripts.reporting.make_runs import record, write_run
from util.errors import UserError


@contextmanager
def serving(folder):
    source = Source(open_runs([folder]), [], lambda runs: page_data(runs, None, None, 50.0))
    server = make_server(source, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(address, path, **headers):
    connection = HTTPConnection(*address, timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_the_page_follows_the_run(tmp_path):
    folder = write_run(tmp_path / "run", [record(1, 5.0)])
    with serving(folder) as address:
        assert address[0] == "127.0.0.1"
        code, page = get(address, "/")
        assert code == 200 and b"const LIVE = true" in page
        data = json.loads(get(address, "/data.json")[1])
        assert data["runs"][0]["x"]["step"] == [1]
        assert get(address, f"/data.json?have={data['version']}") == (204, b"")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record(2, 4.0)) + "\n")
        newer = json.loads(get(address, f"/data.json?have={data['version']}")[1])
        assert newer["runs"][0]["x"]["step"] == [1, 2] and newer["version"] != data["version"]
        assert get(address, "/etc/passwd")[0] == 404 and get(address, "/../run/config.yaml")[0] == 404


@pytest.mark.parametrize(
    "host, code", [("localhost:80", 200), ("127.0.0.1", 200), ("evil.example:8765", 403), ("", 403)]
)
def test_only_requests_to_this_machine_are_answered(tmp_path, host, code):
    with serving(write_run(tmp_path / "run", [record(1, 5.0)])) as address:
        assert get(address, "/", Host=host)[0] == code


def test_a_port_in_use_is_one_line(tmp_path):
    with serving(write_run(tmp_path / "run", [record(1, 5.0)])) as (_, port):
        message = f"^--serve={port}: cannot listen on 127.0.0.1:{port} .Address"
        pytest.raises(UserError, make_server, None, port).match(message)
