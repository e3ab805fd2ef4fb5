"""Which implementation runs a layer: the first that can, in a fixed order, decided once at load time."""

from collections.abc import Collection

import torch

from requant_kernels.choice import first_able
from requant_kernels.dense_sparse.cpu_bf16 import CpuBf16
from requant_kernels.dense_sparse.cpu_int4 import CpuInt4
from requant_kernels.dense_sparse.cpu_int4_native import CpuInt4Native
from requant_kernels.dense_sparse.dequantized import Dequantized
from requant_kernels.dense_sparse.interface import Implementation, LayerConfig
from requant_kernels.dense_sparse.triton import IMPLEMENTATION as TRITON
from requant_kernels.prepared import Prepared
from requant_kernels.weight import DenseSparseWeight

IMPLEMENTATIONS: dict[str, Implementation] = {
    one.name: one for one in (TRITON, CpuBf16(), CpuInt4Native(), CpuInt4(), Dequantized())
}


def choose(config: LayerConfig) -> Implementation:
    """The implementation of ``config``. Raises ValueError, with every reason, where none can."""
    return first_able(list(IMPLEMENTATIONS.values()), config, _kind(config))


def prepare(weight: DenseSparseWeight, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The runtime layout of ``weight`` for activations of ``dtype`` on ``device``.

    Its bias correction is left to the caller: a bias like any other.
    """
    config = LayerConfig.of(weight, dtype, device)
    return choose(config).prepare(weight, config)


def warm_up(
    prepared: Prepared, dtype: torch.dtype, device: torch.device, *, limit: int, biased: Collection[bool]
) -> None:
    """Compiles now what serving ``prepared`` with up to ``limit`` tokens can reach: nothing is compiled later."""
    IMPLEMENTATIONS[prepared.implementation].warm_up(prepared, dtype, device, limit=limit, biased=biased)


def _kind(config: LayerConfig) -> str:
    weights = config.scheme.weights
    levels = "codebook" if weights.codebook else "symmetric" if weights.symmetric else "asymmetric"
    group = "per row" if config.group_size == config.in_features else f"group {config.group_size}"
    sparse = "sparse" if config.scheme.sparse else "dense"
    return f"{weights.bits}-bit {levels} {group} {sparse} layers with {config.dtype} on {config.device.type}"
