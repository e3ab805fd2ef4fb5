"""Named fp32 accumulators in memory, or memory-mapped in a folder so that they need none."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch


class TensorStore(Mapping[str, torch.Tensor]):
    """Zero-initialised fp32 tensors by name: in memory where ``folder`` is None, else one file each in ``folder``."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def zeros(self, name: str, shape: torch.Size) -> torch.Tensor:
        """A new accumulator, replacing any of that name."""
        if self._folder is None:
            tensor = torch.zeros(shape)
        else:
            path = self._folder / f"{name}.f32"
            path.unlink(missing_ok=True)
            tensor = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=torch.float32).view(shape)
        self._tensors[name] = tensor
        return tensor

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
