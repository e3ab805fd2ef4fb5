"""Cells as the tables that docs/BENCHMARKS.md shows, and the bars of a run."""

from benchmarks.kernel_timing.cells import Cell

HEADER = (
    f"{'layer':>10} {'[N, K]':>14} {'tokens':>6} {'kernel':>19} {'sparse':>7} {'us':>9} {'spread':>7} "
    f"{'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'x cuBLAS':>9} {'sparse costs':>12}"
)


def key(cell: Cell) -> tuple[str, str, str, float, int]:
    return cell.model, cell.layer, cell.kernel, cell.density, cell.tokens


def lines(cells: list[Cell], copy: float) -> list[str]:
    """One line a cell, with its relation to the peer and to the same kernel without entries."""
    by_key = {key(cell): cell for cell in cells}
    result = [HEADER]
    for cell in cells:
        peer = by_key.get((cell.model, cell.layer, "cuBLAS", 0.0, cell.tokens))
        bare = by_key.get((cell.model, cell.layer, cell.kernel, 0.0, cell.tokens))
        rate = cell.bytes / cell.time * 1e6
        flops = 2 * cell.rows * cell.columns * cell.tokens / cell.time * 1e6
        cost = f"{cell.time / bare.time - 1:+.1%}" if bare and cell.density else ""
        result.append(
            f"{cell.layer:>10} {f'{cell.rows}x{cell.columns}':>14} {cell.tokens:>6} {cell.kernel:>19} "
            f"{cell.density:>7.1%} {cell.time:>9.2f} {max(cell.micros) / cell.time - 1:>7.1%} {rate / 1e9:>7.0f} "
            f"{rate / copy:>8.1%} {flops / 1e12:>8.1f} {f'{peer.time / cell.time:.2f}' if peer else '':>9} {cost:>12}"
        )
    return result


def total(cells: list[Cell], model: str, kernel: str, density: float, tokens: int) -> tuple[float, int] | None:
    """(microseconds, bytes) of all layers of a model together; None where a layer was not measured."""
    found = [cell for cell in cells if key(cell) == (model, cell.layer, kernel, density, tokens)]
    layers = {cell.layer for cell in cells if cell.model == model}
    if not found or {cell.layer for cell in found} != layers:
        return None
    return sum(cell.time for cell in found), sum(cell.bytes for cell in found)


def bars(cells: list[Cell], model: str, copy: float) -> list[str]:
    """The figures that are held against the bars, each over all layers of ``model``."""
    result = [f"{model}, all layers together"]
    for tokens in sorted({cell.tokens for cell in cells}):
        peer = total(cells, model, "cuBLAS", 0.0, tokens)
        for kernel in dict.fromkeys(cell.kernel for cell in cells if cell.kernel.startswith("W")):
            bare, sparse = (total(cells, model, kernel, density, tokens) for density in (0.0, 0.005))
            if not (peer and bare and sparse):
                continue
            share = sparse[1] / sparse[0] * 1e6 / copy
            speed, cost = peer[0] / sparse[0], sparse[0] / bare[0] - 1
            result.append(
                f"  {tokens:>5} tokens {kernel}: {sparse[0]:>8.1f} us, {share:>6.1%} of copy bandwidth, "
                f"{speed:>5.2f}x cuBLAS, 0.5 % sparse costs {cost:+.1%}"
            )
    return result
