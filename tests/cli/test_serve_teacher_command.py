"""gkd serve-teacher: what it refuses, at once and in one line."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from launching import run_gkd
from teacher_servers import start_server

TOKEN = "0123456789abcdef"


def refusal(*arguments: object, **environment: str) -> str:
    result = run_gkd(["serve-teacher", *map(str, arguments)], timeout_s=60, **environment)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and not result.stdout, result.stderr
    return result.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a.host.example"])
def test_other_hosts_than_loopback_need_a_token(host: str, tmp_path: Path) -> None:
    text = refusal("./no/model", "--host", host)
    assert f"--host: {host} can be reached from other machines" in text and "--token-file" in text
    empty = tmp_path / "token"
    empty.write_text("\n")
    assert "--token-file: a token is at least" in refusal("./no/model", "--host", host, "--token-file", empty)


def test_with_a_token_the_host_is_not_the_fault(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    for arguments, environment in ((("--token-file", tmp_path / "token"), {}), ((), {"GKD_SERVER_TOKEN": TOKEN})):
        text = refusal("./no/model", "--host", "0.0.0.0", "--port", 0, *arguments, **environment)
        assert "there is no folder './no/model'" in text


def test_a_token_on_the_command_line_is_not_taken() -> None:
    result = run_gkd(["serve-teacher", "model", "--token", TOKEN])
    assert result.returncode == 2 and "No such option" in result.stderr


def test_a_port_in_use_is_said_before_the_model_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: cannot listen on 127.0.0.1:{port}: Address already in use" in refusal("no", "--port", port)


def test_a_sequence_cannot_be_longer_than_the_models_context(tiny_teacher: Path) -> None:
    text = refusal(tiny_teacher, "--port", 0, "--max-model-tokens", 513)
    assert "--max-model-tokens: 513 is more than the 512" in text


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    text = refusal("no", "--host", "192.0.2.1", "--port", 8300, GKD_SERVER_TOKEN=TOKEN)
    assert "cannot listen on 192.0.2.1:8300" in text


@pytest.mark.slow
def test_it_can_be_stopped_while_it_loads(tiny_teacher: Path, tmp_path: Path) -> None:
    stops = (signal.SIGINT, signal.SIGTERM)
    servers = [start_server(tiny_teacher, tmp_path) for _ in stops]
    try:
        time.sleep(4)
        for server, stop in zip(servers, stops, strict=True):
            assert server.process.poll() is None
            server.process.send_signal(stop)
        for server, stop in zip(servers, stops, strict=True):
            assert server.process.wait(30) in (0, -stop), server.errors  # the latter before it has looked at signals
            assert "Traceback" not in server.errors, server.errors[-2000:]
    finally:
        for server in servers:
            server.process.kill()
