"""One quantized linear layer in memory: the tensors of docs/FORMAT.md, validated, sliced and stacked."""

from dataclasses import dataclass, replace
from math import gcd
from typing import Self

import torch

from requant_kernels.errors import CheckpointError
from requant_kernels.packing import WORD, pack, packed_length, spare_bits, take_range, unpack
from requant_kernels.scheme import LayerScheme
from requant_kernels.sparse import SparsePart

MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPARSE_TENSORS = ("sparse_row_offsets", "sparse_columns", "sparse_values")


def tensor_names(scheme: LayerScheme) -> tuple[str, ...]:
    """The tensors that a layer of ``scheme`` stores: exactly these, none may be missing, none may be added."""
    weights, activations = scheme.weights, scheme.activations
    if activations:
        present = {
            "weight": True,
            "weight_scale": True,
            "input_scale": not activations.dynamic,
            "input_zero_point": not activations.dynamic and not activations.symmetric,
        }
    else:
        present = {
            "weight_packed": True,
            "weight_codebook": weights.codebook,
            "weight_scale": not weights.codebook,
            "weight_zero_point": not weights.symmetric,
        } | dict.fromkeys(SPARSE_TENSORS, scheme.sparse is not None)
    present["bias_correction"] = scheme.bias_correction
    return tuple(name for name, stored in present.items() if stored)


