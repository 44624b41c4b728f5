"""Which tensors in a checkpoint are the network's weights: wrappers, averages, prefixes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.checkpoint.standins import Bag, NumpyArray
from foldexport.errors import CheckpointError

# In the order in which they are taken.
WEIGHT_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "params", "net", "network", "weights", "module",
    "net_state_dict", "model_weights",
)  # fmt: skip
EMA_KEYS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema", "ema_model", "model_ema_state_dict",
    "ema_state", "model_averaged",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")

# Training state that holds tensors which are nobody's weights.
TRAINING_STATE = re.compile(
    r"optim|sched|scaler|callback|criterion|(^|_)(rng|amp|loops?|loss|grads?)(_|$)", re.IGNORECASE
)

# Deeper than any checkpoint nests; a dict that holds itself ends here.
MAX_DEPTH = 6
MAX_METADATA_ITEMS = 64


@dataclass
class Selection:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    taken: str = ""
    ema: bool = False
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    averaged: str = ""


def choose(content: Any, path: Path, use_ema: bool | None) -> Selection:
    """The weights in whatever a checkpoint file holds; see :func:`foldexport.checkpoint.read`.

    Raises :class:`CheckpointError`: no weights, nothing but one tensor, no EMA weights where they were asked for.
    """
    chosen = Selection()
    weights = _descend(content, path, use_ema, chosen, depth=0)
    if chosen.module is None:
        _collect(weights, chosen)
    _split_averages(chosen, use_ema)
    if not chosen.tensors and chosen.averaged and use_ema is False:
        raise CheckpointError(f"{path}: has EMA weights only (`{chosen.averaged}`), which were ruled out.")
    if not chosen.tensors:
        raise CheckpointError(
            f"{path}: no weights inside; it holds {_contents(content)}.\n"
            "Wanted: a state dict, alone or under a key such as `state_dict` or `model`."
        )
    if use_ema and not chosen.ema:
        raise CheckpointError(f"{path}: has no EMA weights; it holds {_contents(content)}.")
    if chosen.taken:
        chosen.notes.insert(0, f"took the {'EMA ' if chosen.ema else ''}weights under `{chosen.taken}`")
    return chosen


def strip_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """``tensors`` without the wrappers' prefixes that *every* key has, and what was stripped ("module._orig_mod.")."""
    stripped = ""
    names = list(tensors)
    while prefix := next((p for p in PREFIXES if names and all(n.startswith(p) and n != p for n in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
        stripped += prefix
    return dict(zip(names, tensors.values(), strict=True)), stripped


def _descend(content: Any, path: Path, use_ema: bool | None, chosen: Selection, depth: int) -> Mapping:
    """Follow wrapper keys down to the state dict, noting on the way what is left behind."""
    if isinstance(content, nn.DataParallel):
        content = content.module
    if isinstance(content, nn.Module):
        chosen.module = content
        chosen.tensors = dict(content.state_dict())
        return {}
    if isinstance(content, Tensor | NumpyArray):
        raise CheckpointError(f"{path}: holds a single tensor, not a network's weights; wanted a state dict.")
    if isinstance(content, list | tuple):
        content = {f"[{index}]": item for index, item in enumerate(content)}
    if not isinstance(content, Mapping) or depth > MAX_DEPTH:
        return {}
    branches = {key: value for key, value in content.items() if _is_branch(value)}
    direct = any(_is_weight(value) for value in content.values())
    key = _next_key(branches, direct, use_ema, chosen)
    if key is None:
        return content
    inner = branches[key]
    taken = str(key)
    if key == "params" and "stats" in branches:
        inner = _merged(branches, path)
        taken = "params + stats"
    chosen.taken = f"{chosen.taken}.{taken}" if chosen.taken else taken
    _note_beside(content, branches, taken, chosen)
    return _descend(inner, path, use_ema, chosen, depth + 1)


def _next_key(branches: Mapping, direct: bool, use_ema: bool | None, chosen: Selection) -> Any:
    """The wrapper key to follow, or None where this level is the state dict itself."""
    plain = [key for key in WEIGHT_KEYS if key in branches]
    averaged = [key for key in EMA_KEYS if key in branches]
    if averaged and use_ema:
        chosen.ema = True
        return averaged[0]
    if plain:
        return plain[0]
    others = [key for key in branches if key not in averaged and not _is_training_state(key)]
    if averaged and not direct and not others and use_ema is None:
        chosen.ema = True
        chosen.notes.append(f"the file has EMA weights only (`{averaged[0]}`)")
        return averaged[0]
    if not direct and len(others) == 1:
        return others[0]
    return None


def _merged(branches: Mapping, path: Path) -> dict:
    """DiracNets' older layout: parameters and statistics side by side, under names of one network."""
    params, stats = branches["params"], branches["stats"]
    twice = [key for key in stats if key in params]
    if twice:
        raise CheckpointError(f"{path}: {twice[0]} is both in `params` and in `stats`; one set of weights is wanted.")
    return {**params, **stats}


def _note_beside(content: Mapping, branches: Mapping, taken: str, chosen: Selection) -> None:
    used = taken.split(" + ")
    rest = [key for key in content if str(key) not in used]
    averaged = [str(key) for key in rest if key in EMA_KEYS and key in branches]
    if averaged and not chosen.ema:
        chosen.notes.append(f"EMA weights are there too (`{'`, `'.join(averaged)}`), not used")
    second = [str(key) for key in rest if key in WEIGHT_KEYS and key in branches]
    if chosen.ema and second:
        chosen.notes.append(f"the weights without EMA are there too (`{'`, `'.join(second)}`), not used")
    elif second:
        chosen.notes.append(f"more weights are there too (`{'`, `'.join(second)}`), not used")
    _keep_beside({key: content[key] for key in rest if str(key) not in averaged + second}, chosen)


def _keep_beside(beside: Mapping, chosen: Selection) -> None:
    """Metadata of what can be written as JSON; a note of what cannot."""
    ignored = []
    for key, value in beside.items():
        training = isinstance(value, Mapping | list) and _is_training_state(key)
        kept = None if training or _is_branch(value) else jsonable(value)
        if kept is None and value is not None:
            ignored.append(str(key))
        elif value is not None:
            chosen.metadata.setdefault(str(key), kept)
    if ignored:
        more = f" and {len(ignored) - 6} more" if len(ignored) > 6 else ""
        chosen.notes.append(f"ignored beside the weights: {', '.join(ignored[:6])}{more}")


def _collect(weights: Mapping, chosen: Selection) -> None:
    """Flatten the state dict; parts of a network under keys of their own get dotted names."""
    beside = {}
    averaged = []
    for key, value in weights.items():
        if _is_weight(value):
            chosen.tensors[_text(key)] = _as_tensor(value)
        elif _is_branch(value) and key in EMA_KEYS:
            averaged.append(str(key))
        elif _is_branch(value) and not _is_training_state(key):
            chosen.tensors.update(_flatten(value, f"{_text(key)}."))
            chosen.notes.append(f"took `{_text(key)}` as a part of the network")
        else:
            beside[_text(key)] = value
    if averaged:
        chosen.averaged = averaged[0]
        chosen.notes.append(f"EMA weights are there too (`{'`, `'.join(averaged)}`), not used")
    _keep_beside(beside, chosen)


def _flatten(branch: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(branch, nn.Module):
        branch = branch.state_dict()
    for key, value in branch.items():
        if _is_weight(value):
            yield prefix + _text(key), _as_tensor(value)
        elif isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _flatten(value, f"{prefix}{_text(key)}.", depth + 1)


def _split_averages(chosen: Selection, use_ema: bool | None) -> None:
    """Averages kept among the weights: ``model_ema.`` names, and the counter of ``swa_utils.AveragedModel``."""
    if "n_averaged" in chosen.tensors and all(k.startswith("module.") for k in chosen.tensors if k != "n_averaged"):
        chosen.metadata["n_averaged"] = int(chosen.tensors.pop("n_averaged"))
    prefixes = tuple(f"{key}." for key in EMA_KEYS)
    averaged = {key: tensor for key, tensor in chosen.tensors.items() if key.startswith(prefixes)}
    if not averaged:
        return
    name = next(iter(averaged)).split(".", 1)[0]
    only = len(averaged) == len(chosen.tensors)
    if use_ema or (only and use_ema is None):
        chosen.tensors = {key.removeprefix(f"{name}."): tensor for key, tensor in averaged.items()}
        chosen.ema = True
        chosen.notes.append(f"took the EMA weights, those whose names begin `{name}.`")
        return
    chosen.averaged = f"{name}."
    chosen.tensors = {key: tensor for key, tensor in chosen.tensors.items() if key not in averaged}
    chosen.notes.append(f"EMA weights are there too ({len(averaged)} names that begin `{name}.`), not used")


def jsonable(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON types, or None where it is none: scalars, text, short lists and dicts of them."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and not value.is_quantized:
        value = value.detach().item()
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, complex | torch.dtype | torch.device):
        return str(value)
    if depth > 3:
        return None
    if isinstance(value, Bag) or type(value).__name__ in ("Namespace", "SimpleNamespace"):
        value = vars(value)
    if isinstance(value, Mapping) and len(value) <= MAX_METADATA_ITEMS * 4:
        kept = {_text(key): jsonable(item, depth + 1) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None} or None
    if isinstance(value, list | tuple | set) and len(value) <= MAX_METADATA_ITEMS:
        return [jsonable(item, depth + 1) for item in value]
    return None


def _is_weight(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        or (isinstance(value, NumpyArray) and value.array.dtype.kind in "biufc")
        or (type(value).__module__ == "numpy" and type(value).__name__ == "ndarray" and value.dtype.kind in "biufc")
    )


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    array = value.array if isinstance(value, NumpyArray) else value
    # torch reads native byte order only.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=True))


def _is_branch(value: Any, depth: int = 0) -> bool:
    """Whether ``value`` holds tensors under names."""
    if isinstance(value, nn.Module):
        return True
    if not isinstance(value, Mapping) or depth > MAX_DEPTH:
        return False
    return any(_is_weight(item) or _is_branch(item, depth + 1) for item in value.values())


def _is_training_state(key: Any) -> bool:
    return bool(TRAINING_STATE.search(_text(key)))


def _text(key: Any) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


def _contents(content: Any) -> str:
    if isinstance(content, Mapping):
        names = [_text(key) for key in content]
        if not names:
            return "an empty dict"
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"a {type(content).__name__}"
