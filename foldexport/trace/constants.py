"""Values that the user's Python code reads out of weights while it is traced.

``if self.gate > 0``, ``self.scale.item()``, ``self.widths.tolist()``, ``x[:, self.mask]``: a tensor that depends on weights and
numbers only has one value, the checkpoint's. While tensors are traced without values, such tensors are computed beside
them, and Python gets what they hold. A value that depends on the input stays unknown, and is refused as before.

    known(f(a, b, …)) = f(known(a), known(b), …)     if every tensor among the arguments is known and f draws nothing
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from foldexport.trace import checks
from foldexport.trace.forward import Plain, named_tensors
from foldexport.trace.user_code import Names, here

# Functions that hand a tensor's values to Python.
_READS = frozenset(
    {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__}
    | {Tensor.__index__, Tensor.__contains__, Tensor.__complex__, Tensor.is_nonzero, Tensor.equal, torch.equal}
    | {torch.is_nonzero, torch.allclose, Tensor.allclose}
)
# Functions that give Python a truth.
_TRUTHS = frozenset(
    {Tensor.__bool__, Tensor.is_nonzero, torch.is_nonzero, Tensor.equal, torch.equal, torch.allclose, Tensor.allclose}
)
# Functions whose result has a size that depends on values.
_SIZED_BY_VALUES = frozenset(
    {torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.unique, Tensor.unique, torch.masked_select}
    | {Tensor.masked_select, torch.unique_consecutive, Tensor.unique_consecutive, torch.repeat_interleave}
    | {Tensor.repeat_interleave, torch.bincount, Tensor.bincount, torch.where}
)


class Unknown(Exception):
    """An argument that has no value yet."""


class Known(Plain):
    """The user's forward with the values of what depends on weights only.

    tensors: the module's real parameters and buffers by name. notes: which lines read which values, for the user.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], names: Names, notes: dict[str, None]) -> None:
        super().__init__()
        self._module, self._tensors, self._names, self._notes = module, tensors, names, notes
        self._real: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._traced: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __enter__(self) -> Any:
        # By now the module's tensors are the stand-ins that are traced.
        for name, tensor in named_tensors(self._module):
            if name in self._tensors:
                self._traced[tensor] = name
        self._truth = torch.SymBool.__bool__
        torch.SymBool.__bool__ = lambda number: self._truth_of_number(number)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.SymBool.__bool__ = self._truth
        super().__exit__(*error)

    def _truth_of_number(self, number: torch.SymBool) -> bool:
        """``x.max().item() < 1``: the truth of a comparison of numbers."""
        try:
            return self._truth(number)
        except GuardOnDataDependentSymNode:
            answer = checks.answer(here(self._names), self._notes)
            if answer is None:
                raise
            return answer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _TRUTHS and not all(map(self._is_known, args[:2])):
            answer = checks.answer(here(self._names), self._notes)
            if answer is not None:
                return answer
        try:
            real = self._computed(func, args, kwargs)
        except Unknown:
            if func is Tensor.__getitem__:
                args = (args[0], self._indices(args[1]))
            return self._unknown(func, types, args, kwargs)
        if func in _READS or (func in _SIZED_BY_VALUES and _tensors(real)):
            self._note()
            for tensor in _tensors(real):
                self._real[tensor] = tensor
            return real
        result = super().__torch_function__(func, types, args, kwargs)
        for one, other in zip(_tensors(result), _tensors(real)):
            self._real[one] = other
        return result

    # ---- values

    def _is_known(self, tensor: Any) -> bool:
        return not isinstance(tensor, FakeTensor) or tensor in self._real or tensor in self._traced

    def _value(self, tensor: Tensor) -> Tensor:
        if tensor in self._real:
            return self._real[tensor]
        if tensor in self._traced:
            # A copy, since the user's code may write to it.
            real = self._tensors[self._traced[tensor]].detach().clone()
        elif isinstance(tensor, FakeTensor) or type(tensor) not in (Tensor, nn.Parameter):
            raise Unknown
        else:
            real = tensor.detach().clone()
        self._real[tensor] = real
        return real

    def _computed(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What func gives on known values; raises Unknown where an argument has none, or func draws at random."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool | torch.Generator) for leaf in leaves):
            raise Unknown
        if not all(self._is_known(leaf) for leaf in leaves if isinstance(leaf, Tensor)):
            raise Unknown
        with _eager():
            values = [self._value(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(values, spec)
            before = torch.get_rng_state()
            try:
                result = super().__torch_function__(func, (), args, kwargs)
            except Exception as error:  # whatever it raises, it raises again where it is traced
                raise Unknown from error
            if not torch.equal(before, torch.get_rng_state()):
                torch.set_rng_state(before)
                raise Unknown
        return result

    def _unknown(self, func: Any, types: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """func as it is traced; what it writes to has no known value any more, through whichever view."""
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and self._is_known(leaf)]
        versions = [_version(tensor) for tensor in given]
        result = super().__torch_function__(func, types, args, kwargs)
        for tensor, version in zip(given, versions):
            if _version(tensor) != version or version is None and getattr(func, "__name__", "_").endswith("_"):
                self._forget(tensor.untyped_storage()._cdata)
        return result

    def _forget(self, storage: int) -> None:
        for table in (self._real, self._traced):
            for tensor in [each for each in table if each.untyped_storage()._cdata == storage]:
                del table[tensor]

    def _indices(self, index: Any) -> Any:
        """An index with masks of known values as the numbers of the places that they keep."""
        parts = index if isinstance(index, tuple) else (index,)
        masks = [part for part in parts if isinstance(part, Tensor) and part.dtype == torch.bool and self._is_known(part)]
        if not masks:
            return index
        self._note()
        result: list[Any] = []
        for part in parts:
            if any(part is mask for mask in masks):
                with _eager():
                    result += self._value(part).nonzero(as_tuple=True)
            else:
                result.append(part)
        return tuple(result)

    def _note(self) -> None:
        place = here(self._names)
        if place is not None:
            self._notes[f"{place}: values read from weights are fixed as they are in this checkpoint (`{place.code[:60]}`)"] = None


def known(module: nn.Module, names: Names, notes: dict[str, None]) -> Callable[[], Known]:
    """A maker of modes for one trace of module."""
    tensors = dict(named_tensors(module))
    return lambda: Known(module, tensors, names, notes)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None under ``torch.inference_mode``, where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Real values, outside of everything that traces."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield
