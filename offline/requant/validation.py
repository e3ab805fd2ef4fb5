"""Everything that can be wrong with a checkpoint, without a model or a GPU: the work of ``requant check``."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.layer import QuantizedLayer, layer_from_tensors
from requant_kernels.packing import packed_length
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import tensor_names
from transformers import PreTrainedModel

from requant import architectures, models, output_head
from requant.errors import InputError
from requant.planning import split_fused
from requant.sources import resolve, supported_config
from requant.stored import Defect, StoredCheckpoint, open_checkpoint
from requant.tensor_parallel import cut_groups, obstacles

_SPELLING = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATS = {"BF16", "F16", "F32", "F64"}
_STEPS = ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class Expected:
    """What config.json promises: (scheme, [N, K]) of each quantized layer by the name that it is stored under, the
    shapes of all other tensors, and the dtype of every floating-point tensor as safetensors spells it; buffers, such as
    biases of routers, may be float32 in any model, and so may what the model itself makes so, such as routers."""

    skeleton: PreTrainedModel
    layers: dict[str, tuple[LayerScheme, tuple[int, int]]]
    others: dict[str, tuple[int, ...]]
    dtype: str

    @classmethod
    def of(cls, stored: StoredCheckpoint) -> "Expected":
        """Raises InputError where config.json describes no model that is supported, SchemeError for an output head that
        is not."""
        dtype = _SPELLING.get(str(stored.dtype))
        if dtype is None:
            raise InputError(f"dtype: {stored.dtype!r} is not one of {', '.join(_SPELLING)}")
        model = models.skeleton(supported_config(resolve(stored.folder), "config.json"))
        architecture = architectures.architecture_of(model.config)
        others, layers = models.stored_shapes(model, architecture), {}
        for name, in_file in models.names_beside(model, stored.tensors).items():
            if name in others:
                others[in_file] = others.pop(name)
        for name, linear in models.linears(model, architecture).items():
            if scheme := stored.scheme.for_layer(name):
                layers[name] = (scheme, (linear.out_features, linear.in_features))
                del others[f"{name}.weight"]
        if scheme := output_head.scheme_of(stored.scheme, model.config):
            name = output_head.stored_name(model.config)
            rows, columns = others.pop(f"{name}.weight")
            layers[name] = (scheme, (rows, columns))
        return cls(model, layers, others, dtype)


def defects(folder: Path, degrees: tuple[int, ...] = (), *, contents: bool = True) -> Iterator[Defect]:
    """Every defect of the checkpoint in ``folder``: files, then configuration (with each degree of tensor
    parallelism that is asked for and not possible), names and shapes, contents (unless headers are enough)."""
    try:
        stored = open_checkpoint(folder)
        expected = Expected.of(stored)
    except (CheckpointError, InputError, SchemeError) as error:
        yield Defect("config.json", str(error).removeprefix("config.json: "))
        return
    yield from stored.defects
    for line in (*split_fused(stored.scheme, expected.skeleton), *_quantized_kept(stored, expected.skeleton)):
        yield Defect("config.json", line)
    for degree in degrees:
        for line in obstacles(expected.skeleton, degree):
            yield Defect("config.json", line)
    structural = list(_structure(stored, expected))
    yield from structural
    if contents:
        with stored.opened() as opened:
            yield from _contents(opened, expected, {defect.what.split(":")[0] for defect in structural})


def remarks(folder: Path, degrees: tuple[int, ...]) -> Iterator[str]:
    """What each degree of tensor parallelism, which the sound checkpoint in ``folder`` allows, does to it."""
    expected = Expected.of(open_checkpoint(folder))
    for degree in degrees:
        yield from cut_groups(expected.skeleton, expected.layers, degree)


def _quantized_kept(stored: StoredCheckpoint, model: PreTrainedModel) -> Iterator[str]:
    for name, (_, what) in models.kept(model, architectures.architecture_of(model.config)).items():
        if stored.scheme.for_layer(name):
            yield f"{name}: a {what} is stored as it is, so a pattern of 'ignore' must match it"


def _structure(stored: StoredCheckpoint, expected: Expected) -> Iterator[Defect]:
    known = set(expected.others)
    for layer, (scheme, (rows, columns)) in expected.layers.items():
        # these two tie the layer to config.json; the others are compared with them when the layer is read
        shapes = {"weight_packed": (rows, packed_length(columns, scheme.weights.bits)), "weight": (rows, columns)}
        for name in tensor_names(scheme):
            known.add(f"{layer}.{name}")
            yield from _tensor(stored, f"{layer}.{name}", shapes.get(name), expected.dtype)
    wide = {name for name, _ in expected.skeleton.named_buffers()}
    wide |= {name for name, tensor in expected.skeleton.named_parameters() if tensor.dtype == torch.float32}
    for name, shape in expected.others.items():
        found = name in wide and name in stored.tensors and stored.tensors[name].dtype == "F32"
        yield from _tensor(stored, name, shape, "F32" if found else expected.dtype, exact=True)
    for name in sorted(stored.tensors.keys() - known):
        yield Defect(stored.tensors[name].file, f"{name}: not expected in this model")


def _tensor(
    stored: StoredCheckpoint, name: str, shape: tuple[int, ...] | None, dtype: str, *, exact: bool = False
) -> Iterator[Defect]:
    """``dtype``: of a floating-point tensor; with ``exact`` of any."""
    found = stored.tensors.get(name)
    if found is None:
        if not stored.defects:  # else it may lie in a file that could not be read
            yield Defect(stored.contents_file, f"{name}: missing")
        return
    if ".sparse_" in name and len(found.shape) != 1:
        yield Defect(found.file, f"{name}: shape {list(found.shape)}, expected one dimension")
    elif shape is not None and found.shape != shape:
        yield Defect(found.file, f"{name}: shape {list(found.shape)}, but {list(shape)} by config.json")
    if found.dtype != dtype and (exact or found.dtype in _FLOATS):
        yield Defect(found.file, f"{name}: dtype {found.dtype}, but {dtype} by config.json")


def _contents(stored: StoredCheckpoint, expected: Expected, unreadable: set[str]) -> Iterator[Defect]:
    """What only the numbers show, of every tensor whose name, shape and dtype are as expected."""
    steps: dict[str, torch.Tensor] = {}  # of inputs, static ones, by the tensor's name
    for layer, (scheme, _) in expected.layers.items():
        names = {f"{layer}.{name}" for name in tensor_names(scheme)}
        if names & unreadable or not names <= stored.tensors.keys():
            continue
        try:
            tensors = read_layer(stored, layer, scheme).to_tensors()
            steps |= {f"{layer}.{name}": tensor for name, tensor in tensors.items() if name in _STEPS}
        except CheckpointError as error:
            yield Defect(stored.tensors[str(error).split(":")[0]].file, str(error))
    yield from _differing_steps(stored, expected.skeleton, steps)
    for name in sorted(expected.others.keys() & stored.tensors.keys() - unreadable):
        if not bool(torch.isfinite(stored.read(name)).all()):
            yield Defect(stored.tensors[name].file, f"{name}: not finite")


def _differing_steps(
    stored: StoredCheckpoint, model: PreTrainedModel, steps: dict[str, torch.Tensor]
) -> Iterator[Defect]:
    for members in models.shared_schemes(model, architectures.architecture_of(model.config)):
        for step in _STEPS:
            first, *others = [f"{member}.{step}" for member in members]
            for name in others:
                if first in steps and name in steps and not torch.equal(steps[first], steps[name]):
                    what = f"{name}: differs from {first}, but they run as one layer in vLLM and must share one"
                    yield Defect(stored.tensors[name].file, what)


def read_layer(stored: StoredCheckpoint, layer: str, scheme: LayerScheme) -> QuantizedLayer:
    """Raises CheckpointError naming layer and tensor unless it is what the scheme says."""
    tensors = {name: stored.read(f"{layer}.{name}") for name in tensor_names(scheme)}
    return layer_from_tensors(scheme, tensors, layer)
