"""What a run measures, in the order of importance: what comes last is what a run that is cut short has lost."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, product

from benchmarks.kernel_timing import cells, int8, peers, shapes
from benchmarks.kernel_timing.compilation import Task
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.recording import Unit
from benchmarks.kernel_timing.shapes import Shape

USUAL = (0.0, 0.005)  # densities


@dataclass(frozen=True)
class Plan:
    """The layers of each model, the most important first, and at what they are measured."""

    models: Sequence[Sequence[Shape]]
    setting: Setting
    tokens: tuple[int, ...] = shapes.TOKENS
    schemes: tuple[str, ...] = tuple(shapes.SCHEMES)
    rare: tuple[float, ...] = tuple(density for density in shapes.DENSITIES if density not in USUAL)

    @property
    def layers(self) -> list[Shape]:
        return list(chain(*self.models))


def dense_sparse(plan: Plan, stack: ExitStack) -> Iterator[Unit]:
    """Model after model: what the goals are about, then the peers, then other densities. The vendor's sparse product
    comes last: a capture that it breaks off breaks nothing else. ``stack`` ends what the peers begin."""
    others = peers.Peers(plan.setting)
    for model in plan.models:
        yield from _unquantized(plan, model)
        yield from _quantized(plan, model, USUAL)
        if model is plan.models[0]:
            yield Unit("vLLM's kernels", others.begin(stack))
        yield from others.units(model, plan.schemes, plan.tokens)
        yield from _quantized(plan, model, plan.rare)
    for shape in plan.layers:
        yield Unit(f"{shape} CSR", cells.separate_sparse(shape, 0.005, (1, 16, 64), plan.setting))


def w8a8(plan: Plan) -> Iterator[Unit]:
    """Model after model, dynamic steps and their peers first."""
    for model in plan.models:
        yield from _unquantized(plan, model)
        for name, measure in int8.KERNELS.items():
            for shape in model:
                yield Unit(f"{shape} {name}", measure(shape, plan.tokens, plan.setting))


def _unquantized(plan: Plan, model: Sequence[Shape]) -> Iterator[Unit]:
    for shape in model:
        yield Unit(f"{shape} cuBLAS", cells.unquantized(shape, plan.tokens, plan.setting))


def _quantized(plan: Plan, model: Sequence[Shape], densities: Sequence[float]) -> Iterator[Unit]:
    for scheme, shape, density in product(plan.schemes, model, densities):
        measured = cells.quantized(shape, scheme, density, plan.tokens, plan.setting)
        yield Unit(f"{shape} {scheme} {density:.1%}", measured)


def compilations(plan: Plan, *, integers: bool) -> dict[str, Task]:
    """What ``w8a8`` (``integers``) or ``dense_sparse`` will want compiled, by name, in their order. Entries have one
    code whatever their density."""
    tasks: dict[str, Task] = {}
    for model in plan.models:
        if integers:
            for name, shape in product(int8.SCHEMES, model):
                tasks[f"{shape} {name}"] = partial(int8.run_once, name, shape, plan.tokens, plan.setting)
        else:
            for scheme, shape, density in product(plan.schemes, model, USUAL):
                task = partial(cells.run_once, shape, scheme, density, plan.tokens, plan.setting)
                tasks[f"{shape} {scheme} {density:.1%}"] = task
    return tasks