def check_names(scheme: LayerScheme, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError naming the first tensor that is missing or does not belong into the layer ``where``."""
    expected = set(tensor_names(scheme))
    if missing := sorted(expected - set(tensors)):
        raise CheckpointError(f"{where}.{missing[0]}: missing")
    if extra := sorted(set(tensors) - expected):
        raise CheckpointError(f"{where}.{extra[0]}: not expected in a layer of this scheme")


def check_tensor(
    where: str, tensor: torch.Tensor, shape: tuple[int, ...], allowed: tuple[torch.dtype, ...] = MODEL_DTYPES
) -> None:
    """Raises CheckpointError unless ``tensor``, whose full name is ``where``, has that shape, a dtype of ``allowed``
    and only finite values."""
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{where}: shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in allowed:
        raise CheckpointError(f"{where}: dtype {tensor.dtype}, expected {allowed[0]}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: not finite")


def correction_of_columns(correction: torch.Tensor | None, start: int) -> torch.Tensor | None:
    """Layers that are cut along K add up to the whole one, so only the first of them may carry the correction."""
    return correction if correction is None or start == 0 else torch.zeros_like(correction)


@dataclass(frozen=True)
class DenseSparseWeight:
    """W [N, K] = dense low-bit part + sparse residuals; y = x W^T + bias_correction.

    packed int32 [N, ceil(K*b/32)]; scale [N, K/g] and packed zero_point int32 [N, ceil(K/g*b/32)] (asymmetric
    only), or codebook [N, 2**b]; sparse and bias_correction [N] None where the scheme has none. ``group_size`` is
    the number of columns a scale covers in *this* slice, always positive: slicing across a group makes it smaller
    than the scheme's.
    """

    scheme: LayerScheme
    in_features: int
    group_size: int
    packed: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    sparse: SparsePart | None = None
    bias_correction: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, in which scales or levels and sparse values are stored."""
        levels = self.codebook if self.scale is None else self.scale
        assert levels is not None
        return levels.dtype

    def codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        return unpack(self.packed, self.scheme.weights.bits, self.in_features)

    def zero_points(self) -> torch.Tensor | None:
        """uint8 [N, K/g], or None where symmetric."""
        if self.zero_point is None:
            return None
        return unpack(self.zero_point, self.scheme.weights.bits, self.groups)

    @classmethod
    def from_codes(
        cls,
        scheme: LayerScheme,
        codes: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        zero_points: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        sparse: SparsePart | None = None,
        bias_correction: torch.Tensor | None = None,
    ) -> Self:
        """Unpacked codes [N, K] and zero points [N, K/g] -> the packed layer, validated."""
        bits, in_features = scheme.weights.bits, codes.shape[1]
        weight = cls(
            scheme,
            in_features,
            in_features // scheme.weights.groups(in_features),
            pack(codes, bits),
            scale=scale,
            zero_point=None if zero_points is None else pack(zero_points, bits),
            codebook=codebook,
            sparse=sparse,
            bias_correction=bias_correction,
        )
        weight.validate("weight")
        return weight

    @classmethod
    def from_tensors(cls, scheme: LayerScheme, tensors: dict[str, torch.Tensor], where: str) -> Self:
        """The tensors of one layer as they stand in the file, by their last name.

        Trusts nothing: raises CheckpointError naming ``where`` and the tensor.
        """
        check_names(scheme, tensors, where)
        packed, bits = tensors["weight_packed"], scheme.weights.bits
        if packed.dtype != torch.int32 or packed.dim() != 2:
            raise CheckpointError(f"{where}.weight_packed: {packed.dtype} {list(packed.shape)}, not int32 [N, K*b/32]")
        in_features = packed.shape[1] * WORD // bits
        if in_features == 0 or in_features % WORD:
            raise CheckpointError(f"{where}.weight_packed: {packed.shape[1]} words are no multiple of 32 codes")
        sparse = None
        if scheme.sparse:
            offsets, columns, values = (tensors[name] for name in SPARSE_TENSORS)
            sparse = SparsePart(offsets, columns, values, in_features)
        try:
            group_size = in_features // scheme.weights.groups(in_features)
        except ValueError as error:
            raise CheckpointError(f"{where}.weight_packed: {error}") from None
        weight = cls(
            scheme,
            in_features,
            group_size,
            packed,
            tensors.get("weight_scale"),
            tensors.get("weight_zero_point"),
            tensors.get("weight_codebook"),
            sparse,
            tensors.get("bias_correction"),
        )
        weight.validate(where)
        return weight

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The inverse of ``from_tensors``."""
        tensors = {
            "weight_packed": self.packed,
            "weight_scale": self.scale,
            "weight_zero_point": self.zero_point,
            "weight_codebook": self.codebook,
            "bias_correction": self.bias_correction,
        }
        if self.sparse:
            parts = (self.sparse.row_offsets, self.sparse.columns, self.sparse.values)
            tensors |= dict(zip(SPARSE_TENSORS, parts, strict=True))
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def stored_bits(self) -> int:
        """All bits that the layer takes in a file."""
        return sum(tensor.numel() * tensor.element_size() * 8 for tensor in self.to_tensors().values())

    def validate(self, where: str) -> None:
        """Raises CheckpointError unless every shape, dtype and value is what the scheme says."""
        rows, bits = self.out_features, self.scheme.weights.bits
        for name, tensor, shape in (
            ("weight_scale", self.scale, (rows, self.groups)),
            ("weight_codebook", self.codebook, (rows, self.scheme.weights.levels)),
            ("weight_zero_point", self.zero_point, (rows, packed_length(self.groups, bits))),
            ("bias_correction", self.bias_correction, (rows,)),
        ):
            if (tensor is not None) != (name in tensor_names(self.scheme)):
                raise CheckpointError(f"{where}.{name}: {'missing' if tensor is None else 'not expected'}")
            if tensor is not None:
                dtypes = (torch.int32,) if name == "weight_zero_point" else MODEL_DTYPES
                check_tensor(f"{where}.{name}", tensor, shape, dtypes)
        if self.scale is not None and bool((self.scale <= 0).any()):
            raise CheckpointError(f"{where}.weight_scale: not positive")
        if self.zero_point is not None and bool(spare_bits(self.zero_point, bits, self.groups).any()):
            raise CheckpointError(f"{where}.weight_zero_point: not zero above a row's last code")
        if self.sparse is not None:
            if self.sparse.out_features != rows:
                raise CheckpointError(f"{where}.sparse_row_offsets: {self.sparse.out_features} rows, expected {rows}")
            if self.sparse.values.dtype != self.dtype:
                raise CheckpointError(f"{where}.sparse_values: dtype {self.sparse.values.dtype}, expected {self.dtype}")
            self.sparse.validate(where)

    def take_rows(self, index: torch.Tensor) -> Self:
        """Output rows ``index`` (int64 [n]): column parallelism."""

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[index]

        return replace(
            self,
            packed=self.packed[index],
            scale=pick(self.scale),
            zero_point=pick(self.zero_point),
            codebook=pick(self.codebook),
            sparse=None if self.sparse is None else self.sparse.take_rows(index),
            bias_correction=pick(self.bias_correction),
        )

    def take_columns(self, start: int, stop: int) -> Self:
        """Input columns [start, stop): row parallelism.

        A boundary inside a group is allowed: groups are then refined to their common divisor with the slice.
        """
        if (start, stop) == (0, self.in_features):
            return self
        bits = self.scheme.weights.bits
        width = stop - start
        group = width if self.codebook is not None else gcd(self.group_size, start, width)
        group_of = torch.arange(start, stop, group, device=self.packed.device) // self.group_size
        return replace(
            self,
            in_features=width,
            group_size=group,
            packed=take_range(self.packed, bits, start, stop),
            scale=None if self.scale is None else self.scale[:, group_of],
            zero_point=self._zero_points_of(group_of, whole=group == self.group_size),
            sparse=None if self.sparse is None else self.sparse.take_columns(start, stop),
            bias_correction=correction_of_columns(self.bias_correction, start),
        )

    def _zero_points_of(self, group_of: torch.Tensor, *, whole: bool) -> torch.Tensor | None:
        """Packed, of the groups int64 [n], which follow each other and, where ``whole``, occur once each."""
        if self.zero_point is None:
            return None
        bits = self.scheme.weights.bits
        if whole:
            return take_range(self.zero_point, bits, int(group_of[0]), int(group_of[-1]) + 1)
        return pack(unpack(self.zero_point, bits, self.groups)[:, group_of], bits)

    @classmethod
    def concat_rows(cls, parts: "list[DenseSparseWeight]") -> Self:
        """Layers of one scheme stacked along the rows: q/k/v, gate/up. Raises ValueError where they differ."""
        first = parts[0]
        if any(
            (p.scheme, p.in_features, p.group_size) != (first.scheme, first.in_features, first.group_size)
            for p in parts
        ):
            raise ValueError("layers that are fused into one must share scheme and in_features")

        def stack(name: str) -> torch.Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return cls(
            first.scheme,
            first.in_features,
            first.group_size,
            torch.cat([part.packed for part in parts]),
            stack("scale"),
            stack("zero_point"),
            stack("codebook"),
            None if first.sparse is None else SparsePart.concat_rows([p.sparse for p in parts if p.sparse]),
            stack("bias_correction"),
        )

    def to(self, device: torch.device | str) -> Self:
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        sparse = self.sparse
        return replace(
            self,
            packed=self.packed.to(device),
            scale=move(self.scale),
            zero_point=move(self.zero_point),
            codebook=move(self.codebook),
            sparse=sparse
            and replace(
                sparse,
                row_offsets=sparse.row_offsets.to(device),
                columns=sparse.columns.to(device),
                values=sparse.values.to(device),
            ),
            bias_correction=move(self.bias_correction),
        )
