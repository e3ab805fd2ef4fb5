"""The ``requant`` command: arguments in, one line or one table out. Exit codes: 0 done, 1 bad input, 2 usage."""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from requant_kernels.errors import CheckpointError, SchemeError

from requant import recipe as recipes
from requant.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)  # so that unfinished folders are removed
    try:
        return int(arguments.run(arguments) or 0)
    except (InputError, SchemeError, CheckpointError) as error:
        line = str(error)
    except OSError as error:
        line = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {line}", file=sys.stderr)
    return 1


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="requant", description="Dense-plus-sparse low-bit checkpoints for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="make a checkpoint", description=_quantize.__doc__)
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", metavar="MODEL", help="folder, hub name, or GGUF file")
    quantize.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder to make")
    quantize.add_argument(
        "--recipe", default=recipes.DEFAULT, metavar="NAME|FILE", help=f"default {recipes.DEFAULT}; options override it"
    )
    quantize.add_argument("--method", "--base", dest="base", choices=recipes.BASES, help="base quantizer")
    quantize.add_argument("--bits", type=int, choices=(2, 3, 4, 8))
    quantize.add_argument("--group-size", type=int, metavar="N", help="-1 (one per row), 32, 64, 128 or 256")
    quantize.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=None)
    quantize.add_argument("--outliers", metavar="RATIO", help="share kept in the sparse part, such as 0.5%%")
    quantize.add_argument("--ignore", action="append", metavar="REGEX", help="layers to leave as they are; repeatable")
    quantize.add_argument("--seed", type=int)
    quantize.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    quantize.add_argument("--max-shard-size", default="5GB", metavar="SIZE")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    quantize.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def _quantize(arguments: argparse.Namespace) -> None:
    """Quantize MODEL into the folder OUT."""
    from requant import api

    _quiet_libraries()
    report = api.quantize(
        arguments.model,
        arguments.out,
        _recipe(arguments),
        device=arguments.device,
        overwrite=arguments.overwrite,
        max_shard_size=arguments.max_shard_size,
    )
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print(f"{arguments.out}: {report.totals.describe()}")


def _recipe(arguments: argparse.Namespace) -> recipes.Recipe:
    """The recipe named, with what the options say otherwise."""
    recipe = recipes.load_recipe(arguments.recipe)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    changes: dict[str, Any] = {name: given[name] for name in ("base", "seed") if name in given}
    if "outliers" in given:
        changes["outliers"] = recipes.parse_ratio(given["outliers"])
    if "ignore" in given:
        changes["ignore"] = (*recipe.ignore, *given["ignore"])
    weights = {name: given[name] for name in ("bits", "group_size", "symmetric") if name in given}
    return dataclasses.replace(recipe, weights=dataclasses.replace(recipe.weights, **weights), **changes)


def _quiet_libraries() -> None:
    """Progress and errors are ours to print."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
