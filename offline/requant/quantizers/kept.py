"""How a rounding is kept between two runs, as plain tensors, and made again from them."""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.scheme import WeightScheme

from requant.quantizers.bases import FixedRounding, Rounding
from requant.quantizers.learned import LearnedRounding

_DENSE = ("codes", "scale", "zero_points", "codebook")


def tensors_of(rounding: Rounding) -> dict[str, torch.Tensor]:
    """All that ``rebuilt`` needs besides scheme, dtype and mask."""
    if isinstance(rounding, LearnedRounding):
        anchor = {"anchor": rounding.kept.flatten(1), "low": rounding.low, "high": rounding.high}
        return anchor | {f"parameter.{name}": one for name, one in rounding.named_parameters()}
    dense, target = rounding.quantized()
    parts = {name: getattr(dense, name) for name in _DENSE}
    return {name: part for name, part in parts.items() if part is not None} | {"target": target}


def rebuilt(
    tensors: dict[str, torch.Tensor], scheme: WeightScheme, dtype: torch.dtype, excluded: torch.Tensor | None
) -> Rounding:
    """The rounding that ``tensors_of`` took apart."""
    if "anchor" not in tensors:
        dense = QuantizedDense(scheme, **{name: tensors[name] for name in _DENSE if name in tensors})
        return FixedRounding(dense, tensors["target"], excluded)
    rounding = LearnedRounding(
        tensors["anchor"], tensors["low"], tensors["high"], scheme, dtype=dtype, excluded=excluded
    )
    rounding.load_state_dict({name: tensors[f"parameter.{name}"] for name, _ in rounding.named_parameters()})
    return rounding
