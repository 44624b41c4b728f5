"""verify.py by itself: judges as foldexport does, and needs nothing of it."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldexport.bundle import MARK, standalone
from foldexport.exporters import FORMATS
from foldexport.verify import Tolerance, compare

SOURCE = Path(standalone.__file__).read_text()
LATER = {"zip": "strict", "dataclass": "slots"}  # keyword arguments that Python 3.9 does not have


def test_it_is_python_3_9_and_needs_numpy_alone():
    tree = ast.parse(SOURCE, feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert LATER.get(name) not in {each.arg for each in node.keywords}, ast.unparse(node)
        assert not isinstance(node, (ast.Import, ast.ImportFrom)) or "foldexport" not in ast.unparse(node)
    tops = {each.name for node in tree.body if isinstance(node, ast.Import) for each in node.names}
    tops |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert tops <= sys.stdlib_module_names | {"importlib.util", "importlib.metadata"}
    assert MARK in SOURCE and SOURCE.isascii()


def test_it_knows_only_formats_that_there_are():
    assert set(standalone.RUNNERS) <= set(FORMATS)


def test_what_it_says_to_install_for_tensorrt_rtx_is_what_it_then_finds():
    """The wheels have a module of another name than the source distribution over them."""
    pytest.importorskip("tensorrt_rtx_bindings")
    rows = standalone.RUNNERS["tensorrt"]
    there = [row[1] for row in rows if all(importlib.util.find_spec(name) for name in row[0].split())]
    assert "torch tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs" in there


def golden_of(references: list[list[np.ndarray]], n32: list[float]) -> dict[str, np.ndarray]:
    found = {"runs": np.int64(len(references)), "step": np.int64(1), "n32": np.asarray(n32)}
    for run, outputs in enumerate(references):
        for place, output in enumerate(outputs):
            found |= {f"run{run}_output{place}": output, f"run{run}_shape{place}": np.asarray(output.shape)}
            found[f"run{run}_peak_at{place}"] = np.int64(0)
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16), size=st.sampled_from([(1, 10), (3, 10), (4, 1), (2, 3, 5, 5), (3, 0), (2,)]),
    scale=st.sampled_from([0.0, 1e-8, 3e-7, 1e-6, 3e-6, 1e-2, np.nan, np.inf]), zero=st.booleans(), loose=st.booleans(),
    there=st.sampled_from([None, 1e-6, 1e-4]),
)  # fmt: skip
def test_it_judges_as_foldexport_does(seed, size, scale, zero, loose, there):
    generator = np.random.default_rng(seed)
    references = [[np.zeros(size) if zero else generator.normal(size=size)] for _ in range(2)]
    outputs = [[(each + scale * generator.normal(size=size)).astype(np.float32) for each in run] for run in references]
    tolerance = {"absolute": 1e-6, "relative": 1e-6} if loose else None
    runs = [iter(outputs), iter(outputs)]
    wanted = compare(
        [[torch.from_numpy(each) for each in run] for run in references], lambda *_: next(runs[0]), [(), ()], [2e-7],
        format="f", label="l", tolerance=Tolerance(**tolerance) if tolerance else None,
        noise_there=None if there is None else lambda run: [[there]] if run == 1 else [],
    )  # fmt: skip
    units = {} if there is None else {"1": [there]}
    error, multiple, classes, wrong = standalone.compare(lambda *_: next(runs[1]), golden_of(references, [2e-7]), tolerance, units)
    assert (error, multiple) == pytest.approx((wanted.max_error, wanted.noise_multiple), rel=1e-9, nan_ok=True)
    assert bool(wrong) == (not wanted.ok), (wrong, wanted.message)
    if wanted.top1 is not None and wanted.top1.counted:
        assert classes == f"top-1 {wanted.top1.agree}/{wanted.top1.counted}"


def test_shapes_and_integers():
    golden = golden_of([[np.arange(12).reshape(3, 4)]], [1e-7])
    assert standalone.compare(lambda: [np.arange(12).reshape(3, 4)], golden, None)[3] == ""
    assert "wanted [[3, 4]]" in standalone.compare(lambda: [np.zeros((4, 3))], golden, None)[3]
    wrong = np.arange(12).reshape(3, 4).copy()
    wrong[0, 0] = 7
    assert "differs in 1 of 12" in standalone.compare(lambda: [wrong], golden, None)[3]


def test_batches_in_parts():
    calls = []

    def run(x):
        calls.append(len(x))
        return [x * 2, np.repeat(x, 2, axis=0)]

    x = np.arange(10.0).reshape(5, 2)
    one, two = standalone.in_parts(run, 2, 3)(x)
    assert (one == 2 * x).all() and (two == np.repeat(x, 2, axis=0)).all() and calls == [3, 2]
    assert [len(each) for each in standalone.in_parts(run, 4, 4)(x)] == [5, 10]
