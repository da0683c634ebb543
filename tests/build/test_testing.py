"""Each shared assertion passes just inside its bound and fails just outside it."""

from __future__ import annotations

import math

import pytest
import torch

from dicekernels.testing import assert_close_to_truth, assert_gradient_close, error_bound

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TRUTH = torch.tensor([[1.0, -4.0, 0.5], [0.25, 2.0, -1.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_is_twice_the_honest_error_plus_eight_eps_of_the_largest_truth(dtype):
    honest = TRUTH.clone()
    honest[1, 0] -= 0.125  # err(honest) = 0.125, max|truth| = 4
    assert error_bound(TRUTH, honest, dtype) == 2 * 0.125 + 8 * torch.finfo(dtype).eps * 4


def test_bound_in_numbers():
    # float32: eps = 2^-23, no honest error: 8 * 2^-23 * 4 = 2^-18
    assert error_bound(TRUTH, TRUTH, torch.float32) == 2.0**-18
    assert error_bound(torch.zeros(0), torch.zeros(0), torch.float32) == 0.0


def test_an_honest_overflow_does_not_widen_the_bound():
    honest = TRUTH.clone()
    honest[0, 0], honest[0, 1] = math.inf, math.nan
    assert error_bound(TRUTH, honest, torch.float32) == 2.0**-18


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 2)])
def test_fails_just_over_the_bound_and_names_the_place(dtype, at):
    honest = TRUTH + 0.01
    bound = error_bound(TRUTH, honest, dtype)
    inside, outside = TRUTH.clone(), TRUTH.clone()
    inside[at] += 0.999 * bound
    outside[at] -= 1.001 * bound
    assert_close_to_truth(inside, TRUTH, honest, dtype, "loss")
    with pytest.raises(AssertionError, match=r"loss \[torch\.\w+\]: max error .* exceeds") as error:
        assert_close_to_truth(outside, TRUTH, honest, dtype, "loss")
    assert f"at {at}: ours {outside[at].item()!r}, truth {TRUTH[at].item()!r}" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_match_in_place_and_sign(value):
    truth = TRUTH.clone()
    truth[0, 2] = value
    assert_close_to_truth(truth.clone(), truth, truth, torch.float32, "x")
    for bad in (TRUTH, truth.flip(0), torch.where(truth == value, -truth, truth).nan_to_num(7.0)):
        with pytest.raises(AssertionError, match="misplaced"):
            assert_close_to_truth(bad, truth, truth, torch.float32, "x")
    with pytest.raises(AssertionError, match="misplaced"):  # ours not finite, truth finite
        assert_close_to_truth(truth, TRUTH, truth, torch.float32, "x")


def test_a_wrong_sign_of_infinity_fails():
    truth = torch.tensor([math.inf, 1.0], dtype=torch.float64)
    ours = torch.tensor([-math.inf, 1.0])
    with pytest.raises(AssertionError, match=r"\+inf misplaced in 1 of 2 .* first at \(0,\)"):
        assert_close_to_truth(ours, truth, truth, torch.float32, "x")


def test_finite_errors_beside_a_matching_nan_are_seen():
    truth = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    ours = torch.tensor([math.nan, 1.001])
    with pytest.raises(AssertionError, match=r"max error 1\.0\d+e-03 exceeds .* at \(1,\)"):
        assert_close_to_truth(ours, truth, truth, torch.float32, "x")


def test_shapes_must_agree_without_broadcasting():
    with pytest.raises(AssertionError, match=r"got shape \(1, 2, 3\)"):
        assert_close_to_truth(TRUTH[None], TRUTH, TRUTH, torch.float32, "x")
    with pytest.raises(AssertionError, match="honest: got shape"):
        assert_close_to_truth(TRUTH, TRUTH, TRUTH[:1], torch.float32, "x")


def test_truth_must_be_double():
    with pytest.raises(ValueError, match=r"truth: got torch\.float32, expected torch\.float64"):
        assert_close_to_truth(TRUTH, TRUTH.float(), TRUTH, torch.float32, "x")


def test_scalars_are_compared_too():
    one = torch.ones((), dtype=torch.float64)
    assert_close_to_truth(one.float(), one, one, torch.float32, "loss")
    with pytest.raises(AssertionError, match=r"at \(\)"):
        assert_close_to_truth(one + 9 * 2.0**-23, one, one, torch.float32, "loss")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_fails_on_a_spread_error_that_no_single_element_shows(dtype):
    # One large element sets the elementwise bound, 8 eps * 10; each of 99 small ones uses a share.
    # ||truth|| = 10, so an error d in each gives a relative L2 error d sqrt(99) / 10 ~ 0.995 d.
    truth = torch.zeros(100, dtype=torch.float64)
    truth[0] = 10
    eps = torch.finfo(dtype).eps
    spread = torch.ones(100, dtype=torch.float64)
    spread[0] = 0
    assert_gradient_close(truth + 15.9 * eps * spread, truth, truth, dtype, "grad")
    assert_close_to_truth(truth + 16.3 * eps * spread, truth, truth, dtype, "grad")
    with pytest.raises(AssertionError, match=r"grad \[.*relative L2 error"):
        assert_gradient_close(truth + 16.3 * eps * spread, truth, truth, dtype, "grad")


def test_gradient_grants_twice_the_honest_relative_error():
    # rel(honest) = 0.01 exactly along truth: ours may be 16 eps + 0.02 off.
    truth = torch.ones(64, dtype=torch.float64)
    assert_gradient_close(truth * 1.0199, truth, truth * 1.01, torch.float32, "grad")
    with pytest.raises(AssertionError, match="grad"):
        assert_gradient_close(truth * 1.0201, truth, truth * 1.01, torch.float32, "grad")


@pytest.mark.parametrize("flipped", [slice(0, 1), slice(None)])
def test_gradient_fails_on_a_flipped_sign(flipped):
    ours = TRUTH.flatten().clone()
    ours[flipped] *= -1
    with pytest.raises(AssertionError, match="grad"):
        assert_gradient_close(ours, TRUTH.flatten(), TRUTH.flatten(), torch.bfloat16, "grad")


def test_gradient_may_not_point_backwards_even_when_honest_pytorch_is_lost():
    # honest underflows to 0: rel(honest) = 1, so length alone would let -truth pass.
    zero = torch.zeros_like(TRUTH)
    with pytest.raises(AssertionError, match=r"direction off, 1 - cosine = 2\.0"):
        assert_gradient_close(-TRUTH, TRUTH, zero, torch.float16, "grad")
    assert_gradient_close(TRUTH, TRUTH, zero, torch.float16, "grad")


def test_gradient_of_a_zero_truth_must_be_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    assert_gradient_close(zero, zero, zero, torch.float32, "grad")
    with pytest.raises(AssertionError, match="exceeds the bound 0"):
        assert_gradient_close(zero + 1e-30, zero, zero, torch.float32, "grad")


def test_gradient_with_a_misplaced_nan_fails():
    ours = TRUTH.clone()
    ours[1, 1] = math.nan
    with pytest.raises(AssertionError, match=r"NaN misplaced in 1 of 6 .* first at \(1, 1\)"):
        assert_gradient_close(ours, TRUTH, TRUTH, torch.float32, "grad")
