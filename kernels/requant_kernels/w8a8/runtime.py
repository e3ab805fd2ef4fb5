"""What every implementation keeps of a layer beside its own form of the codes."""

from typing import NamedTuple, Self

import torch

from requant_kernels.reference import QuantizedInput
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8.rounding import round_input
from requant_kernels.w8a8.weight import W8A8Weight

ROWS_AT_ONCE = 1024  # that are summed up: torch makes int32 of all that it is given


class Runtime(NamedTuple):
    """weight: the codes in an implementation's own form; weight_scale fp32 and weight_sums (of the codes of each row)
    int32 [N]; input_scale fp32 [1] and input_zero_point int32 [1] where the scheme stores them."""

    scheme: ActivationScheme
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_sums: torch.Tensor
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None

    @classmethod
    def of(cls, stored: W8A8Weight, weight: torch.Tensor, weight_scale: torch.Tensor) -> Self:
        assert stored.scheme.activations is not None
        zero_point = stored.input_zero_point
        return cls(
            stored.scheme.activations,
            weight,
            weight_scale,
            _sums(stored.codes),
            None if stored.input_scale is None else stored.input_scale.float(),
            None if zero_point is None else zero_point.to(torch.int32),
        )

    def store(self) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
        """Tensors and meta of a ``Prepared`` layer."""
        tensors = {name: value for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        return tensors, (self.scheme.dynamic, self.scheme.symmetric)

    @classmethod
    def load(cls, tensors: list[torch.Tensor], meta: list[int]) -> Self:
        """The inverse of ``store``."""
        dynamic, symmetric = meta
        return cls(ActivationScheme(bool(dynamic), bool(symmetric)), *tensors)

    def round(self, x: torch.Tensor) -> QuantizedInput:
        return round_input(x, self.scheme, self.input_scale, self.input_zero_point)


def _sums(codes: torch.Tensor) -> torch.Tensor:
    """Of each row, int32."""
    parts = codes.split(ROWS_AT_ONCE)  # type: ignore[no-untyped-call]
    return torch.cat([part.sum(1, dtype=torch.int32) for part in parts])
