"""What a checkpoint consists of, from its headers: the work of ``requant inspect``."""

from dataclasses import replace
from pathlib import Path

from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import tensor_names
from transformers import PreTrainedModel

from requant import architectures, models, output_head
from requant.architecture import Architecture
from requant.report import LayerRow, Totals
from requant.sources import resolve, supported_config
from requant.stored import StoredCheckpoint, open_checkpoint


def layer_rows(folder: Path) -> tuple[list[LayerRow], Totals]:
    """One row per linear layer. Raises CheckpointError, InputError for what ``requant check`` would refuse first."""
    stored = open_checkpoint(folder)
    if stored.defects:
        raise CheckpointError(str(stored.defects[0]))
    model = models.skeleton(supported_config(resolve(folder), "config.json"))
    architecture = architectures.architecture_of(model.config)
    try:
        rows = [
            _row(stored, name, (linear.out_features, linear.in_features), stored.scheme.for_layer(name))
            for name, linear in models.linears(model, architecture).items()
        ]
        rows += [LayerRow.skipped(name, *one) for name, one in models.kept(model, architecture).items()]
        head = _head_row(stored, model, architecture)
    except KeyError as error:
        raise CheckpointError(f"{stored.contents_file}: {error.args[0]}: missing") from None
    except SchemeError as error:
        raise CheckpointError(f"config.json: {error}") from None
    return [*rows, head], Totals.of(rows, head, sum(tensor.nbytes for tensor in stored.tensors.values()))


def _head_row(stored: StoredCheckpoint, model: PreTrainedModel, architecture: Architecture) -> LayerRow:
    weight, reason = models.head(model, architecture)
    scheme = output_head.scheme_of(stored.scheme, model.config)
    if scheme is None:
        return LayerRow.skipped(architecture.head, weight, reason)
    row = _row(stored, output_head.stored_name(model.config), (weight.shape[0], weight.shape[1]), scheme)
    return replace(row, name=architecture.head, reason=reason)


def _row(stored: StoredCheckpoint, layer: str, shape: tuple[int, int], scheme: LayerScheme | None) -> LayerRow:
    names = tensor_names(scheme) if scheme else ("weight",)
    tensors = {name: stored.tensors[f"{layer}.{name}"] for name in names}
    nnz = tensors["sparse_values"].shape[0] if scheme and scheme.sparse else 0
    reason = None if scheme else "ignored by the recipe"
    return LayerRow(layer, shape, scheme, sum(tensor.nbytes for tensor in tensors.values()), nnz, reason=reason)
