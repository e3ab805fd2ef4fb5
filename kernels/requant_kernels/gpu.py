"""What both sets of Triton kernels ask of a device and of their inputs, and how they are compiled before serving."""

from collections.abc import Collection, Hashable, Iterable
from importlib.util import find_spec

import torch

from requant_kernels.prepared import Prepared, Runs

CAPABILITY = (8, 0)
# A product may be fused with the sum that takes it: one rounding less, where the kernels do not forbid it themselves.
# Every launch says so, because Triton's default depends on its version (disabled from 3.10 on) and on the environment.
FP_FUSION = {"enable_fp_fusion": True}


def able(device: torch.device) -> tuple[bool, str]:
    """(True, ""), or (False, why Triton kernels can not run there)."""
    if device.type != "cuda":
        return False, f"runs on CUDA devices, not on {device.type}"
    if not find_spec("triton"):
        return False, "the package triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False, "needs compute capability 8.0 (Ampere) or later"
    return True, ""


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x at an address that is a multiple of 16: kernels are compiled for 16-byte copies only."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


class WarmUp:
    """Runs every kernel once that serving can reach: none is compiled later. Layers of one kind share their kernels:
    only the first of them runs."""

    def __init__(self) -> None:
        self._warm: set[tuple[Hashable, bool]] = set()

    def run(
        self,
        runs: Runs,
        prepared: Prepared,
        columns: int,
        *,
        regimes: Iterable[int],
        like: torch.Tensor,
        limit: int,
        biased: Collection[bool],
    ) -> None:
        """regimes: the smallest count of tokens of each; those beyond ``limit`` are left out. like: dtype, device."""
        kind = (prepared.out_features, columns, *prepared.meta, like.dtype, like.device, limit)
        cold = {(kind, with_bias) for with_bias in biased} - self._warm
        self._warm |= cold
        if not cold:
            return
        for tokens in regimes:
            if tokens <= limit:
                x = like.new_zeros(tokens, columns)
                for _, with_bias in cold:
                    bias = x.new_zeros(prepared.out_features) if with_bias else None
                    runs.apply(x, list(prepared.tensors.values()), bias, prepared.out_features, list(prepared.meta))
