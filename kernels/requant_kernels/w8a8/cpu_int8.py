"""The W8A8 layer on a CPU in one operator, where there is a C++ compiler and the processor has VNNI instructions."""

from pathlib import Path

import torch
from torch.nn.functional import pad

from requant_kernels import native
from requant_kernels.prepared import Prepared
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.weight import W8A8Weight

SOURCE = Path(__file__).with_name("cpu_int8.cpp")
PANEL, QUAD = 64, 4  # rows and columns of the layout, as the operator has them


class CpuInt8(Implementation):
    name = "cpu_int8"
    traceable = True
    readable = True

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type != "cpu":
            return False, f"runs on a CPU, not on {config.device.type}"
        missing = unavailable()
        return not missing, missing

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """weight uint8 [ceil(N/64), ceil(K/4), 64, 4]: code + 128."""
        tensors, meta = Runtime.of(weight, packed(weight.codes), weight.scale.float()).store()
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        dynamic, symmetric = meta
        return torch.ops.requant.cpu_int8_linear.default(x, tensors, bias, out_features, bool(dynamic), bool(symmetric))

    def codes(self, weight: torch.Tensor, rows: torch.Tensor, in_features: int) -> torch.Tensor:
        """int16."""
        unsigned = weight[rows // PANEL, :, rows % PANEL].flatten(-2)[..., :in_features]
        return unsigned.to(torch.int16) - 128


def packed(codes: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] -> uint8 [ceil(N/64), ceil(K/4), 64, 4]. What fills it up is never used, or multiplied by 0."""
    rows, columns = codes.shape
    unsigned = codes.view(torch.uint8) ^ 0x80
    filled = pad(unsigned, (0, -columns % QUAD, 0, -rows % PANEL))
    return filled.view(-1, PANEL, filled.shape[1] // QUAD, QUAD).transpose(1, 2).contiguous()


def unavailable() -> str:
    """Why the operator can not be had on this machine; empty where it is there."""
    if torch.cpu._is_amx_tile_supported():
        return "oneDNN has AMX instructions to use on this processor"
    if not torch.cpu._is_vnni_supported():
        return "needs a processor with AVX-512 VNNI"
    return native.load_linear(SOURCE, "requant::cpu_int8_linear")
