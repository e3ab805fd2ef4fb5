"""What rounding to 8 bits costs: perplexity of W8A8 by method, with input steps per token and per tensor.

    python benchmarks/w8a8.py MODEL --text FILE [--seqlen 1024] [--tokens 8192] [--json FILE]
    python benchmarks/w8a8.py MODEL --text FILE --weights-only [--group-size 64]      equalization and bias correction
                                                                                      on weights of 4 and 3 bits

Each figure comes from a checkpoint that `requant quantize` makes and `requant eval` measures; FILE is held out: the
calibration text is the built-in one unless --calibration says otherwise. The table is printed as Markdown. Figures
that the JSON file holds already are not measured again, so that an interrupted run goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from requant import api
from requant.aweq.settings import SEARCH, Activations, Equalization
from requant.markdown import table
from requant.recipe import Recipe, load_recipe
from requant.settings import Calibration
from requant_kernels.scheme import W8A8_WEIGHTS, WeightScheme

from benchmarks.quality.jobs import conditions

NEVER = 1e9  # a limit that no layer exceeds: all stay static
MODES = {"dynamic": "per token", "static": "per tensor", "all static": "per tensor, every layer"}


@dataclass(frozen=True)
class Row:
    """A method in words and the recipe that it is."""

    name: str
    recipe: Recipe


def activations(mode: str, method: str = "mse") -> Activations:
    """``method``: how static ranges are found where every layer is static."""
    if mode == "all static":
        return Activations("static", range=method, limit=NEVER)  # type: ignore[arg-type]
    return Activations(mode)  # type: ignore[arg-type]


def w8a8_rows(alphas: list[float]) -> list[Row]:
    """Naive, SmoothQuant at each alpha, AWEQ's formula, the search, with bias correction; and both presets."""

    def row(name: str, mode: str, equalization: Equalization, **more: Any) -> Row:
        return Row(f"{name}|{mode}", Recipe(W8A8_WEIGHTS, equalization=equalization, **more))

    plain = {mode: activations(mode, "minmax") for mode in ("dynamic", "all static")}
    rows = [row("naive", mode, Equalization(), activations=one) for mode, one in plain.items()]
    for alpha in alphas:
        name, equalization = f"SmoothQuant, alpha {alpha:g}", Equalization("absmax", alpha)
        rows += [row(name, mode, equalization, activations=one) for mode, one in plain.items()]
    aweq: list[tuple[str, float | str, bool]] = [
        ("AWEQ, alpha 1/2", 0.5, False),
        ("AWEQ, searched", SEARCH, False),
        ("AWEQ, searched, bias correction", SEARCH, True),
    ]
    for name, strength, corrected in aweq:
        for mode in MODES:
            settings = {"activations": activations(mode), "bias_correction": corrected}
            rows.append(row(name, mode, Equalization("minmax", strength), **settings))
    for mode, name in {"dynamic": "aweq-w8a8", "static": "aweq-w8a8-static", "all static": "aweq-w8a8-static"}.items():
        preset = load_recipe(name)
        if mode == "all static":
            preset = replace(preset, activations=replace(preset.activations, limit=NEVER))
        kinds = {"AWEQ, preset": preset}
        if mode != "dynamic":
            kinds["AWEQ, preset, symmetric inputs"] = replace(
                preset, activations=replace(preset.activations, symmetric=True)
            )
        for kind, recipe in kinds.items():
            rows.append(Row(f"{kind} without bias correction|{mode}", replace(recipe, bias_correction=False)))
            rows.append(Row(f"{kind}|{mode}", recipe))
    return rows


def weight_rows(group_size: int) -> list[Row]:
    """On top of two bases, at two widths: as they are, equalized, corrected, both."""
    rows = []
    for base in ("rtn", "gptq"):
        for name, kind, corrected in (
            ("", "none", False),
            (", equalized", "minmax", False),
            (", bias correction", "none", True),
            (", equalized, bias correction", "minmax", True),
        ):
            for bits in (4, 3):
                weights = WeightScheme(bits, group_size, symmetric=False)
                settings = {"equalization": Equalization(kind), "bias_correction": corrected}  # type: ignore[arg-type]
                rows.append(Row(f"{base}{name}|{bits} bit", Recipe(weights, base, **settings)))  # type: ignore[arg-type]
    return rows


def measure(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint, made, checked, evaluated and thrown away."""
    calibration = Calibration(arguments.calibration, arguments.samples, arguments.calibration_seqlen)
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "checkpoint", time.process_time()
        report = api.quantize(arguments.model, out, replace(row.recipe, calibration=calibration))
        seconds = time.process_time() - start
        assert not api.check(out)
        found = api.evaluate(out, arguments.text, seqlen=arguments.seqlen, tokens=arguments.tokens)
    return {"perplexity": found.perplexity, "remarks": report.remarks(), "seconds": seconds}


def report(found: dict[str, dict[str, Any]], columns: list[str], original: float) -> str:
    """Markdown: a line for each method, a column for each mode; below, what was decided about layers."""
    names = dict.fromkeys(key.split("|")[0] for key in found)
    cells = (
        [name, *(f"{found[f'{name}|{one}']['perplexity']:.3f}" if f"{name}|{one}" in found else "" for one in columns)]
        for name in names
    )
    remarks = [f"{key.replace('|', ', ')}: {'; '.join(one['remarks'])}" for key, one in found.items() if one["remarks"]]
    return "\n".join([table([f"original {original:.3f}", *columns], cells), "", *remarks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, help="a UTF-8 file, held out")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--group-size", type=int, default=64, help="of the weights-only table")
    parser.add_argument("--alphas", default="0.25,0.5,0.75", help="of SmoothQuant")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--calibration-seqlen", type=int, default=256)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results: dict[str, Any] = (
        json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    )
    if "original" not in results:
        original = api.evaluate(arguments.model, arguments.text, seqlen=arguments.seqlen, tokens=arguments.tokens)
        results |= {"original": original.perplexity, "protocol": original.protocol, "rows": {}}
        results["conditions"] = conditions()
    if arguments.weights_only:
        rows, columns = weight_rows(arguments.group_size), ["4 bit", "3 bit"]
    else:
        rows, columns = w8a8_rows([float(alpha) for alpha in arguments.alphas.split(",")]), list(MODES)
    for row in rows:
        if row.name not in results["rows"] and arguments.only in row.name:
            results["rows"][row.name] = measure(row, arguments)
            print(f"{row.name}: {results['rows'][row.name]['perplexity']:.3f}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    known = {row.name: results["rows"][row.name] for row in rows if row.name in results["rows"]}
    print(f"{results['protocol']}\n\n{report(known, columns, results['original'])}")


if __name__ == "__main__":
    main()
