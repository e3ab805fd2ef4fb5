"""The sparse part of a weight: canonical CSR of residuals, built, validated, sliced and merged as pure functions."""

from dataclasses import dataclass
from typing import Self

import torch

from requant_kernels.errors import CheckpointError

MAX_UINT16_COLUMNS = 1 << 16


def column_dtype(in_features: int) -> torch.dtype:
    """uint16 wherever every column index fits, else int32."""
    return torch.uint16 if in_features <= MAX_UINT16_COLUMNS else torch.int32


@dataclass(frozen=True)
class SparsePart:
    """CSR of shape [N, K]: row_offsets int32 [N+1], columns uint16|int32 [nnz] (strictly ascending in a row),
    values [nnz] in the model's dtype."""

    row_offsets: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    in_features: int

    @property
    def out_features(self) -> int:
        return self.row_offsets.shape[0] - 1

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    @classmethod
    def from_coo(cls, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> Self:
        """Entries in any order, each (row, column) at most once."""
        out_features, in_features = shape
        order = torch.argsort(rows.long() * in_features + columns.long())
        counts = torch.bincount(rows.long(), minlength=out_features)
        offsets = torch.zeros(out_features + 1, dtype=torch.int32, device=rows.device)
        offsets[1:] = torch.cumsum(counts, 0)
        return cls(
            offsets,
            columns[order].to(column_dtype(in_features)),
            values[order].contiguous(),
            in_features,
        )

    @classmethod
    def from_mask(cls, values: torch.Tensor, mask: torch.Tensor) -> Self:
        """The entries of ``values`` [N, K] where ``mask`` [N, K] holds, zeros among them included."""
        rows, columns = mask.nonzero(as_tuple=True)
        return cls.from_coo(rows, columns, values[rows, columns], (mask.shape[0], mask.shape[1]))

    def rows(self) -> torch.Tensor:
        """int64 [nnz]: the row of every entry."""
        counts = self.row_offsets.diff().long()
        return torch.repeat_interleave(torch.arange(self.out_features, device=counts.device), counts)

    def to_dense(self) -> torch.Tensor:
        """fp32 [N, K]."""
        dense = torch.zeros(self.out_features, self.in_features, device=self.values.device)
        dense[self.rows(), self.columns.long()] = self.values.float()
        return dense

    def take_rows(self, index: torch.Tensor) -> Self:
        """The rows ``index`` (int64 [n]), in that order."""
        counts = self.row_offsets.diff().long()[index]
        ends = torch.cumsum(counts, 0)
        offsets = torch.zeros(index.shape[0] + 1, dtype=torch.int32, device=index.device)
        offsets[1:] = ends
        starts = self.row_offsets[:-1].long()[index]
        entries = torch.arange(int(counts.sum()), device=index.device)
        entries = entries + torch.repeat_interleave(starts - (ends - counts), counts)
        return type(self)(
            offsets,
            self.columns.to(torch.int32)[entries].to(self.columns.dtype),
            self.values[entries],
            self.in_features,
        )

    def take_columns(self, start: int, stop: int) -> Self:
        """Columns [start, stop), renumbered from zero."""
        columns = self.columns.to(torch.int32)
        keep = (columns >= start) & (columns < stop)
        return type(self).from_coo(
            self.rows()[keep], columns[keep] - start, self.values[keep], (self.out_features, stop - start)
        )

    @classmethod
    def concat_rows(cls, parts: "list[SparsePart]") -> Self:
        """Parts of equal K stacked along the rows."""
        offsets, base = [parts[0].row_offsets[:1]], 0
        for part in parts:
            offsets.append(part.row_offsets[1:] + base)
            base += part.nnz
        # concatenation knows no uint16
        columns = torch.cat([part.columns.to(torch.int32) for part in parts]).to(parts[0].columns.dtype)
        return cls(torch.cat(offsets), columns, torch.cat([part.values for part in parts]), parts[0].in_features)

    def validate(self, where: str) -> None:
        """Raises CheckpointError, naming ``where`` and the tensor, unless this is canonical and finite.

        Everything that a kernel later indexes without a bound check is established here.
        """
        offsets, columns = self.row_offsets.long(), self.columns.to(torch.int32)
        if self.row_offsets.dtype != torch.int32 or offsets.dim() != 1 or not len(offsets):
            raise CheckpointError(f"{where}.sparse_row_offsets: not int32 of one dimension")
        if self.columns.dtype != column_dtype(self.in_features):
            raise CheckpointError(
                f"{where}.sparse_columns: dtype {self.columns.dtype}, expected {column_dtype(self.in_features)}"
            )
        if columns.shape != self.values.shape or columns.dim() != 1:
            raise CheckpointError(f"{where}.sparse_columns: {list(columns.shape)} does not match sparse_values")
        if int(offsets[0]) != 0 or int(offsets[-1]) != self.nnz or bool((offsets.diff() < 0).any()):
            raise CheckpointError(f"{where}.sparse_row_offsets: not monotone from 0 to {self.nnz}")
        if not self.nnz:
            return
        if int(columns.min()) < 0 or int(columns.max()) >= self.in_features:
            raise CheckpointError(f"{where}.sparse_columns: {int(columns.max())} is outside [0, {self.in_features})")
        rows = self.rows()
        if bool(((columns.diff() <= 0) & (rows.diff() == 0)).any()):
            raise CheckpointError(f"{where}.sparse_columns: not ascending and unique within a row")
        if not bool(torch.isfinite(self.values).all()):
            raise CheckpointError(f"{where}.sparse_values: not finite")
