"""A stored linear layer of whichever kind its scheme says."""

import torch

from requant_kernels.scheme import LayerScheme
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight

QuantizedLayer = DenseSparseWeight | W8A8Weight


def kind_of(scheme: LayerScheme) -> type[QuantizedLayer]:
    """The class that holds a layer of ``scheme``."""
    return W8A8Weight if scheme.activations else DenseSparseWeight


def layer_from_tensors(scheme: LayerScheme, tensors: dict[str, torch.Tensor], where: str) -> QuantizedLayer:
    """The tensors of one layer as they stand in the file, by their last name.

    Trusts nothing: raises CheckpointError naming ``where`` and the tensor.
    """
    return kind_of(scheme).from_tensors(scheme, tensors, where)
