"""Calibration windows: from all over the text, apart from each other, drawn by the seed."""

import pytest
import torch
from requant import sources
from requant.calibration import read_windows
from requant.settings import Calibration


@pytest.fixture(scope="module")
def tokenizer(micro_llama):
    return sources.resolve(micro_llama).tokenizer()


def starts(windows, tokenizer, text):
    """Where in the text's ids each window begins."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    rows = torch.tensor(ids).unfold(0, windows.ids[0].numel(), 1)
    return [int((rows == window).all(1).nonzero()[0]) for window in windows.ids]


def test_windows_by_seed(tmp_path, tokenizer):
    text = " ".join(f"{number} sheep and {number * number} goats" for number in range(400))
    path = tmp_path / "text.txt"
    path.write_text(text)
    calibration = Calibration(str(path), samples=9, seqlen=32)
    drawn = {seed: starts(read_windows(calibration, tokenizer, seed), tokenizer, text) for seed in (0, 1, 2)}
    distances = {right - left for left, right in zip(drawn[0], drawn[0][1:], strict=False)}
    assert len(distances) == 1
    assert drawn[0][0] == 0
    for seed in (1, 2):
        assert all(right - left >= 32 for left, right in zip(drawn[seed], drawn[seed][1:], strict=False))
        assert drawn[seed] == starts(read_windows(calibration, tokenizer, seed), tokenizer, text)
    assert drawn[0] != drawn[1] != drawn[2]
