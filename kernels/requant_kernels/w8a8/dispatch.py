"""Which implementation runs a W8A8 layer, decided once at load time."""

from collections.abc import Collection

import torch

from requant_kernels.choice import first_able
from requant_kernels.prepared import Prepared
from requant_kernels.w8a8.accumulating import Accumulating
from requant_kernels.w8a8.cpu_int8 import AVX2, AVX512, CpuInt8
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.onednn import OneDnn
from requant_kernels.w8a8.products import Fbgemm, Float32, IntMm
from requant_kernels.w8a8.triton import IMPLEMENTATION as TRITON
from requant_kernels.w8a8.weight import W8A8Weight

# oneDNN refuses processors without VNNI instructions; _int_mm saturates on some of them and is slow on the others
IMPLEMENTATIONS: dict[str, Implementation] = {
    one.name: one
    for one in (
        TRITON,
        CpuInt8(AVX512),
        OneDnn(),
        CpuInt8(AVX2),
        Accumulating(IntMm()),
        Accumulating(Fbgemm()),
        Accumulating(Float32()),
    )
}


def prepare(weight: W8A8Weight, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The runtime layout of ``weight`` for x of ``dtype`` on ``device``.

    Its bias correction is left to the caller: a bias like any other. Raises ValueError where nothing can run it.
    """
    config = LayerConfig.of(weight, dtype, device)
    return first_able(list(IMPLEMENTATIONS.values()), config, _kind(config)).prepare(weight, config)


def warm_up(
    prepared: Prepared, dtype: torch.dtype, device: torch.device, *, limit: int, biased: Collection[bool]
) -> None:
    """Compiles now what serving ``prepared`` with up to ``limit`` tokens can reach: nothing is compiled later."""
    IMPLEMENTATIONS[prepared.implementation].warm_up(prepared, dtype, device, limit=limit, biased=biased)


def _kind(config: LayerConfig) -> str:
    steps = "dynamic" if config.activations.dynamic else "static"
    symmetry = "symmetric" if config.activations.symmetric else "asymmetric"
    return f"W8A8 {steps} {symmetry} layers with {config.dtype} on {config.device.type}"
