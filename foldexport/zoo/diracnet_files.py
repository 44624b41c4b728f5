"""DiracNet checkpoints: which network the keys and shapes are of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from foldexport.errors import CheckpointError, UsageError
from foldexport.zoo import diracnet_layouts as layouts
from foldexport.zoo.dirac import dirac_delta, tiled_dirac_delta
from foldexport.zoo.diracnet import BASE_WIDTHS, DiracNet, FoldedDiracNet, Plan, make_plan
from foldexport.zoo.family import Family, Identified
from foldexport.zoo.loading import load_strictly

ARGUMENTS = ("dataset", "depth", "width", "num_classes", "version")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What the original code normalises with (RGB in 0 … 1) and the sizes that it trains and tests on.
PREPROCESSING = {
    "CIFAR": {
        "input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0,
        "mean": (125.3 / 255, 123.0 / 255, 113.9 / 255), "std": (63.0 / 255, 62.1 / 255, 66.7 / 255),
    },
    "ImageNet": {
        "input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.875,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    },
}  # fmt: skip

_CONV = re.compile(r"features\.group(\d{1,9})\.block(\d{1,9})\.conv\.(weight|alpha|beta|bias)")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Blocks named as the paper's code names them, with Dirac scales beside the weight or, folded, a bias."""
    keys = list(tensors)
    scales = r"group\d+\.block\d+\.(alpha|beta)"
    return any(re.fullmatch(scales, key) for key in keys) or layouts.is_network(keys)


def load(tensors: dict[str, Tensor], arch_args: dict[str, Any], source: str) -> Identified:
    """The DiracNet that the tensors are of; ``arch_args`` (`ARGUMENTS`) overrule what the shapes say."""
    published = layouts.is_published(list(tensors))
    state, eyes, surplus = layouts.from_published(tensors) if published else (dict(tensors), {}, [])
    folded = not published and not any(key.endswith((".alpha", ".beta")) for key in state)
    plan, reason = read_plan(state, source)
    if arch_args:
        plan, reason = _asked_plan(plan, arch_args), f"asked for: {', '.join(f'{k}={v}' for k, v in arch_args.items())}"
    description = describe(plan, folded)
    try:
        with torch.device("meta"):
            module = FoldedDiracNet(plan) if folded else DiracNet(plan)
    except ValueError as error:
        raise CheckpointError(f"{source}: no {description} can be made: {error}.") from error
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    notes = [] if folded else _add_deltas(state, eyes, surplus, shapes, plan.version)

    def file_key(key: str) -> str:
        return layouts.published_key(key, shapes.get(key, ())) if published else key

    load_strictly(module, state, surplus, file_key, f"{source}, as {description}")
    return Identified(
        module=module,
        name="DiracNet",
        description=description,
        reason=f"{_layout_reason(published, folded)}; {reason}",
        input_shape=(1, *PREPROCESSING[plan.dataset]["input_size"]),
        num_classes=plan.num_classes,
        preprocessing=_preprocessing(plan),
        notes=notes,
    )


def describe(plan: Plan, folded: bool) -> str:
    """For instance "DiracNet v2, CIFAR, depth 16, width 2, 10 classes, unfolded"."""
    channels = "-".join(map(str, plan.widths))
    width = f"channels {channels}" if plan.width is None else f"width {plan.width:g}"
    if plan.dataset == "CIFAR":
        standard = len(set(plan.blocks)) == 1 and plan.blocks[0] % 2 == 0
    else:
        standard = any(plan.blocks == make_plan("ImageNet", depth).blocks for depth in (18, 34))
    blocks = "" if standard else f" ({'-'.join(map(str, plan.blocks))} blocks)"
    return (
        f"DiracNet v{plan.version}, {plan.dataset}, depth {plan.depth}{blocks}, {width}, {plan.num_classes} classes, "
        f"{'folded' if folded else 'unfolded'}"
    )


def _layout_reason(published: bool, folded: bool) -> str:
    if published:
        return "keys group0.block0.conv with .alpha and .beta beside it"
    return f"keys features.group0.block0.conv.{'weight and .bias' if folded else 'alpha and .beta'}"


def read_plan(state: Mapping[str, Tensor], source: str) -> tuple[Plan, str]:
    """The plan that most of the shapes agree on, so that a single wrong one is reported as wrong; and why.

    Raises CheckpointError where the groups are not those of a DiracNet.
    """
    blocks, weights = _blocks(state), _block_weights(state)
    if not blocks:
        raise CheckpointError(f"{source}: no DiracNet: no key group0.block0.conv with group0.block0.alpha beside it.")
    if sum(blocks.values()) > len(state):
        count = f"{len(state)} tensors are not {sum(blocks.values())} blocks"
        raise CheckpointError(f"{source}: looks like a DiracNet, but {count}.")
    if blocks.keys() not in ({0, 1, 2}, {0, 1, 2, 3}) or blocks.keys() - weights.keys():
        raise CheckpointError(
            f"{source}: looks like a DiracNet, but has convolutions in groups {', '.join(map(str, sorted(weights)))};\n"
            "a DiracNet has groups 0 to 2 (CIFAR) or 0 to 3 (ImageNet), their weights [Cout, Cin, 3, 3]."
        )
    dataset = "CIFAR" if len(blocks) == 3 else "ImageNet"
    widths = tuple(_most_common(w.shape[0] for w in weights[g].values()) for g in sorted(weights))
    version = _version(state, weights)
    head = state.get("fc.weight", state.get("fc.bias"))
    num_classes = head.shape[0] if head is not None and head.dim() else (10 if dataset == "CIFAR" else 1000)
    plan = Plan(dataset, widths, tuple(blocks[g] for g in sorted(blocks)), num_classes, version)
    return plan, _reason(plan)


