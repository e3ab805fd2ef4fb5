"""The output head as a quantized layer: where it is stored, as what, and what its weight becomes."""

import torch
from requant_kernels.scheme import HEAD_SCHEME, W8A8_WEIGHTS, CheckpointScheme, LayerScheme, check_output_head
from requant_kernels.w8a8.weight import W8A8Weight
from transformers import PreTrainedConfig

from requant import models
from requant.aweq import int8
from requant.errors import InputError
from requant.quantizers import rtn


def stored_name(config: PreTrainedConfig) -> str:
    """The layer whose tensors are the head's: the embeddings where it is tied to them."""
    architecture = models.ARCHITECTURES[config.model_type]
    return architecture.embeddings if config.tie_word_embeddings else architecture.head


def scheme_of(scheme: CheckpointScheme, config: PreTrainedConfig) -> LayerScheme | None:
    """How the head is stored, None where it is stored as it was. Raises SchemeError for a scheme that no head can have,
    InputError for a model whose head vLLM can not quantize."""
    architecture = models.ARCHITECTURES[config.model_type]
    chosen = scheme.for_layer(architecture.head)
    if chosen:
        check_output_head(chosen, architecture.head)
        kind = "tied" if config.tie_word_embeddings else "untied"
        if kind not in architecture.quantizable_heads:
            raise InputError(
                f"{architecture.head}: vLLM can not quantize the {kind} output head of {config.model_type!r}"
            )
    return chosen


def quantize(weight: torch.Tensor) -> W8A8Weight:
    """weight [N, K] in the model's dtype -> int8, each row rounded to nearest with a step of its own."""
    return int8.from_dense(rtn.quantize(weight.float(), W8A8_WEIGHTS, dtype=weight.dtype), HEAD_SCHEME)
