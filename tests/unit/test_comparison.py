"""What the self-check allows: measured noise, between an ulp and a cap."""

from __future__ import annotations

import pytest
import torch

from parallel.worker.comparison import CAP, Allowed, Difference, difference, moved, products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_element_of_twelve_is_moved_by_one_ulp(dtype: torch.dtype):
    x = torch.randn(100, 120, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = moved(x, dtype)
    assert y.dtype == x.dtype
    changed = x != y
    assert changed.float().mean() == pytest.approx(1 / 12, rel=0.1)
    infinity = torch.tensor(torch.inf, dtype=dtype)
    by_one = (y == torch.nextafter(x, infinity)) | (y == torch.nextafter(x, -infinity))
    assert by_one[changed].float().mean() > 0.97, "below a power of 2 the next ulp is half as large"
    assert torch.equal(y, moved(x, dtype)), "the same on every rank"


def test_an_fp32_input_is_moved_by_an_ulp_of_the_compute_dtype():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    change = ((moved(x, torch.bfloat16) - x.bfloat16().float()) / x).abs()
    assert 2**-9 < change.max() <= 2**-7


def test_norm_and_slope():
    reference = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = difference(products(1.02 * reference, reference))
    assert (found.norm, found.slope) == pytest.approx((0.02, 0.02), rel=1e-3)
    across = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    found = difference(products(reference + 0.02 * across, reference))
    assert found.norm == pytest.approx(0.02, rel=0.1) and found.slope < 0.005


def test_parts_add_up():
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    parts = products(a[:300], b[:300]) + products(a[300:], b[300:]) + products(a[:0], b[:0])
    whole = difference(products(a, b))
    assert (difference(parts).norm, difference(parts).slope) == pytest.approx((whole.norm, whole.slope))


def test_limits_follow_the_noise_between_an_ulp_and_the_cap():
    ulp = 2.0**-7
    assert Allowed.of_noise(0.0, torch.bfloat16) == Allowed(ulp, ulp / 2)
    assert Allowed.of_noise(0.01, torch.bfloat16) == Allowed(0.04, 0.005)
    assert Allowed.of_noise(9.0, torch.bfloat16) == Allowed(CAP, CAP)


def test_what_is_not_a_number_is_not_within_limits():
    x = torch.ones(3)
    assert difference(products(x, x)).within(Allowed(0.0, 0.0))
    assert not difference(products(x * torch.nan, x)).within(Allowed(CAP, CAP))
    assert not Difference(0.0, 0.1).within(Allowed(0.2, 0.01))
    assert not Difference(0.1, 0.0).within(Allowed(0.01, 0.2))


def test_a_reference_of_zeros():
    """As of weights that are zero: equal, or infinitely different in effect."""
    zero = torch.zeros(4)
    assert difference(products(zero, zero)) == Difference(0.0, 0.0)
    assert not difference(products(zero + 1, zero)).within(Allowed(CAP, CAP))
