"""The weights of a checkpoint into a network that the user built, strictly."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from foldexport.checkpoint.misfit import Misfit, explanations, misfit, outputs, weights
from foldexport.checkpoint.tensors import HALF_TYPES
from foldexport.errors import CheckpointError

SHOWN_KEYS = 5


class Suggests(Protocol):
    """What knows how the network was built (foldexport.builder)."""

    def suggestion(self, found: Misfit, tensors: Mapping[str, Tensor]) -> str:
        """Arguments under which everything fits, as the command line takes them; '' without any."""


def load_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path = "checkpoint", builder: Suggests | None = None
) -> list[str]:
    """Copy ``tensors`` into ``module`` and return notes (a prefix that was matched, a change of precision).

    Every name must fit, but for ``num_batches_tracked``. Names that all fit once one prefix is stripped or added are
    matched that way, and so is the one part of a file with several networks that fits. The module keeps its own dtypes:
    half-precision weights are widened to them. builder: asked for other arguments where the weights do not fit.

    Raises :class:`CheckpointError` with the missing, surplus and differently shaped names, and what would explain them.
    """
    expected = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    named, stripped, added = _best_prefix(tensors, expected)
    notes = []
    part = None if _fits(named, expected) else _fitting_part(tensors, expected, source, type(module).__name__)
    if part is not None:
        named, note = _under(tensors, part), _note_part(tensors, part)
        notes, hint = [note], ""
    elif _fits(named, expected):
        notes += [f"matched names by stripping the prefix `{stripped}` from the checkpoint's"] if stripped else []
        notes += [f"matched names by adding the prefix `{added}` to the checkpoint's"] if added else []
        hint = ""
    else:
        hint = _prefix_hint(named, tensors, expected, stripped, added)
        named = dict(tensors) if not hint else named
    named = {key: _as_scalar(tensor, expected.get(key)) for key, tensor in named.items()}
    reshaped = _reshaped(named, expected)
    missing, surplus = (weights(expected.keys() - named.keys()), weights(named.keys() - expected.keys()))
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
            *_explained(named, expected, builder),
        ]))  # fmt: skip
    return notes + _precision(named, expected)


def _explained(named: Mapping[str, Tensor], expected: Mapping[str, Tensor], builder: Suggests | None) -> list[str]:
    """What would explain the difference, and the arguments that would take it away, in one line."""
    found = misfit(named, expected)
    told = explanations(found) or parts_told(named, expected)
    arguments = builder.suggestion(found, named) if builder is not None else ""
    if not arguments and builder is None and told and outputs(found):
        arguments = f"--arch-arg num_classes={found.named[found.reshaped[0]][0]}"
    if arguments:
        return [f"  {told[0]}: try {arguments}" if told else f"  Every name and shape would fit with {arguments}"]
    return [f"  {told[0]}"] if told else []


def _fits(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return weights(named) == weights(expected)


# ---- parts of a file


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _fitting_part(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path, kind: str) -> str | None:
    """The prefix under which the checkpoint has exactly the network's names and shapes; None without one.

    Raises CheckpointError where there are several: a student and its teacher, a network and its average.
    """
    counts: Counter[str] = Counter()
    for key in weights(tensors):
        parts = key.split(".")
        counts.update(".".join(parts[:at]) + "." for at in range(1, len(parts)))
    wanted = len(weights(expected))
    found = [p for p, count in counts.items() if count == wanted and not misfit(_under(tensors, p), expected).size]
    if len(found) > 1:
        order = list(tensors)
        found.sort(key=lambda p: next(at for at, key in enumerate(order) if key.startswith(p)))
        names = ", ".join(f"`{prefix}`" for prefix in found)
        raise CheckpointError(
            f"{source}: holds {len(found)} networks that fit {kind}, under {names}.\n"
            f"Keep one of them: the names that begin with {found[0]}, saved to a file of their own."
        )
    return found[0] if found else None


def _note_part(tensors: Mapping[str, Tensor], prefix: str) -> str:
    rest = [key for key in tensors if not key.startswith(prefix)]
    others = list(dict.fromkeys(key.split(".")[0] + ("." if "." in key else "") for key in rest))
    more = f" and {len(others) - SHOWN_KEYS} more" if len(others) > SHOWN_KEYS else ""
    named = ", ".join(f"`{other}`" for other in others[:SHOWN_KEYS])
    return f"took the names that begin with `{prefix}`; {len(rest)} others are not used ({named}{more})"


def parts_told(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The networks that a checkpoint seems to hold, where it holds several and one of them comes nearest."""
    wanted = weights(expected)
    sizes = Counter(key.split(".")[0] for key in named if "." in key and weights([key]))
    large = [name for name, size in sizes.items() if size * 4 >= len(wanted)]
    fitting = {name: _alike(_under(named, f"{name}."), expected) for name in large}
    best = max(large, key=fitting.__getitem__, default="")
    if len(large) < 2 or fitting[best] * 2 <= len(wanted) or fitting[best] <= _alike(named, expected):
        return []
    held = ", ".join(f"`{name}.` ({sizes[name]} tensors)" for name in large[:SHOWN_KEYS])
    return [f"The checkpoint holds {held}: under `{best}.` {fitting[best]} of the network's {len(wanted)} names fit"]


def _alike(named: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> int:
    """How many of the network's names the checkpoint has in the network's shape."""
    found = misfit(named, expected)
    return len(weights(expected)) - len(found.missing) - len(found.reshaped)


# ---- prefixes


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
    return weights(missing), weights(result.unexpected_keys)


def _report(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return [f"  {len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}{more}"]


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
