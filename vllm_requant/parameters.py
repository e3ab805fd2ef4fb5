"""From the tensors of a file, in any order, to one validated local weight per layer.

The sparse part has a length that no parameter can be given beforehand, so the parameters that vLLM finds on a layer
are empty: their loader collects the tensors of each shard, and as soon as a shard is whole it is validated and cut
to this rank. Memory then holds the file's form of one layer at a time.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from requant_kernels.errors import CheckpointError
from requant_kernels.layer import QuantizedLayer, kind_of, layer_from_tensors
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import tensor_names
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_requant.sharding import LocalIndex, ShardId

# Every tensor that any scheme knows has a placeholder, and so has the unquantized weight: one that a file should
# not contain is then refused by name.
TENSORS = {
    "weight_packed": torch.int32,
    "weight_scale": None,
    "weight_zero_point": torch.int32,
    "weight_codebook": None,
    "sparse_row_offsets": torch.int32,
    "sparse_columns": torch.uint16,
    "sparse_values": None,
    "input_scale": None,
    "input_zero_point": torch.int8,
    "bias_correction": None,
    "weight": None,
}


@dataclass(frozen=True)
class Form:
    """What a file holds of each layer of a scheme, by the last names of its tensors, and how they become the layer;
    ``layer`` gets the layer's name too, and raises CheckpointError."""

    tensors: Callable[[LayerScheme], tuple[str, ...]]
    layer: Callable[[LayerScheme, dict[str, torch.Tensor], str], QuantizedLayer]


QUANTIZED = Form(tensor_names, layer_from_tensors)


class Placeholder(BasevLLMParameter):  # type: ignore[misc]
    """An empty parameter whose ``weight_loader`` brings tensors to a LayerLoader."""

    def __init__(self, data: torch.Tensor, weight_loader: Callable[..., None], index: LocalIndex) -> None:
        super().__init__(data, weight_loader)
        self._index = index
        # Models that put a file's rows in another order (falcon.py) ask for the axis.
        self.output_dim, self.input_dim = 0, 1

    @property
    def weight_loader(self) -> Callable[..., None]:
        return self._weight_loader

    @weight_loader.setter
    def weight_loader(self, loader: Callable[..., None]) -> None:
        """Where a model brings a loader (parameter, weight) of its own (mamba_mixer2.py), that is how rows are cut; all
        others, of vLLM's reloading, take what a LayerLoader does."""
        if len(inspect.signature(loader).parameters) == 2:
            self._index.cut_by(loader)
        else:
            self._weight_loader = loader


class LayerLoader:
    """Collects one linear layer of the model, made of the stored layers ``names`` (several where vLLM fuses them)."""

    def __init__(
        self,
        names: list[str],
        scheme: LayerScheme,
        form: Form,
        index: LocalIndex,
        finish: Callable[[QuantizedLayer], None],
        *,
        dtype: torch.dtype,
    ) -> None:
        """``finish`` gets the local weight once, as soon as it is whole; what it refuses need not name the layer.
        ``dtype``: of the activations."""
        self._names, self._scheme, self._form, self._index, self._finish = names, scheme, form, index, finish
        self._dtype = dtype
        self._arrived: dict[ShardId, dict[str, torch.Tensor]] = {}
        self._parts: list[tuple[torch.Tensor, QuantizedLayer]] = []
        self._complete = False
        self._served = False

    def placeholder(self, tensor_name: str) -> Placeholder:
        """An empty parameter whose ``weight_loader`` brings tensors here."""
        int8 = tensor_name == "weight" and self._scheme.activations  # vLLM warns where a file holds another dtype
        empty = torch.empty(0, dtype=torch.int8 if int8 else TENSORS[tensor_name] or self._dtype)

        def weight_loader(param: torch.nn.Parameter, loaded: torch.Tensor, shard: ShardId = None) -> None:
            self.load(tensor_name, loaded, shard)

        return Placeholder(empty, weight_loader=weight_loader, index=self._index)

    def close(self) -> None:
        """From now on the layer is served from its runtime layout, into which no tensor of a file can be put."""
        self._served = True

    def check_complete(self) -> None:
        """Raises CheckpointError, naming the first tensor that never came."""
        if self._complete:
            return
        came = {(self._name(shard), tensor_name) for shard, parts in self._arrived.items() for tensor_name in parts}
        for name in self._names:
            for tensor_name in self._form.tensors(self._scheme):
                if (name, tensor_name) not in came:
                    raise CheckpointError(f"{name}.{tensor_name}: missing in the checkpoint")
        raise CheckpointError(f"{', '.join(self._names)}: do not fill the model's layer")

    def load(self, tensor_name: str, tensor: torch.Tensor, shard: ShardId) -> None:
        """Takes one tensor of the stored layer that ``shard`` means. Raises CheckpointError for one that is wrong, not
        expected or here already."""
        name = self._name(shard)
        where = f"{name}.{tensor_name}"
        if self._served:  # the parts of the model that were reloaded before this are lost already
            raise CheckpointError(f"{where}: a quantized layer that is served can not be reloaded; start vLLM anew")
        expected = self._form.tensors(self._scheme)
        if tensor_name == "weight" and "weight" not in expected:
            raise CheckpointError(f"{where}: stored unquantized, but quantization_config does not ignore the layer")
        if tensor_name not in expected:
            raise CheckpointError(f"{where}: not expected in a layer of this scheme")
        tensors = self._arrived.setdefault(shard, {})
        if tensor_name in tensors:
            raise CheckpointError(f"{where}: loaded twice")
        # Kernels take steps in the dtype that they compute in: others are rounded to it, as any model's weights are by
        # vLLM. Those of W8A8 are used in fp32.
        rounded = tensor.is_floating_point() and self._dtype.itemsize == 2 and not self._scheme.activations
        # A copy: some of vLLM's readers reuse their buffers.
        tensors[tensor_name] = tensor.to("cpu", self._dtype if rounded else tensor.dtype, copy=True)
        if len(tensors) == len(expected):
            self._add_part(name, tensors, shard)

    def _name(self, shard: ShardId) -> str:
        """Of the fused layer that vLLM's shard id means. Where one before it is several of vLLM's (qwen3_5.py), ids run
        ahead of names; the last then has the last."""
        first = shard[0] if isinstance(shard, tuple) else shard or 0
        place = first if isinstance(first, int) else "qkv".index(first)
        return self._names[place] if place < len(self._names) else self._names[-1]

    def _add_part(self, name: str, tensors: dict[str, torch.Tensor], shard: ShardId) -> None:
        weight = self._form.layer(self._scheme, tensors, name)
        for tensor_name in tensors:  # the names stay, to tell later what came; the memory goes
            tensors[tensor_name] = torch.empty(0)
        try:
            places, local = self._index.cut(weight, shard)
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        self._parts.append((places, local))
        if sum(len(places) for places, _ in self._parts) == self._index.size:
            self._complete = True
            self._parts.sort(key=lambda part: int(part[0][0]))
            parts: list[Any] = [part for _, part in self._parts]  # all of this kind
            try:
                whole = kind_of(self._scheme).concat_rows(parts)
            except ValueError as error:
                raise CheckpointError(f"{', '.join(self._names)}: {error}") from None
            try:
                self._finish(whole)
            except CheckpointError as error:
                raise CheckpointError(f"{', '.join(self._names)}: {error}") from None
            self._parts.clear()
