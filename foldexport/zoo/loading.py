"""A checkpoint's tensors into a network of the zoo: which do not fit, in the names of the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from foldexport.errors import CheckpointError

SHOWN_KEYS = 5


def uniform_precision(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Every float tensor in float32, or all in float64 where all of them are; and a note of what that changed."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) < 2 and kinds <= {torch.float32, torch.float64}:
        return dict(tensors), []
    widened = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    notes = []
    if narrow := sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.itemsize < 4):
        notes.append(f"half-precision weights were widened to float32 ({', '.join(narrow)} in the file)")
    if torch.float64 in kinds:
        count = sum(tensor.dtype == torch.float64 for tensor in tensors.values())
        notes.append(f"{count} float64 tensors among others were rounded to float32")
    return widened, notes


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    surplus: Sequence[str],
    file_key: Callable[[str], str],
    title: str,
) -> nn.Module:
    """``module`` (on the meta device) with ``state`` as its tensors, in eval mode.

    ``surplus``: keys of the file that have no name in the network; ``file_key`` maps a name of the network to that of
    the file. ``num_batches_tracked``, which evaluation does not read, may be absent and starts at 0. Raises
    CheckpointError that lists what is missing, surplus, of another shape and not floating point.
    """
    wanted = module.state_dict()
    counters = {key for key in wanted if key.endswith(".num_batches_tracked")}
    missing = [file_key(key) for key in wanted if key not in state and key not in counters]
    surplus = [*surplus, *(file_key(key) for key in state if key not in wanted)]
    shared = [key for key in wanted if key in state and key not in counters]
    reshaped = [
        f"{file_key(key)} is {list(state[key].shape)}, wanted {list(wanted[key].shape)}"
        for key in shared
        if state[key].shape != wanted[key].shape
    ]
    integers = [
        f"{file_key(key)} is {str(state[key].dtype).removeprefix('torch.')}"
        for key in shared
        if wanted[key].is_floating_point() and not state[key].is_floating_point()
    ]
    misfits = [
        *_listed("missing", missing),
        *_listed("surplus", surplus),
        *_listed("of another shape", reshaped),
        *_listed("not floating point", integers),
    ]
    if misfits:
        raise CheckpointError(
            f"{title}: {'; '.join(misfits)}.\n"
            "Pass the file as it was saved, or --arch package.module:callable for a network of your own."
        )
    found = {key: state[key] for key in shared}
    found |= {key: torch.tensor(0) for key in counters}
    module.load_state_dict(found, strict=True, assign=True)
    return module.eval()


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return [f"{len(names)} {what} ({', '.join(names[:SHOWN_KEYS])}{more})"]
