"""The device of these tests: a GPU, or, to try the tests themselves where there is none, FOLDEXPORT_TEST_DEVICE=cpu:0."""

from __future__ import annotations

import os

import pytest

from foldexport import device


@pytest.fixture(scope="session")
def there() -> str:
    """ "cuda"; skips with the driver's own reason where there is no GPU."""
    asked = os.environ.get("FOLDEXPORT_TEST_DEVICE", "cuda")
    reason = device.why_not(asked)
    if reason:
        pytest.skip(f"no GPU: {reason}")
    return asked


@pytest.fixture(scope="session")
def gpu(there: str) -> str:
    """The device where it is a GPU, for what nothing else has."""
    if device.kind(there) != "cuda":
        pytest.skip(f"{there} is no GPU")
    return there
