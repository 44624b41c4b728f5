"""The weights of a checkpoint into a network that the user built, strictly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from foldexport.checkpoint.tensors import HALF_TYPES
from foldexport.errors import CheckpointError

SHOWN_KEYS = 5


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path = "checkpoint") -> list[str]:
    """Copy ``tensors`` into ``module`` and return notes (a prefix that was matched, a change of precision).

    Every name must fit, but for ``num_batches_tracked``. Names that all fit once one prefix is stripped or added are
    matched that way. The module keeps its own dtypes: half-precision weights are widened to them.

    Raises :class:`CheckpointError` with the missing, surplus and differently shaped names, and what would explain them.
    """
    expected = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    named, stripped, added = _best_prefix(tensors, expected)
    notes = []
    if _fits(named, expected):
        notes += [f"matched names by stripping the prefix `{stripped}` from the checkpoint's"] if stripped else []
        notes += [f"matched names by adding the prefix `{added}` to the checkpoint's"] if added else []
        hint = ""
    else:
        hint = _prefix_hint(named, tensors, expected, stripped, added)
        named = dict(tensors)
    named = {key: _as_scalar(tensor, expected.get(key)) for key, tensor in named.items()}
    reshaped = _reshaped(named, expected)
    missing, surplus = (_weights(expected.keys() - named.keys()), _weights(named.keys() - expected.keys()))
    if not reshaped:
        missing, surplus = _load(module, named, source)
    if missing or surplus or reshaped:
        order = {key: index for index, key in enumerate([*expected, *named])}
        raise CheckpointError("\n".join([
            f"{source}: does not fit {type(module).__name__}:{hint}",
            *_report("missing from the checkpoint", sorted(missing, key=order.__getitem__)),
            *_report("not in the network", sorted(surplus, key=order.__getitem__)),
            *_report("of another shape", [
                f"{key} {list(named[key].shape)}, wanted {list(expected[key].shape)}" for key in reshaped
            ]),
            *_class_hint(named, expected, reshaped, missing, surplus),
        ]))  # fmt: skip
    return notes + _precision(named, expected)


def _weights(keys: Iterable[str]) -> set[str]:
    return {key for key in keys if key.rsplit(".", 1)[-1] != "num_batches_tracked"}


def _fits(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return _weights(named) == _weights(expected)


def _best_prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str]:
    """The renaming by one prefix, stripped or added, under which most names fit: (tensors, stripped, added)."""
    plain = (dict(tensors), "", "")
    stripped = [({key.removeprefix(p): value for key, value in tensors.items()}, p, "") for p in _prefixes(tensors)]
    added = [({p + key: value for key, value in tensors.items()}, "", p) for p in _prefixes(expected)]
    # max keeps the first of equals: no renaming where it gains nothing.
    return max([plain, *stripped, *added], key=lambda choice: len(choice[0].keys() & expected.keys()))


def _prefixes(keys: Iterable[str]) -> list[str]:
    """Every dotted prefix that all keys share: "a.b.c", "a.b.d" → ["a.", "a.b."]."""
    parts = os.path.commonprefix([key.split(".")[:-1] for key in keys])
    return [".".join(parts[: count + 1]) + "." for count in range(len(parts))]


def _prefix_hint(
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    stripped: str,
    added: str,
) -> str:
    fit, before = len(named.keys() & expected.keys()), len(tensors.keys() & expected.keys())
    if fit <= before:
        return ""
    change = f"stripped of `{stripped}`" if stripped else f"under `{added}`"
    return f" {before} of {len(tensors)} names fit ({fit} would, {change})"


def _as_scalar(tensor: Tensor, wanted: Tensor | None) -> Tensor:
    """Scalars of PyTorch 0.3 have shape [1], later ones []."""
    if wanted is None or is_lazy(wanted) or tensor.shape == wanted.shape:
        return tensor
    return tensor.reshape(wanted.shape) if tensor.numel() == wanted.numel() == 1 else tensor


def _reshaped(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [
        key
        for key, wanted in expected.items()
        if key in named and not is_lazy(wanted) and named[key].shape != wanted.shape
    ]


def _load(module: nn.Module, named: dict[str, Tensor], source: str | Path) -> tuple[set[str], set[str]]:
    """(missing, surplus) as the network's own loading hooks see them: old names that a hook maps do fit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = module.load_state_dict(named, strict=False)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{source}: does not load into {type(module).__name__}: {str(error).strip()}") from error
    # A module's own extra state is not weights.
    missing = {key for key in result.missing_keys if not key.endswith("_extra_state")}
    return _weights(missing), _weights(result.unexpected_keys)


def _report(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return [f"  {len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}{more}"]


def _class_hint(
    named: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    reshaped: list[str],
    missing: set[str],
    surplus: set[str],
) -> list[str]:
    """One layer whose output count alone differs is a classifier for another number of classes."""
    layers = {key.rpartition(".")[0] for key in reshaped}
    counts = {named[key].shape[0] for key in reshaped if named[key].dim()}
    only_outputs = all(named[key].shape[1:] == expected[key].shape[1:] for key in reshaped)
    if missing or surplus or len(layers) != 1 or len(counts) != 1 or not only_outputs:
        return []
    count = counts.pop()
    return [f"  The checkpoint has {count} outputs in {layers.pop()}: try --arch-arg num_classes={count}"]


def _precision(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    changes: dict[tuple[str, str], int] = {}
    floats = 0
    for key, tensor in named.items():
        if not tensor.is_floating_point() or key not in expected:
            continue
        floats += 1
        if tensor.dtype != expected[key].dtype:
            pair = (_name(tensor), _name(expected[key]))
            changes[pair] = changes.get(pair, 0) + 1
    return [
        f"{_verb(old, new)} {count} of {floats} float tensors from {old} to {new}, the network's own"
        for (old, new), count in changes.items()
    ]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _verb(old: str, new: str) -> str:
    halves = {str(dtype).removeprefix("torch.") for dtype in HALF_TYPES}
    return "widened" if (old in halves and new not in halves) or new == "float64" else "rounded"
