"""Lets transformers load a requant checkpoint, decoded to full precision; importing this module registers it.

Weights are decoded; inputs are rounded and outputs corrected by hooks and biases, as the reference says.

Without it ``AutoModelForCausalLM.from_pretrained`` does not know the format and leaves every linear layer random.
"""

from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from requant_kernels.errors import CheckpointError
from requant_kernels.layer import layer_from_tensors
from requant_kernels.reference import dequantize
from requant_kernels.scheme import OUTPUT_HEAD, QUANT_METHOD, CheckpointScheme, LayerScheme
from requant_kernels.weight import SPARSE_TENSORS
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from requant import output_head
from requant.aweq.installed import install_around
from requant.models import as_stored, auto_class, towers
from requant.stored import open_checkpoint
from requant.validation import defects, read_layer

_TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_codebook",
    *SPARSE_TENSORS,
    "input_scale",
    "input_zero_point",
    "bias_correction",
)
# What load_quantized has found to be sound: transformers passes nothing on to a quantizer but config.json.
_SOUND: ContextVar[Path | None] = ContextVar("_SOUND", default=None)


def load_quantized(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint as a transformers model whose weights are decoded to ``dtype``: an ordinary one, but for the hooks
    that round the inputs of W8A8 layers.

    Only fp32 holds the decoded values exactly. Raises CheckpointError naming file, tensor and reason.
    """
    # transformers fails in its own words, or not at all, where the folder is not what it seems
    _refuse_unsound(Path(folder))
    token = _SOUND.set(Path(folder))
    try:
        return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)
    finally:
        _SOUND.reset(token)


def _refuse_unsound(folder: Path) -> None:
    defect = next(defects(folder), None)
    if defect:
        raise CheckpointError(str(defect))


@register_quantization_config(QUANT_METHOD)
class RequantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of config.json. Raises SchemeError for what the format does not know."""

    dequantize = True  # the loaded model is an ordinary one; transformers then drops this configuration

    def __init__(self, **data: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.scheme = CheckpointScheme.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        return self.scheme.to_dict()


@register_quantizer(QUANT_METHOD)
class RequantQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the tensors of each quantized layer by the one ``weight`` that they mean, while they are loaded."""

    quantization_config: RequantConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        # transformers reports a failing conversion only after the fact and with a traceback; refuse beforehand
        if checkpoint_files:
            self._folder = Path(checkpoint_files[0]).parent
            if self._folder != _SOUND.get():
                _refuse_unsound(self._folder)
        self._towers = towers(model)
        return as_stored(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model._weight_conversions = None  # save_pretrained would try to undo the decoding
        for name in self._towers:  # transformers leaves what it renames in the dtype of the file
            for parameter in model.get_submodule(name).parameters():
                parameter.data = parameter.data.to(model.get_input_embeddings().weight.dtype)
        with open_checkpoint(self._folder).opened() as stored:
            for name, module in model.named_modules():
                scheme = stored.scheme.for_layer(name) if isinstance(module, nn.Linear) else None
                if scheme and (scheme.activations or scheme.bias_correction):
                    where = output_head.stored_name(model.config) if name == OUTPUT_HEAD else name
                    install_around(module, read_layer(stored, where, scheme))
        return model

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        # all others, which rename tensors and fuse experts, have no work left: names are those of the file, but towers'
        renamings = [one for one in weight_conversions if isinstance(one, WeightRenaming)] if self._towers else []
        return [*renamings, *self.get_weight_conversions()]

    def get_weight_conversions(self) -> list[WeightConverter]:
        scheme = self.quantization_config.scheme
        int8 = any(one.activations for one in (scheme.scheme, *scheme.overrides.values()))
        sources = [rf"\.{name}$" for name in (*_TENSORS, *(("weight",) if int8 else ()))]
        return [WeightConverter(sources, ".weight", [_Decode(self.quantization_config.scheme)])]

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Decode(ConversionOps):  # type: ignore[misc]
    def __init__(self, scheme: CheckpointScheme) -> None:
        self._scheme = scheme

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **_: Any
    ) -> dict[str, torch.Tensor]:
        layer = full_layer_name.removesuffix(".weight")
        scheme = self._scheme_of(layer, model)
        tensors = {pattern[2:-1]: values[0] for pattern, values in input_dict.items()}
        if scheme is None:
            if tensors.keys() != {"weight"}:
                raise CheckpointError(f"{layer}: quantized tensors of a layer that config.json leaves as it is")
            return {full_layer_name: tensors["weight"].to(model.dtype)}
        return {full_layer_name: dequantize(layer_from_tensors(scheme, tensors, layer)).to(model.dtype)}

    def _scheme_of(self, layer: str, model: PreTrainedModel) -> LayerScheme | None:
        """Of the tensors that are stored under the name ``layer``."""
        module = model.get_submodule(layer)
        if isinstance(module, nn.Linear):
            return self._scheme.for_layer(layer)
        tied = module is model.get_input_embeddings() and model.config.tie_word_embeddings
        return self._scheme.for_layer(OUTPUT_HEAD) if tied else None
