import pytest
import torch
from requant.aweq.bias_correction import correction


def batches(mean, noise=1.0, count=10):
    generator = torch.Generator().manual_seed(0)
    return [mean + noise * torch.randn(64, 16, generator=generator) for _ in range(count)]


def even(differences):
    return correction((one, torch.full((len(one),), 1 / len(one))) for one in differences)


def test_no_mean_error_is_left_over_the_calibration_set():
    differences = batches(torch.linspace(-1, 1, 16))
    value = even(differences).value
    assert float((torch.cat(differences) + value).mean(0).abs().max()) < 1e-6


def test_batches_of_different_lengths_count_by_their_tokens():
    differences = [torch.full((1, 2), 3.0), torch.zeros(2, 2)]
    torch.testing.assert_close(even(differences).value, torch.tensor([-1.0, -1.0]))


def test_a_systematic_error_is_worth_correcting():
    found = even(batches(torch.ones(16)))
    assert found.helps
    assert found.error_without == pytest.approx(2 * 16 * 5, rel=0.1)
    assert found.error_with == pytest.approx(1 * 16 * 5, rel=0.1)


def test_the_held_out_errors_are_what_they_say():
    differences = batches(torch.linspace(0, 1, 16), count=4)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(64, generator=generator) for _ in differences]
    found = correction(zip(differences, weights, strict=True))
    estimate = torch.cat(differences[::2]).mean(0)
    held_out, weight = torch.cat(differences[1::2]), torch.cat(weights[1::2])
    assert found.error_without == pytest.approx(float(weight @ held_out.square().sum(1)), rel=1e-5)
    assert found.error_with == pytest.approx(float(weight @ (held_out - estimate).square().sum(1)), rel=1e-5)


def test_a_mean_that_does_not_carry_over_to_other_text_is_not_kept():
    assert not even([torch.ones(8, 4), -torch.ones(8, 4)]).helps


def test_a_mean_that_one_massive_token_makes_is_not_kept():
    differences = [torch.zeros(64, 4) for _ in range(4)]
    for one in differences:
        one[0] = 100
    states = torch.ones(64)
    states[0] = 1e6
    assert not correction((one, 1 / states.square()) for one in differences).helps
