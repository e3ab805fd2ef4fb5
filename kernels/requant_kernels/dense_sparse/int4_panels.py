"""4-bit weights as PyTorch's CPU operator ``aten::_weight_int4pack_mm_for_cpu`` wants them, and back.

The operator computes w = (code - 8) * scale + zero. It stores rows in panels of P: uint8 [N/P, K, P/2], where byte
[p, k, i] holds row p*P + i in its low and row p*P + P/2 + i in its high half. P follows the vector width (64 with
AVX-512, 32 with AVX2) and none of this is documented, so ``panel_rows`` finds it out by packing a known matrix.
"""

import logging
from functools import cache

import torch

_LOG = logging.getLogger(__name__)
_KERNELS = torch.ops.aten

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 64  # every known panel divides it, so padding to it leaves no narrower last panel
ROWS_AT_ONCE = 16 * ROW_MULTIPLE
ZERO_CODE = 8


def pack_panels(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] in [0, 16), N a multiple of 64 -> uint8 [N, K/2], opaque."""
    # some panels at a time: as int32 all codes would take eight times the memory of what becomes of them
    parts = codes.split(ROWS_AT_ONCE)  # type: ignore[no-untyped-call]
    return torch.cat([_KERNELS._convert_weight_to_int4pack_for_cpu(part.to(torch.int32), 1) for part in parts])


def multiply_panels(
    x: torch.Tensor, packed: torch.Tensor, group_size: int, scale_and_zero: torch.Tensor
) -> torch.Tensor:
    """x bf16 [M, K]; scale_and_zero bf16 [K/g, N, 2] -> bf16 [M, N], accumulated in fp32."""
    return _KERNELS._weight_int4pack_mm_for_cpu.default(x, packed, group_size, scale_and_zero)


def unpack_panels(panels: torch.Tensor, out: torch.Tensor) -> None:
    """panels uint8 [p, K, P/2] -> codes as floats into ``out`` [K, p*P], i.e. transposed."""
    count, columns, half = panels.shape
    rows = panels.permute(1, 0, 2)
    halves = out.view(columns, count, 2, half)
    halves[:, :, 0].copy_(rows & 15)
    halves[:, :, 1].copy_(rows >> 4)


@cache
def unavailable() -> str:
    """Why the operator can not be used in this process; empty where it computes what it should."""
    try:
        codes, x = _known_matrix(), torch.eye(64, dtype=torch.bfloat16)
        scale_and_zero = torch.tensor([2.0, 1.0], dtype=torch.bfloat16).expand(2, len(codes), 2).contiguous()
        product = multiply_panels(x, pack_panels(codes), 32, scale_and_zero)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"PyTorch {torch.__version__} has no 4-bit CPU product here ({str(error).splitlines()[0]})"
    if not torch.equal(product.float(), (codes.float().T - ZERO_CODE) * 2 + 1):
        return f"PyTorch {torch.__version__} computes its 4-bit CPU product differently from what is expected"
    return ""


@cache
def panel_rows() -> int:
    """P as described above, or 0 where the layout is another one: then only the operator can read the weights."""
    codes = _known_matrix()
    rows, columns = codes.shape
    packed = pack_panels(codes)
    for size in (64, 32, 16):
        decoded = torch.empty(columns, rows, dtype=torch.float32)
        unpack_panels(packed.view(rows // size, columns, size // 2), decoded)
        if torch.equal(decoded, codes.float().T):
            return size
    _LOG.warning("PyTorch %s packs 4-bit weights in an unknown layout: long prompts will be slower", torch.__version__)
    return 0


def _known_matrix() -> torch.Tensor:
    """Codes [128, 64] in which no two rows agree: any other layout is noticed."""
    rows, columns = torch.arange(128)[:, None], torch.arange(64)
    return (rows * 7 + columns * 3 + rows * columns // 5) % 16
