"""How an image becomes the network's input, under timm's field names, and what the user says of it.

``input_size``, ``interpolation``, ``crop_pct``, ``mean``, ``std`` and ``label_names`` are timm's; ``value_range`` (of the pixels
that mean and std are of), ``color_order`` and ``layout`` say the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foldexport.errors import UsageError
from foldexport.normalise import Raw, require

COLOR_ORDER = {1: "L", 3: "RGB"}
PIXELS = (0.0, 1.0)  # what mean and std are of, as in timm and torchvision
#: Where training code leaves the names of its classes: a list, or a dictionary from or to class numbers.
NAMES_IN_FILES = ("label_names", "class_names", "classes", "CLASSES", "names", "class_to_idx", "idx_to_class")


def settle(
    fields: dict[str, Any], shapes: Sequence[Sequence[int]], *, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, asked: bool = False,
) -> list[str]:
    """Put what the user says into ``fields``: mean, std, and the size of the image in ``shapes``; returns notes.

    asked: the shapes are the user's, and overrule the size that is known. Raises UsageError for another number of channels.
    """
    notes = []
    image = tuple(shapes[0][1:]) if len(shapes) == 1 and len(shapes[0]) == 4 else ()
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        channels = shapes[0][1] if len(shapes) == 1 and len(shapes[0]) > 2 else len(values)
        if len(values) != channels:
            raise UsageError(f"--{name} {','.join(map(str, values))}: has {len(values)} numbers, the input {channels} channels.")
        before = fields.get(name)
        fields[name] = require(f"--{name}", values, positive=name == "std")
        if before and tuple(before) != fields[name]:
            notes.append(f"--{name} {_words(fields[name])} replaces {_words(before)}")
    known = tuple(fields.get("input_size") or ())
    if image and (fields.get("mean") or fields.get("std") or known) and (asked or not known):
        fields["input_size"] = image
    return notes


def raw_of(fields: Mapping[str, Any], top: float) -> Raw:
    """What ``--normalize`` puts into the network. Raises UsageError where nothing says mean and std."""
    missing = [name for name in ("mean", "std") if not fields.get(name)]
    if missing:
        raise UsageError(
            f"--normalize: nothing in the checkpoint says the {' and '.join(missing)} of its images: pass "
            f"{' and '.join(f'--{name}' for name in missing)}, for example --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225."
        )
    mean, std = require("mean", fields["mean"]), require("std", fields["std"], positive=True)
    if len(mean) != len(std):
        raise UsageError(f"--normalize: the mean has {len(mean)} channels and the deviation {len(std)}: pass --mean and --std.")
    return Raw(mean, std, top)


def taken_in(fields: dict[str, Any], raw: Raw) -> str:
    """Say in ``fields`` that the network itself does it: mean 0, std 1 of pixels from 0 to top; returns a note."""
    count = len(raw.mean)
    fields |= {"mean": (0.0,) * count, "std": (1.0,) * count, "value_range": (0.0, raw.top)}
    fields["inside_network"] = {"mean": raw.mean, "std": raw.std, "value_range": (0.0, raw.top)}
    inside = f"mean {_words(raw.mean)} and deviation {_words(raw.std)} are inside of the network"
    return f"{inside}: it takes pixels from 0 to {raw.top:g}"


def described(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with what goes without saying in timm: the range of pixels, the order of colours, the axes."""
    size = fields.get("input_size") or ()
    if len(size) != 3:
        return dict(fields)
    added: dict[str, Any] = {"value_range": PIXELS} if fields.get("mean") and fields.get("std") else {}
    if size[0] in COLOR_ORDER:
        added["color_order"] = COLOR_ORDER[size[0]]
    return {**fields, **{key: value for key, value in (added | {"layout": "NCHW"}).items() if key not in fields}}


def read_names(path: Path) -> tuple[str, ...]:
    """One class name a line, in the order of the outputs. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {path}: cannot be read ({error}); wanted a text file with one name a line.") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise UsageError(f"--class-names {path}: {where}; wanted one name a line, in the order of the outputs.")
    return tuple(names)


def names_in(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names that lie beside the weights in a checkpoint, in order; none where nothing clear does."""
    places = [metadata, *(metadata.get(key) for key in ("pretrained_cfg", "meta", "dataset_meta", "hyper_parameters"))]
    for place in places:
        for key in NAMES_IN_FILES if isinstance(place, Mapping) else ():
            if names := _in_order(place.get(key)):
                return names
    return ()


def require_names(names: Sequence[str], outputs: int | None, source: str) -> None:
    """Raise UsageError unless there is a name for each output."""
    if outputs is not None and len(names) != outputs:
        raise UsageError(f"{source}: has {len(names)} names, the network {outputs} classes; wanted one a line for each.")


def _in_order(value: Any) -> tuple[str, ...]:
    """Names from a list, ``{"cat": 0}`` or ``{0: "cat"}``."""
    if isinstance(value, (list, tuple)):
        names = list(value)
    elif isinstance(value, Mapping) and value:
        pairs = list(value.items())
        if all(isinstance(item, int) for _, item in pairs):
            pairs = [(item, key) for key, item in pairs]
        if not all(str(key).isdigit() for key, _ in pairs):
            return ()
        numbered = {int(key): name for key, name in pairs}
        names = [numbered.get(place) for place in range(len(pairs))]
    else:
        return ()
    return tuple(names) if len(names) > 1 and all(isinstance(name, str) and name for name in names) else ()


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
