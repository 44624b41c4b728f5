"""What a written file may hold: the definition of a network in calls of torch, and nothing that acts on the machine.

A manifest and its files may come from elsewhere, so the source is read before Python runs it.
"""

from __future__ import annotations

import ast
import builtins

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foldexport.errors import EquivalenceError

IMPORTS = frozenset({
    "from collections import OrderedDict", "import torch", "import torch.nn.functional as F",
    "from safetensors.torch import load_file", "from torch import nn",
})  # fmt: skip
SYNTAX = (
    ast.Module, ast.Expr, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Return, ast.Call, ast.Attribute, ast.Name, ast.Constant,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Dict, ast.keyword, ast.arguments,
    ast.arg, ast.alias, ast.expr_context, ast.operator, ast.unaryop, ast.boolop,
)  # fmt: skip
DEFINED = frozenset({"build", "load", "Network", "__init__", "forward"})
BUILTINS = frozenset({"float", "slice", "super"})
METHODS = frozenset({"load_state_dict", "eval", "register_buffer", "__init__"})
DENIED = frozenset({
    "numpy", "storage", "untyped_storage", "set_", "apply_", "map_", "map2_", "register_hook", "share_memory_", "from_file", "save",
    "data_ptr", "cuda", "module_load",
})  # fmt: skip
ROOTS = ("torch", "nn", "F")


def check(text: str) -> None:
    """Raise :class:`EquivalenceError`, naming the line, for a file that holds more than a network."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise EquivalenceError(f"pytorch: line {error.lineno} of the file is no Python ({error.msg}).") from error
    inner = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Attribute)}
    for node in ast.walk(tree):
        if not _allowed(node, id(node) in inner):
            line = getattr(node, "lineno", 0)
            found = ast.unparse(node).splitlines()[0][:80]
            raise EquivalenceError(
                f"pytorch: line {line} of the file holds `{found}`, which no file written by foldexport does; it was not run."
            )


def _allowed(node: ast.AST, inside: bool) -> bool:
    """inside: whether the node is the left part of an attribute, which is judged as a whole."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ast.unparse(node) in IMPORTS
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        bases = [ast.unparse(each) for each in getattr(node, "bases", ())]
        bare = not node.decorator_list and not getattr(node, "keywords", ()) and bases in ([], ["nn.Module"])
        return bare and node.name in DEFINED
    if isinstance(node, ast.Name):
        plain = node.id in BUILTINS or not hasattr(builtins, node.id)
        stored = isinstance(node.ctx, ast.Load) or node.id not in (*ROOTS, *BUILTINS, "load_file", "OrderedDict")
        return stored and (node.id == "__file__" or (plain and not node.id.startswith("__"))) and (
            inside or node.id not in ROOTS)  # fmt: skip
    if isinstance(node, ast.arg):
        return node.arg not in (*ROOTS, *BUILTINS, "load_file", "OrderedDict") and not node.arg.startswith("__")
    if isinstance(node, ast.Attribute):
        return _attribute(node, inside)
    return isinstance(node, SYNTAX)


def _attribute(node: ast.Attribute, inside: bool) -> bool:
    chain = ast.unparse(node).split(".")
    if chain[0] == "self" and len(chain) == 2:
        return not node.attr.startswith("__")
    if node.attr in METHODS:
        return True
    if chain[0] in ROOTS and all(part.isidentifier() for part in chain):
        return (inside and chain in (["torch", "ops"], ["torch", "ops", "aten"])) or _of_torch(chain, inside)
    return hasattr(Tensor, node.attr) and node.attr not in DENIED and not node.attr.startswith("_")


def _of_torch(chain: list[str], inside: bool) -> bool:
    """``torch.cat``, ``torch.float16``, ``torch.ops.aten.mean.dim``, ``nn.Conv2d``, ``F.relu``."""
    root, name = chain[:2]
    if DENIED & set(chain):
        return False
    if chain[:3] == ["torch", "ops", "aten"]:
        return len(chain) == 5 or (inside and len(chain) == 4)
    if len(chain) != 2 or inside:
        return False
    if root == "nn":
        found = getattr(nn, name, None)
        return found is nn.Parameter or (isinstance(found, type) and issubclass(found, nn.Module))
    if root == "F":
        return callable(getattr(F, name, None)) and not name.startswith("_")
    found = getattr(torch, name, None)
    kinds = (torch.dtype, torch.layout, torch.memory_format)
    own = getattr(found, "__module__", "") == "torch.functional" or name.startswith("sym_") or found is torch.device
    return isinstance(found, kinds) or own or (hasattr(torch._C._VariableFunctions, name) and not name.startswith("_"))
