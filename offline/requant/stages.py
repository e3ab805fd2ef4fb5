"""What a run has finished, kept beside its output, so that an interrupted run continues and ends in the same bytes."""

import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from requant.checkpoint import save
from requant.errors import InputError

Tensors = dict[str, torch.Tensor]
Result = tuple[Tensors, dict[str, Any]]
CHOICE = "sparse"  # the stage that chooses the sparse entries
_FINGERPRINT = "fingerprint.json"


class Stages:
    """Results of finished stages, one safetensors file each in ``folder``; where that is None, nothing is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @classmethod
    def opened(cls, folder: Path, fingerprint: Mapping[str, Any]) -> "Stages":
        """Those of an earlier run with the same ``fingerprint`` (JSON), or none yet. Raises InputError naming what
        differs from the earlier run."""
        path, said = folder / _FINGERPRINT, json.loads(json.dumps(fingerprint))
        if path.exists():
            earlier = _read_fingerprint(path)
            if changed := sorted(key for key in {*said, *earlier} if said.get(key) != earlier.get(key)):
                raise InputError(
                    f"--resume: {', '.join(changed)} differ from those of the interrupted run; go back to them, or "
                    f"remove {folder} to start anew"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(said), encoding="utf-8")
            os.replace(partial, path)
        return cls(folder)

    def kept(self, name: str, make: Callable[[], Result]) -> Result:
        """What ``make`` returned when stage ``name`` was finished: (tensors, JSON), in this run or an earlier one."""
        if self._folder is None:
            return make()
        path = self._folder / f"{name}.safetensors"
        if path.exists():
            return _read(path)
        tensors, facts = make()
        partial = path.with_suffix(".partial")
        # safetensors refuses tensors that share memory, as an original weight and a target do
        copies = {
            key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
        }
        save(copies, partial, {"facts": json.dumps(facts)})
        os.replace(partial, path)
        return tensors, facts


def _read_fingerprint(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); remove {path.parent} to start anew") from None
    return dict(found)


def _read(path: Path) -> Result:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); remove it to repeat this stage") from None


def folder_of(out: Path) -> Path:
    """Where the stages of a run into ``out`` are kept."""
    absolute = Path(os.path.abspath(out))
    return absolute.with_name(f".{absolute.name}.stages")


def digest(paths: list[Path]) -> str:
    """sha256 of files' contents, in the order of their names."""
    found = sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                found.update(chunk)
    return found.hexdigest()
