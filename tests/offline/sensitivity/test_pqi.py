from dataclasses import replace
from pathlib import Path as File

import pytest
import torch
from requant.sensitivity.pqi import completeness, elements
from requant.sensitivity.quadrature import nodes
from requant.sensitivity.store import offloaded
from torch import nn

from tests.offline.sensitivity.conftest import path_of


@pytest.mark.parametrize("bits", [4, 3])
def test_the_integral_is_complete(model: nn.Module, samples: list[torch.Tensor], bits: int) -> None:
    path = path_of(model, bits)
    gradients = path.gradients(samples, nodes("midpoint", 8))
    assert abs(completeness(path, gradients, samples).error) < 0.005


def test_more_intervals_bring_the_integral_closer(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 2)
    errors = [
        abs(completeness(path, path.gradients(samples[:1], nodes("midpoint", n)), samples[:1]).error) for n in (1, 2, 4)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_moments_are_those_of_gradients_averaged_along_the_path(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path, points = path_of(model, 3), nodes("midpoint", 2)
    gradients = path.gradients(samples[:2], points, second_moment=True)
    single = [path.gradients([sample], points).mean for sample in samples[:2]]
    for name in path.parameters:
        a, b = (store[name] for store in single)
        torch.testing.assert_close(gradients.mean[name], (a + b) / 2)
        torch.testing.assert_close(gradients.square[name], (a.square() + b.square()) / 2)


def test_leaves_the_model_as_it_was(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 4)
    path.gradients(samples[:1], nodes("midpoint", 1))
    assert all(torch.equal(parameter, path.start[name]) for name, parameter in path.parameters.items())


def test_accumulators_on_disk_give_the_same_integral(
    model: nn.Module, samples: list[torch.Tensor], tmp_path: File
) -> None:
    path, points = path_of(model, 3), nodes("midpoint", 2)
    in_memory = path.gradients(samples[:1], points, second_moment=True)
    with offloaded(tmp_path / "new") as stores:
        on_disk = replace(path, stores=stores).gradients(samples[:1], points, second_moment=True)
        assert on_disk.mean.mapped
        for name in path.parameters:
            assert torch.equal(elements(path, on_disk, name), elements(path, in_memory, name))
            assert torch.equal(on_disk.square[name], in_memory.square[name])
    assert not list((tmp_path / "new").iterdir())


def test_a_broken_model_is_refused(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 4)
    next(iter(path.end.values())).fill_(float("inf"))
    with pytest.raises(ValueError, match=r"loss is nan at t=1 of the path"):
        path.gradients(samples[:1], nodes("end", 1))
