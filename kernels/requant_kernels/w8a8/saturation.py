"""The question that decides which int8 products a CPU may use: do they add up exactly?

Without VNNI instructions, fast int8 products add two neighbouring products in 16 bits and saturate: the result is
wrong, without a word, wherever weights and inputs are large. So each product is tried with the largest there are.
"""

from collections.abc import Callable

import torch

# One token, a few, many: libraries use different kernels for them.
TOKENS = (1, 5, 40)
SHAPE = (48, 128)


def unavailable(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> str:
    """Why ``multiply`` can not be used in this process; empty where it is exact.

    multiply: codes int8 [M, K] and weight int8 [N, K] -> their exact product [M, N] in any dtype.
    """
    weight = torch.full(SHAPE, 127, dtype=torch.int8)
    weight[::2] = -128
    weight[::3, ::3] = -5
    for tokens in TOKENS:
        codes = torch.full((tokens, SHAPE[1]), 127, dtype=torch.int8)
        codes[:, ::5] = -128
        codes[:, 1::7] = 3
        try:
            product = multiply(codes, weight)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            return f"PyTorch {torch.__version__} does not offer it here ({str(error).splitlines()[0]})"
        if not torch.equal(product.double(), codes.double() @ weight.double().T):
            return "its sums saturate on this processor, which has no VNNI instructions"
    return ""
