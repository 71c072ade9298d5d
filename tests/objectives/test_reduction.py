"""Reductions, weights and the factors that the rows' gradients get."""

from __future__ import annotations

import math

import pytest
import torch

from gkd.errors import ConfigError, InputError
from gkd.objectives import reduce_rows
from gkd.objectives.reduction import check_reduction, check_weights, mask_rows, row_factors, weigh

VALUES = torch.tensor([1.0, math.nan, 3.0, math.inf])
WEIGHTS = torch.tensor([2.0, 0.0, 0.5, 0.0])


def test_ignored_rows_count_as_zero() -> None:
    assert reduce_rows(VALUES, WEIGHTS, "none").tolist() == [2.0, 0.0, 1.5, 0.0]
    assert reduce_rows(VALUES, WEIGHTS, "sum") == 3.5
    assert reduce_rows(VALUES, WEIGHTS, "mean") == pytest.approx(3.5 / 2.5)


def test_a_row_that_counts_is_not_hidden() -> None:
    assert reduce_rows(VALUES, None, "sum").isnan()
    assert reduce_rows(VALUES[[0, 3]], None, "mean") == math.inf


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_weights_of_any_real_type(dtype: torch.dtype) -> None:
    mask = torch.tensor([1, 0, 1, 0]).to(dtype)
    assert reduce_rows(VALUES, mask, "mean") == 2.0
    assert reduce_rows(VALUES, mask, "mean").dtype == torch.float32


@pytest.mark.parametrize("weights", [None, torch.zeros(0), torch.zeros(3)])
def test_nothing_to_average_is_zero(weights: torch.Tensor | None) -> None:
    values = torch.ones(0 if weights is None else len(weights))
    assert reduce_rows(values, weights, "mean") == 0
    factors = row_factors(values, weights, "mean")
    assert factors is not None
    assert factors.abs().sum() == 0


@pytest.mark.parametrize("weights", [None, torch.tensor([2.0, 0.0, -0.5])])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_factors_are_the_gradient_of_the_reduction(reduction: str, weights: torch.Tensor | None) -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    want = torch.autograd.grad(reduce_rows(values, weights, reduction), values)[0]
    factors = row_factors(values.detach(), weights, reduction)
    torch.testing.assert_close(torch.ones(3) if factors is None else factors, want)


def test_masking_takes_nan_out_of_the_input() -> None:
    rows = torch.tensor([[1.0, 2.0], [math.nan, math.inf]], dtype=torch.bfloat16)
    masked = mask_rows(rows, torch.tensor([0.5, 0.0]))
    assert masked.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert masked.dtype == torch.bfloat16
    assert mask_rows(rows, None) is rows
    assert weigh(rows[:, 0], None) is not None


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        check_reduction("meen")
    with pytest.raises(InputError, match=r"shape \[3\], not \[2\]"):
        check_weights(torch.ones(2), (3,))
    with pytest.raises(InputError, match="real numbers"):
        check_weights(torch.ones(3, dtype=torch.complex64), (3,))
    check_weights(None, (3,))
