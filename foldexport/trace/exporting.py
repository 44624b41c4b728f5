"""``torch.export`` in the ways that are tried, one after the other, until one gives a graph without unknown sizes.

    free          non-strict: the user's Python runs, on tensors without values
    constants     the same, and Python gets the values of what depends on weights only (constants.py)
    strict        Dynamo reads the user's bytecode

Each at a symbolic batch, then at the example's own; the way that works once more with heights and widths symbolic, where those
are to be free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo

from foldexport.device import named_in
from foldexport.trace.calling import Inputs, arranged
from foldexport.trace.constants import known
from foldexport.trace.forward import Plain, Untraceable, Watch, under
from foldexport.trace.user_code import Place, last_user_frame, names_of, place_of

Shapes = tuple[dict[int, Dim], ...]

#: A height that must be a multiple of 32 is a condition of the graph; by default torch.export refuses the symbol.
CONDITIONS = {"prefer_deferred_runtime_asserts_over_guards": True}
FEW = 16  # pixels: a least size at or below it is what strides and windows ask for, and no news


class UnknownSize(Exception):
    """A tensor of the graph has a size that depends on values. operator: its name; source: the user's line."""

    def __init__(self, operator: str, source: str, stack: str) -> None:
        super().__init__(f"the size of what '{operator}' gives depends on values\n{stack}")
        self.operator, self.source = operator, source


@dataclass(eq=False)
class Exported:
    """An exported program, the inputs it was traced at, the axes that are symbolic: any of "batch", "height", "width".

    notes: what tracing fixed or left out. changed: names of attributes that forward changes.
    """

    program: ExportedProgram
    used: Inputs
    symbolic: frozenset[str]
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Failed:
    """Why each way failed: (way, error), in the order they were tried."""

    errors: list[tuple[str, Exception]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of torch.export and of the user's code, and no gradients."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(torch.no_grad())
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def is_too_deep(error: BaseException) -> bool:
    """Whether Python's recursion limit was met."""
    return isinstance(error, RecursionError) or "maximum recursion depth" in str(error)


def export(
    module: nn.Module,
    inputs: Inputs,
    keywords: tuple[str, ...],
    dynamic: bool,
    plain: Callable[[], Any],
    space: Collection[str] = (),
) -> Exported | Failed:
    """The first way that works. plain: runs the network itself, once the first way has failed; raises where it fails too.

    space: "height", "width" where those are to be symbolic. A network that fixes its batch (``x.view(4, -1)``,
    ``if len(x) > 4``) breaks the promise of ``Dim("batch")``, which torch.export reports; ``Dim.AUTO`` would narrow the axis
    silently.
    """
    attempts = _attempts(inputs, dynamic)
    errors: list[tuple[str, Exception]] = []
    ways = ["free", "constants", "strict"]
    for way in ways:  # which grows where an output had to be registered first
        failed: list[Exception] = []
        fixed = ""
        for used, shapes in attempts:
            notes, watch = _first_notes(way), Watch()
            try:
                program = _exported(way, module, arranged(used, keywords), _named(module, shapes, keywords), notes, watch)
                _refuse_unknown_sizes(program)
            except Exception as error:  # torch.export raises whatever the network, dynamo or sympy raised
                if is_too_deep(error):
                    raise
                failed.append(error)
                fixed = fixed or _why_fixed(module, error, watch)
                if _is_about_values(error):
                    break
                continue
            if _uses_gpu(program):
                plain()  # tensors without values go to a GPU that is not there; the network's own do not
            if dynamic and shapes is None and used[0].ndim:
                notes[f"the batch is fixed at {used[0].shape[0]}{fixed}"] = None
            symbolic = ["batch"] * (shapes is not None)
            spaced = _with_space(way, module, used, shapes, keywords, space, notes, watch)
            found = [*symbolic, *space] if spaced is not None else symbolic
            return Exported(spaced or program, used, frozenset(found), list(notes), watch.changed)
        errors.append((way, failed[-1]))
        if len(errors) == 1 and _registered(plain()):
            ways.insert(1, "free")
    return Failed(errors)


def _attempts(inputs: Inputs, dynamic: bool) -> list[tuple[Inputs, Shapes | None]]:
    """(inputs, symbolic axes per input or None) to trace at: a batch of two or more, since a batch of one specialises."""
    found: list[tuple[Inputs, Shapes | None]] = [_batched(inputs, share) for share in (True, False)] if dynamic else []
    found = [a for at, a in enumerate(found) if any(a[1] or ()) and a[1] not in [b[1] for b in found[:at]]]
    return [*found, (inputs, None)]


def _with_space(
    way: str,
    module: nn.Module,
    inputs: Inputs,
    shapes: Shapes | None,
    keywords: tuple[str, ...],
    space: Collection[str],
    notes: dict[str, None],
    watch: Watch,
) -> ExportedProgram | None:
    """The trace that worked once more, with heights and widths of images symbolic too; None, and a note, where that fails.

    torch.export finds the range that the network takes. Its batch has been seen to be free, or not, before.
    """
    places = {"height": -2, "width": -1}
    wanted = tuple(
        axes | {value.ndim + places[name]: Dim.DYNAMIC for name in sorted(space)} if value.ndim >= 4 else axes
        for value, axes in zip(inputs, shapes or ({},) * len(inputs))
    )
    if not space or wanted == shapes:
        return None
    call, axes, failed = arranged(inputs, keywords), _named(module, wanted, keywords), None
    for how in ({}, CONDITIONS):
        try:
            program = _exported(way, module, call, axes, {}, watch, **how)
            _refuse_unknown_sizes(program)
        except Exception as error:  # torch.export raises whatever the network, dynamo or sympy raised
            if is_too_deep(error):
                raise
            failed = failed or error
            continue
        notes |= dict.fromkeys(_limits(program, wanted))
        return program
    notes[f"heights and widths are numbers of the graph{_why_fixed(module, failed, watch)}"] = None
    return None


def _limits(program: ExportedProgram, shapes: Shapes) -> Iterator[str]:
    """The sizes that the way taken through the network is for, where they are not all from `FEW` on."""
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in program.graph_signature.user_inputs]
    for node, axes in zip(inputs, shapes):
        for axis in sorted(set(axes) - {0}):
            size = node.meta["val"].shape[axis]
            known = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if known is None or (known.lower <= FEW and known.upper == int_oo):
                continue
            end = "on" if known.upper == int_oo else f"to {known.upper}"
            yield f"the graph is for {'widths' if axis == node.meta['val'].ndim - 1 else 'heights'} from {known.lower} {end}"


