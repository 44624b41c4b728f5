"""The device that the user asked for: whether it is there, and float32 that is float32 on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foldexport.errors import MissingDependencyError

DEVICES = ("cpu", "cuda")
NONE = "none"
IEEE = "ieee"  # torch's name for float32 products that are float32
REDUCED = ("tf32", "bf16")  # and for those that are not
#: Switches of torch.backends.cuda.matmul under which half types are summed in half types.
HALF_SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")


def kind(device: str) -> str:
    """ "cuda" of "cuda:1"."""
    return device.partition(":")[0]


def require(device: str) -> None:
    """Raise MissingDependencyError, with the driver's own reason, unless PyTorch can compute on ``device``."""
    reason = why_not(device)
    if reason:
        raise MissingDependencyError(f"--device {device}: {reason}. Run with --device cpu.")


def why_not(device: str) -> str:
    """Why PyTorch cannot compute on ``device``, in the driver's words, or in PyTorch's where it is that; empty where it can."""
    if kind(device) == "cpu":
        return ""
    import torch

    from foldexport.benchmark import environment

    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:  # what PyTorch raises without CUDA in it, and without a driver
        return environment.no_gpu() or str(error).strip().splitlines()[0].rstrip(".")
    return ""


def described(device: str) -> str:
    """ "cuda (NVIDIA L4)", and "cpu" as it is."""
    if kind(device) != "cuda":
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32 and sums of half types in float32, whatever the process had switched on.

    TF32 keeps 11 of float32's 24 digits, and cuDNN uses it unless it is told not to. torch has two sets of switches, and
    reading one of them is an error where the other disagrees, so both are set: the old ones first, since they write the new
    ones ("Numerical accuracy" and "CUDA semantics" in PyTorch's notes). An old switch that is off leaves the new ones to what
    is set for all of torch, which may be TF32; so the new ones say "ieee" by name.
    """
    import torch

    products = torch.backends.cuda.matmul
    before = _switches()
    sums = {name: _half_sum(name) for name in HALF_SUMS}
    try:
        _set({"cudnn": False, "matmul": "highest", **dict.fromkeys(_newer(), IEEE)})
        for name in HALF_SUMS:
            setattr(products, name, False)
        yield
    finally:
        _set(before)
        for name, value in sums.items():
            setattr(products, name, value)


def reduced_on_cpu() -> bool:
    """Whether the process lets float32 products on the CPU be computed in less."""
    import torch

    cpu = torch.backends.mkldnn
    return cpu.matmul.fp32_precision in REDUCED or cpu.conv.fp32_precision in REDUCED


def with_device(module: Any, device: str) -> Any:
    """The module, or its layers under a graph that makes its own tensors, as ``torch.zeros(n, device=…)`` does, on ``device``.

    ``Module.to`` moves tensors only: a device that a traced graph names stays what it was.
    """
    import torch
    from torch import fx

    if not isinstance(module, fx.GraphModule) or not any(named_in(node) for node in module.graph.nodes):
        return module
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda each: torch.device(device) if isinstance(each, torch.device) else each
        )
    return fx.GraphModule(module, graph).eval()


def named_in(node: Any) -> list[Any]:
    """The devices among the arguments of a node of a graph."""
    import torch
    from torch import fx

    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda each: found.append(each))
    return [each for each in found if isinstance(each, torch.device)]


def product_precision() -> str:
    """``torch.get_float32_matmul_precision()``, also where torch refuses to say it since its two sets of switches disagree."""
    return _switches()["matmul"]


def _newer() -> dict[str, Any]:
    """The owners of the new switches, ``fp32_precision`` each."""
    import torch.backends.cudnn.rnn

    backends = torch.backends
    return {
        "cuda matmul": backends.cuda.matmul, "cudnn conv": backends.cudnn.conv, "cudnn rnn": backends.cudnn.rnn,
        "mkldnn matmul": backends.mkldnn.matmul, "mkldnn conv": backends.mkldnn.conv,
    }  # fmt: skip


def _switches() -> dict[str, Any]:
    """Every switch of float32 as it stands. One that torch refuses to read, since the other set disagrees, is the default."""
    import torch

    found: dict[str, Any] = {"cudnn": True, "matmul": "highest"}
    readers = {"cudnn": lambda: torch.backends.cudnn.allow_tf32, "matmul": torch.get_float32_matmul_precision}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the old ones will go
        for name, read in readers.items():
            try:
                found[name] = read()
            except RuntimeError:
                continue
    return found | {name: owner.fp32_precision for name, owner in _newer().items()}


def _set(values: dict[str, Any]) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = values["cudnn"]
        torch.set_float32_matmul_precision(values["matmul"])
    for name, owner in _newer().items():
        owner.fp32_precision = NONE  # which takes what is set for all of torch; kept so where that is what was read
        if owner.fp32_precision != values[name]:
            owner.fp32_precision = values[name]


def _half_sum(name: str) -> Any:
    """The switch with what belongs to it: whether a sum may be split."""
    import torch

    products = torch.backends.cuda.matmul
    split = getattr(products, f"{name}_split_k", None) if "reduction" in name else None
    value = getattr(products, name)
    return value if split is None else (value, split)
