"""What the page draws of a study, as plain values: the operators of both networks, what became of each, their weights.

An operator is a dictionary:

    name, kind, module   of the graph; by which operators are counted ("conv"); the user's own, or the layer's
    detail, shape        "3×3 /2"; of one sample
    reads                names of the operators, or of the inputs of the network, whose values it reads
    type, entries        of the training graph only: the class of the user's module, and places in the ledger
    became, how          of the training graph only: places among the folded operators, and "stays", "kept" (with a reason in the
                         ledger), "folded" or "gone"
    origin               of the folded network only: the operator of the training graph that it stands for
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from foldexport.api import UNCOUNTED
from foldexport.fold.constants import Constants
from foldexport.fold.layers import KIND_OF
from foldexport.fold.ledger import FOLDED, KEPT, Ledger
from foldexport.fold.pending import hint, name_of
from foldexport.report.html.shapes import shapes_of
from foldexport.trace import Graph, bound

if TYPE_CHECKING:
    from foldexport.fold.rebuild import Program
    from foldexport.study import Study

LAYERS = ("conv", "conv_transpose", "linear")
EXCHANGED = ("avg_pool", "upsample")  # operators that a convolution changes places with
Operator = dict[str, Any]


def networks(study: Study, program: Program | None) -> dict[str, Any]:
    """``before`` and ``after``, lists of operators in the order of execution, and ``weights``, see :func:`_weights`.

    program: the folded network in float64; None where nothing was folded, and ``after`` is None too.
    """
    constants = Constants(study.graph)
    before = _training(study.graph, constants, study.ledger)
    if program is None:
        return {"before": before, "after": None, "weights": []}
    after = _folded(study.graph, program)
    _link(before, after, study.ledger, program)
    return {"before": before, "after": after, "weights": _weights(study.graph, constants, program, before, after)}


def _training(graph: Graph, constants: Constants, ledger: Ledger | None) -> list[Operator]:
    entries: dict[str, list[int]] = {}
    for place, (node, _) in enumerate(ledger.with_nodes() if ledger is not None else ()):
        if isinstance(node, fx.Node):
            entries.setdefault(node.name, []).append(place)
    nodes = [node for node in graph.fx.nodes if node not in constants]
    kinds = {node: _kind(node) for node in nodes}
    reads = _reads(nodes, kinds)
    return [
        {
            "name": node.name, "kind": kind, "module": node.meta.get("module", ""), "type": node.meta.get("module_type", ""),
            "detail": _detail(kind, _arguments(node)), "shape": _sample_shape(node.meta.get("val")), "reads": reads[node],
            "entries": entries.get(node.name, []), "became": [], "how": "stays",
        }
        for node, kind in kinds.items()
        if kind
    ]  # fmt: skip


def _kind(node: fx.Node) -> str:
    """As operators are counted; "" for what is not."""
    name = name_of(node)
    return KIND_OF.get(name, name) if node.op == "call_function" and name not in UNCOUNTED else ""


def _folded(graph: Graph, program: Program) -> list[Operator]:
    module, inputs = program.module, dict(zip(_inputs(program.module.graph), graph.input_names))
    nodes = [node for node in module.graph.nodes if node.op != "get_attr"]
    kinds = {node: node.meta.get("kind", "pad" if node.op == "call_module" else "") for node in nodes}
    reads, shapes = _reads(nodes, kinds, inputs), shapes_of(module, graph.example)
    layers = dict(module.named_modules())
    return [
        {
            "name": node.name, "kind": kind,
            "module": node.target if node.op == "call_module" else program.labels.get(node.name, ""),
            "detail": _detail(kind, vars(layers[node.target]) if node.op == "call_module" else _arguments(node)),
            "shape": shapes.get(node.name), "reads": reads[node], "origin": node.meta.get("origin", ""),
        }
        for node, kind in kinds.items()
        if kind
    ]  # fmt: skip


def _inputs(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _reads(
    nodes: Sequence[fx.Node], kinds: Mapping[fx.Node, str], inputs: Mapping[fx.Node, str] | None = None
) -> dict[fx.Node, list[str]]:
    """What each node reads, through what is not counted and only passes values on."""
    found: dict[fx.Node, list[str]] = {}
    for node in nodes:
        sources: dict[str, None] = {}
        for source in node.all_input_nodes:
            if source.op == "placeholder":
                sources[(inputs or {}).get(source, source.name)] = None
            elif kinds.get(source):
                sources[source.name] = None
            else:
                sources |= dict.fromkeys(found.get(source, ()))
        found[node] = list(sources)
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Geometry under the names that layers use for it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    args = bound(node)
    weight = args.get("weight")
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if isinstance(value, Tensor) and value.dim() > 2 and "kernel_size" not in args:
        args["kernel_size"] = tuple(value.shape[2:])
        args["in_channels"] = value.shape[1] * args.get("groups", 1)
    return args


def _detail(kind: str, has: Mapping[str, Any]) -> str:
    """``"3×3 /2 dilation 2, 32 groups"``; nothing for what is usual."""
    if kind not in ("conv", "conv_transpose", "max_pool", "avg_pool"):
        return ""
    kernel, stride, dilation = (_sizes(has.get(name)) for name in ("kernel_size", "stride", "dilation"))
    if not kernel:
        return ""
    parts = ["×".join(map(str, kernel * 2 if len(kernel) == 1 and "pool" in kind else kernel))]
    if stride and set(stride) != {1}:
        parts.append("/" + "×".join(map(str, stride if len(set(stride)) > 1 else stride[:1])))
    if dilation and set(dilation) != {1}:
        parts.append("dilation " + "×".join(map(str, dilation if len(set(dilation)) > 1 else dilation[:1])))
    groups = has.get("groups", 1)
    if isinstance(groups, int) and groups > 1:
        parts.append("depthwise" if groups == has.get("in_channels") else f"{groups} groups")
    return " ".join(parts)


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    return tuple(value) if isinstance(value, list | tuple) and all(isinstance(each, int) for each in value) else ()


def _sample_shape(value: Any) -> list[int] | None:
    if isinstance(value, list | tuple):
        value = next((each for each in value if isinstance(each, Tensor)), None)
    return [hint(size) for size in value.shape][1:] if isinstance(value, Tensor) else None


# ── what became of what ─────────────────────────────────────────────────────────────────────────────────────────────


def _link(before: list[Operator], after: list[Operator], ledger: Ledger | None, program: Program) -> None:
    """Fill in `became` and `how`, from the ledger, from what made each folded operator, and from what each stores."""
    places = {each["name"]: place for place, each in enumerate(after)}
    made: dict[str, list[int]] = {}
    for place, each in enumerate(after):
        made.setdefault(each["origin"], []).append(place)
    named = _by_label(after, program)
    stored: dict[str, int] = {}
    for node, records in program.records.items():
        for record in records:
            if node in places:
                stored[record.value] = places[node]
    readers, entries = _readers(before), list(ledger or ())
    exchanging = {each["name"] for each in before if each["kind"] in EXCHANGED}
    for each in reversed(before):
        gone = [entry for entry in (entries[at] for at in each["entries"]) if entry.status == FOLDED and entry.into]
        targets = [place for entry in gone for name in entry.into.split(", ") for place in named.get(name, ())]
        alike = [place for place in targets if after[place]["kind"] == each["kind"]]
        if alike and all(entry.rule.startswith("exchange") for entry in gone):  # it only changed places
            each["became"] = alike
        elif targets:
            each["became"], each["how"] = sorted(set(targets)), FOLDED
        elif each["name"] in made:
            moved = [place for place in made[each["name"]] if each["kind"] in LAYERS or after[place]["kind"] not in LAYERS]
            each["became"] = moved or made[each["name"]]
            each["how"] = KEPT if any(entries[at].status == KEPT for at in each["entries"]) else each["how"]
        elif each["kind"] in LAYERS and (same := [at for at in named.get(each["module"], ()) if after[at]["origin"] in exchanging]):
            each["became"] = same  # behind a pool, say
        elif each["name"] in stored:
            each["became"], each["how"] = [stored[each["name"]]], FOLDED
        else:  # a branch of a merged sum, say: it is where what reads it is
            each["became"] = sorted({place for reader in readers.get(each["name"], ()) for place in reader["became"]})
            each["how"] = FOLDED if each["became"] else "gone"


def _readers(operators: Sequence[Operator]) -> dict[str, list[Operator]]:
    found: dict[str, list[Operator]] = {}
    for each in operators:
        for name in each["reads"]:
            found.setdefault(name, []).append(each)
    return found


def _by_label(after: list[Operator], program: Program) -> dict[str, list[int]]:
    """The user's name as the ledger has it → folded operators, layers with weights where there are any."""
    found: dict[str, list[int]] = {}
    for place, each in enumerate(after):
        for name in {program.labels.get(each["name"], ""), each["module"], each["name"]} - {""}:
            found.setdefault(name, []).append(place)
    layers = {name: [at for at in places if after[at]["kind"] in LAYERS] for name, places in found.items()}
    return {name: layers[name][:1] or places[:1] for name, places in found.items()}


def _weights(
    graph: Graph, constants: Constants, program: Program, before: list[Operator], after: list[Operator]
) -> list[dict[str, Any]]:
    """Per folded layer: its name, and the largest magnitude of its weight, beside that of the layer it was.

    ``before`` is None for a layer that was none: a merged one.
    """
    nodes = {node.name: node for node in graph.fx.nodes}
    sources: dict[int, list[float]] = {}
    for each in before:
        weight = bound(nodes[each["name"]]).get("weight") if each["kind"] in LAYERS else None
        if weight in constants:
            for place in each["became"]:
                sources.setdefault(place, []).append(_largest(constants.value(weight)))
    found: dict[str, dict[str, Any]] = {}
    for place, each in enumerate(after):
        if each["kind"] in LAYERS:
            largest = _largest(program.module.get_parameter(f"{each['module']}.weight"))
            own = sources.get(place)
            found.setdefault(each["module"], {"layer": each["module"], "before": max(own) if own else None, "after": largest})
    return list(found.values())


def _largest(tensor: Tensor) -> float | None:
    value = float(tensor.detach().abs().max()) if tensor.numel() else math.nan
    return value if math.isfinite(value) else None