def _batched(inputs: Inputs, share: bool) -> tuple[Inputs, Shapes]:
    """The inputs at a batch of two or more, and per input its dynamic axes: axis 0 of the first input, and, if share,
    of every input whose axis 0 is as long."""
    batch = inputs[0].shape[0] if inputs[0].ndim else 0
    has_batch = [batch > 0 and i.ndim > 0 and i.shape[0] == batch and (share or i is inputs[0]) for i in inputs]
    used = tuple(torch.cat([i, i]) if batch == 1 and has else i for i, has in zip(inputs, has_batch))
    axis = Dim("batch", min=1)
    return used, tuple({0: axis} if has else {} for has in has_batch)


def _named(module: nn.Module, shapes: Shapes | None, keywords: tuple[str, ...]) -> Any:
    """Symbolic axes as torch.export wants them: by name where an input goes by keyword or among ``*args``."""
    if shapes is None:
        return None
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    named = dict(zip([*positional, *keywords] if keywords else positional, shapes))
    if not rest or len(positional) >= len(shapes):
        return named if keywords else shapes
    return named | {rest[0]: tuple(shapes[len(positional) :])}


def _exported(
    way: str, module: nn.Module, call: tuple[tuple, dict], shapes: Any, notes: dict[str, None], watch: Watch, **how: bool
) -> ExportedProgram:
    """One trace. notes, watch: filled with what was fixed, left out and seen. how: options of torch.export."""
    args, kwargs = call
    with quiet(), _without_hooks_of_its_own():
        if way == "strict":
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=True, **how)
        mode = known(module, names_of(module), notes) if way == "constants" else Plain
        with under(module, mode, watch), torch.compiler.set_stance("force_eager"):
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False, **how)


@contextlib.contextmanager
def _without_hooks_of_its_own() -> Iterator[None]:
    """Removes the hook on every module's buffers that a failed ``torch.export`` leaves behind in PyTorch before 2.13."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for key in set(hooks) - before:
            del hooks[key]


def _refuse_unknown_sizes(program: ExportedProgram) -> None:
    """Raises UnknownSize for a tensor whose size depends on values, and ValueError for a constant without values."""
    if any(isinstance(value, FakeTensor) for value in program.constants.values()):
        raise ValueError("a tensor without values was kept as a constant")
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and any(isinstance(s, torch.SymInt) and not s.node.has_hint() for s in value.shape):
                stack = node.meta.get("stack_trace") or ""
                raise UnknownSize(node.target.__name__.partition(".")[0], last_user_frame(stack), stack)


def _uses_gpu(program: ExportedProgram) -> bool:
    """Whether an operator of the graph makes a tensor on another device than the CPU, as ``x.cuda()`` does."""
    return any(device.type not in ("cpu", "meta") for node in program.graph.nodes for device in named_in(node))


def _is_about_values(error: Exception) -> bool:
    """Whether a fixed batch would not help."""
    return isinstance(error, Untraceable | UnknownSize) or "data-dependent" in str(error).lower()


def _registered(result: Any) -> bool:
    """Whether result has a dataclass in it that PyTorch did not know as a container of tensors, and now does."""
    kinds = {type(leaf) for leaf in pytree.tree_leaves(result) if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)}
    for kind in kinds:
        torch.export.register_dataclass(kind)
    return bool(kinds) and (_registered(result) or True)


def _why_fixed(module: nn.Module, error: Exception, watch: Watch) -> str:
    """``: net.py:12 in forward (`len(x)`)``, the line that kept the batch from being symbolic; '' where nothing tells."""
    place = Place(*watch.fixed) if watch.fixed is not None else place_of(error, names_of(module))
    return f": {place} (`{place.code[:60]}`)" if place is not None else ""


def _first_notes(way: str) -> dict[str, None]:
    return {"traced by Dynamo (torch.export, strict): plain tracing failed": None} if way == "strict" else {}