def _reason(plan: Plan) -> str:
    def dashed(numbers: Iterable[int]) -> str:
        return "-".join(map(str, numbers))

    stem = "3x3" if plan.dataset == "CIFAR" else "7x7"
    reads = "as many channels as they write" if plan.version == 2 else "twice the channels (NCReLU)"
    return (
        f"{len(plan.blocks)} groups behind a {stem} stem: {plan.dataset}; "
        f"{dashed(plan.blocks)} blocks: depth {plan.depth}; "
        f"{dashed(plan.widths)} channels where width 1 has {dashed(BASE_WIDTHS[plan.dataset])}; "
        f"blocks read {reads}: v{plan.version}; fc has {plan.num_classes} rows"
    )


def _blocks(state: Mapping[str, Tensor]) -> dict[int, int]:
    """Group → number of blocks, by the highest that occurs: a block without its weight is missing, not absent."""
    found: dict[int, int] = {}
    for key in state:
        if match := _CONV.fullmatch(key):
            group, block = int(match[1]), int(match[2])
            found[group] = max(found.get(group, 0), block + 1)
    return found


def _block_weights(state: Mapping[str, Tensor]) -> dict[int, dict[int, Tensor]]:
    found: dict[int, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        match = _CONV.fullmatch(key)
        if match and match[3] == "weight" and tensor.dim() == 4:
            found.setdefault(int(match[1]), {})[int(match[2])] = tensor
    return found


def _version(state: Mapping[str, Tensor], weights: Mapping[int, Mapping[int, Tensor]]) -> int:
    """Version 1 behind its first block reads ``[Cout, 2·Cout, 3, 3]``; in groups of one block, alpha is ``[1]``."""
    ratios = [w.shape[1] / w.shape[0] for group in weights.values() for b, w in group.items() if b > 0 and w.shape[0]]
    if ratios:
        return 1 if _most_common(ratios) == 2 else 2
    alphas = [tensor.numel() for key, tensor in state.items() if key.endswith(".conv.alpha")]
    return 1 if alphas and _most_common(alphas) == 1 else 2


def _most_common(values: Iterable):
    return Counter(values).most_common(1)[0][0]


def _asked_plan(plan: Plan, arch_args: dict[str, Any]) -> Plan:
    unknown = sorted(arch_args.keys() - set(ARGUMENTS))
    if unknown:
        raise UsageError(f"--arch diracnet takes no {unknown[0]}; it takes {', '.join(ARGUMENTS)}.")
    dataset = arch_args.get("dataset", plan.dataset)
    found = {"dataset": dataset, "num_classes": plan.num_classes, "version": plan.version}
    if dataset == plan.dataset:
        found |= {"depth": plan.depth, "width": plan.width or 1}
    try:
        return make_plan(**{**found, **arch_args})
    except (ValueError, TypeError) as error:
        raise UsageError(f"--arch diracnet: {error}.") from error


def _add_deltas(
    state: dict[str, Tensor],
    eyes: Mapping[str, Tensor],
    surplus: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    version: int,
) -> list[str]:
    """Gives every block its delta: the file's, else the identity as the paper has it; a note says which were made."""
    deltas = {key: layouts.eye_name(shape) for key, shape in shapes.items() if key.endswith(".conv.delta")}
    surplus += sorted(eyes.keys() - set(deltas.values()))
    make = tiled_dirac_delta if version == 1 else dirac_delta
    made = set()
    for key, eye in deltas.items():
        if key in state:
            continue
        if eye in eyes:
            state[key] = eyes[eye].clone()
            continue
        weight = state.get(key.replace(".delta", ".weight"))
        state[key] = make(shapes[key]).to(weight.dtype if weight is not None else torch.float32)
        made.add(eye)
    return [f"deltas that the file lacks were made: {', '.join(sorted(made))}"] if made else []


def _preprocessing(plan: Plan) -> dict[str, Any]:
    fields = {**PREPROCESSING[plan.dataset], "num_classes": plan.num_classes}
    if plan.dataset == "CIFAR" and plan.num_classes == 10:
        fields["label_names"] = CIFAR10_CLASSES
    return fields


FAMILY = Family(name="DiracNet", arch="diracnet", keys=layouts.KEYS, recognises=recognises, load=load)
