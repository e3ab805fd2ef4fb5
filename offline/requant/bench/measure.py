"""The run: servers started one after another, then driven in turns, so that whatever else the machine does hits all."""

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from requant.bench.client import Figures, drive
from requant.bench.models import Served
from requant.bench.results import Cell, Footprint, Results
from requant.bench.workloads import Workload, longest
from requant.processes import peak_resident_bytes
from requant.progress import say
from requant.server import Server, ServerError, serve

GPU_SHARE = 0.9  # of a GPU's memory, for all servers together: each would take as much by itself
WAITING_SECONDS = 30.0  # between two lines about a server that starts


def settings(works: Sequence[Workload], servers: int, gpu: bool) -> list[str]:
    """The arguments of every ``vllm serve``. Nothing may be remembered from one repetition to the next."""
    share = ["--gpu-memory-utilization", f"{GPU_SHARE / servers:.3f}"] if gpu else []
    return ["--max-model-len", str(longest(works)), "--no-enable-prefix-caching", "--seed", "0", *share]


def measure(
    models: Sequence[Served], works: Sequence[Workload], repetitions: int, arguments: Sequence[str]
) -> Generator[Results]:
    """``models``: that which the run is about, then those it is compared with, of which the first is the reference.

    Yields all that has been measured, after each repetition. Raises ServerError. No server is left behind, however it
    ends.
    """
    with _logs() as folder, ExitStack() as stack:
        servers = {}
        for number, served in enumerate(models):
            say(f"starting vllm serve {served.path} --dtype {served.dtype} {' '.join(arguments)}")
            log = folder / f"server-{number}.log"
            running = serve(served.path, "--dtype", served.dtype, *arguments, log=log, waiting=_waiting())
            servers[served] = stack.enter_context(running)
            say(f"ready after {servers[served].startup_seconds:.0f} s")
        reference = models[1].name if len(models) > 1 else None
        cells: list[Cell] = []
        for work in works:
            repeated: list[dict[str, Figures]] = []
            for seed in range(repetitions):
                repeated.append(_repetition(servers, work, seed, f"{seed + 1}/{repetitions}", folder))
                runs = {served.name: [figures[served.name] for figures in repeated] for served in models}
                footprints = {served.name: _footprint(served, server) for served, server in servers.items()}
                yield Results(footprints, reference, [*cells, Cell(work, runs)])
            cells.append(Cell(work, runs))


def _repetition(
    servers: dict[Served, Server], work: Workload, seed: int, number: str, folder: Path
) -> dict[str, Figures]:
    found = {}
    # the order changes too, so that none always runs on the warmer machine
    for served, server in list(servers.items())[:: 1 if seed % 2 else -1]:
        found[served.name] = drive(server, served.path, work, seed, folder)
        say(f"{work.name}, {number}, {served.name}: {found[served.name][work.throughput]:.1f} tokens/s")
    return found


def _footprint(served: Served, server: Server) -> Footprint:
    return Footprint(served.disk_bytes(), server.startup_seconds, peak_resident_bytes(server.session))


def _waiting() -> Callable[[float], None]:
    told = 0.0

    def tell(elapsed: float) -> None:
        nonlocal told
        if elapsed > told + WAITING_SECONDS:
            told = elapsed
            say(f"starting: {elapsed:.0f} s")

    return tell


@contextmanager
def _logs() -> Iterator[Path]:
    """A folder that outlives the run only where a server failed, whose error names it."""
    folder = Path(tempfile.mkdtemp(prefix="requant-bench-"))
    kept = False
    try:
        yield folder
    except ServerError:
        kept = True
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
