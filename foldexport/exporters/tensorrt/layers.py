"""What an engine is made of, layer by layer, in the user's module names: read from the engine, or from the build log.

TensorRT-RTX logs the layers of the engine it built, so the report needs no GPU there; an `EngineInspector` needs the
engine opened, on a GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from foldexport.exporters.tensorrt.modules import NodeModules, onnx_nodes

LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?Metadata: (?P<metadata>.*)$"
)
TENSOR = re.compile(r"Dimensions: \[(?P<shape>[\d,\s-]*)\].*?Datatype: (?P<type>\w+)")
#: How the inspector and the log spell number types.
TYPES = {
    "float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bfloat16": "bfloat16", "bf16": "bfloat16",
    "int8": "int8", "fp8": "float8", "float8": "float8", "int4": "int4", "fp4": "float4", "float4": "float4",
}  # fmt: skip
NARROWEST = ("int4", "float4", "int8", "float8", "float16", "bfloat16", "float32")
FORMAT = re.compile(r"\b(FP32|FP16|BF16|INT8|FP8|INT4|FP4|Float|Half|BFloat16|Int8)\b", re.IGNORECASE)

Tensor = tuple[str, int]  # number type, elements


def from_log(lines: Iterable[tuple[str, str]], modules: NodeModules) -> list[dict[str, Any]]:
    """The layers that the builder logged last; empty where it logged none."""
    report = next((text for _, text in reversed(list(lines)) if text.startswith("Layers:")), "")
    found = []
    for line in report.splitlines():
        match = LINE.match(line)
        if match:
            tensors = {part: _tensors(match[part]) for part in ("inputs", "constants", "outputs")}
            found.append(_record(match["name"], match["kind"], match["metadata"], tensors, modules))
    return found


def from_inspector(text: str, modules: NodeModules) -> list[dict[str, Any]]:
    """The layers of ``EngineInspector.get_engine_information(JSON)``; empty where it names none."""
    try:
        layers = json.loads(text).get("Layers", [])
    except (ValueError, AttributeError):
        return []
    found = []
    for each in layers:
        if not isinstance(each, dict):  # names only: the engine was built without DETAILED verbosity
            continue
        tensors = {part: [_inspected(one) for one in each.get(part.title(), [])] for part in ("inputs", "constants", "outputs")}
        tensors["constants"] += [_weights(each[key]) for key in ("Weights", "Bias") if isinstance(each.get(key), dict)]
        found.append(_record(each.get("Name", ""), each.get("LayerType", ""), each.get("Metadata", ""), tensors, modules))
    return found


def types(layers: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Layers in each number type, most first."""
    return dict(Counter(each["type"] for each in layers if each["type"]).most_common())


def products(layers: Sequence[dict[str, Any]], modules: NodeModules) -> dict[str, int]:
    """Convolutions and matrix products of the ONNX graph by the type that the engine computes them in.

    Of several layers that one node was split into, the one with the most weights counts; casts are layers of their own.
    """
    deciding: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for node in layer["onnx"]:
            if modules.multiplies(node) and layer["weights"] >= deciding.get(node, {"weights": 0})["weights"]:
                deciding[node] = layer
    return types(deciding.values())


def _record(name: str, kind: str, metadata: str, tensors: dict[str, list[Tensor]], modules: NodeModules) -> dict[str, Any]:
    nodes = onnx_nodes(metadata)
    return {
        "name": name, "kind": kind, "type": _precision(tensors), "onnx": nodes,
        "weights": max((count for _, count in tensors["constants"]), default=0),
        "modules": list(dict.fromkeys(modules.of(node) for node in nodes if modules.of(node))),
        "inputs": [each for each, _ in tensors["inputs"]], "outputs": [each for each, _ in tensors["outputs"]],
    }  # fmt: skip


def _precision(tensors: dict[str, list[Tensor]]) -> str:
    """The type that a layer computes in: that of its weights; without any, the narrowest that it reads or writes.

    Casts are fused into their neighbours, so that inputs alone do not tell.
    """
    constants = [each for each in tensors["constants"] if each[0] in NARROWEST]
    if constants and max(count for _, count in constants) > 1:
        return max(constants, key=lambda each: each[1])[0]
    types = [each for each, _ in tensors["inputs"] + tensors["outputs"] if each in NARROWEST]
    return min(types, key=NARROWEST.index) if types else ""


def _tensors(text: str) -> list[Tensor]:
    return [(_type(each["type"]), _elements(each["shape"].split(","))) for each in TENSOR.finditer(text)]


def _inspected(tensor: dict[str, Any]) -> Tensor:
    said = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Format") or "")
    return _type(said), _elements(tensor.get("Dimensions", []))


def _weights(described: dict[str, Any]) -> Tensor:
    return _type(str(described.get("Type", ""))), int(described.get("Count", 0))


def _type(text: str) -> str:
    match = FORMAT.search(text)
    return TYPES.get((match[1] if match else text).lower(), text.lower())


def _elements(sizes: Iterable[Any]) -> int:
    return math.prod(int(size) for size in sizes if str(size).strip())
