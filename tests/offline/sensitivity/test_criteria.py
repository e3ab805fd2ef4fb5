import pytest
import torch
from requant.sensitivity.criteria import CRITERIA, Evidence, criterion


def evidence(tokens: int = 1, seed: int = 0) -> Evidence:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(3, 5, generator=generator) for _ in range(4)]
    return Evidence(matrices[0], matrices[1], matrices[2], matrices[3].square(), tokens, generator)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_entry(name: str) -> None:
    score = criterion(name).score(evidence())
    assert score.shape == (3, 5)
    assert bool(score.isfinite().all())


def test_marginal_is_the_exact_gain_of_restoring_on_a_quadratic() -> None:
    # F(v) = g (v - w~) + 1/2 h (v - w~)^2 around w~; restoring moves v from w~ to w~ - d
    e = evidence(tokens=7)
    curvature = 7 * e.square
    gain = -(e.mean * -e.error + 0.5 * curvature * e.error.square())
    torch.testing.assert_close(criterion("marginal").score(e), gain)


def test_signed_pqi_keeps_the_sign_that_pqi_drops() -> None:
    e = evidence()
    torch.testing.assert_close(criterion("pqi-signed").score(e).abs(), criterion("pqi").score(e))


def test_random_repeats_with_its_seed() -> None:
    score = criterion("random").score
    assert torch.equal(score(evidence(seed=3)), score(evidence(seed=3)))
    assert not torch.equal(score(evidence(seed=3)), score(evidence(seed=4)))


def test_gradients_are_asked_for_where_they_are_needed() -> None:
    assert criterion("magnitude").points("midpoint", 4) == []
    assert criterion("end-point").points("midpoint", 4) == [(1.0, 1.0)]
    assert len(criterion("pqi").points("midpoint", 4)) == 4


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'hessian' is not one of pqi, "):
        criterion("hessian")
