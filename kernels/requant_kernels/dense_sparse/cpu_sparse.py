"""The product with the sparse part on a CPU, for few tokens."""

import torch


def add_sparse(
    y: torch.Tensor, x: torch.Tensor, row_offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> None:
    """y [M, N] += x [M, K] S^T, both bf16; S by rows: int32 [N + 1], int32 [nnz], fp32 [nnz].

    Summed in fp32 and rounded once. Rows hold two or three entries each: of what torch has, embedding_bag is the best
    for that. A loop compiled by numba is faster for one token, but vLLM 0.32 can not start a second engine in a process
    that has loaded numba.
    """
    transposed = x.t().to(torch.float32, memory_format=torch.contiguous_format)
    # The function under torch.nn.functional's, whose checks take longer than a small layer: mode 0 is a sum.
    y += torch.embedding_bag(transposed, columns, row_offsets, False, 0, False, values, True)[0].t()
