"""Time of device work: a CUDA graph of calls on rotating inputs, replayed between events."""

import statistics
import time
from collections.abc import Callable

import torch

Calls = list[Callable[[], torch.Tensor]]
REPLAY_SECONDS = 0.015
REPLAYS = (5, 60)


def microseconds(calls: Calls, device: torch.device) -> float:
    """Median over replays of the time of one call. Without a GPU: one call by the wall clock, which means nothing."""
    if device.type != "cuda":
        begun = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - begun) * 1e6
    graph = _captured(calls)
    replays = int(REPLAY_SECONDS / max(_replay(graph), 1e-6))
    times = [_replay(graph) for _ in range(min(max(replays, REPLAYS[0]), REPLAYS[1]))]
    return statistics.median(times) / len(calls) * 1e6


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of one replay."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begun.record()
    graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(ended) * 1e-3


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches: bytes/s of a large copy (read plus written), FLOP/s of a large bf16 product."""
    size, side = (2**31, 8192) if device.type == "cuda" else (2**26, 512)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    # by a kernel: the driver's own copy inside a graph reaches two thirds of it on an H200
    copy = microseconds([lambda: torch.mul(source, 2.0, out=target)], device)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = microseconds([lambda: a @ b], device)
    return {"copy_bytes_per_s": 2 * size / copy * 1e6, "bf16_flop_per_s": 2 * side**3 / product * 1e6}
