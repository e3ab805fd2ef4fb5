"""Exact rewrites of a decoder block: a producer's channels are divided by s, its consumers' columns multiplied."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from requant.architecture import Architecture, Pair
from requant.aweq.equalization import ChannelRange, RangeKind, fold_heads, spread_heads, weight_range
from requant.errors import InputError


@dataclass(frozen=True)
class Rewriter:
    """The pairs of one architecture. ``head_dim``: 0 where no pair asks for it. ``dtype``: in which the model stores
    its parameters."""

    pairs: tuple[Pair, ...]
    norm_offset: float
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: PreTrainedConfig, architecture: Architecture, dtype: torch.dtype) -> "Rewriter":
        """The pairs that are exact for ``config``. Raises InputError where none is known."""
        config = config.get_text_config()
        pairs = tuple(
            pair for pair in architecture.pairs if all(getattr(config, key) == value for key, value in pair.requires)
        )
        if not pairs:
            raise InputError(
                f"architecture {config.model_type!r}: no equalization pairs are known for it; "
                "quantize without equalization (--equalize none), with or without W8A8"
            )
        if not any(pair.through == "heads" for pair in pairs):  # it may differ from block to block (Gemma 4)
            return cls(pairs, architecture.norm_offset, 0, dtype)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(pairs, architecture.norm_offset, head_dim, dtype)

    def input_range(self, block: nn.Module, pair: Pair, observed: ChannelRange, kind: RangeKind) -> torch.Tensor:
        """r(X) of the pair's channels, fp32 [C], from the range of its consumers' input."""
        return self._folded(block, pair, observed.width(kind))

    def weight_range(self, block: nn.Module, pair: Pair, kind: RangeKind) -> torch.Tensor:
        """r(W) of the pair's channels, fp32 [C], over all consumers."""
        weights = [_weight(block, name) for name in pair.consumers]
        return self._folded(block, pair, weight_range(weights, kind))

    def _folded(self, block: nn.Module, pair: Pair, columns: torch.Tensor) -> torch.Tensor:
        if pair.through != "heads":
            return columns
        return fold_heads(columns, _weight(block, pair.producer).shape[0], self.head_dim)

    def apply(self, block: nn.Module, pair: Pair, scale: torch.Tensor) -> None:
        """Divides and multiplies the parameters of ``block``, which are fp32, in place; ``scale`` fp32 [C] > 0.

        Raises ValueError for a scale that is not positive and finite, and where a parameter leaves the model's dtype.
        """
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"{pair.producer}: an equalization scale is zero or not finite")
        producer = _weight(block, pair.producer)
        if pair.through == "norm":
            scale = self._divide_norm(producer, scale)
        else:
            producer.div_(scale[:, None])
        bias = dict(block.named_parameters()).get(f"{pair.producer}.bias")
        if bias is not None:
            bias.detach().copy_((bias.detach() / scale).to(self.dtype))  # as it is stored
        columns = self.columns(block, pair, scale)
        for name in pair.consumers:
            _weight(block, name).mul_(columns)
        for name in (pair.producer, *pair.consumers):
            if any(not _holds(self.dtype, parameter) for parameter in block.get_submodule(name).parameters()):
                raise ValueError(
                    f"{name}: equalization takes it beyond what {str(self.dtype).removeprefix('torch.')} can hold; "
                    "use --equalize none, or another base than awq"
                )

    def columns(self, block: nn.Module, pair: Pair, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` [C] at each input column of the pair's consumers [K]."""
        if pair.through != "heads":
            return scale
        return spread_heads(scale, _weight(block, pair.consumers[0]).shape[1], self.head_dim)

    def _divide_norm(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Divides by nearly ``scale`` and returns the exact quotient: the norm is stored in the model's dtype, and what
        rounding takes from it must not be lost but reach the consumers, which are still fp32."""
        before = weight + self.norm_offset
        weight.copy_((before / scale - self.norm_offset).to(self.dtype))
        after = weight + self.norm_offset
        same_sign = after * before > 0
        # a channel that the norm switches off, or that rounds to nothing, stays as it was
        weight.copy_(torch.where(same_sign, weight, before - self.norm_offset))
        return torch.where(same_sign, before / after, torch.ones_like(scale))


def _holds(dtype: torch.dtype, parameter: torch.Tensor) -> bool:
    return bool((parameter.detach().abs() <= torch.finfo(dtype).max).all())


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    return block.get_parameter(f"{name}.weight").detach()
