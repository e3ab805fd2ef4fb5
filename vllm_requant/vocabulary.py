"""A quantized output head in vLLM, and the embeddings that are tied to it: one set of tensors, used in two ways."""

from dataclasses import replace
from typing import Any

import torch
from requant_kernels.errors import SchemeError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.w8a8.dispatch import IMPLEMENTATIONS
from requant_kernels.w8a8.weight import W8A8Weight
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_requant.linear import W8A8LinearMethod
from vllm_requant.parameters import TENSORS


class VocabularyMethod(W8A8LinearMethod):
    """A layer with a row for each token of the vocabulary, which vLLM pads so that ranks get equally many."""

    def create_weights(self, layer: VocabParallelEmbedding, *args: Any, **kwargs: Any) -> None:
        self._tokens = layer.shard_indices.num_org_elements  # of this rank; padding follows
        super().create_weights(layer, *args, **kwargs)

    def _prepare(self, weight: QuantizedLayer) -> None:
        assert isinstance(weight, W8A8Weight)
        padding = torch.arange(self._tokens, weight.out_features)
        super()._prepare(replace(weight, codes=weight.codes.index_fill(0, padding, 0)))


class OutputHeadMethod(VocabularyMethod):
    """Logits of an output head with a weight of its own."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """``layer`` is another one where vLLM has taken the head out: an embedding model has none."""
        if isinstance(layer, ParallelLMHead):
            super().process_weights_after_loading(layer)

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> ParallelLMHead:
        """``layer`` without tensors: those of ``embed_tokens`` serve it.

        Raises SchemeError where the model hands its embeddings no quantization, so that there are none.
        """
        if not isinstance(embed_tokens.quant_method, EmbeddingMethod):
            raise SchemeError(
                f"{self.names[0]}: vLLM can not quantize the embeddings of this model, to which the output head is tied"
            )
        for name in TENSORS:
            delattr(layer, name)
        layer.quant_method = TiedHeadMethod(embed_tokens)
        return layer


class EmbeddingMethod(VocabularyMethod):
    """Embeddings that are an output head, too."""

    def _prepare(self, weight: QuantizedLayer) -> None:
        assert isinstance(weight, W8A8Weight)
        super()._prepare(weight)
        self._runs = IMPLEMENTATIONS[self._prepared.implementation]
        # What some libraries pack can not be read by rows: there the codes are kept a second time, which makes 2 bytes
        # a weight, as many as bfloat16 has.
        self._codes = None if self._runs.readable else weight.codes.to(self._device)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if self._codes is not None:
            layer.register_parameter("codes", torch.nn.Parameter(self._codes, requires_grad=False))
            self._codes = None

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [...] -> [..., K] in the dtype of the activations: codes times step in fp32, rounded once."""
        steps: torch.Tensor = layer.weight_scale  # type: ignore[assignment]
        return (self._read(layer, input_).float() * steps[input_].unsqueeze(-1)).to(self._dtype)

    def _read(self, layer: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        if self._runs.readable:
            return self._runs.codes(layer.weight, rows, self._shape[1])  # type: ignore[arg-type]
        return layer.codes[rows]  # type: ignore[index]


class TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Logits by the tensors of ``embed_tokens``, which loads and prepares them."""

    def __init__(self, embed_tokens: VocabParallelEmbedding) -> None:
        self._embed_tokens = embed_tokens

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a head becomes a tied one after its creation")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.weight = self._embed_tokens.weight  # LoRA asks it for dtype and device

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> logits [..., N] of this rank's part of the vocabulary."""
        logits: torch.Tensor = self._embed_tokens.quant_method.apply(self._embed_tokens, x, bias)
        return logits
