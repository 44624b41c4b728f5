"""What an artifact really computes in: read back from the file, never taken from what was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from foldexport.errors import PrecisionError
from foldexport.precision.homogeneous import name_of

SPARE_BYTES = 1024  # constants that a writer may keep in float32 beside the weights
SPARE_SHARE = 0.01
MULTIPLIERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Bilinear,
)  # fmt: skip
#: Functions that multiply, and how many products a writer makes of each.
PRODUCTS = {
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "convolution"), 1),
    **{f"conv{kind}{rank}d": 1 for kind in ("", "_transpose") for rank in (1, 2, 3)},
    "scaled_dot_product_attention": 2,
}


@dataclass(frozen=True)
class Delivered:
    """layers: convolutions and matrix products of the file by the type they compute in. weight_bytes: floats by type."""

    layers: dict[str, int]
    weight_bytes: dict[str, int]

    def share(self, name: str) -> float:
        """Of the weight bytes."""
        total = sum(self.weight_bytes.values())
        return self.weight_bytes.get(name, 0) / total if total else 0.0

    def __str__(self) -> str:
        layers = ", ".join(
            f"{count} of unknown type" if name == "unknown" else f"{count} in {name}"
            for name, count in sorted(self.layers.items(), key=lambda pair: -pair[1])
        )
        weights = ", ".join(f"{100 * self.share(name):.1f} % {name}" for name in sorted(self.weight_bytes, key=self.share)[::-1])
        return f"layers {layers or 'none'}; weight bytes {weights or 'none'}"

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "weight_bytes": self.weight_bytes}


def delivered(exporter: Any, path: str | Path) -> Delivered:
    """Read the types of an artifact: of its weights, and where the format can tell, of its layers' arithmetic."""
    sizes: Counter[str] = Counter()
    for array in exporter.weights(path).values():
        if is_weight(str(array.dtype)):
            sizes[str(array.dtype)] += int(array.nbytes)
    layers = exporter.precision_of(path) if hasattr(exporter, "precision_of") else {}
    return Delivered(dict(layers), dict(sizes))


def is_weight(name: str) -> bool:
    """A float, or an eight-bit integer: what weights are in. Longer integers are shapes and indices."""
    return "float" in name or name in ("int8", "uint8")


def expected(module: nn.Module) -> Delivered:
    """What a file of ``module`` is to be in."""
    layers: Counter[str] = Counter()
    nodes = list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []
    called = [module.get_submodule(node.target) for node in nodes if node.op == "call_module"]  # one that is shared, each time
    for each in called if nodes else module.modules():
        if isinstance(each, MULTIPLIERS):
            layers[str(each.weight.dtype).removeprefix("torch.")] += 1
    for node in nodes:
        count = PRODUCTS.get(name_of(node.target), 0) if node.op == "call_function" else 0
        if count and "works_in" in node.meta:
            layers[str(node.meta["works_in"]).removeprefix("torch.")] += count
    sizes: Counter[str] = Counter()
    state = {id(each): each for each in (*module.parameters(), *module.buffers())}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return Delivered(dict(layers), dict(sizes))


def require_delivered(exporter: Any, path: str | Path, module: nn.Module, dtype: torch.dtype) -> Delivered:
    """What the file is in. Raises PrecisionError (exit 6) where more of it is in another type than ``module`` is."""
    found, wanted, name = delivered(exporter, path), expected(module), str(dtype).removeprefix("torch.")
    other = _others(found.weight_bytes, name) - _others(wanted.weight_bytes, name)
    wide = exporter.float32_bytes(path) if hasattr(exporter, "float32_bytes") else 0  # what its format has no half type for
    other -= wide
    total = sum(found.weight_bytes.values())
    none = wanted.weight_bytes.get(name) and not found.weight_bytes.get(name) and not wide
    if total and (none or other > SPARE_BYTES + SPARE_SHARE * total):
        raise PrecisionError(
            f"{exporter.name}: asked for {name}, but the file holds {100 * (1 - found.share(name)):.0f} % of its weight bytes in "
            f"other types ({found}); no file was written."
        )
    unknown, at_most = found.layers.get("unknown", 0), _products(module)
    if at_most is not None and unknown > at_most:
        raise PrecisionError(
            f"{exporter.name}: asked for {name}, but the file does not tell what {unknown} of {sum(found.layers.values())} layers "
            f"compute in ({found}), {at_most} expected; no file was written."
        )
    if found.layers and _others(found.layers, name) > _others(wanted.layers, name):
        raise PrecisionError(
            f"{exporter.name}: asked for {name}, but {_others(found.layers, name)} of {sum(found.layers.values())} layers compute "
            f"in another type ({found}); no file was written."
        )
    return found


def _products(module: nn.Module) -> int | None:
    """Products of values that are computed, whose type a file need not say; None where the module is no graph."""
    if not isinstance(module, fx.GraphModule):
        return None
    return sum(PRODUCTS.get(name_of(node.target), 0) for node in module.graph.nodes if node.op == "call_function")


def _others(counts: Mapping[str, int], name: str) -> int:
    return sum(count for each, count in counts.items() if each not in (name, "unknown"))
