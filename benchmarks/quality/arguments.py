"""What the comparisons of methods ask for alike: a model, held-out texts, another text to calibrate on."""

import argparse
from pathlib import Path

from benchmarks.quality.jobs import Protocol


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--text", action="append", required=True, help="what perplexity is measured on; repeatable")
    made.add_argument("--calibration", required=True, help="another text")
    made.add_argument("--seqlen", type=int, default=1024)
    made.add_argument("--tokens", type=int, default=8192)
    made.add_argument("--json", type=Path)
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    arguments = made.parse_args(argv)
    if Path(arguments.calibration).resolve() in [Path(text).resolve() for text in arguments.text]:
        made.error("calibration and test text are the same file")
    return arguments


def protocol(arguments: argparse.Namespace) -> Protocol:
    return Protocol(arguments.model, tuple(arguments.text), arguments.seqlen, arguments.tokens)
