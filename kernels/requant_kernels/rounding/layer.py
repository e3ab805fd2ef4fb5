"""One linear layer rounded to nearest, without data: weight and scheme in, the layer to run or to store out."""

import torch

from requant_kernels.errors import SchemeError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.rounding import rtn
from requant_kernels.scheme import LayerScheme


def refuse_undecided(scheme: LayerScheme) -> None:
    """Raises SchemeError where ``scheme`` has a part that a weight alone does not decide."""
    static = scheme.activations is not None and not scheme.activations.dynamic
    for present, part in (
        (scheme.weights.codebook, "a codebook"),
        (scheme.sparse is not None, "a sparse part"),
        (static, "a static input step"),
        (scheme.bias_correction, "a bias correction"),
    ):
        if present:
            raise SchemeError(f"{part} can not be had by rounding alone; make a checkpoint with `requant quantize`")


def round_layer(weight: torch.Tensor, scheme: LayerScheme) -> QuantizedLayer:
    """weight [N, K] in the model's dtype, finite -> its layer, with scales of that dtype.

    The same bytes as a checkpoint of base rtn stores. Raises SchemeError where the group size does not divide K, or
    ``scheme`` asks for more than rounding.
    """
    refuse_undecided(scheme)
    dense = rtn.quantize(weight.float(), scheme.weights, dtype=weight.dtype)
    return dense.pack_w8a8(scheme) if scheme.activations else dense.pack()
