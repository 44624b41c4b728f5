"""In-place operators turned into their functional forms, in one linear pass.

``torch.export`` keeps the in-place operators of eager code. In the graph that ``functionalize`` returns every node is
a value that never changes, and a use after a write sees what was written, through whichever view (aliases.py).
``run_decompositions`` does the same by tracing again: superlinear, and it replaces other operators too.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import CustomObjArgument
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from foldexport.trace import views
from foldexport.trace.aliases import META, Alias, Aliases, Parts, is_tensor
from foldexport.trace.views import NotFunctional, aten, bound, out_of_place, packet_name

# Values that are their argument: nothing is emitted. A lifted constant is a copy, so it starts a storage of its own.
_PASSED = {aten.alias.default, aten.detach.default, aten.detach_.default}
_COPIED = {aten.lift_fresh_copy.default, aten.lift_fresh.default}
# In-place operators that change what a tensor looks at, not its values.
_VIEWS_IN_PLACE = frozenset({"squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "as_strided_"})
# Return their input itself in eval mode, though their schemas do not say so.
_MAY_ALIAS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})
_COMPARISONS = frozenset(
    {"eq_", "ne_", "lt_", "le_", "gt_", "ge_", "greater_", "greater_equal_", "less_", "less_equal_", "not_equal_"}
    | {"logical_and_", "logical_or_", "logical_xor_", "logical_not_"}
)
# Memory that is not filled: what is read of it is whatever it is, so it may as well be zero, and the same in every run.
_FILLED = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
# Higher-order operators that are their body, and which argument the body is.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0}


def functionalize(
    source: fx.GraphModule,
    inputs: Mapping[str, str],
    constants: Mapping[str, str],
    outputs: Container[int] | None = None,
) -> fx.Graph:
    """The functional graph of an exported program's graph module.

    inputs: placeholder name -> the user's name, in order. constants: placeholder (or attribute) name -> target of the
    ``get_attr`` node that stands for it. outputs: which outputs to keep (all). Writes to inputs and constants stay
    inside the graph; assertions and unused nodes are dropped; ``no_grad`` regions are inlined. Nodes of source have
    meta ``module``, ``module_type`` and ``source``.

    Raises NotFunctional, naming the operator and its source line, where there is no functional form.
    """
    walk = _Walk(constants)
    for node in source.graph.find_nodes(op="placeholder"):
        if node.name in inputs:
            walk.input(node, inputs[node.name])
    try:
        results = walk.run(source)
        kept = [result for at, result in enumerate(results) if outputs is None or at in outputs]
        walk.build.graph.output([map_arg(result, walk.build.read_node) for result in kept])
    except NotFunctional as error:
        source_line = walk.build.here.meta.get("source")
        raise NotFunctional(f"{source_line}: {error}" if source_line else str(error)) from error
    _tidy(walk.build.graph)
    return walk.build.graph


def _tidy(graph: fx.Graph) -> None:
    """Erases what nothing uses; puts each constant beside its first use, so that a run need not hold all weights."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    seen: set[fx.Node] = set()
    for node in list(graph.nodes):
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in seen:
                seen.add(argument)
                node.prepend(argument)


