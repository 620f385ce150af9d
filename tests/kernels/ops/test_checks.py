"""Checks of arguments: which values count as integers, and what the messages say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lambda_kernels.ops.checks import as_int, dtype_name, require_int


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_come_back_as_python_integers(value):
    assert type(require_int("n", value, 3, 3)) is int
    assert as_int(value) == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 3.0, "3", None, torch.tensor([3, 3])])
def test_other_values_are_no_integers(value):
    assert as_int(value) is None
    with pytest.raises(ValueError, match=r"n must be an integer of at least 0; got "):
        require_int("n", value, 0)
    with pytest.raises(TypeError, match=r"n must be an integer or two; got "):
        require_int("n", value, more=" or two", wrong_type=TypeError)


@pytest.mark.parametrize("value", [-1, 5])
def test_bounds(value):
    with pytest.raises(ValueError, match=rf"n must be an integer from 0 to 4; got {value}"):
        require_int("n", value, 0, 4, wrong_type=TypeError)


def test_names_of_dtypes():
    assert dtype_name(torch.bfloat16) == "bfloat16"
