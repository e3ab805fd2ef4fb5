"""The Triton kernels as an implementation that dispatch can choose. Importing this needs no GPU and no triton."""

from functools import cache
from importlib.util import find_spec

import torch

from requant_kernels.dense_sparse.interface import Implementation, LayerConfig, Prepared
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, Layer, build
from requant_kernels.dense_sparse.triton.strips import STRIP
from requant_kernels.dense_sparse.triton.table import Table, table_of
from requant_kernels.weight import DenseSparseWeight

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)


class Triton(Implementation):
    """Every scheme in bfloat16 and float16 on CUDA devices from compute capability 8.0 on.

    ``table`` overrides the launch configurations that belong to the device; ``launch`` decides what runs.
    """

    name = "triton"

    def __init__(self, table: Table | None = None) -> None:
        self._table = table
        self._warm: set[tuple[object, ...]] = set()

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type != "cuda":
            return False, f"runs on CUDA devices, not on {config.device.type}"
        if not find_spec("triton"):
            return False, "the package triton is not installed"
        if torch.version.hip is None and torch.cuda.get_device_capability(config.device) < CAPABILITY:
            return False, "needs compute capability 8.0 (Ampere) or later"
        return supports(config)

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """codes, steps and sparse entries as strips.py and lists.py lay them out."""
        tensors, meta = build(weight.to(config.device))
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        from requant_kernels.dense_sparse.triton.launch import Call, run

        aligned = x if x.data_ptr() % 16 == 0 else x.clone()  # kernels are compiled for 16-byte copies only
        return run(Call(_layer(tuple(meta)), aligned, tensors, bias, out_features), self._table_of(x))

    def _table_of(self, x: torch.Tensor) -> Table:
        return self._table or table_of(x.device)

    def warm_up(self, prepared: Prepared, dtype: torch.dtype, device: torch.device, limit: int) -> None:
        """Runs every kernel that serving ``prepared`` with up to ``limit`` tokens can reach, with and without a bias:
        none is compiled later. Layers of one kind share their kernels: only the first of them runs."""
        kind = (prepared.out_features, *prepared.meta, dtype, device, limit)
        if kind in self._warm:
            return
        self._warm.add(kind)
        layer, table = _layer(prepared.meta), self._table or table_of(device)
        for tokens in table.regimes(layer.bits, layer.kind == CODEBOOK):
            if tokens <= limit:
                x = torch.zeros(tokens, layer.in_features, dtype=dtype, device=device)
                for bias in (None, x.new_zeros(prepared.out_features)):
                    self.apply(x, list(prepared.tensors.values()), bias, prepared.out_features, list(prepared.meta))


@cache
def _layer(meta: tuple[int, ...]) -> Layer:
    return Layer(*meta)


def supports(config: LayerConfig) -> tuple[bool, str]:
    """Whether the kernels cover the layer, wherever it runs; the reason where they do not."""
    if config.dtype not in DTYPES:
        return False, f"activations of {config.dtype}: serve with --dtype bfloat16 or float16"
    if config.stored_dtype != config.dtype:
        return False, f"stored in {config.stored_dtype} but activations are {config.dtype}: serve in one dtype"
    if config.group_size % STRIP and config.group_size != config.in_features:
        width = config.group_size
        return False, f"groups of {width} columns after slicing, not a multiple of 16: lower the tensor-parallel degree"
    return True, ""
