"""The benchmark scripts run and say what they measured; how long anything takes is not a test's business."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from foldexport.recognise import recognise

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NETWORK, SHAPE = "tiny_resnet", "1x3x32x32"


@pytest.fixture
def script(monkeypatch):
    """Import one of the scripts the way that it is run: with its own folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def settings(script, tmp_path):
    """Of a run on a tiny network, whose checkpoint is drawn."""
    path = tmp_path / "tiny.pth"
    script("conversion_parts").checkpoint(NETWORK, str(path))
    return script("conversion").Settings(NETWORK, SHAPE, (2, 4), 1, 1, str(path))


def test_every_part_gives_one_number_per_round(script, settings) -> None:
    parts = script("conversion_parts")
    assert [len(values) for values in parts.fold(NETWORK, SHAPE, 2).values()] == [2, 2]
    assert {name: len(values) for name, values in parts.layers("chain", [2, 4], 1).items()} == {"2": 1, "4": 1}
    found = parts.proof(NETWORK, SHAPE, settings.weights, 1)
    assert set(found) == {"proof", "forward", *parts.PROOF}
    assert found["proof"][0] == pytest.approx(sum(found[name][0] for name in parts.PROOF))


@pytest.mark.parametrize("subject", ["fold", "fuse"])
def test_memory_is_counted_against_the_folded_weights(script, subject) -> None:
    found = script("conversion_parts").fold_memory(NETWORK, SHAPE, subject)
    folded = script("networks").tiny_resnet()
    layers = list(folded.modules())
    biases = sum(layer.num_features for layer in layers if isinstance(layer, torch.nn.BatchNorm2d))
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, torch.nn.Conv2d))
    assert found["weight_bytes"] == 4 * (weights + biases + folded.fc.weight.numel() + folded.fc.bias.numel())


def test_both_folds_of_the_fold_row_compute_the_same(script) -> None:
    parts, networks = script("conversion_parts"), script("networks")
    module, x = networks.randomise(networks.tiny_resnet()), torch.randn(2, 3, 32, 32)
    ours, theirs = parts.fold_stage(parts.trace(module, x)), parts.fuse(module)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_networks_have_batch_norms_of_both_signs(script) -> None:
    networks = script("networks")
    for module in (networks.resnet50(), networks.chain(4), networks.residual(4)):
        norms = [layer for layer in networks.randomise(module).modules() if isinstance(layer, torch.nn.BatchNorm2d)]
        assert norms and all(bool((norm.weight < 0).any() and (norm.weight > 0).any()) for norm in norms)
        assert not module.training


def test_command_and_script_are_compared(script, settings) -> None:
    rows = script("conversion").command(settings)
    assert set(rows) == {"command", "command-memory"}
    assert all(len(row.values) == 1 and row.values[0] > 0 and not row.failed for row in rows.values())


def test_help_is_run(script, settings) -> None:
    assert len(script("conversion").help_text(settings)["help"].values) == 5


def test_process_that_fails_says_why(script, settings) -> None:
    conversion = script("conversion")
    with pytest.raises(conversion.FailedRun, match="exit code 1: ValueError: no such thing"):
        conversion.run(["-c", "raise ValueError('no such thing')"], settings)


def test_a_measure_that_fails_fails_its_rows_alone(script, settings, monkeypatch) -> None:
    conversion = script("conversion")

    def broken(_):
        raise conversion.FailedRun("exit code 1: Killed")

    measures = {broken: ("fold",), (lambda _: {"help": conversion.Row([0.1])}): ("help",)}
    monkeypatch.setattr(conversion, "MEASURES", measures)
    rows = conversion.measure(settings)
    assert rows["fold"].failed and not rows["help"].failed
    assert set(conversion.measure(settings, ["help"])) == {"help"}


def test_table_has_a_verdict_for_every_limit(script) -> None:
    conversion, report = script("conversion"), script("conversion_report")
    rows = {limit.key: report.Row([limit.wanted * factor for factor in (0.5, 0.9, 3.0)]) for limit in conversion.LIMITS}
    rows["proof"] = report.Row([61.0, 61.0, 1.0])
    rows["help"] = report.Row(failed="exit code 1: Killed")
    lines = report.table(conversion.LIMITS, rows).splitlines()
    assert len(lines) == 2 + len(conversion.LIMITS)
    verdicts = {limit.key: line.split("|")[5].strip() for limit, line in zip(conversion.LIMITS, lines[2:], strict=True)}
    assert {key for key, verdict in verdicts.items() if verdict == "FAIL"} == {"proof", "help"}
    assert "61.0 passes | 1.0 … 61.0 | 60 passes | FAIL" in "\n".join(lines)


def test_results_name_no_machine_and_no_path(script, settings) -> None:
    conversion, report = script("conversion"), script("conversion_report")
    rows = {limit.key: report.Row([1.0]) for limit in conversion.LIMITS}
    found = report.document(conversion.LIMITS, rows, conversion.shown(settings), "2000-01-01")
    text = report.page(conversion.LIMITS, rows, found) + json.dumps(found)
    assert str(Path(settings.weights).parent) not in text and str(FOLDER) not in text
    assert importlib.import_module("platform").node() not in text.split()
    assert {"processor", "cores", "memory", "torch", "onnxruntime"} <= set(found["machine"])


def test_driver_imports_no_torch() -> None:
    """The peaks of what it starts would have its own memory in them."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import conversion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(FOLDER)], check=False).returncode == 0


def test_the_forms_of_activations_are_counted_and_timed(script, tmp_path) -> None:
    forms = script("activation_forms")
    path = Path(__file__).resolve().parents[1] / "models" / "preresnet20_cifar10.pth"
    found = forms.measure(path, rounds=2, threads=1, batch=2)
    assert sum(found["forms"].values()) == found["batch_norms"] == 19 and 0 < found["largest_absorbed"] <= 4
    assert set(found["latency_ms"]) == {"chosen", "nothing absorbed upstream", "every clamp two-sided", "unfolded"}
    assert "| chosen |" in forms.table(found)


def test_every_form_computes_the_same(script) -> None:
    forms = script("activation_forms")
    example = torch.randn(2, 3, 32, 32)
    network = recognise(Path(__file__).resolve().parents[1] / "models" / "preresnet20_cifar10.pth").module
    built = forms.forms(network, example)
    with torch.no_grad():
        wanted = network(example)
        assert all(torch.allclose(module(example), wanted, atol=1e-4) for module in built.values())


def test_a_zoo_row_is_measured_checked_and_shown(script) -> None:
    zoo, networks = script("zoo"), script("zoo_networks")
    entry = networks.Entry(lambda: networks.preresnet(8, width=4), (3, 16, 16))
    row = zoo.measure(entry)
    zoo.check("small", row)
    assert "| small |" in zoo.page({"Family": {"small": row}})
    with pytest.raises(SystemExit, match="small: batch_norm left"):
        zoo.check("small", {**row, "after": {"batch_norm": 1}})
    with pytest.raises(SystemExit, match="more operators"):
        zoo.check("small", {**row, "after": {"conv": 1000}})


def test_a_ratio_of_latencies_has_its_interval(script) -> None:
    ratio = script("interleaved").ratio
    generator = np.random.default_rng(0)
    one, other = generator.normal(1.0, 0.05, 400), generator.normal(1.1, 0.05, 400)
    value, low, high = ratio(other, one)
    assert low < 1.1 < high and low < value < high and high - low < 0.05
    assert ratio(one, one) == (1.0, 1.0, 1.0)
