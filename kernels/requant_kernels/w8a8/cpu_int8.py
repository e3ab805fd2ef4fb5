"""The W8A8 layer on a CPU in one C++ operator, where there is a compiler: one for each kind of int8 instructions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from requant_kernels import native
from requant_kernels.prepared import Prepared
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.weight import W8A8Weight


@dataclass(frozen=True)
class Machine:
    """cpu_int8_NAME.cpp: it wants weights [ceil(N/panel), ceil(K/block), panel, block], the int8 codes themselves or,
    with an ``offset``, uint8 codes + 128. missing: why this processor should not run it; empty where it should."""

    name: str
    panel: int
    block: int
    offset: bool
    missing: Callable[[], str]

    @property
    def source(self) -> Path:
        return Path(__file__).with_name(f"cpu_int8_{self.name}.cpp")

    def unavailable(self) -> str:
        """Why the operator can not be had on this machine; empty where it is there."""
        return self.missing() or native.load_linear(self.source, f"requant::cpu_int8_{self.name}_linear")

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 [N, K] -> its layout. What fills it up is never used, or multiplied by 0."""
        rows, columns = codes.shape
        filled = pad(
            codes.view(torch.uint8) ^ 0x80 if self.offset else codes, (0, -columns % self.block, 0, -rows % self.panel)
        )
        return filled.view(-1, self.panel, filled.shape[1] // self.block, self.block).transpose(1, 2).contiguous()

    def codes(self, layout: torch.Tensor, rows: torch.Tensor, in_features: int) -> torch.Tensor:
        """Those of ``rows`` [...], int16 [..., K]."""
        found = layout[rows // self.panel, :, rows % self.panel].flatten(-2)[..., :in_features].to(torch.int16)
        return found - 128 if self.offset else found


def _no_vnni() -> str:
    if torch.cpu._is_amx_tile_supported():
        return "oneDNN has AMX instructions to use on this processor"
    return "" if torch.cpu._is_vnni_supported() else "needs a processor with AVX-512 VNNI"


def _no_avx2() -> str:
    return "" if torch.cpu._is_avx2_supported() else "needs a processor with AVX2"


AVX512 = Machine("avx512", panel=64, block=4, offset=True, missing=_no_vnni)
AVX2 = Machine("avx2", panel=16, block=2, offset=False, missing=_no_avx2)


class CpuInt8(Implementation):
    traceable = True
    readable = True

    def __init__(self, machine: Machine) -> None:
        self.name, self.machine = f"cpu_int8_{machine.name}", machine
        self._operator = f"{self.name}_linear"

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type != "cpu":
            return False, f"runs on a CPU, not on {config.device.type}"
        missing = self.machine.unavailable()
        return not missing, missing

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """weight: the machine's layout."""
        tensors, meta = Runtime.of(weight, self.machine.packed(weight.codes), weight.scale.float()).store()
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        operator = getattr(torch.ops.requant, self._operator).default
        return operator(x, tensors, bias, out_features, *map(bool, meta))

    def codes(self, weight: torch.Tensor, rows: torch.Tensor, in_features: int) -> torch.Tensor:
        """int16."""
        return self.machine.codes(weight, rows, in_features)
