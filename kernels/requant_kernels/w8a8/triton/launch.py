"""From a layer and a batch of tokens to kernel launches. Imports triton, so only calls import it."""

from dataclasses import dataclass
from typing import Any

import torch

from requant_kernels.gpu import FP_FUSION
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.triton.fused import fused_kernel
from requant_kernels.w8a8.triton.product import product_kernel
from requant_kernels.w8a8.triton.reduce import reduce_kernel
from requant_kernels.w8a8.triton.rounding import round_kernel
from requant_kernels.w8a8.triton.table import Table

REDUCE_ROWS = 256


def run(x: torch.Tensor, layer: Runtime, bias: torch.Tensor | None, table: Table) -> torch.Tensor:
    """x [M, K] contiguous and 16-byte aligned -> y [M, N] of x's dtype; ``layer.weight`` is the weight int8 [N, K]."""
    return _Call(x, layer, bias, table).run()


@dataclass(frozen=True)
class _Call:
    x: torch.Tensor
    layer: Runtime
    bias: torch.Tensor | None
    table: Table

    def run(self) -> torch.Tensor:
        tokens, columns = self.x.shape
        rows = self.layer.weight.shape[0]
        tile = self.table.tile(tokens)
        splits = tile.splits(tokens, rows, columns)
        steps = self.x.new_empty(tokens, dtype=torch.float32), self.x.new_empty(tokens, dtype=torch.int32)
        if tile.kernel == "product":
            codes = self.round(steps)
        if splits == 1:
            out = self.x.new_empty(tokens, rows)
        else:
            out = self.x.new_empty(splits, tokens, rows, dtype=torch.int32)
        sizes = (tokens, rows, columns)
        constants = {
            "SYMMETRIC": self.layer.scheme.symmetric,
            "BIAS": self.bias is not None and splits == 1,
            "PARTIAL": splits > 1,
            "EVEN": columns % tile.columns == 0,
            "TOKENS": tile.tokens,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            **FP_FUSION,
        }
        row_tiles, token_tiles = -(-rows // tile.rows), -(-tokens // tile.tokens)
        weight = self.layer.weight
        if tile.kernel == "fused":
            constants["DYNAMIC"] = self.layer.scheme.dynamic
            fused_kernel[(row_tiles, splits)](
                self.x, *self.static(), weight, *self.scaling(), out, *steps, *sizes, **constants
            )
        else:
            product_kernel[(token_tiles * row_tiles, splits)](
                codes, *steps, weight, *self.scaling(), out, *sizes, GROUP=tile.group, **constants
            )
        return out if splits == 1 else self.reduce(out, steps)

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

    def reduce(self, shares: torch.Tensor, steps: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        splits, tokens, rows = shares.shape
        out = self.x.new_empty(tokens, rows)
        reduce_kernel[(-(-rows // REDUCE_ROWS), tokens)](
            shares,
            *steps,
            *self.scaling(),
            out,
            tokens,
            rows,
            splits,
            SYMMETRIC=self.layer.scheme.symmetric,
            BIAS=self.bias is not None,
            ROWS=REDUCE_ROWS,
            num_warps=4,
            **FP_FUSION,
        )
        return out
