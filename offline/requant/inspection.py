"""What a checkpoint consists of, from its headers: the work of ``requant inspect``."""

from pathlib import Path

from requant_kernels.errors import CheckpointError
from requant_kernels.weight import tensor_names

from requant import models
from requant.report import ROUTER, LayerRow, Totals
from requant.sources import auto_config, resolve
from requant.stored import StoredCheckpoint, open_checkpoint


def layer_rows(folder: Path) -> tuple[list[LayerRow], Totals]:
    """One row per linear layer. Raises CheckpointError, InputError for what ``requant check`` would refuse first."""
    stored = open_checkpoint(folder)
    if stored.defects:
        raise CheckpointError(str(stored.defects[0]))
    architecture = models.architecture_of(str(stored.config.get("model_type")), "config.json")
    model = models.skeleton(auto_config(resolve(folder)))
    try:
        rows = [
            _row(stored, name, (linear.out_features, linear.in_features))
            for name, linear in models.linears(model, architecture).items()
        ]
        rows += [LayerRow.skipped(name, weight, ROUTER) for name, weight in models.routers(model, architecture).items()]
    except KeyError as error:
        raise CheckpointError(f"{stored.contents_file}: {error.args[0]}: missing") from None
    rows.append(LayerRow.skipped(architecture.head, *models.head(model, architecture)))
    return rows, Totals.of(rows, sum(tensor.nbytes for tensor in stored.tensors.values()))


def _row(stored: StoredCheckpoint, layer: str, shape: tuple[int, int]) -> LayerRow:
    scheme = stored.scheme.for_layer(layer)
    names = tensor_names(scheme) if scheme else ("weight",)
    tensors = {name: stored.tensors[f"{layer}.{name}"] for name in names}
    nnz = tensors["sparse_values"].shape[0] if scheme and scheme.sparse else 0
    reason = None if scheme else "ignored by the recipe"
    return LayerRow(layer, shape, scheme, sum(tensor.nbytes for tensor in tensors.values()), nnz, reason=reason)
