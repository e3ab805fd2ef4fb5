"""What each part of ReQuant gains, in the form of the paper's Table 8, with controls at equal budget.

    python benchmarks/ablation.py MODEL --text HELD_OUT [--text FOREIGN] --calibration OTHER [--base kmeans] [--bits 4]
        [--group-size 64] [--samples 32] [--length 512] [--intervals 8] [--seqlen 1024] [--tokens 8192] [--json FILE]

All rows share the base, its bits and the calibration text; sparse parts hold 0.45 % outliers, 0.05 % significant
weights, or both. "before" chooses entries first and quantizes around them; "after" restores them, as the paper does.
A seed draws the calibration windows as well, which are at equal distances without one: rows that differ by it alone
show the spread. Rows that the JSON file already holds are not measured again.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from requant.markdown import table
from requant.recipe import Recipe
from requant.settings import BASES, CODEBOOK, SENSITIVITIES, Calibration, Selection
from requant_kernels.scheme import WeightScheme

from benchmarks.quality import arguments as arguments_of
from benchmarks.quality.jobs import Job, Row, run

OUTLIERS, SIGNIFICANT = 0.0045, 0.0005
SEEDS = (0, 1, 2)
RIVALS = ("pqi", "pqi-second-moment", "fisher-error")  # compared on several draws of calibration windows


def variants(plain: Recipe) -> Iterator[tuple[str, Recipe]]:
    def made(outliers: float, significant: float, changes: dict[str, Any], seed: int = 0) -> Recipe:
        selection = replace(plain.selection, **changes)
        return replace(plain, outliers=outliers, significant=significant, selection=selection, seed=seed)

    both, after = OUTLIERS + SIGNIFICANT, {"restore": True}
    yield "dense only", plain
    for seed in SEEDS:
        yield f"random 0.5 %, seed {seed}", made(0, both, {"sensitivity": "random"}, seed)
    yield "significant 0.05 %, after", made(0, SIGNIFICANT, {"sensitivity": "pqi"} | after)
    for rule, said in (("magnitude", "uniform"), ("quartiles", "quartiles"), ("adaptive", "self-adaptive")):
        yield f"outliers 0.45 %, {said}", made(OUTLIERS, 0, {"rule": rule})
    for steps, said in ((1, "one step"), (2, "two steps")):
        paper = {"rule": "adaptive", "sensitivity": "pqi", "steps": steps}
        yield f"both, {said}, after (the paper's)", made(OUTLIERS, SIGNIFICANT, paper | after)
        yield f"both, {said}, before", made(OUTLIERS, SIGNIFICANT, paper)
    for name in SENSITIVITIES:
        if name != "random":
            yield f"{name} 0.5 %, before", made(0, both, {"sensitivity": name})
    for name in RIVALS:
        for seed in SEEDS[1:]:
            yield f"{name} 0.5 %, before, seed {seed}", made(0, both, {"sensitivity": name}, seed)
    for name in ("pqi", "pqi-second-moment", "marginal"):
        yield f"{name} 0.5 %, after", made(0, both, {"sensitivity": name} | after)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = arguments_of.parser(__doc__)
    parser.add_argument("--base", choices=[base for base in BASES if base != "learned"], default="kmeans")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of each sample")
    parser.add_argument("--intervals", type=int, default=8)
    return arguments_of.parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    codebook = arguments.base in CODEBOOK
    plain = Recipe(
        WeightScheme(arguments.bits, -1 if codebook else arguments.group_size, symmetric=codebook, codebook=codebook),
        arguments.base,
        calibration=Calibration(arguments.calibration, arguments.samples, arguments.length),
        selection=Selection(intervals=arguments.intervals),
    )
    protocol = arguments_of.protocol(arguments)
    jobs = [Job("as it is", protocol, None), *(Job(name, protocol, recipe) for name, recipe in variants(plain))]
    rows = run(jobs, arguments.json)
    head = ("variant", "true bits", *rows[0].perplexities, "integral / measured dF")
    print(table(head, ((row.name, f"{row.bits:.3f}", *values(row), complete(row)) for row in rows)))


def values(row: Row) -> list[str]:
    return [f"{value:.2f}" for value in row.perplexities.values()]


def complete(row: Row) -> str:
    integrals = row.summary.get("integrals", [])
    return ", ".join(f"{one['integral']:.4f} / {one['measured']:.4f}" for one in integrals)


if __name__ == "__main__":
    main()
