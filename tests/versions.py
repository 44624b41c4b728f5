"""Versions of PyTorch, where what a test expects depends on one."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
#: Before it, torch.export fixes a batch whose size was compared with a view's.
FREE_BATCHES = pytest.mark.skipif(TORCH < (2, 13), reason="torch.export before 2.13 fixes more batches")
#: Text that PyTorch prints is compared with what 2.13 and later print.
PRINTS = pytest.mark.skipif(TORCH < (2, 13), reason="PyTorch before 2.13 prints its layers otherwise")
