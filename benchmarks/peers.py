"""Every base quantizer, alone and with the sparse part of ReQuant, on one model at one protocol.

    python benchmarks/peers.py MODEL --text TEST [--text FOREIGN] --calibration OTHER [--seqlen 1024] [--tokens 8192]
        [--group-size 64] [--symmetric] [--bits 4,3,2] [--methods rtn,gptq,awq,kmeans,learned,distilled]
        [--parts dense,sparse,whole] [--recipe FILE] [--json FILE]

Prints a Markdown table: true bits a weight, perplexity in float32 on each text, wall time and peak memory of
quantizing. Settings are those of the preset of each width, or of --recipe. "distilled" is the base "learned", whose
codes are afterwards trained through the whole model; "+ ReQuant" (part sparse) puts the preset's share of significant
weights into the sparse part before the base quantizes around them; "+ ReQuant, distilled" (part whole) trains steps,
codebooks and sparse values as the presets of 2 and 3 bits do, too. A row that the JSON file already holds is not
measured again, so a long comparison can be interrupted.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from requant.markdown import table
from requant.recipe import Recipe, load_recipe
from requant.settings import CODEBOOK, Distillation
from requant_kernels.scheme import WeightScheme

from benchmarks.quality import arguments as arguments_of
from benchmarks.quality.jobs import Job, run

DISTILLED = "distilled"
DISTILLATION = Distillation(steps=60, batch=8, rate=0.01)
METHODS = ("rtn", "gptq", "awq", "kmeans", "learned", DISTILLED)
SUFFIXES = {"dense": "", "sparse": " + ReQuant", "whole": " + ReQuant, distilled"}  # by part


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    protocol, symmetric = arguments_of.protocol(arguments), ", symmetric" * arguments.symmetric
    for bits in arguments.bits:
        preset = load_recipe(arguments.recipe or f"requant-w{bits}")
        preset = replace(preset, calibration=replace(preset.calibration, text=arguments.calibration))
        scheme = WeightScheme(bits, arguments.group_size, symmetric=arguments.symmetric)
        for method in arguments.methods:
            for part in arguments.parts:
                name = f"W{bits} {method}" + symmetric * (method not in CODEBOOK) + SUFFIXES[part]
                yield Job(name, protocol, recipe_of(preset, method, scheme, part))


def recipe_of(preset: Recipe, method: str, weights: WeightScheme, part: str) -> Recipe:
    levels = preset.distillation if preset.distillation.steps else Distillation(steps=64)
    return replace(
        preset,
        base="learned" if method == DISTILLED else method,
        weights=WeightScheme(weights.bits, codebook=True) if method in CODEBOOK else weights,
        significant=0.0 if part == "dense" else preset.significant,
        distillation=DISTILLATION if method == DISTILLED else levels if part == "whole" else Distillation(),
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments_of.parser(__doc__)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[4, 3, 2])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["dense", "sparse"])
    parser.add_argument("--recipe")
    arguments = arguments_of.parse(parser, argv)
    for given, choices in ((arguments.methods, METHODS), (arguments.parts, SUFFIXES)):
        if unknown := set(given) - set(choices):
            parser.error(f"{unknown.pop()!r} is not one of {', '.join(choices)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    protocol = arguments_of.protocol(arguments)
    rows = run([Job("as it is", protocol, None), *jobs(arguments)], arguments.json)
    head = ("method", "true bits", "sparse", *rows[0].perplexities, "seconds", "peak GiB")
    cells = (
        (
            row.name,
            f"{row.bits:.3f}",
            f"{row.sparse_percent:.2f} %",
            *(f"{value:.2f}" for value in row.perplexities.values()),
            f"{row.seconds:.0f}",
            f"{row.peak_gib:.2f}",
        )
        for row in rows
    )
    print(table(head, cells))


if __name__ == "__main__":
    main()
