"""The walk of ``requant quantize``: recipe -> blocks -> quantizer -> detach -> checkpoint. No step reaches back."""

import json
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.reference import dequantize
from requant_kernels.rounding.dense import attach_residual
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import CheckpointScheme, LayerScheme
from requant_kernels.weight import MODEL_DTYPES
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from requant import architectures, models, output_head, sources
from requant.architecture import Architecture
from requant.aweq import int8
from requant.calibrated.run import Calibrated, CalibratedRun
from requant.calibrated.subject import Subject
from requant.calibration import Windows, read_windows
from requant.checkpoint import ShardWriter, write_json
from requant.detach import outliers
from requant.errors import InputError
from requant.model_card import model_card
from requant.planning import fitted, plan
from requant.progress import track
from requant.quantizers.bases import DATA_FREE
from requant.recipe import Recipe
from requant.report import REPORT_FILE, LayerRow, Report, Totals
from requant.sensitivity.store import Stores, offloaded
from requant.stages import Stages, digest, folder_of
from requant.staging import staged
from requant.validation import defects
from requant.versions import producer


def run(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    *,
    device: torch.device,
    overwrite: bool,
    max_shard_bytes: int,
    resume: bool = False,
    offload_folder: Path | None = None,
) -> Report:
    """Quantizes ``model`` into the folder ``out``. Without calibration, matrices visit ``device`` one by one; the model
    stays on the CPU and is freed block by block. With it, the whole model computes on ``device`` in fp32. ``resume``:
    keeps what is finished of a calibrated run until it is whole, and takes up what an earlier one kept.
    ``offload_folder``: of sensitivity/store.py. Raises InputError, SchemeError; leaves nothing else behind when it
    does."""
    if resume and recipe.settled:
        raise InputError("--resume: not with activations or bias_correction, whose blocks are not kept; leave it out")
    source = sources.resolve(model)
    config = sources.read_config(source)
    scheme = plan(config, recipe, producer())
    windows = _windows(source, config, recipe) if recipe.calibrated else None
    with staged(out, overwrite=overwrite, source=source.path) as folder:
        sources.write_sidecars(source, folder)  # first: what is wrong with a tokenizer is said before hours of work
        torch.manual_seed(recipe.seed)
        network = sources.load(source)
        original_bytes = sum(tensor.nbytes for _, tensor in models.stored_tensors(network))
        shards = ShardWriter(folder, max_shard_bytes)
        architecture = architectures.architecture_of(network.config)
        kept = folder_of(out) if resume else None
        calibrated = None
        if windows:
            with offloaded(offload_folder) as stores:
                subject = _subject(network, scheme, recipe, stores)
                stages = Stages.opened(kept, _fingerprint(source, windows, recipe, device)) if kept else Stages()
                calibrated = _calibrate(CalibratedRun(subject, stages), windows, device, source.name)
        layers = calibrated.layers if calibrated else {}
        if layers:
            chosen = {name: layer.scheme for name, layer in layers.items()}
            head_scheme = output_head.scheme_of(scheme, network.config)
            scheme = fitted(scheme, chosen | ({architecture.head: head_scheme} if head_scheme else {}))
        rows, head = _Walk(architecture, scheme, recipe, device, shards, layers).write(network)
        report = Report(
            model=source.name,
            recipe=recipe.to_dict(),
            producer=producer(),
            layers=(*rows, head),
            total=Totals.of(rows, head, shards.total_bytes),
            original_bytes=original_bytes,
            calibration=calibrated.summary() if calibrated else None,
        )
        _write_metadata(source, network, scheme, report, folder)
        if defect := next(defects(folder, contents=False), None):  # ours: nobody is to serve it
            raise RuntimeError(f"the checkpoint that was made is not sound: {defect}")
    if resume:
        shutil.rmtree(folder_of(out), ignore_errors=True)
    return report


@dataclass(frozen=True)
class _Walk:
    """Once through a model, block by block: every tensor ends in ``shards``, every linear layer in a row."""

    architecture: Architecture
    scheme: CheckpointScheme
    recipe: Recipe
    device: torch.device
    shards: ShardWriter
    layers: dict[str, QuantizedLayer]  # those that are quantized already, by name

    def write(self, network: PreTrainedModel) -> tuple[list[LayerRow], LayerRow]:
        """The rows of all blocks, and the output head's."""
        head, rows = self._write_outer(network), []
        blocks = models.blocks(network, self.architecture)
        for prefix, block in track(blocks, network.config.get_text_config().num_hidden_layers, "quantizing blocks"):
            rows += self._write_block(prefix, block)
            block.to("meta")  # its memory is free again
        self.shards.close()
        return rows, head

    def _write_outer(self, network: PreTrainedModel) -> LayerRow:
        weight, reason = models.head(network, self.architecture)
        row = LayerRow.skipped(self.architecture.head, weight, reason)
        scheme, layer = output_head.scheme_of(self.scheme, network.config), output_head.stored_name(network.config)
        for name, parameter in models.outer_tensors(network, self.architecture):
            tensor = _checked(name, parameter)
            if scheme and name == f"{layer}.weight":
                stored = round_layer(tensor.to(self.device), scheme)
                self._add(layer, stored)
                row = LayerRow.quantized(row.name, stored, relative_error(tensor, stored), reason)
            else:
                self.shards.add(name, tensor)
        return row

    def _write_block(self, prefix: str, block: nn.Module) -> list[LayerRow]:
        rows, architecture = [], self.architecture.of(block)
        for local, stored_tensor in models.stored_tensors(block):
            name, tensor = f"{prefix}.{local}", _checked(f"{prefix}.{local}", stored_tensor)
            layer = name.removesuffix(".weight")
            linear = local.removesuffix(".weight") in architecture.linears
            scheme = self.scheme.for_layer(layer) if linear else None
            if scheme:
                stored = self.layers.pop(layer, None) or self._quantized(layer, tensor, scheme)
                self._add(layer, stored)
                rows.append(LayerRow.quantized(layer, stored, relative_error(tensor, stored)))
            else:
                self.shards.add(name, tensor)
                if linear:
                    rows.append(LayerRow.skipped(layer, tensor, "ignored by the recipe"))
                elif what := dict(architecture.kept).get(local.removesuffix(".weight")):
                    rows.append(LayerRow.skipped(layer, tensor, what))
        return rows

    def _add(self, layer: str, stored: QuantizedLayer) -> None:
        for part, value in stored.to_tensors().items():
            self.shards.add(f"{layer}.{part}", value)

    def _quantized(self, name: str, weight: torch.Tensor, scheme: LayerScheme) -> QuantizedLayer:
        per_tensor = self.recipe.activations_of(name).per_tensor
        return quantize_layer(weight.to(self.device), scheme, self.recipe, per_tensor)


