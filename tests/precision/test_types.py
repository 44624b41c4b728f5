"""One rounding, and the emulation of a significand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from foldexport.precision.types import HALF, rounded, through, to_digits


def values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 16, (20000,), generator=generator)
    drawn = torch.randn(20000, generator=generator, dtype=torch.float64) * 2.0**exponents
    ties = (1 + 2.0**-11) * (1 + torch.tensor([0.0, 2.0**-40, -(2.0**-40), 2.0**-30, -(2.0**-30)], dtype=torch.float64))
    return torch.cat([drawn, ties, -ties, torch.tensor([0.0, 65519.9999, 65520.0, 7e4, float("inf"), 2.0**-25, 2.0**-26])])


def test_fp16_is_rounded_once():
    found = rounded(values(), torch.float16).numpy()
    with np.errstate(over="ignore"):
        wanted = values().numpy().astype(np.float16)  # numpy rounds float64 to float16 directly
    np.testing.assert_array_equal(found, wanted)


def test_two_roundings_would_differ():
    tie = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert float(rounded(tie, torch.float16)) == 1 + 2.0**-10 and float(tie.to(torch.float16)) == 1.0


def test_bf16_is_rounded_once():
    tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, 1 + 3 * 2.0**-8], dtype=torch.float64)
    assert rounded(tie, torch.bfloat16).tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-6]
    plain = torch.randn(1000).double()  # float32 values: one rounding either way
    np.testing.assert_array_equal(
        rounded(plain, torch.bfloat16).float().numpy(), plain.float().numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    )


@pytest.mark.parametrize("name", HALF)
def test_digits_without_the_range(name):
    kind, drawn = HALF[name], torch.randn(5000)
    assert torch.equal(to_digits(drawn, kind), through(drawn, kind)) or name == "fp16"  # near 0 fp16 has fewer digits
    normal = drawn[drawn.abs() > kind.smallest_normal]
    assert torch.equal(to_digits(normal, kind), through(normal, kind))
    scaled = to_digits(normal * 2.0**60, kind)
    assert torch.equal(scaled, to_digits(normal, kind) * 2.0**60) and bool(scaled.isfinite().all())
    assert float((to_digits(normal, kind) / normal - 1).abs().max()) <= kind.roundoff
