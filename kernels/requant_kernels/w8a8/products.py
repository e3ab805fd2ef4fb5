"""The int8 products of PyTorch: codes int8 [M, K] times a weight int8 [N, K], summed exactly.

On a CPU, which is fastest depends on the processor; which is right depends on it too (saturation.py).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from requant_kernels.w8a8 import saturation


class Product(Protocol):
    name: str
    devices: tuple[str, ...]
    readable: bool  # whether the operand is indexed like the weight

    def unavailable(self) -> str:
        """Why it can not be used in this process; empty where it can."""
        ...

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 [N, K] -> the operand that ``multiply`` wants."""
        ...

    def multiply(self, codes: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        """codes int8 [M, K] -> their product with the weight [M, N], int32 or fp32."""
        ...


class IntMm:
    """``torch._int_mm``: exact and fast with VNNI instructions, saturating or slow without."""

    name = "int_mm"
    devices: tuple[str, ...] = ("cpu",)
    readable = True

    def unavailable(self) -> str:
        return saturation.unavailable(self.multiply)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.contiguous()

    def multiply(self, codes: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        if codes.shape[1] == 1:  # PyTorch 2.13 returns uninitialised memory
            return codes.to(torch.int32) * operand.t()
        return torch._int_mm(codes, operand.t())


class Fbgemm:
    """fbgemm's int8 product, which on AVX2 adds two products of a u8 and an s8 in 16 bits.

    7-bit inputs never saturate there: 2 * 127 * 128 < 2**15. So each code is split into 2 * high + low, with high in
    [-64, 63] and low in {0, 1}, and both halves are multiplied in one call.
    """

    name = "fbgemm"
    devices: tuple[str, ...] = ("cpu",)
    readable = False

    def unavailable(self) -> str:
        return saturation.unavailable(lambda codes, weight: self.multiply(codes, self.pack(weight)))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 []: the number of the packed weight, which is no tensor and lives as long as the process."""
        rows = codes.shape[0]
        with _fbgemm_engine():
            quantized = torch._make_per_channel_quantized_tensor(
                codes, torch.ones(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64), 0
            )
            _PACKED.append(torch.ops.quantized.linear_prepack(quantized, None))
        return torch.tensor(len(_PACKED) - 1)

    def multiply(self, codes: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        high = codes >> 1
        halves = torch.cat((high, codes - 2 * high)).float()
        # with step 1 and zero point 64 it rounds these floats to exactly their u8 codes
        sums = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(halves, 1.0, 64, _PACKED[int(operand)])
        return torch.add(sums[len(codes) :], sums[: len(codes)], alpha=2)


_PACKED: list[torch.ScriptObject] = []


@contextmanager
def _fbgemm_engine() -> Iterator[None]:
    """The library that packs is a global setting of PyTorch, and its quantized tensors are deprecated with a warning
    that the user of a server can do nothing about."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = engine


class Float32:
    """The codes as floats: right everywhere, to the rounding of fp32 sums beyond 2**24."""

    name = "float32"
    devices: tuple[str, ...] = ("cpu", "cuda")
    readable = True

    def unavailable(self) -> str:
        return ""

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def multiply(self, codes: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return torch.mm(codes.float(), operand.t())