class _Walk:
    """One walk over the source graph, in order. Its values, views and writes are in ``build``."""

    def __init__(self, constants: Mapping[str, str]) -> None:
        self.build = Aliases()
        self.env = self.build.env
        self.constants = constants
        self.attributes: dict[str, fx.Node] = {}
        self.sizes: dict[str, tuple[fx.Node, int]] = {}  # a symbolic size -> an input and axis that has it

    def input(self, node: fx.Node, name: str) -> None:
        """A placeholder of the new graph for one of the source graph."""
        placeholder = self.build.graph.placeholder(name)
        placeholder.meta.update({key: node.meta.get(key) for key in META})
        self.env[node] = self.build.root(placeholder)
        for axis, size in enumerate(node.meta["val"].shape if is_tensor(node) else ()):
            if views.is_symbolic(size):
                self.sizes.setdefault(str(size), (placeholder, axis))

    def run(self, source: fx.GraphModule, arguments: Sequence[Any] | None = None) -> list[Any]:
        """Appends source's nodes. arguments: nodes of the enclosing graph, for the body of a region.

        Returns what source returns: nodes of source, not yet read, since a later write changes them too.
        """
        given = iter(arguments or ())
        for node in source.graph.nodes:
            self.build.here = node
            if node.op == "output":
                return list(node.args[0])
            if node.op == "placeholder" and arguments is not None:
                argument = next(given)
                self.env[node] = self.env[argument] if isinstance(argument, fx.Node) else argument
            elif node.op == "placeholder" and node.name in self.constants:
                self.env[node] = self.build.root(self._constant(node, self.constants[node.name]))
            elif node.op == "placeholder" and isinstance(node.meta.get("val"), CustomObjArgument):
                self._refuse_object(node)
            elif node.op == "get_attr":
                self._attribute(source, node)
            elif node.op == "call_function":
                self._call(node)
        return []

    def _refuse_object(self, node: fx.Node) -> None:
        self.build.here = user = next(iter(node.users), node)
        kind = node.meta["val"].class_fqn
        what = "draws from a torch.Generator" if kind.endswith("Generator") else f"takes a {kind}"
        raise NotFunctional(f"'{packet_name(user.target)}' {what}, which no graph holds; keep its result in a buffer instead")

    def _attribute(self, source: fx.GraphModule, node: fx.Node) -> None:
        attribute = operator.attrgetter(node.target)(source)
        if isinstance(attribute, Tensor):
            attribute = self.build.root(self._constant(node, self.constants[node.target]))
        self.env[node] = attribute

    def _constant(self, node: fx.Node, target: str) -> fx.Node:
        if target not in self.attributes:
            attribute = self.build.graph.create_node("get_attr", target, name=target.replace(".", "_"))
            module = target.rpartition(".")[0]
            attribute.meta.update(val=node.meta.get("val"), module=module, module_type="", source="")
            self.attributes[target] = attribute
        return self.attributes[target]

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if isinstance(target, torch._ops.HigherOrderOperator):
            self.env[node] = self._inline(node)
        elif target is operator.getitem and not isinstance(self.env[node.args[0]], fx.Node):
            self._part(node)
        elif target in _PASSED or views.is_whole_slice(node):
            self.env[node] = self.env[node.args[0]]
        elif target in _COPIED:
            self.env[node] = self.build.root(self.build.read_node(node.args[0]))
        elif not isinstance(target, torch._ops.OpOverload):
            self._value(node)
        elif target._schema.is_mutable:
            self._write(node)
        elif target._schema.returns:  # what returns nothing is an assertion
            self._value(node)

    def _inline(self, node: fx.Node) -> list[Any]:
        name, args = packet_name(node.target), node.args
        body = self.env.get(args[_REGIONS[name]]) if name in _REGIONS else None
        if not isinstance(body, fx.GraphModule):
            raise NotFunctional(f"the control-flow operator '{name}' cannot be folded; trace one branch without it")
        arguments = args[_REGIONS[name] + 1 :]
        devices = {a.meta["val"].device.type for a in arguments if isinstance(a, fx.Node) and is_tensor(a)}
        if name == "wrap_with_autocast" and args[2] and args[0] in devices:
            raise NotFunctional(f"forward runs under torch.autocast('{args[0]}'); switch it off for the export")
        return self.run(body, arguments)

    # ---- values and views

    def _value(self, node: fx.Node) -> None:
        """What a functional operator makes: a view of one of its arguments, or a value of its own."""
        values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
        if not all(map(_is_dense, pytree.tree_leaves(values))):
            raise NotFunctional(f"'{node.target}' works on sparse tensors or under torch.func; write it with plain tensors")
        parent = self._parent(node)
        if parent is None:
            value = self._filled(node) if node.target in _FILLED else self.build.copy(node)
            self.env[node] = self.build.root(value) if is_tensor(node) else value
        elif not is_tensor(node):
            self.env[node] = self.build.parts(node, parent)
        else:
            # x[:, :2] *= 2 takes the same slice twice, and writes the second with itself
            key = (node.target, *map(str, node.args[1:])) if packet_name(node.target) in ("slice", "select") else node
            if key not in parent.children:
                parent.children[key] = self.build.view(node, parent, self.build.copy(node))
            self.env[node] = parent.children[key]

    def _filled(self, node: fx.Node) -> fx.Node:
        value = self.build.copy(node, _FILLED[node.target])
        known = {argument.name for argument in value.target._schema.arguments}
        value.kwargs = {key: given for key, given in value.kwargs.items() if key in known}
        return value

    def _parent(self, node: fx.Node) -> Alias | None:
        """The argument whose memory node shares: read off the storages of the traced values."""
        val = node.meta.get("val")
        first = next(iter(val), None) if isinstance(val, (list, tuple)) else val
        if not isinstance(first, Tensor):
            return None
        if packet_name(node.target) in _MAY_ALIAS and not (bound(node)["train"] and bound(node)["p"]):
            return self.env[node.args[0]]
        storage = first.untyped_storage()._cdata
        for argument in node.all_input_nodes:
            if isinstance(self.env[argument], Alias) and is_tensor(argument):
                if argument.meta["val"].untyped_storage()._cdata == storage:
                    return self.env[argument]
        return None

    def _part(self, node: fx.Node) -> None:
        whole, index = self.env[node.args[0]], node.args[1]
        if isinstance(whole, Parts):
            self.env[node] = self.build.view(node, whole.parent, self.build.part(whole, node))
        else:
            result = whole[index]
            self.env[node] = self.env[result] if isinstance(result, fx.Node) else result

    # ---- writes

    def _write(self, node: fx.Node) -> None:
        name, arguments = packet_name(node.target), node.target._schema.arguments
        place = self.env.get(node.args[0]) if node.args else None
        written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        if not isinstance(place, Alias) or written != arguments[:1]:
            raise NotFunctional(f"'{node.target}' has no functional form; write it out of place")
        self.env[node] = place
        if name in _VIEWS_IN_PLACE:
            self.env[node] = self.build.view(node, place, self.build.copy(node, out_of_place(node.target)))
        elif name != "requires_grad_":
            value = self._written(node, name)
            if value is not place.value:
                self.build.write(place, value)

    def _written(self, node: fx.Node, name: str) -> fx.Node:
        """What a write leaves in its place: of the place's shape and dtype."""
        args, val = bound(node), node.args[0].meta["val"]
        old = self.build.read_node(node.args[0])
        if name == "copy_":
            return self._fitted(self.build.read_node(args["src"]), val)
        if node.target is aten.fill_.Tensor:
            return self._fitted(self.build.read_node(args["value"]), val)
        if node.target is aten.fill_.Scalar:
            return self.build.emit(aten.full_like.default, (old, args["value"]), val)
        if name == "zero_":
            return self.build.emit(aten.zeros_like.default, (old,), val)
        value = self.build.copy(node, out_of_place(node.target))
        value.meta["val"] = val
        return self._cast(value, _promoted(name, value), val)

    def _fitted(self, value: fx.Node, val: Tensor) -> fx.Node:
        """value, expanded and cast as ``copy_`` does."""
        given = value.meta["val"]
        if not views.same_sizes(given.shape, val.shape):
            sizes = [self._size(size) for size in val.shape]
            expanded = val if given.dtype == val.dtype else val.to(given.dtype)
            value = self.build.emit(aten.expand.default, (value, sizes), expanded)
        return self._cast(value, given.dtype, val)

    def _cast(self, value: fx.Node, dtype: torch.dtype, val: Tensor) -> fx.Node:
        return value if dtype == val.dtype else self.build.emit(aten.to.dtype, (value, val.dtype), val)

    def _size(self, size: Any) -> Any:
        if not views.is_symbolic(size):
            return int(size)
        if str(size) not in self.sizes:
            raise NotFunctional(f"a broadcast write to an axis of the computed size {size}; expand the value first")
        return self.build.emit(aten.sym_size.int, self.sizes[str(size)], size)


def _is_dense(value: Any) -> bool:
    """Whether a traced value has memory of its own; no value but a tensor does."""
    if not isinstance(value, Tensor):
        return True
    return value.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _promoted(name: str, value: fx.Node) -> torch.dtype:
    """dtype of a functional result. An in-place operator casts to its tensor's own; a functional one promotes.

    value: a node whose meta has the val of the tensor that is written.
    """
    own = value.meta["val"]
    others = {n.meta["val"].dtype for n in value.all_input_nodes if is_tensor(n)} - {own.dtype}
    if own.dtype.is_floating_point and not any(t.is_floating_point or t.is_complex for t in others):
        others = set()
    if not others and name not in _COMPARISONS:
        return own.dtype
    with own.fake_mode:
        args, kwargs = map_arg((value.args, value.kwargs), lambda n: n.meta["val"])
        return value.target(*args, **kwargs).dtype
