"""The table of formats: names, nearest names, what is missing, and nothing imported before it is used."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from foldexport import exporters
from foldexport.errors import MissingDependencyError, PrecisionError, UsageError
from foldexport.exporters.options import ExportOptions
from tests.exporters.installed import need


def test_aliases_and_order():
    assert [row.name for row in exporters.resolve("ts, ONNX,torchscript")] == ["torchscript", "onnx"]


@pytest.mark.parametrize(
    ("name", "nearest"), [("onx", "onnx"), ("torchscipt", "torchscript"), ("onnxruntim", "onnxruntime")]
)
def test_unknown_name_gives_the_nearest(name, nearest):
    with pytest.raises(UsageError, match=f"unknown format '{name}': did you mean {nearest}"):
        exporters.resolve(f"onnx,{name}")


def test_unknown_name_without_a_near_one_lists_all():
    with pytest.raises(UsageError, match="formats are onnx, torchscript"):
        exporters.get("qqqq")


def test_no_name_at_all():
    with pytest.raises(UsageError, match="no format in ' ,'"):
        exporters.resolve(" ,")


def test_missing_package_gives_the_exact_command():
    row = dataclasses.replace(exporters.get("onnx"), packages=("onnx", "surely_not_installed"), extra="special")
    with pytest.raises(MissingDependencyError) as caught:
        exporters.exporter(row)
    assert (
        str(caught.value)
        == "onnx needs surely_not_installed, which is not installed: pip install 'foldexport[special]'"
    )
    assert caught.value.exit_code == 5


def test_exporter_that_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "broken_exporter.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = dataclasses.replace(exporters.get("onnx"), target="broken_exporter:Exporter", extra="special")
    with pytest.raises(MissingDependencyError, match=r"surely_not_installed.*pip install 'foldexport\[special\]'"):
        exporters.exporter(row)


def test_status_tells_what_works_and_why_not(monkeypatch):
    broken = dataclasses.replace(
        exporters.get("onnx"), name="other", packages=("surely_not_installed",), extra="special"
    )
    monkeypatch.setitem(exporters.FORMATS, "other", broken)
    found = {each.format.name: each for each in exporters.status()}
    assert found["onnx"].works and found["onnx"].version and not found["onnx"].reason
    assert not found["other"].works and "pip install 'foldexport[special]'" in found["other"].reason


def test_looking_at_the_table_imports_nothing_heavy():
    code = (
        "import sys; from foldexport import exporters; exporters.resolve('onnx,ts'); exporters.status();"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'numpy', 'onnxsim') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("row", exporters.FORMATS.values(), ids=lambda row: row.name)
def test_every_format_has_what_the_stages_call(row):
    exporter = need(row.name)
    assert (exporter.name, exporter.suffix) == (row.name, row.suffix)
    assert all(callable(getattr(exporter, method)) for method in ("export", "load", "weights", "runtime"))
    found = exporters.status()[list(exporters.FORMATS).index(row.name)]
    if row.needs and not found.works:
        pytest.skip(found.reason)  # no Python package brings it
    # A build, "+cpu" or "+cu130", is not in every package's own record.
    assert exporter.runtime().split()[-1].partition("+")[0] == found.version.partition("+")[0]


def test_options_names():
    assert ExportOptions().names("input", 1) == ["input"]
    assert ExportOptions().names("output", 3) == ["output_0", "output_1", "output_2"]
    assert ExportOptions(input_names=("image",)).names("input", 1) == ["image"]
    with pytest.raises(UsageError, match=r"2 input names given \(a, b\), but the network has 1 inputs"):
        ExportOptions(input_names=("a", "b")).names("input", 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dynamic": ("depth",)}, "unknown dynamic axis 'depth'"),
        ({"output_names": ("a", "a")}, "each must be distinct"),
        ({"input_names": ("",)}, "not empty"),
        ({"input_names": ("x",), "output_names": ("x",)}, "'x' names both an input and an output"),
    ],
)
def test_options_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        ExportOptions(**wrong)


def test_precision_that_a_format_does_not_write():
    with pytest.raises(PrecisionError, match="onnx is written in fp32, not fp16"):
        ExportOptions(precision="fp16").require_precision("onnx")
