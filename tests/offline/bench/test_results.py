"""Ratios, tables and pictures of figures that are known."""

import json
from pathlib import Path

import pytest
from requant.bench.client import checked
from requant.bench.environment import environment
from requant.bench.plot import draw
from requant.bench.results import Cell, Footprint, Ratio, Results
from requant.bench.table import markdown
from requant.bench.workloads import Shape, Workload
from requant.server import ServerError


def figures(throughput: float, inter_token: float = 2.0) -> dict[str, float]:
    return {
        "output_throughput": throughput,
        "total_token_throughput": 3 * throughput,
        "median_ttft_ms": 10.0,
        "median_itl_ms": inter_token,
        "p99_itl_ms": 2 * inter_token,
    }


DECODE = Cell(
    Workload(Shape("decode", 32, 96), 8),
    {"q": [figures(30), figures(10), figures(22)], "bf16": [figures(10), figures(5), figures(10)]},
)
PREFILL = Cell(
    Workload(Shape("prefill", 64, 1), 1),
    {"q": [figures(8, 0)] * 3, "bf16": [figures(4, 0)] * 3},
)
FOOTPRINTS = {"q": Footprint(1_500_000, 31.4, 900_000_000), "bf16": Footprint(4_000_000, 29.6, 0)}
COMPARED = Results(FOOTPRINTS, "bf16", [DECODE, PREFILL])
ALONE = Results({"q": FOOTPRINTS["q"]}, None, [DECODE])


def test_a_ratio_compares_within_a_repetition():
    assert COMPARED.ratio(DECODE, "q") == Ratio(2.2, 2.0, 3.0)
    assert COMPARED.ratio(DECODE, "bf16") is None
    assert ALONE.ratio(DECODE, "q") is None


def test_tables():
    assert markdown(COMPARED) == (
        "| model | on disk, MB | start-up, s | peak memory of its server, MB |\n"
        "| --- | --- | --- | --- |\n"
        "| q | 1.5 | 31 | 900.0 |\n"
        "| bf16 | 4.0 | 30 | - |\n"
        "\n"
        "| workload | model | tokens/s | first token, ms | inter-token, ms | its p99, ms | over bf16 (low-high) |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| decode, 8 streams | q | 22.0 | 10.0 | 2.0 | 4.0 | **2.20** (2.00-3.00) |\n"
        "| decode, 8 streams | bf16 | 10.0 | 10.0 | 2.0 | 4.0 |  |\n"
        "| prefill, 1 stream | q | 24.0 | 10.0 | - | - | **2.00** (2.00-2.00) |\n"
        "| prefill, 1 stream | bf16 | 12.0 | 10.0 | - | - |  |"
    )


def test_a_model_alone_has_no_ratios():
    assert markdown(ALONE).splitlines()[-1] == "| decode, 8 streams | q | 22.0 | 10.0 | 2.0 | 4.0 |"
    assert ALONE.to_dict()["ratios"] == {}


def test_json_leads_with_the_ratios():
    found = json.loads(json.dumps(COMPARED.to_dict()))
    assert found["ratios"] == {"decode": {"8": 2.2}, "prefill": {"1": 2.0}}
    assert found["reference"] == "bf16"
    assert found["models"]["q"]["startup_seconds"] == 31.4
    assert [(row["kind"], row["model"]) for row in found["results"]] == [
        ("decode", "q"),
        ("decode", "bf16"),
        ("prefill", "q"),
        ("prefill", "bf16"),
    ]
    assert found["results"][0]["ratio"] == {"median": 2.2, "low": 2.0, "high": 3.0}
    assert len(found["results"][0]["repetitions"]) == 3


def test_an_unanswered_request_is_an_error():
    whole = {"completed": 16, "total_output_tokens": 16 * 96, "duration": 1.5, "label": None}
    assert checked(whole, DECODE.work, Path("log")) == {k: v for k, v in whole.items() if k != "label"}
    with pytest.raises(ServerError, match=r"decode, 8 streams: 15 of 16 requests answered \(log: log\)"):
        checked(whole | {"completed": 15}, DECODE.work, Path("log"))
    with pytest.raises(ServerError, match="1535 tokens came, not 1536"):
        checked(whole | {"total_output_tokens": 1535}, DECODE.work, Path("log"))


def test_where_it_was_measured(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    found = environment()
    assert found["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "secret" not in found["environment"].values()
    json.dumps(found)
    assert found["cores"] >= 1
    assert {"vllm", "vllm-requant", "torch", "transformers"} <= set(found["versions"])


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw(COMPARED, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
