"""A network left as it was found: what its forward writes into attributes, caches and random generators is undone.

Tracing runs the user's forward on tensors without values. Whatever that stores (a counter, a grid made at the first
call, a list of features) would stay in the user's module, and break it.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from foldexport.trace.user_code import functions_of, is_users

_MAX_DEPTH = 4
_MAX_ITEMS = 10_000  # of containers that are looked into
_OWN = frozenset({"_parameters", "_buffers", "_modules"})
Container = dict | list | set | deque


@contextlib.contextmanager
def kept(module: nn.Module) -> Iterator[list[str]]:
    """Puts back attributes of module (and what they hold, to a depth), function caches, and random generators.

    Values inside of tensors are not put back: run the module on copies of them. Yields a list, which holds after the block
    the names of the random generators that were used in it.
    """
    drawn: list[str] = []
    saved = Saved(module)
    caches = _globals_and_caches(module, saved)
    generators = {name: (read(), write) for name, read, write in _generators()}
    try:
        yield drawn
    finally:
        saved.restore()
        for cache, size in caches:
            if cache.cache_info().currsize != size:
                cache.cache_clear()
        for name, read, write in _generators():
            before = generators.get(name)
            if before is not None and not _same_state(read(), before[0]):
                drawn += [name] if name != "torch" else []  # torch.export draws from that one itself
                write(before[0])


class Saved:
    """The attributes of a module's parts and the containers in them, each with a copy of what it held."""

    def __init__(self, module: nn.Module) -> None:
        self._copies: list[tuple[str, Any, Any]] = []
        modules = dict(nn.Module.named_modules(module))
        self._seen: set[int] = set()
        self._registered = {id(child) for child in modules.values()}
        for name, child in modules.items():
            self.keep(vars(child), name, 0)

    def keep(self, value: Any, name: str, depth: int) -> None:
        """Remembers value, a container or an object of the user's, and what is in it."""
        holder = value if isinstance(value, Container) else _attributes(value)
        if holder is None or id(holder) in self._seen or id(value) in self._registered or depth > _MAX_DEPTH:
            return
        self._seen.add(id(holder))
        self._copies.append((name, holder, holder.copy()))
        if len(holder) > _MAX_ITEMS:
            return
        own = holder is not value or depth == 0
        items = list(holder.items()) if isinstance(holder, dict) else [(None, item) for item in holder]
        for key, item in items:
            inner = f"{name}.{key}".lstrip(".") if own and key not in _OWN else name
            self.keep(item, inner, depth + 1)

    def changed(self) -> list[str]:
        """The names of what holds something else than it did ("layers.0.calls")."""
        found = [_changed(name, holder, copy) for name, holder, copy in self._copies if not _same_items(holder, copy)]
        return list(dict.fromkeys(name for names in found for name in names))

    def restore(self) -> None:
        """Puts everything back."""
        for _, holder, copy in self._copies:
            if not _same_items(holder, copy):
                holder.clear()
                holder.update(copy) if isinstance(holder, dict | set) else holder.extend(copy)


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object of the user's own class, or of a module that lies in a plain list."""
    kind = type(value)
    if isinstance(value, type | ModuleType | Tensor) or callable(value) and not isinstance(value, nn.Module):
        return None
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or "<"
    known = isinstance(value, nn.Module) or is_users(file)
    found = getattr(value, "__dict__", None) if known else None
    return found if isinstance(found, dict) else None


def _same_items(holder: Any, copy: Any) -> bool:
    if len(holder) != len(copy):
        return False
    if isinstance(holder, dict):
        return all(key in copy and _same(copy[key], value) for key, value in holder.items())
    if isinstance(holder, set):
        return holder == copy
    return all(map(_same, holder, copy))


def _same(one: Any, other: Any) -> bool:
    """The same object, or equal numbers, text and tuples of them, which torch.export makes anew."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, int | float | str | bytes | tuple):
        return False
    return one == other if not isinstance(one, tuple) else len(one) == len(other) and all(map(_same, one, other))


def _changed(name: str, holder: Any, copy: Any) -> list[str]:
    if not isinstance(holder, dict) or not all(isinstance(key, str) for key in holder):
        return [name]
    keys = [key for key in {**copy, **holder} if key not in holder or key not in copy or not _same(holder[key], copy[key])]
    return [f"{name}.{key}".lstrip(".") for key in keys]


def _globals_and_caches(module: nn.Module, saved: Saved) -> list[tuple[Any, int]]:
    """Keeps the containers at module level that the user's methods name; gives their ``lru_cache``s and sizes."""
    caches: dict[int, Any] = {}
    for function in functions_of(module):
        if hasattr(function, "cache_clear"):
            caches[id(function)] = function
            function = getattr(function, "__wrapped__", None)
        code, space = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        for name in getattr(code, "co_names", ()):
            value = space.get(name)
            if hasattr(value, "cache_clear") and hasattr(value, "cache_info"):
                caches[id(value)] = value
            elif isinstance(value, Container):
                saved.keep(value, name, 0)
    return [(cache, cache.cache_info().currsize) for cache in caches.values() if hasattr(cache, "cache_info")]


def _generators() -> list[tuple[str, Callable[[], Any], Callable[[Any], None]]]:
    found: list[tuple[str, Callable[[], Any], Callable[[Any], None]]] = [
        ("random", random.getstate, random.setstate),
        ("torch", torch.get_rng_state, torch.set_rng_state),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(("numpy.random", numpy.random.get_state, numpy.random.set_state))
    return found


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    # NumPy's state is a tuple with an array in it.
    same = [a == b for a, b in zip(one, other, strict=True)]
    return all(bool(each.all()) if hasattr(each, "all") else bool(each) for each in same)