def quantize_layer(
    weight: torch.Tensor, scheme: LayerScheme, recipe: Recipe, per_tensor: bool = False
) -> QuantizedLayer:
    """weight [N, K] in the model's dtype -> the layer to store, without calibration."""
    target = weight.float()
    if per_tensor:
        return int8.one_step(target, weight.dtype).pack_w8a8(scheme)
    mask = outliers.largest(target, recipe.outliers) if scheme.sparse else None
    dense = DATA_FREE[recipe.base](target, scheme.weights, dtype=weight.dtype, excluded=mask)
    if scheme.activations:
        return dense.pack_w8a8(scheme)
    return dense.pack() if mask is None else attach_residual(target, dense, mask, weight.dtype)


def relative_error(weight: torch.Tensor, stored: QuantizedLayer) -> float:
    """|W - W~| / |W|, Frobenius norms."""
    target, decoded = weight.float(), dequantize(stored)
    norm = float(target.norm())
    return float((target - decoded.to(target.device)).norm()) / norm if norm else 0.0


def _windows(source: sources.Source, config: PreTrainedConfig, recipe: Recipe) -> Windows:
    context = config.get_text_config().max_position_embeddings
    if recipe.calibration.seqlen > context:
        raise InputError(f"calibration: seqlen {recipe.calibration.seqlen} exceeds the model's context of {context}")
    return read_windows(recipe.calibration, source.tokenizer(), recipe.seed)


def _subject(network: PreTrainedModel, scheme: CheckpointScheme, recipe: Recipe, stores: Stores) -> Subject:
    architecture = architectures.architecture_of(network.config)
    for name, tensor in models.stored_tensors(network):
        _checked(name, tensor)
    schemes = {name: scheme.for_layer(name) for name in models.linears(network, architecture)}
    wanted = {name: chosen for name, chosen in schemes.items() if chosen}
    return Subject(network, architecture, wanted, recipe, network.dtype, stores)


def _calibrate(run: CalibratedRun, windows: Windows, device: torch.device, name: str) -> Calibrated:
    """Computes in fp32 on ``device``; the norms of the model, called ``name``, may come back rewritten, in numbers that
    its own dtype can hold."""
    network = run.subject.network
    try:
        network.to(device, torch.float32)
        return run.quantize(windows)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(".")[0]
        raise InputError(f"{name}: in fp32 it does not fit on the device ({reason}); use --device cpu") from None
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    finally:
        network.to("cpu", run.subject.dtype)


def _fingerprint(source: sources.Source, windows: Windows, recipe: Recipe, device: torch.device) -> dict[str, str]:
    """All that decides the bytes of a run, by the names that a refusal uses."""
    files = [source.path] if source.gguf else [source.folder / "config.json", *source.folder.glob("*.safetensors")]
    return {
        "the model's files": digest(files),
        "the calibration text": windows.sha256,
        "its tokens": sha256(torch.cat(windows.ids).numpy().tobytes()).hexdigest(),
        "the recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        "versions and device": json.dumps(producer() | {"device": device.type}, sort_keys=True),
    }


def _checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in MODEL_DTYPES:
        raise InputError(f"{name}: dtype {tensor.dtype} is not bfloat16, float16 or float32")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name}: holds NaN or infinite values; the model itself is broken")
    return tensor


def _write_metadata(
    source: sources.Source,
    network: PreTrainedModel,
    scheme: CheckpointScheme,
    report: Report,
    folder: Path,
) -> None:
    config = {key: value for key, value in source.raw.items() if key != "torch_dtype"}  # dtype's old name
    config["architectures"] = config.get("architectures") or [type(network).__name__]  # a GGUF names none
    config |= {"dtype": str(network.dtype).removeprefix("torch."), "quantization_config": scheme.to_dict()}
    tied = {"tie_word_embeddings": network.config.tie_word_embeddings}
    config |= tied
    if "text_config" in config:  # which vLLM asks, while transformers asks the model's own
        config["text_config"] = config["text_config"] | tied
    write_json(folder / "config.json", config)
    write_json(folder / REPORT_FILE, report.to_dict())
    (folder / "README.md").write_text(model_card(report, source), encoding="utf-8")
