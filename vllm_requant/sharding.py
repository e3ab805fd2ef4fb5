"""Which rows or columns of a stored layer live on this rank."""

from collections.abc import Callable
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.parameter import ModelWeightParameter

ShardId = str | int | tuple[int, ...] | None


class LocalIndex:
    """Asks vLLM's own loader of the layer, so that fused and merged layers and replicated key/value heads are placed
    as in any other model: it is given the numbers 0, 1, 2, ... to load as if they were a weight."""

    def __init__(self, layer: Any, shape: tuple[int, int], row_parallel: bool, loader: Callable[..., None]) -> None:
        """``layer`` knows ``tp_rank`` and ``tp_size``; ``shape`` [N, K] is the layer's on this rank; ``row_parallel``
        layers are cut along K, others along N."""
        self._layer, self._shape, self._row_parallel, self._loader = layer, shape, row_parallel, loader
        rows, columns = (1, shape[1]) if row_parallel else (shape[0], 1)
        self._index = ModelWeightParameter(
            data=torch.empty(rows, columns, dtype=torch.int64, device="cpu"),
            output_dim=0,
            input_dim=1,
            weight_loader=loader,
        )

    def cut_by(self, loader: Callable[..., None]) -> None:
        """From now on the layer's rows are placed as ``loader`` places them."""
        self._loader = loader

    @property
    def size(self) -> int:
        """The local extent of the axis that is cut."""
        return self._index.numel()

    def cut(self, weight: QuantizedLayer, shard: ShardId) -> tuple[torch.Tensor, QuantizedLayer]:
        """A stored layer -> (places int64 [n] along the cut axis of the local layer, the part that belongs there).

        Raises ValueError where its shape is not the model's.
        """
        if self._row_parallel:
            self._check(weight.out_features, self._shape[0], "rows")
            places, columns = self._place(weight.in_features, "columns", shard)
            return places, weight.take_columns(int(columns[0]), int(columns[-1]) + 1)
        self._check(weight.in_features, self._shape[1], "columns")
        places, rows = self._place(weight.out_features, "rows", shard)
        whole = torch.equal(rows, torch.arange(weight.out_features))
        return places, weight if whole else weight.take_rows(rows)

    def _place(self, length: int, what: str, shard: ShardId) -> tuple[torch.Tensor, torch.Tensor]:
        """(where in the local layer, which of 0 .. length-1), both int64 [n]."""
        self._index.tp_rank, self._index.tp_size = self._layer.tp_rank, self._layer.tp_size
        self._index.data.fill_(-1)
        numbers = torch.arange(length).unsqueeze(0 if self._row_parallel else 1)
        refusal = ValueError(f"has {length} {what}, which do not fit the model's layer")
        try:
            self._loader(self._index, numbers, *(() if shard is None else (shard,)))
        except (AssertionError, RuntimeError):  # it narrows and asserts without a word of its own
            raise refusal from None
        local = self._index.data.flatten()
        places = (local >= 0).nonzero().flatten()
        # A tensor too long passes narrow(); but then the last rank does not reach its end. A vocabulary's loader looks
        # at the length itself, and its last rank may hold nothing but padding.
        last = self._layer.tp_rank == self._layer.tp_size - 1 and not isinstance(self._layer, VocabParallelEmbedding)
        if last and int(local.max()) != length - 1:
            raise refusal
        return places, local[places]

    @staticmethod
    def _check(found: int, expected: int, what: str) -> None:
        if found != expected:
            raise ValueError(f"has {found} {what}, the model's layer {expected}")
