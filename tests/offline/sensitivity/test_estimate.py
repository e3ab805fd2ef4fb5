import re

import pytest
import torch
from requant.sensitivity.estimate import FORWARDS, Estimate, estimate
from requant.sensitivity.quadrature import nodes
from requant.sensitivity.store import TensorStore
from torch import nn

from tests.offline.sensitivity.conftest import path_of


def test_counts_accumulators_where_they_are(model: nn.Module, samples, tmp_path) -> None:
    path = path_of(model, 4)
    stores = [TensorStore(), TensorStore(tmp_path)]
    for store in stores:
        store.zeros("weight", torch.Size((8, 16)))
    cost = estimate(lambda: path.loss(samples[0]), path.blocks, 6, stores)
    hidden = samples[0].numel() * model.config.hidden_size * 4
    block = sum(parameter.nbytes for parameter in path.blocks[0].parameters())
    assert (cost.memory, cost.disk) == (8 * 16 * 4 + len(path.blocks) * hidden + block, 8 * 16 * 4)
    assert cost.seconds > 0


def test_time_is_that_of_forward_passes(monkeypatch, model: nn.Module, samples) -> None:
    clock = iter((0.0, 2.0))
    monkeypatch.setattr("requant.sensitivity.estimate.time.monotonic", lambda: next(clock))
    path = path_of(model, 4)
    assert estimate(lambda: path.loss(samples[0]), path.blocks, 5, []).seconds == FORWARDS * 5 * 2.0


def test_is_said_before_the_first_gradient(capsys, model: nn.Module, samples) -> None:
    path_of(model, 4).gradients(samples[:2], nodes("midpoint", 2))
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert re.match(r"path integral: 4 passes, about \d+ s; memory 0.00 GiB beside the model; disk none", first)
    assert second.startswith("path integral: 1/2")


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Estimate(30, 2**29, 0), "about 30 s; memory 0.50 GiB beside the model; disk none"),
        (Estimate(600, 2**31, 2**30), "about 10 min; memory 2.00 GiB beside the model; disk 1.00 GiB"),
    ],
)
def test_in_words(cost, text) -> None:
    assert str(cost) == text
