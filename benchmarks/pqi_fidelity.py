"""How well first order, second order and PQI predict the loss that quantization costs: the paper's Tables 1, 2, 3, 5.

    python benchmarks/pqi_fidelity.py MODEL --calibration TEXT [--bits 4] [--group-size 64] [--samples 16]
        [--length 512] [--intervals 4,8,16,32] [--only 1,2,3,5]

Weights go to round to nearest, asymmetric. All figures are nats a token on the calibration samples themselves; both
orders use the gradient at the original weights, the second a diagonal Fisher estimate of the Hessian, once of
sequence means (as printed in the paper) and once times the tokens of a sequence (an estimate of the curvature).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from requant import architectures, models, sources
from requant.calibration import read_windows
from requant.markdown import table
from requant.sensitivity import pqi
from requant.sensitivity.quadrature import Rule, nodes
from requant.settings import Calibration
from requant_kernels.rounding import rtn
from requant_kernels.scheme import WeightScheme

FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.0005, 0.0015, 0.005, 0.0071, 0.01, 0.0525)
RULES: tuple[Rule, ...] = ("midpoint", "trapezoid", "paper")


def path_of(arguments: argparse.Namespace) -> tuple[pqi.Path, list[torch.Tensor]]:
    source = sources.resolve(arguments.model)
    network = sources.load(source, torch.float32).requires_grad_(False)
    architecture = architectures.architecture_of(network.config)
    calibration = Calibration(arguments.calibration, arguments.samples, arguments.length)
    scheme = WeightScheme(arguments.bits, arguments.group_size, symmetric=False)
    weights = {name: linear.get_parameter("weight") for name, linear in models.linears(network, architecture).items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    end = {name: rtn.quantize(weight, scheme, dtype=torch.bfloat16).dequantize() for name, weight in start.items()}
    blocks = [block for _, block in models.blocks(network, architecture)]

    def loss(ids: torch.Tensor) -> Any:
        return network(input_ids=ids, labels=ids, use_cache=False).loss

    return pqi.Path(blocks, weights, loss, start, end), read_windows(calibration, source.tokenizer()).ids


def orders(path: pqi.Path, samples: list[torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """First-order term, and second-order term by sequence means, of each matrix."""
    found = path.gradients(samples, nodes("start", 1), second_moment=True)
    error = {name: path.end[name] - path.start[name] for name in path.parameters}
    first = {name: float((found.mean[name] * d).double().sum()) for name, d in error.items()}
    return first, {name: 0.5 * float((found.square[name] * d.square()).double().sum()) for name, d in error.items()}


def layers_alone(path: pqi.Path, samples: list[torch.Tensor], first: dict[str, float], second: dict[str, float]) -> str:
    """Table 1: one block quantized at a time, then all."""
    head = ("quantized alone", "first order", "second order, sequences", "second order, tokens", "measured")
    tokens = samples[0].numel()
    before = path.loss_at(0.0, samples)

    def row(label: str, names: list[str]) -> tuple[str, ...]:
        path.move_to(0.0)
        for name in names:
            path.parameters[name].data.copy_(path.end[name])
        with torch.no_grad():
            measured = sum(float(path.loss(sample)) for sample in samples) / len(samples) - before
        one, two = (sum(order[name] for name in names) for order in (first, second))
        return label, *(f"{value:.2e}" for value in (one, two, tokens * two, measured))

    blocks: dict[str, list[str]] = {}
    for name in path.parameters:
        blocks.setdefault(".".join(name.split(".")[:3]), []).append(name)
    rows = [row(f"block {index}", names) for index, names in enumerate(blocks.values())]
    return table(head, [*rows, row("all", list(path.parameters))])


def along_the_path(path: pqi.Path, samples: list[torch.Tensor], first: float, second: float) -> str:
    """Table 2: the same orders where only a fraction t of d is taken."""
    before, tokens = path.loss_at(0.0, samples), samples[0].numel()
    head = ("t", "first order", "second order, tokens", "both", "measured")
    rows = []
    for t in FRACTIONS:
        one, two, measured = t * first, t * t * tokens * second, path.loss_at(t, samples) - before
        rows.append((t, *(f"{value:.4e}" for value in (one, two, one + two, measured))))
    return table(head, rows)


def integrals(path: pqi.Path, samples: list[torch.Tensor], intervals: list[int]) -> str:
    """Table 3: the sum of PQI by rule and number of intervals, its error in percent of the measured change.

    The sum over all entries is the integral of the loss's slope along the path, so one gradient at each point serves
    every rule that has it: four numbers of intervals have 117 points in common, not 180.
    """
    slopes: dict[float, float] = {}

    def slope(t: float) -> float:
        if t not in slopes:
            found = path.gradients(samples, [(t, 1.0)])
            slopes[t] = sum(float(pqi.elements(path, found, name).double().sum()) for name in path.parameters)
        return slopes[t]

    measured = path.loss_at(1.0, samples) - path.loss_at(0.0, samples)

    def cells(rule: Rule) -> Iterator[str]:
        for count in intervals:
            total = sum(weight * slope(t) for t, weight in nodes(rule, count))
            yield f"{total:.5f} ({100 * (total / measured - 1):+.2f} %)"

    head = ("rule", *(f"N = {count}" for count in intervals), "measured")
    return table(head, ((rule, *cells(rule), f"{measured:.5f}") for rule in RULES))


def coverage(path: pqi.Path, samples: list[torch.Tensor], intervals: int) -> str:
    """Table 5: the share of the whole score that the best entries hold."""
    found = path.gradients(samples, nodes("midpoint", intervals), second_moment=True)
    names = list(path.parameters)
    scores = {
        "abs(PQI)": torch.cat([pqi.elements(path, found, name).abs().flatten() for name in names]),
        "second moment": torch.cat(
            [(found.square[name] * (path.end[name] - path.start[name]).square()).flatten() for name in names]
        ),
    }

    def cells(score: torch.Tensor) -> Iterator[str]:
        ordered, total = score.sort(descending=True).values, float(score.double().sum())
        for share in SHARES:
            yield f"{100 * float(ordered[: round(share * len(ordered))].double().sum()) / total:.2f} %"

    head = ("score", *(f"top {100 * share:g} %" for share in SHARES))
    return table(head, ((name, *cells(score)) for name, score in scores.items()))


def main() -> None:
    def whole(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--intervals", type=whole, default=[4, 8, 16, 32])
    parser.add_argument("--only", type=whole, default=[1, 2, 3, 5], help="numbers of tables")
    arguments = parser.parse_args()
    path, samples = path_of(arguments)
    if {1, 2} & set(arguments.only):
        first, second = orders(path, samples)
    for number in arguments.only:
        print(f"\nTable {number}", flush=True)
        if number == 1:
            print(layers_alone(path, samples, first, second))
        elif number == 2:
            print(along_the_path(path, samples, sum(first.values()), sum(second.values())))
        elif number == 3:
            print(integrals(path, samples, arguments.intervals))
        else:
            print(coverage(path, samples, arguments.intervals[0]))


if __name__ == "__main__":
    main()
