"""The output head as a quantized layer: where it is stored, and as what."""

from requant_kernels.scheme import CheckpointScheme, LayerScheme, check_output_head
from transformers import PreTrainedConfig

from requant import architectures
from requant.errors import InputError


def stored_name(config: PreTrainedConfig) -> str:
    """The layer whose tensors are the head's: the embeddings where it is tied to them."""
    architecture = architectures.architecture_of(config)
    return architecture.embeddings if config.tie_word_embeddings else architecture.head


def scheme_of(scheme: CheckpointScheme, config: PreTrainedConfig) -> LayerScheme | None:
    """How the head is stored, None where it is stored as it was. Raises SchemeError for a scheme that no head can have,
    InputError for a model whose head vLLM can not quantize."""
    architecture = architectures.architecture_of(config)
    chosen = scheme.for_layer(architecture.head)
    if chosen:
        check_output_head(chosen, architecture.head)
        kind = "tied" if config.tie_word_embeddings else "untied"
        if kind not in architecture.quantizable_heads:
            raise InputError(
                f"{architecture.head}: vLLM can not quantize the {kind} output head of {config.model_type!r}"
            )
    return chosen
