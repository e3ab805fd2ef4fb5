"""`--quantization requant` on an unquantized model: its linear layers are rounded to nearest while they are loaded.

A layer is rounded as the file holds it, whole, and cut to this rank afterwards, like one of a checkpoint. So its
numbers are those of a checkpoint of base rtn, at every degree of tensor parallelism, and memory holds one unrounded
layer at a time.
"""

from dataclasses import replace

import torch
from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.rounding.layer import refuse_undecided, round_layer
from requant_kernels.scheme import CheckpointScheme, LayerScheme, WeightScheme
from requant_kernels.weight import check_tensor

from vllm_requant.parameters import Form

DEFAULT = CheckpointScheme(LayerScheme(WeightScheme(4, 64, symmetric=False)))
SMALLER_GROUPS = (32, -1)  # where those of the default do not divide a layer's columns


def fitted(scheme: LayerScheme, columns: int) -> LayerScheme:
    """``scheme``, one of DEFAULT, with the largest groups that divide ``columns``."""
    if columns % scheme.weights.group_size == 0:
        return scheme
    group = next(size for size in SMALLER_GROUPS if size == -1 or columns % size == 0)
    return replace(scheme, weights=replace(scheme.weights, group_size=group))


def refuse_unroundable(scheme: LayerScheme, columns: int, prefix: str) -> None:
    """Raises SchemeError, naming ``prefix``, unless rounding alone makes a layer of ``columns`` inputs."""
    try:
        refuse_undecided(scheme)
        scheme.weights.groups(columns)
    except SchemeError as error:
        raise SchemeError(f"{prefix}: {error}") from None


def unquantized(device: torch.device) -> Form:
    """What the file of an unquantized model holds of a layer; rounded on ``device``."""

    def rounded(scheme: LayerScheme, tensors: dict[str, torch.Tensor], where: str) -> QuantizedLayer:
        weight = tensors["weight"]
        if weight.dim() != 2:
            raise CheckpointError(f"{where}.weight: shape {list(weight.shape)}, not [N, K]")
        check_tensor(f"{where}.weight", weight, tuple(weight.shape))
        return round_layer(weight.to(device), scheme).to("cpu")

    return Form(lambda scheme: ("weight",), rounded)
