"""The run with a stand-in for vLLM: turns, settings, and one clear message for whatever goes wrong."""

import json
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from requant import server
from requant.bench import client, command
from requant.bench.measure import settings
from requant.bench.workloads import SHAPES, Workload
from requant.cli import main

TINY = ("--workloads", "decode:8:8", "--streams", "2")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    """In vLLM's place; logs in a folder of the test's own."""
    program = (sys.executable, str(Path(__file__).parents[1] / "stand_in.py"))
    monkeypatch.setattr(server, "VLLM", program)
    monkeypatch.setattr(client, "VLLM", program)
    monkeypatch.setattr(command, "find_spec", lambda name: object())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def model(tmp_path):
    def make(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return str(folder)

    return make


def test_models_are_driven_in_turns(model, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = [
        model("ours"),
        "--against",
        model("theirs"),
        *TINY,
        "--json",
        str(report),
        "--vllm",
        "--max-num-seqs",
        "4",
    ]
    assert main(["bench", *arguments]) == 0
    printed = capsys.readouterr()
    driven = [line.split(", ")[3] for line in printed.err.splitlines() if line.startswith("decode, 2 streams")]
    assert driven == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert "| decode, 2 streams | ours, bfloat16 | 101.0 | 1.0 | 1.0 | 1.0 | **1.00** (1.00-1.00) |" in printed.out
    found = json.loads(report.read_text())
    assert found["ratios"] == {"decode": {"2": 1.0}}
    assert found["settings"][-2:] == ["--max-num-seqs", "4"]
    assert not list(tmp_path.glob("requant-bench-*"))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("deaf", ["error: vllm serve exited with 1 (log: {log})", "ValueError: this model can not be served"]),
        ("unanswered", ["error: decode, 2 streams: 3 of 4 requests answered (log: {log})"]),
        ("fail", ["error: vllm bench serve exited with 1 (logs: {folder})", "ValueError: no such dataset"]),
        ("fatal", ["error: vllm serve died with exit code 9 (log: {log})", "MemoryError: no room"]),
    ],
)
def test_what_goes_wrong_is_said_and_its_log_kept(name, lines, model, tmp_path, capsys):
    assert main(["bench", model(name), *TINY]) == 1
    printed = capsys.readouterr()
    assert not printed.out
    [folder] = tmp_path.glob("requant-bench-*")
    log = folder / "server-0.log"
    assert log.exists()
    assert printed.err.splitlines()[-len(lines) :] == [line.format(log=log, folder=folder) for line in lines]


def test_a_port_that_is_taken_meanwhile(model, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(server, "free_port", lambda: port)
        assert main(["bench", model("ours"), *TINY]) == 1
    message = f"error: http://127.0.0.1:{port}: another program took the port just now; run this again"
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_servers_share_a_gpu():
    works = [Workload(SHAPES["prefill"], 1)]
    assert settings(works, 2, gpu=False) == ["--max-model-len", "1041", "--no-enable-prefix-caching", "--seed", "0"]
    assert settings(works, 2, gpu=True)[-2:] == ["--gpu-memory-utilization", "0.450"]
