"""Tensors on disk: their room is taken when they are made, and free again when they go."""

import resource
from pathlib import Path

import pytest
import torch
from requant.sensitivity.store import offloaded


def mapped_below(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_tensor_on_disk_goes_with_its_store(tmp_path: Path) -> None:
    with offloaded(tmp_path) as stores:
        store = stores()
        store.copy("a", torch.arange(6.0).view(2, 3))
        store["a"].add_(1)
        assert store["a"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert mapped_below(tmp_path)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # it has no name any more
        del store
        assert not mapped_below(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with offloaded(tmp_path) as stores, pytest.raises(OSError, match="File too large"):
            stores().zeros("a", torch.Size((16, 16)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
