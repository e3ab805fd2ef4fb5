import pytest
import torch
from requant.aweq.bias_correction import computed_from, correction, held_out


def corrected(differences, weights):
    """From three batches of four; the others decide."""
    batches = list(zip(differences, weights, strict=True))
    return correction(computed_from(batches), held_out(batches))


def batches(mean, noise=1.0, count=10):
    generator = torch.Generator().manual_seed(0)
    return [mean + noise * torch.randn(64, 16, generator=generator) for _ in range(count)]


def even(differences):
    return corrected(differences, [torch.full((len(one),), 1 / len(differences[0])) for one in differences])


def test_no_mean_error_is_left_over_what_it_is_computed_from():
    differences = batches(torch.linspace(-1, 1, 16))
    value = even(differences).value
    assert float((torch.cat(computed_from(differences)) + value).mean(0).abs().max()) < 1e-6


def test_every_batch_is_computed_from_or_held_out():
    for count in range(2, 12):
        numbers = list(range(count))
        assert held_out(numbers)
        assert sorted([*computed_from(numbers), *held_out(numbers)]) == numbers


def test_batches_of_different_lengths_count_by_their_tokens():
    differences = [torch.full((1, 2), 3.0), torch.zeros(5, 2), torch.zeros(2, 2)]
    torch.testing.assert_close(even(differences).value, torch.tensor([-1.0, -1.0]))


def test_a_token_counts_by_its_weight():
    differences = [torch.tensor([[4.0], [0.0]]), torch.zeros(1, 1)]
    found = corrected(differences, [torch.tensor([1.0, 3.0]), torch.ones(1)])
    torch.testing.assert_close(found.value, torch.tensor([-1.0]))


def test_a_systematic_error_is_worth_correcting():
    found = even(batches(torch.ones(16), count=40))
    assert found.helps
    assert found.error_without == pytest.approx(2 * 16 * 10, rel=0.1)
    assert found.error_with == pytest.approx(1 * 16 * 10, rel=0.1)


def test_the_held_out_errors_are_what_they_say():
    differences = batches(torch.linspace(0, 1, 16), count=4)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(64, generator=generator) for _ in differences]
    found = corrected(differences, weights)
    used, by = torch.cat(computed_from(differences)), torch.cat(computed_from(weights))
    estimate = by @ used / by.sum()
    deciding, weight = torch.cat(held_out(differences)), torch.cat(held_out(weights))
    assert found.error_without == pytest.approx(float(weight @ deciding.square().sum(1)), rel=1e-5)
    assert found.error_with == pytest.approx(float(weight @ (deciding - estimate).square().sum(1)), rel=1e-5)


def test_a_mean_that_does_not_carry_over_to_other_text_is_not_kept():
    assert not even([torch.ones(8, 4), -torch.ones(8, 4)]).helps


def test_one_massive_token_moves_no_other():
    differences = [torch.zeros(64, 4) for _ in range(4)]
    for one in differences:
        one[0] = 100
    states = torch.ones(64)
    states[0] = 1e3
    assert float(corrected(differences, [1 / states.square()] * 4).value.abs().max()) < 1e-4
