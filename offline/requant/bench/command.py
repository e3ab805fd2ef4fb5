"""The arguments of `requant bench`, and what is refused before anything is started."""

import argparse
import json
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from requant.arguments import number, numbers
from requant.bench.environment import environment
from requant.bench.measure import measure, settings
from requant.bench.models import parse_all
from requant.bench.plot import check_plot, draw
from requant.bench.table import markdown
from requant.bench.workloads import SHAPES, Shape, workloads
from requant.errors import InputError
from requant.staging import require_folder, write_whole

STREAMS = (1, 8, 32)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser("bench", help="measure served throughput", description=run.__doc__)
    bench.set_defaults(run=run)
    bench.add_argument("out", metavar="OUT", help="a model folder; @float32 after it for other than bfloat16")
    bench.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="MODEL", help="others; the first counts as 1"
    )
    bench.add_argument("--streams", type=numbers, default=STREAMS, metavar="1,8,32", help="requests at a time")
    kinds = ",".join(SHAPES)
    bench.add_argument(
        "--workloads",
        type=_shapes,
        default=tuple(SHAPES.values()),
        metavar="KIND[:IN:OUT],…",
        help=f"of {kinds}, and the tokens of a prompt and of its answer",
    )
    bench.add_argument("--repetitions", type=number, default=3, metavar="N")
    bench.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything that was measured, after each repetition"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw throughputs (.png, .svg, .pdf)")
    bench.add_argument(
        "--vllm", nargs=argparse.REMAINDER, default=[], metavar="ARG", help="all that follows goes to every vllm serve"
    )


def run(arguments: argparse.Namespace) -> None:
    """Serve OUT and the models it is compared with by vLLM, with equal settings; drive them in turns with vLLM's
    own benchmark client; print throughput, latency, memory, start-up time and ratios as Markdown."""
    models = parse_all([arguments.out, *arguments.against])
    _check(arguments)
    works = workloads(arguments.workloads, arguments.streams)
    where = environment()
    serving = [*settings(works, len(models), gpu=bool(where["gpus"])), *arguments.vllm]
    with closing(measure(models, works, arguments.repetitions, serving)) as measured:  # servers end with it
        for results in measured:
            if arguments.json:  # now, because the next hour may not end well
                found = {**results.to_dict(), **where, "settings": serving}
                write_whole(arguments.json, json.dumps(found, indent=1))
    print(markdown(results))
    if arguments.plot:
        draw(results, arguments.plot)


def _check(arguments: argparse.Namespace) -> None:
    """Raises InputError for what would fail after hours otherwise."""
    if find_spec("vllm") is None:
        raise InputError("vLLM is not installed in this environment (docs.vllm.ai, Installation)")
    if arguments.plot:
        check_plot(arguments.plot)
    for path in (arguments.json, arguments.plot):
        if path:
            require_folder(path)


def _shapes(text: str) -> tuple[Shape, ...]:
    """One of a kind at most: kinds name the ratios."""
    try:
        shapes = tuple(Shape.parse(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of {', '.join(SHAPES)}, each with IN:OUT tokens or without"
        ) from None
    if len({shape.kind for shape in shapes}) < len(shapes):
        raise argparse.ArgumentTypeError(f"{text!r} names a kind twice")
    return shapes
