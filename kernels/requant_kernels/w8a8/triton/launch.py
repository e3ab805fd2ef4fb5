"""From a layer and a batch of tokens to kernel launches. Imports triton, so only calls import it."""

from dataclasses import dataclass
from typing import Any

import torch

from requant_kernels.gpu import FP_FUSION
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.triton.fused import fused_kernel
from requant_kernels.w8a8.triton.product import product_kernel
from requant_kernels.w8a8.triton.rounding import round_kernel
from requant_kernels.w8a8.triton.table import Table


def run(
    x: torch.Tensor, layer: Runtime, arrived: torch.Tensor, bias: torch.Tensor | None, table: Table
) -> torch.Tensor:
    """x [M, K] contiguous and 16-byte aligned -> y [M, N] of x's dtype; ``layer.weight`` is the weight int8 [N, K].
    arrived int32, all zero: a counter for each tile of a product whose columns are split (shares.py)."""
    return _Call(x, layer, arrived, bias, table).run()


@dataclass(frozen=True)
class _Call:
    x: torch.Tensor
    layer: Runtime
    arrived: torch.Tensor
    bias: torch.Tensor | None
    table: Table

    def run(self) -> torch.Tensor:
        tokens, columns = self.x.shape
        rows = self.layer.weight.shape[0]
        tile = self.table.tile(tokens)
        splits = tile.splits(tokens, rows, columns)
        row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
        out = self.x.new_empty(tokens, rows)
        shares = out
        if splits > 1:
            shares = self.x.new_empty(splits, token_tiles * row_tiles, tile.tokens * tile.rows, dtype=torch.int32)
        arguments = (self.layer.weight, *self.scaling(), out, shares, self.arrived, tokens, rows, columns)
        constants = {
            "SYMMETRIC": self.layer.scheme.symmetric,
            "BIAS": self.bias is not None,
            "SPLIT": splits > 1,
            "EVEN": columns % tile.columns == 0,
            "TOKENS": tile.tokens,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **FP_FUSION,
        }
        grid = (token_tiles * row_tiles, splits)
        if tile.kernel == "fused":
            constants["DYNAMIC"] = self.layer.scheme.dynamic
            fused_kernel[grid](self.x, *self.static(), *arguments, **constants)
        else:
            steps = self.x.new_empty(tokens, dtype=torch.float32), self.x.new_empty(tokens, dtype=torch.int32)
            codes = self.round(steps)
            product_kernel[grid](codes, *steps, *arguments, GROUP=tile.group, **constants)
        return out

    def static(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored steps, or stand-ins that no kernel reads."""
        scale, zero_point = self.layer.input_scale, self.layer.input_zero_point
        return (
            self.layer.weight_scale if scale is None else scale,
            self.layer.weight_sums if zero_point is None else zero_point,
        )

    def scaling(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the sums are scaled and shifted with; a stand-in where there is no bias."""
        layer = self.layer
        return layer.weight_scale, layer.weight_sums, layer.weight_scale if self.bias is None else self.bias

    def round(self, steps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Codes int8 [M, K]; fills ``steps``: scale fp32 and zero point int32 [M]."""
        tokens, columns = self.x.shape
        codes = torch.empty_like(self.x, dtype=torch.int8)
        constants: dict[str, Any] = {"BLOCK": self.table.round_block, "num_warps": self.table.round_warps}
        scheme = self.layer.scheme
        round_kernel[(tokens,)](
            self.x,
            codes,
            *steps,
            *self.static(),
            columns,
            DYNAMIC=scheme.dynamic,
            SYMMETRIC=scheme.symmetric,
            **constants,
            **FP_FUSION,
        )
        return codes
