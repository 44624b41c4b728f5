"""What is done to an ONNX model as protobuf: strip, convert to an older opset, simplify, write, check."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.version_converter
from google.protobuf.message import Message

from foldexport.errors import UsageError

LOCAL_FIELDS = (
    "metadata_props",
    "doc_string",
)  # where torch.onnx stores stack traces with paths of the exporting machine
OLDEST_OPSET = 13  # onnx's converter has no adapter for Gemm to earlier ones
HIDDEN = "foldexport.unchanged"  # domain of the nodes that the version converter is not to look at


def strip(message: Message) -> None:
    """Clear metadata and documentation in the model and everything in it: graphs, functions, nodes, subgraphs."""
    if isinstance(message, onnx.TensorProto):  # looking at the fields of a tensor copies its weights
        for name in LOCAL_FIELDS:
            message.ClearField(name)
        return
    for field, value in message.ListFields():
        if field.name in LOCAL_FIELDS:
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for each in (value,) if isinstance(value, Message) else value:
                strip(each)


def opset(proto: onnx.ModelProto) -> int:
    """Version of the default operator set."""
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def require_known_opset(asked: int | None) -> None:
    """Raise :class:`UsageError` for an opset that the installed onnx does not define or onnxruntime does not run."""
    if asked is None:
        return
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= asked <= newest:
        raise UsageError(f"opset {asked}: onnx {onnx.__version__} can write {OLDEST_OPSET} to {newest}.")
    import onnxruntime

    value = onnx.helper.make_tensor_value_info
    ends = [value(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
    tiny = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", asked)], ir_version=10)
    try:
        onnxruntime.InferenceSession(tiny.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no other base class
        version = onnxruntime.__version__
        raise UsageError(f"opset {asked}: onnxruntime {version} does not run it yet; ask for an older one.") from error


def lower(proto: onnx.ModelProto, asked: int | None) -> onnx.ModelProto:
    """The model at the asked opset; unchanged when none was asked or it is there already.

    onnx's version converter lacks adapters for operators whose newer versions only added types or attributes (Relu 14,
    Reshape 14, Pad 18), so nodes that are valid as they stand are hidden from it, in a domain of their own.

    Raises :class:`UsageError` when an operator has no form at that opset.
    """
    if asked is None or opset(proto) == asked:
        return proto
    hidden = onnx.ModelProto()
    hidden.CopyFrom(proto)
    literal = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in hidden.graph.node:
        _hide(node, asked, literal)
    hidden.opset_import.add(domain=HIDDEN, version=1)
    try:
        lowered = onnx.version_converter.convert_version(hidden, asked)
        _unhide(lowered, asked)
        onnx.checker.check_model(lowered, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).split("failed: ")[-1].strip().splitlines()[0]
        raise UsageError(
            f"onnx: this network cannot be written at opset {asked} ({reason}): ask for a newer one."
        ) from error
    return lowered


def _hide(node: onnx.NodeProto, asked: int, literal: dict[str, onnx.TensorProto]) -> None:
    """Hide a node that the asked opset takes as it is, without the attributes that it neither knows nor needs."""
    if node.domain or not onnx.defs.has(node.op_type) or node.op_type == "RoiAlign":  # its defaults changed at 16
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, asked)
    except onnx.defs.SchemaError:
        return
    surplus = [each for each in node.attribute if each.name not in schema.attributes]
    idle = all(_is_default(node.op_type, each) or _is_idle_allowzero(node, each, literal) for each in surplus)
    if not idle or len(node.input) > schema.max_input or len(node.output) > schema.max_output:
        return
    for attribute in surplus:
        node.attribute.remove(attribute)
    node.domain = HIDDEN


def _unhide(proto: onnx.ModelProto, asked: int) -> None:
    """Put hidden nodes back; drop what the converter left of attributes at their default that the asked opset lacks."""
    for node in proto.graph.node:
        node.domain = "" if node.domain == HIDDEN else node.domain
        known = onnx.defs.get_schema(node.op_type, asked).attributes if not node.domain else {}
        for attribute in [each for each in node.attribute if not node.domain and each.name not in known]:
            if _is_default(node.op_type, attribute):
                node.attribute.remove(attribute)
    kept = [entry for entry in proto.opset_import if entry.domain != HIDDEN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


def _is_default(operator: str, attribute: onnx.AttributeProto) -> bool:
    described = onnx.defs.get_schema(operator).attributes.get(attribute.name)
    if described is None or not described.default_value.name:
        return False
    return onnx.helper.get_attribute_value(attribute) == onnx.helper.get_attribute_value(described.default_value)


def _is_idle_allowzero(
    node: onnx.NodeProto, attribute: onnx.AttributeProto, literal: dict[str, onnx.TensorProto]
) -> bool:
    """Reshape's ``allowzero`` says what a 0 in the shape means, and nothing where the shape has none."""
    shape = literal.get(node.input[1]) if node.op_type == "Reshape" else None
    return attribute.name == "allowzero" and shape is not None and bool((onnx.numpy_helper.to_array(shape) != 0).all())


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """What onnxsim makes of the model, None where it fails or renames the ends: it is an improvement, never a need."""
    import onnxsim

    try:
        simpler, _ = onnxsim.simplify(proto)
    except Exception:  # onnxsim raises whatever its C++ core met; the plain model stands without it
        return None
    same = [v.name for v in simpler.graph.input] == [v.name for v in proto.graph.input]
    same = same and [v.name for v in simpler.graph.output] == [v.name for v in proto.graph.output]
    return simpler if same and opset(simpler) == opset(proto) else None


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Strip, serialise deterministically, and check the file with full, strict shape inference.

    Raises ``onnx.checker.ValidationError`` or ``InferenceError`` when the file is not valid ONNX: a bug, ours or the
    writer's.
    """
    strip(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path), full_check=True)
