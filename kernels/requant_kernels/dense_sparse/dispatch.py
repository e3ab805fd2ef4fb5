"""Which implementation runs a layer: the first that can, in a fixed order, decided once at load time."""

import logging
from functools import cache

import torch

from requant_kernels.dense_sparse.cpu_int4 import CpuInt4
from requant_kernels.dense_sparse.dequantized import Dequantized
from requant_kernels.dense_sparse.interface import Implementation, LayerConfig, Prepared
from requant_kernels.weight import DenseSparseWeight

_LOG = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, Implementation] = {one.name: one for one in (CpuInt4(), Dequantized())}


def choose(config: LayerConfig) -> tuple[Implementation, tuple[str, ...]]:
    """The implementation of ``config`` and why those before it can not. Raises ValueError where none can."""
    refusals: list[str] = []
    for implementation in IMPLEMENTATIONS.values():
        able, reason = implementation.can_implement(config)
        if able:
            return implementation, tuple(refusals)
        refusals.append(f"{implementation.name}: {reason}")
    raise ValueError(f"no implementation of {_kind(config)}: {'; '.join(refusals)}")


def prepare(weight: DenseSparseWeight, dtype: torch.dtype, device: torch.device) -> Prepared:
    """The runtime layout of ``weight`` for activations of ``dtype`` on ``device``.

    Its bias correction is left to the caller: a bias like any other.
    """
    config = LayerConfig.of(weight, dtype, device)
    implementation, refusals = choose(config)
    _log_once(_kind(config), implementation.name, refusals)
    return implementation.prepare(weight, config)


def _kind(config: LayerConfig) -> str:
    weights = config.scheme.weights
    levels = "codebook" if weights.codebook else "symmetric" if weights.symmetric else "asymmetric"
    group = "per row" if config.group_size == config.in_features else f"group {config.group_size}"
    sparse = "sparse" if config.scheme.sparse else "dense"
    return f"{weights.bits}-bit {levels} {group} {sparse} layers with {config.dtype} on {config.device.type}"


@cache
def _log_once(kind: str, name: str, refusals: tuple[str, ...]) -> None:
    _LOG.info("%s run as %s%s", kind, name, f" ({'; '.join(refusals)})" if refusals else "")
