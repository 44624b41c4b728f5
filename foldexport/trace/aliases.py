"""Which tensors of a graph with in-place operators share memory, and what each holds at each moment.

A tensor of the source graph becomes an *alias*: a place in a storage, reached from the storage's root through views.
A write gives its alias a new value and leaves every other alias of the storage stale; a stale alias is brought up to
date when it is read, and only then:

    flush    from the place last written, upwards:  parent' = write_back(parent, child)     (views.py)
    replay   from there, downwards:                 child'  = view(parent')

Per storage only one place is *dirty*: its ancestors are right everywhere but under it, and every alias that is right
lies under it. So a write or a read costs at most the length of its chain of views, however deep the network.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from foldexport.trace import views
from foldexport.trace.views import aten, bound, packet_name

META = ("val", "module", "module_type", "source")


@dataclass(eq=False)
class Storage:
    """Memory that aliases share. version counts its writes; dirty is the alias last written, or flushed to."""

    version: int = 0
    dirty: Alias | None = None


@dataclass(eq=False)
class Alias:
    """A tensor of the source graph. value holds its contents as of the storage's version ``stamp``.

    parent and maker: the alias that it is a view of, and the node of the source graph that makes it (None for a root).
    """

    storage: Storage
    value: fx.Node
    parent: Alias | None = None
    maker: fx.Node | None = None
    stamp: int = 0
    depth: int = 0
    children: dict[Any, Alias] = field(default_factory=dict)

    def is_under(self, ancestor: Alias) -> bool:
        """Whether this is ancestor, or a view of it."""
        alias = self
        while alias.depth > ancestor.depth:
            alias = alias.parent
        return alias is ancestor


@dataclass(eq=False)
class Parts:
    """The list that a view with several results (``split``, ``unbind``) gives."""

    parent: Alias
    maker: fx.Node
    value: fx.Node
    stamp: int


class Aliases:
    """The new graph, and for every node of the source graph its alias, its parts, or its value.

    here: the node of the source graph that is being translated; new nodes take its module and source.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.here: fx.Node | None = None

    # ---- making

    def root(self, value: fx.Node) -> Alias:
        """A storage of its own, that holds value."""
        alias = Alias(Storage(), value)
        alias.storage.dirty = alias
        return alias

    def view(self, maker: fx.Node, parent: Alias, value: fx.Node) -> Alias:
        """value, which maker made from parent."""
        return Alias(parent.storage, value, parent, maker, parent.storage.version, parent.depth + 1)

    def parts(self, maker: fx.Node, parent: Alias) -> Parts:
        """The results of maker, a view of parent."""
        return Parts(parent, maker, self.copy(maker), parent.storage.version)

    def part(self, whole: Parts, maker: fx.Node) -> fx.Node:
        """The value of maker, an ``operator.getitem`` on whole."""
        return self.append(operator.getitem, (self._read_parts(whole), maker.args[1]), {}, maker, maker.name)

    # ---- reading and writing

    def write(self, alias: Alias, value: fx.Node) -> None:
        """Gives alias, which must have just been read, a new value."""
        alias.storage.version += 1
        alias.value, alias.stamp, alias.storage.dirty = value, alias.storage.version, alias

    def read_node(self, node: fx.Node) -> Any:
        """What a node of the source graph holds now, as a value of the new graph."""
        entry = self.env[node]
        if isinstance(entry, Parts):
            return self._read_parts(entry)
        return self.read(entry) if isinstance(entry, Alias) else entry

    def read(self, alias: Alias) -> fx.Node:
        """What alias holds now."""
        storage, stale = alias.storage, []
        if alias.stamp == storage.version:
            return alias.value
        while not alias.is_under(storage.dirty):
            self._flush(storage)
        while alias.stamp != storage.version:
            stale.append(alias)
            alias = alias.parent
        for alias in reversed(stale):
            alias.value, alias.stamp = self._replay(alias.maker), storage.version
        return alias.value

    def _read_parts(self, parts: Parts) -> fx.Node:
        self.read(parts.parent)
        if parts.stamp != parts.parent.storage.version:
            parts.value, parts.stamp = self.copy(parts.maker), parts.parent.storage.version
        return parts.value

    def _flush(self, storage: Storage) -> None:
        child, here = storage.dirty, self.here
        parent = child.parent
        self.here = child.maker
        if child.maker.target is operator.getitem:
            split, part = child.maker.args
            value = views.write_back_part(self.emit, split, part, parent.value, child.value)
        else:
            args = {name: map_arg(value, self._settled) for name, value in bound(child.maker).items()}
            value = views.write_back(self.emit, child.maker, args, parent.value, child.value)
        parent.value, parent.stamp, storage.dirty, self.here = value, storage.version, parent, here

    def _settled(self, node: fx.Node) -> Any:
        """The value as it stands: an inverse needs numbers and sizes, never a tensor's contents."""
        entry = self.env[node]
        return entry.value if isinstance(entry, (Alias, Parts)) else entry

    def _replay(self, maker: fx.Node) -> fx.Node:
        if maker.target is operator.getitem:
            return self.part(self.env[maker.args[0]], maker)
        if packet_name(maker.target) in ("view", "_unsafe_view") and maker.target is not aten.view.dtype:
            # The functional value may be strided otherwise than the tensor that it stands for.
            return self.copy(maker, aten.reshape.default)
        return self.copy(maker, views.out_of_place(maker.target) if maker.target._schema.is_mutable else None)

    # ---- nodes of the new graph

    def copy(self, node: fx.Node, target: Any = None) -> fx.Node:
        """node, on the present values of its arguments; with target instead of its own operator."""
        args, kwargs = map_arg((node.args, node.kwargs), self.read_node)
        return self.append(target or node.target, args, kwargs, node, packet_name(target) if target else node.name)

    def emit(self, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
        """A new node of this val, at ``here``."""
        node = self.append(target, args, {}, self.here, packet_name(target))
        node.meta["val"] = val
        return node

    def append(
        self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], like: fx.Node, name: str
    ) -> fx.Node:
        """A new node with the meta of like, a node of the source graph."""
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=name)
        node.meta.update({key: like.meta.get(key) for key in META})
        return node


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor, not a number or a list."""
    return isinstance(node.meta.get("val"), Tensor)
