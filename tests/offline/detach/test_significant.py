import pytest
import torch
from requant.detach import significant
from requant.sensitivity.criteria import CRITERIA
from requant.sensitivity.measure import Sensitivity
from torch import nn

from tests.offline.sensitivity.conftest import causal_lm, path_of


@pytest.fixture
def model(micro_llama) -> nn.Module:  # type: ignore[no-untyped-def]
    return causal_lm(micro_llama)


@pytest.fixture
def samples() -> list[torch.Tensor]:
    return [torch.randint(2048, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def flags(size: int, index: torch.Tensor) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.bool).scatter(0, index, True)


def sensitivity(name: str) -> Sensitivity:
    return Sensitivity(CRITERIA[name], intervals=1)


def restored(path) -> int:  # type: ignore[no-untyped-def]
    return sum(int((path.end[name] == path.start[name]).sum()) for name in path.parameters)


@pytest.mark.parametrize("name", CRITERIA)
def test_restores_exactly_as_many_as_asked(model: nn.Module, samples: list[torch.Tensor], name: str) -> None:
    path = path_of(model, 3)
    before = restored(path)
    chosen = significant.select(path, samples, sensitivity(name), 501, steps=1).indices
    assert sum(len(index) for index in chosen.values()) == 501
    for layer, index in chosen.items():
        assert torch.equal(path.end[layer].view(-1)[index], path.start[layer].view(-1)[index])
    assert restored(path) <= before + 501


def test_one_step_takes_the_global_top(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 3)
    scores = torch.cat([s.flatten() for _, s in sensitivity("pqi").measure(path, samples).scores()])
    chosen = significant.select(path, samples, sensitivity("pqi"), 100, steps=1).indices
    flat = torch.cat([flags(path.start[name].numel(), index) for name, index in chosen.items()])
    assert float(scores[flat].min()) >= float(scores[~flat].max())


def test_steps_look_again_and_never_take_an_entry_twice(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 2)
    once = significant.select(path, samples, sensitivity("pqi"), 301, steps=1).indices
    path.move_to(0.0)
    twice = significant.select(path_of(model, 2), samples, sensitivity("pqi"), 301, steps=2).indices
    assert sum(len(index) for index in twice.values()) == 301
    assert all(len(index.unique()) == len(index) for index in twice.values())
    assert any(not torch.equal(once[name], twice[name]) for name in once)


def test_per_matrix_gives_each_the_same_share(model: nn.Module, samples: list[torch.Tensor]) -> None:
    path = path_of(model, 3)
    total = sum(weight.numel() for weight in path.start.values())
    chosen = significant.select(path, samples, sensitivity("error"), total // 100, steps=1, per_matrix=True).indices
    for name, index in chosen.items():
        assert len(index) == pytest.approx(path.start[name].numel() / 100, abs=1)


def test_what_is_taken_is_not_taken_again_and_integrals_are_reported(
    model: nn.Module, samples: list[torch.Tensor]
) -> None:
    path = path_of(model, 3)
    first = significant.select(path, samples, sensitivity("magnitude"), 200, steps=1)
    second = significant.select(path, samples, sensitivity("magnitude"), 200, steps=1, taken=first.indices)
    for name, index in second.indices.items():
        assert not set(index.tolist()) & set(first.indices[name].tolist())
    assert first.completeness == []
    integrals = significant.select(path, samples, sensitivity("pqi"), 10, steps=2).completeness
    assert len(integrals) == 2
    assert all(abs(integral.error) < 0.5 for integral in integrals)
