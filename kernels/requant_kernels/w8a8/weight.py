"""One W8A8 linear layer in memory: the tensors of docs/FORMAT.md, validated, sliced and stacked."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import MODEL_DTYPES, check_names, check_tensor, correction_of_columns


@dataclass(frozen=True)
class W8A8Weight:
    """W = codes * scale[:, None]; the input is rounded to int8 as ``scheme.activations`` says.

    codes int8 [N, K]; scale [N]; input_scale [1] (static only) and input_zero_point int8 [1] (static and asymmetric
    only); bias_correction [N] where the scheme has it. Floats are in the model's dtype.
    """

    scheme: LayerScheme
    codes: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None = None
    input_zero_point: torch.Tensor | None = None
    bias_correction: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, in which the steps are stored."""
        return self.scale.dtype

    @classmethod
    def from_tensors(cls, scheme: LayerScheme, tensors: dict[str, torch.Tensor], where: str) -> Self:
        """The tensors of one layer as they stand in the file, by their last name.

        Trusts nothing: raises CheckpointError naming ``where`` and the tensor.
        """
        check_names(scheme, tensors, where)
        weight = cls(
            scheme,
            tensors["weight"],
            tensors["weight_scale"],
            tensors.get("input_scale"),
            tensors.get("input_zero_point"),
            tensors.get("bias_correction"),
        )
        weight.validate(where)
        return weight

    def _named(self) -> dict[str, torch.Tensor]:
        tensors = {
            "weight": self.codes,
            "weight_scale": self.scale,
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
            "bias_correction": self.bias_correction,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The inverse of ``from_tensors``."""
        return {name: tensor.contiguous() for name, tensor in self._named().items()}

    def stored_bits(self) -> int:
        """All bits that the layer takes in a file."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self._named().values())

    def validate(self, where: str) -> None:
        """Raises CheckpointError unless every shape, dtype and value is what the scheme says."""
        tensors = self._named()
        check_names(self.scheme, tensors, where)
        if self.codes.dim() != 2 or self.codes.dtype != torch.int8 or not self.codes.numel():
            raise CheckpointError(f"{where}.weight: {self.codes.dtype} {list(self.codes.shape)}, not int8 [N, K]")
        for name, shape in (("weight_scale", (self.out_features,)), ("input_scale", (1,))):
            if name in tensors:
                check_tensor(f"{where}.{name}", tensors[name], shape)
                if bool((tensors[name] <= 0).any()):
                    raise CheckpointError(f"{where}.{name}: not positive")
        if self.input_zero_point is not None:
            check_tensor(f"{where}.input_zero_point", self.input_zero_point, (1,), (torch.int8,))
        if self.bias_correction is not None:
            check_tensor(f"{where}.bias_correction", self.bias_correction, (self.out_features,), MODEL_DTYPES)

    def take_rows(self, index: torch.Tensor) -> Self:
        """Output rows ``index`` (int64 [n]): column parallelism."""
        correction = None if self.bias_correction is None else self.bias_correction[index]
        return replace(self, codes=self.codes[index], scale=self.scale[index], bias_correction=correction)

    def take_columns(self, start: int, stop: int) -> Self:
        """Input columns [start, stop): row parallelism."""
        correction = correction_of_columns(self.bias_correction, start)
        return replace(self, codes=self.codes[:, start:stop], bias_correction=correction)

    @classmethod
    def concat_rows(cls, parts: "list[W8A8Weight]") -> Self:
        """Layers of one scheme and one input stacked along the rows: q/k/v, gate/up. Raises ValueError where they
        differ."""
        first = parts[0]
        for part in parts:
            if (part.scheme, part.in_features) != (first.scheme, first.in_features):
                raise ValueError("layers that are fused into one must share scheme and in_features")
            if not (
                _same(part.input_scale, first.input_scale) and _same(part.input_zero_point, first.input_zero_point)
            ):
                raise ValueError("layers that are fused into one must share input_scale and input_zero_point")
        corrections = [part.bias_correction for part in parts if part.bias_correction is not None]
        return cls(
            first.scheme,
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            first.input_scale,
            first.input_zero_point,
            torch.cat(corrections) if corrections else None,
        )

    def to(self, device: torch.device | str) -> Self:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            input_scale=move(self.input_scale),
            input_zero_point=move(self.input_zero_point),
            bias_correction=move(self.bias_correction),
        )


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))
