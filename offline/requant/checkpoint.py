"""Writes a Hugging Face folder tensor by tensor: at most one shard is held in memory."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from requant.errors import InputError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class ShardWriter:
    """Collects tensors in the order of ``add`` and cuts a shard before it would exceed ``max_bytes``."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending[name] = tensor.cpu().contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Writes what is pending, gives the shards their final names, and the index where there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._temporary(0).rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._folder / INDEX_FILE, index)

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        path = self._temporary(len(self._shards))
        save(self._pending, path, {"format": "pt"})
        path.chmod(self._folder.stat().st_mode & 0o666)  # safetensors lets nobody else read what it writes
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file. Raises InputError where it can not be written, and leaves nothing of it then."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise InputError(f"{path.parent}: can not be written ({error})") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """'5GB' or '500MB' -> bytes (decimal units). Raises InputError, also for a bare number: as in transformers, and
    whoever writes 5 hardly means bytes, which would give each tensor a file of its own."""
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise InputError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2].upper()]
