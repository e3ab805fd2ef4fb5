"""A checkpoint's tensors as they are read: each file is opened once for a walk over them."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from requant import api, stored
from requant.recipe import Recipe
from requant.stored import open_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


@pytest.fixture
def openings(monkeypatch) -> Counter[str]:
    """How often each file has been opened by us."""
    counts: Counter[str] = Counter()

    def counting(path: Path, framework: str) -> object:
        counts[path.name] += 1
        return safe_open(path, framework=framework)

    monkeypatch.setattr(stored, "safe_open", counting)
    return counts


def test_a_check_parses_each_header_twice_however_many_tensors_there_are(quantized, openings):
    assert api.check(quantized) == []
    assert openings == dict.fromkeys((path.name for path in quantized.glob("*.safetensors")), 2)


def test_a_load_parses_each_header_four_times_however_many_tensors_there_are(llama, tmp_path, openings):
    """Headers and contents; headers and the layers whose inputs are rounded. What transformers does is not counted."""
    recipe = Recipe.from_dict({"weights": {"bits": 8}, "activations": {"mode": "dynamic"}})
    api.quantize(llama, tmp_path / "out", recipe)
    openings.clear()
    api.load_quantized(tmp_path / "out")
    assert openings == {"model.safetensors": 4}


def test_what_was_read_outlives_the_walk_and_no_file_stays_open(checkpoint):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    expected = load_file(file)
    with open_checkpoint(checkpoint).opened() as opened:
        read = {name: opened.read(name) for name in expected}
    file.unlink()
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    with pytest.raises(SafetensorError, match="closed"):
        opened.read(name)
