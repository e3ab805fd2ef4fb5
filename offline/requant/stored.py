"""A checkpoint folder as it lies on disk, read from headers alone and without trust."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.scheme import CheckpointScheme
from safetensors import SafetensorError, safe_open

from requant.checkpoint import INDEX_FILE, SINGLE_FILE

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Defect:
    """One line about what is wrong and where: the file, then the tensor or key, then the matter."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header declares it; ``dtype`` as safetensors spells it ("BF16")."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BYTES.get(self.dtype, 1)


def _open(path: Path) -> Any:
    """Parses the whole header. What is read from it outlives it."""
    return safe_open(path, framework="pt")


@dataclass(frozen=True)
class StoredCheckpoint:
    """``tensors`` by name, from every file that could be read; ``defects`` of the files that could not, or that
    disagree with the index."""

    folder: Path
    config: dict[str, Any]
    scheme: CheckpointScheme
    tensors: dict[str, StoredTensor]
    defects: tuple[Defect, ...]
    _file: Callable[[Path], Any] = field(default=_open, repr=False, compare=False)

    @property
    def dtype(self) -> str | None:
        """The model's dtype as config.json spells it: "bfloat16"."""
        return self.config.get("dtype") or self.config.get("torch_dtype")

    @property
    def contents_file(self) -> str:
        """The file that lists the tensors: where a missing one is missed."""
        return INDEX_FILE if (self.folder / INDEX_FILE).exists() else SINGLE_FILE

    def read(self, name: str) -> torch.Tensor:
        """One tensor; whoever wants many reads them within ``opened``."""
        tensor: torch.Tensor = self._file(self.folder / self.tensors[name].file).get_tensor(name)
        return tensor

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """The same checkpoint for the length of a walk: a file is opened when it is first read from, and stays open."""
        with ExitStack() as stack:
            yield replace(self, _file=cache(lambda path: stack.enter_context(self._file(path))))


def open_checkpoint(folder: Path) -> StoredCheckpoint:
    """Raises CheckpointError where config.json does not declare a requant checkpoint of a known version."""
    config = read_json(folder / "config.json")
    if not isinstance(config.get("quantization_config"), dict):
        raise CheckpointError("config.json: no quantization_config, so not a requant checkpoint")
    try:
        scheme = CheckpointScheme.from_dict(config["quantization_config"])
    except SchemeError as error:
        raise CheckpointError(f"config.json: {error}") from None
    tensors, defects = _scan(folder)
    return StoredCheckpoint(folder, config, scheme, tensors, tuple(defects))


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where ``path`` is no readable JSON object."""
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: not a JSON object")
    return data


def _scan(folder: Path) -> tuple[dict[str, StoredTensor], list[Defect]]:
    tensors: dict[str, StoredTensor] = {}
    defects: list[Defect] = []
    twice: list[Defect] = []
    declared: dict[str, str] | None = None
    if (folder / INDEX_FILE).exists():
        try:
            declared = _weight_map(folder)
        except CheckpointError as error:
            return tensors, [Defect(INDEX_FILE, str(error).removeprefix(f"{INDEX_FILE}: "))]
        defects += _index_defects(folder, declared)
    present = sorted(path.name for path in folder.glob("*.safetensors"))
    expected = {SINGLE_FILE} if declared is None else set(declared.values())
    defects += [Defect(file, "no part of this checkpoint by its index") for file in present if file not in expected]
    if declared is None and SINGLE_FILE not in present:
        defects.append(Defect(SINGLE_FILE, f"absent, and so is {INDEX_FILE}"))
    for file in present:
        if file not in expected:
            continue
        try:
            header = dict(_header(folder, file))
        except (SafetensorError, OSError) as error:
            defects.append(Defect(file, f"not a whole safetensors file ({error})"))
            continue
        again = header.keys() & tensors.keys()
        twice += [Defect(file, f"{name}: in {tensors[name].file} as well") for name in sorted(again)]
        # of two, the one that the index names
        tensors |= {
            name: header[name] for name in header if name not in again or (declared and declared.get(name) == file)
        }
    if declared is not None:
        defects += _disagreements(declared, tensors, {defect.file for defect in defects})
    return tensors, defects + twice


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_FILE}: no weight_map")
    return {name: str(file) for name, file in weight_map.items()}


def _index_defects(folder: Path, weight_map: dict[str, str]) -> Iterator[Defect]:
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            yield Defect(INDEX_FILE, f"{file!r}: not the plain name of a safetensors file in this folder")
        elif not (folder / file).is_file():
            yield Defect(INDEX_FILE, f"{file}: named here, but absent")


def _disagreements(
    weight_map: dict[str, str], tensors: dict[str, StoredTensor], unread: Iterable[str]
) -> Iterator[Defect]:
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None and file not in unread:
            yield Defect(INDEX_FILE, f"{name}: not in {file}, where the index has it")
        elif found is not None and found.file != file:
            yield Defect(INDEX_FILE, f"{name}: in {found.file}, where the index has {file}")
    for name in tensors.keys() - weight_map.keys():
        yield Defect(tensors[name].file, f"{name}: not in {INDEX_FILE}")


def _header(folder: Path, file: str) -> Iterator[tuple[str, StoredTensor]]:
    with _open(folder / file) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            view = opened.get_slice(name)
            yield name, StoredTensor(file, view.get_dtype(), tuple(view.get_shape()))
