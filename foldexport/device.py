"""Whether the device that the user asked for is there."""

from __future__ import annotations

from foldexport.errors import MissingDependencyError

DEVICES = ("cpu", "cuda")


def require(device: str) -> None:
    """Raise MissingDependencyError, with the driver's own reason, unless PyTorch can compute on ``device``."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # what PyTorch raises without CUDA in it, and without a driver
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise MissingDependencyError(f"--device {device}: {reason}. Run with --device cpu.") from error
