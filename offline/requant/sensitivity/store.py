"""Named fp32 tensors as large as the model, in memory, or memory-mapped in a folder so that they need none."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class TensorStore(Mapping[str, torch.Tensor]):
    """fp32 tensors on the CPU by name: in memory where ``folder`` is None, else mapped from nameless files there."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A new tensor, replacing any of that name."""
        if self._folder is None or not shape.numel():
            tensor = torch.zeros(shape)
        else:
            tensor = _mapped(self._folder / f"{name}.f32", shape.numel()).view(shape)
        self._tensors[name] = tensor
        return tensor

    def copy(self, name: str, tensor: torch.Tensor) -> None:
        """Holds what ``tensor`` (on any device) holds now."""
        self.zeros(name, tensor.shape).copy_(tensor)

    @property
    def mapped(self) -> bool:
        """Whether the tensors lie on disk."""
        return self._folder is not None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _mapped(path: Path, numel: int) -> torch.Tensor:
    """Zeros, fp32 [numel], whose room on the disk is free again when the tensor goes. Raises OSError where there is
    none: a mapping that finds the disk full only when it is written to would end the process."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * numel)
    tensor = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)
    path.unlink()
    return tensor


Stores = Callable[[], TensorStore]  # makes one more


@contextmanager
def offloaded(folder: Path | None) -> Iterator[Stores]:
    """Stores below ``folder``, which is made where there is none and emptied of them on leaving; None: in memory."""
    if folder is None:
        yield TensorStore
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="requant-", dir=folder) as made:
        yield lambda: TensorStore(Path(tempfile.mkdtemp(dir=made)))
