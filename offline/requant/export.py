"""A checkpoint rewritten for programs that do not know its format: the work of ``requant export``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from requant_kernels.errors import CheckpointError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.packing import pack
from requant_kernels.reference import dequantize
from requant_kernels.scheme import LayerScheme
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight

from requant import architectures, models, output_head
from requant.checkpoint import ShardWriter, write_json
from requant.errors import InputError
from requant.settings import COMPRESSED, DENSE
from requant.sources import Source, write_sidecars
from requant.staging import staged
from requant.stored import StoredCheckpoint, open_checkpoint
from requant.validation import Expected, defects, read_layer

PACKED_BITS = (4, 8)  # which vLLM's kernels for compressed-tensors take


def export(folder: Path, out: Path, to: str, *, overwrite: bool, max_shard_bytes: int) -> list[str]:
    """Writes the checkpoint in ``folder`` to ``out``, which appears whole or not at all; returns what it no longer is.

    to: 'dense', an ordinary model in the dtype of the original, or 'compressed-tensors', which has no sparse parts. One
    layer at a time is in memory, and a shard. Raises CheckpointError for a broken checkpoint, InputError for a layer
    that the format can not hold.
    """
    if defect := next(defects(folder), None):
        raise CheckpointError(str(defect))
    stored = open_checkpoint(folder)
    expected = Expected.of(stored)
    if to == COMPRESSED:
        _refuse_for_compressed(expected)
    with staged(out, overwrite=overwrite, source=folder) as made, stored.opened() as opened:
        write_sidecars(Source(folder.resolve().name, folder, stored.config), made)
        shards = ShardWriter(made, max_shard_bytes)
        written = set[str]()
        for layer, (scheme, _) in expected.layers.items():
            weight = read_layer(opened, layer, scheme)
            for name, tensor in (_dense if to == DENSE else _compressed)(layer, weight):
                shards.add(f"{layer}.{name}", tensor)
            if weight.bias_correction is not None:
                bias = _corrected_bias(opened, layer, weight.bias_correction)
                shards.add(f"{layer}.bias", bias)
                written.add(f"{layer}.bias")
        for name in expected.others:
            if name not in written:
                shards.add(name, opened.read(name))
        shards.close()
        config = {key: value for key, value in stored.config.items() if key != "quantization_config"}
        if to == COMPRESSED:
            config["quantization_config"] = _compressed_config(stored, expected)
        write_json(made / "config.json", config)
    rounded = sum(scheme.activations is not None for scheme, _ in expected.layers.values())
    if to == DENSE and rounded:
        return [f"{rounded} layers: their weights are those of the checkpoint, but their inputs are no longer rounded"]
    return []


def _refuse_for_compressed(expected: Expected) -> None:
    architecture = architectures.architecture_of(expected.skeleton.config)
    if architecture.experts:
        raise InputError(f"routed experts are not exported to {COMPRESSED}; use --to {DENSE}")
    if architecture.head in expected.layers or output_head.stored_name(expected.skeleton.config) in expected.layers:
        raise InputError(f"{architecture.head}: an int8 output head is not exported to {COMPRESSED}; use --to {DENSE}")


def _corrected_bias(stored: StoredCheckpoint, layer: str, correction: torch.Tensor) -> torch.Tensor:
    if f"{layer}.bias" not in stored.tensors:
        raise InputError(f"{layer}: its bias correction has no place, since layers of this model have no bias")
    bias = stored.read(f"{layer}.bias")
    return (bias.float() + correction.float()).to(bias.dtype)


def _dense(layer: str, weight: QuantizedLayer) -> Iterator[tuple[str, torch.Tensor]]:
    yield "weight", dequantize(weight).to(weight.dtype)


def _compressed(layer: str, weight: QuantizedLayer) -> Iterator[tuple[str, torch.Tensor]]:
    """What compressed-tensors 0.17 calls int-quantized (W8A8) and pack-quantized."""
    if isinstance(weight, W8A8Weight):
        yield "weight", weight.codes
        yield "weight_scale", weight.scale[:, None]
        if weight.input_scale is not None:
            yield "input_scale", weight.input_scale
        if weight.input_zero_point is not None:
            yield "input_zero_point", weight.input_zero_point
        return
    yield from _packed(layer, weight)


def _packed(layer: str, weight: DenseSparseWeight) -> Iterator[tuple[str, torch.Tensor]]:
    bits = weight.scheme.weights.bits
    if weight.sparse is not None and weight.sparse.nnz:
        raise InputError(
            f"{layer}: has a sparse part, for which {COMPRESSED} has no place; use --to {DENSE}, or quantize with "
            "--outliers 0 --significant 0"
        )
    if weight.scale is None or bits not in PACKED_BITS:
        kind = "a codebook" if weight.scale is None else f"{bits} bits"
        raise InputError(f"{layer}: has {kind}, which no kernel of vLLM for {COMPRESSED} takes; use --to {DENSE}")
    yield "weight_packed", weight.packed  # signed codes of theirs, and the midpoint: the same unsigned ones
    yield "weight_scale", weight.scale
    yield "weight_shape", torch.tensor([weight.out_features, weight.in_features])
    zero_points = weight.zero_points()
    if zero_points is not None:
        yield "weight_zero_point", pack(zero_points.T.contiguous(), bits).T


def _compressed_config(stored: StoredCheckpoint, expected: Expected) -> dict[str, Any]:
    """Of config.json: each scheme with the names of its layers, the others in ``ignore``."""
    names: dict[LayerScheme, list[str]] = {}
    for layer, (scheme, _) in expected.layers.items():
        names.setdefault(scheme, []).append(layer)
    architecture = architectures.architecture_of(expected.skeleton.config)
    linears = models.linears(expected.skeleton, architecture)
    groups = {f"group_{i}": _group(scheme, layers) for i, (scheme, layers) in enumerate(names.items())}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": COMPRESSED,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*(name for name in linears if name not in expected.layers), architecture.head],
    }


def _group(scheme: LayerScheme, layers: list[str]) -> dict[str, Any]:
    """``layers``: whole names, because vLLM renames those, but no patterns, where its model calls them otherwise."""
    weights, inputs = scheme.weights, scheme.activations
    by_group = weights.group_size != -1
    group: dict[str, Any] = {
        "targets": layers,
        "format": "int-quantized" if inputs else "pack-quantized",
        "weights": {
            "num_bits": weights.bits,
            "type": "int",
            "symmetric": weights.symmetric,
            "strategy": "group" if by_group else "channel",
            "group_size": weights.group_size if by_group else None,
            "dynamic": False,
        },
    }
    if inputs:
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": inputs.symmetric,
            "strategy": "token" if inputs.dynamic else "tensor",
            "dynamic": inputs.dynamic,
        }
    return group
