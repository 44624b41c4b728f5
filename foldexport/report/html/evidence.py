"""The sections of the page that are measured: proof, files, ranges of the weights, the signal, latencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foldexport.benchmark.timing import NOISY
from foldexport.report.html.charts import Line, bars, chart, number
from foldexport.report.words import milliseconds, size

FAIL, WARN = 8.0, 4.0  # times float32 noise, as foldexport.verify judges
FLOAT16 = 65504.0
FEWEST_POINTS = 2


def proof(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The certificate in words and bars; None where nothing was folded."""
    found = record["certificate"]
    if found is None:
        return None
    worst, ends = found["worst"], found["end_to_end"]
    exact = []
    if worst is not None:
        ratio = _float(worst["ratio"])
        exact.append({"label": f"worst value, {worst['module']}", "value": ratio, "good": True,
                      "text": f"error {number(_float(worst['error']))}, allowed {number(_float(worst['bound']))}"})  # fmt: skip
    if ends is not None:
        error, bound = _float(ends["error"]), _float(ends["bound"])
        exact.append({"label": "outputs, end to end", "value": error / bound if bound else None, "good": True,
                      "text": f"error {number(error)} of peak, allowed {number(bound)}"})  # fmt: skip
    return {
        "values": found["n_values"], "operators": found["n_nodes"], "probes": found["probes"],
        "exact": bars(exact, 1e-9, 10.0, [(1.0, "allowed")]), "informative": ends is None or ends["informative"],
        "dropped": found["dropped"], "skipped": found["skipped"], "silent": sum(found["silent"].values()),
        "silent_modules": found["silent"],
    }  # fmt: skip


def rounding(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Errors in the training graph's own noise: of the folded network, and of each file."""
    found, rows = record["certificate"], []
    levels = (found or {}).get("rounding")
    if levels:
        each = levels["multiples"]["folded"]
        rows.append(_noise_row("folded network, float32", each["multiple"], f"error {number(_float(each['error']))} of peak"))
    tolerance = record.get("tolerance")
    for done in [
        *(record.get("device") or {}).get("comparisons", ()),
        *(each["comparison"] for each in record.get("artifacts", ())),
    ]:
        if done and done["unit"] != "int8" and done["noise_multiple"] is not None and done["probes"]:
            unit = "" if done["unit"] == "float32" else f" in {done['unit']} noise"
            there = "" if done.get("device", "cpu") == "cpu" else f" on {done['device']}"
            said = f"error {number(done['max_error'])} of peak"
            rows.append(_noise_row(f"{done['format']}{there}{unit}", done["noise_multiple"], said))
    if not rows:
        return None
    largest = max((row["value"] for row in rows if row["value"] is not None), default=1.0)
    marks = [(WARN, "warning"), (FAIL, "limit")] if not tolerance else [(WARN, "warning")]
    return {**bars(rows, 0.1, max(30.0, 2 * largest), marks), "noise": number(levels["noise"]) if levels else ""}


def _noise_row(label: str, multiple: Any, text: str) -> dict[str, Any]:
    value = _float(multiple)
    said = text if value is None else f"{value:.2g}×, {text}"
    return {"label": label, "value": value, "text": said, "good": value is None or value <= WARN}


def artifacts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per format: what ran it and what was found."""
    rows = []
    for artifact in record.get("artifacts", ()):
        done = artifact["comparison"] or {}
        top1, weights = done.get("top1"), done.get("weights_identical")
        instead = ". ".join([done.get("not_run", ""), *done.get("instead", ())]).strip(". ")
        rows.append({
            "format": artifact["format"], "file": artifact["file"], "runtime": done.get("runtime", ""),
            "size": f"{size(sum(each['size_bytes'] for each in artifact['files']))}B",
            "error": instead or (number(done.get("max_error")) if done.get("probes") else "–"),
            "noise": "–" if done.get("noise_multiple") is None or not done.get("probes") or done.get("unit") == "int8"
            else f"{done['noise_multiple']:.1f}× {done['unit']}",
            "weights": "–" if not weights else f"{weights[0]}/{weights[1]}",
            "top1": "–" if not top1 else f"{top1['agree']}/{top1['counted']}",
            "ties": len(top1["near_ties"]) if top1 else 0,
            "message": done.get("message", ""), "precision": _types(artifact["notes"].get("precision")),
        })  # fmt: skip
    return rows


def _types(read: Any) -> str:
    """What a file was read back to be in."""
    if not isinstance(read, Mapping) or not read.get("weight_bytes"):
        return ""
    sizes = sorted(read["weight_bytes"].items(), key=lambda pair: -pair[1])
    total = sum(count for _, count in sizes) or 1
    return ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in sizes)


def weights(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The largest weight of every layer before and after, and the extremes of the folded network."""
    rows, extremes = document["graph"]["weights"], document["record"].get("extremes")
    if len(rows) < FEWEST_POINTS:
        return None
    lines = [Line("training graph", [row["before"] for row in rows], "was"), Line("folded", [row["after"] for row in rows], "now")]
    drawn = chart("largest |weight| of each layer", [row["layer"] for row in rows], lines, joined=False)
    words = {"weight": "weight or bias"}
    peaks = [(words.get(kind, kind), number(_float(each["value"])), each["layer"]) for kind, each in (extremes or {}).items()]
    fits = all((_float(each["value"]) or 0.0) < FLOAT16 for each in (extremes or {}).values())
    return {"chart": drawn, "peaks": peaks, "fits": fits} if drawn else None


def signal(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The variance of activations and of gradients along both networks."""
    found = document.get("propagation")
    if not found or len(found["names"]) < FEWEST_POINTS:
        return None
    networks = [("training graph", found["training"], "was")]
    networks += [("folded, as stored", found["folded"], "now")] if found["folded"] else []
    charts = [
        chart(f"{what} variance", found["names"], [Line(name, each[what], style) for name, each, style in networks], narrow=True)
        for what in ("activation", "gradient")
    ]
    return {"kind": found["kind"], "samples": found["samples"], "charts": [each for each in charts if each]}


def latency(timing: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What ``foldexport bench`` measured: medians as bars from zero, and the ratios with their intervals."""
    if not timing:
        return None
    groups = [_measurement(each) for each in timing["measurements"]]
    here = timing["environment"]
    gpu = (here.get("gpu") or {}).get("name")
    facts = [("processor", gpu or here["processor"]), ("cores", here["cores"]), ("load average", here.get("load_average")),
             ("governor", here.get("governor")), ("turbo", here.get("turbo"))]  # fmt: skip
    return {"groups": groups, "facts": [(name, value) for name, value in facts if value is not None], "notes": timing["notes"],
            "unavailable": timing["unavailable"]}  # fmt: skip


def _measurement(found: Mapping[str, Any]) -> dict[str, Any]:
    slowest = max(each["latency_ms"]["median"] for each in found["variants"])
    shapes = "+".join("×".join(map(str, shape)) for shape in found["input_shapes"])
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    rows = []
    for each in found["variants"]:
        speed = each["speedup"]
        numbers = speed is not None and each["verdict"] != NOISY
        text = f"{each['verdict']} ({speed['interval'][0]:.2f} to {speed['interval'][1]:.2f})" if numbers else each["verdict"]
        median, p90, p99 = (each["latency_ms"][name] for name in ("median", "p90", "p99"))
        rows.append({"label": each["name"], "share": f"{100 * median / slowest:.1f}", "median": f"{milliseconds(median)} ms",
                     "text": text, "p90": milliseconds(p90), "p99": milliseconds(p99),
                     "baseline": each["name"] == found["baseline"]})  # fmt: skip
    where = ", ".join([found["version"], shapes, threads if found["device"] == "cpu" else found["device"]])
    return {
        "title": found["runtime"],
        "where": where,
        "level": f"{round(100 * found['level'], 3):g}",
        "rows": rows,
        "findings": found["findings"],
    }


def _float(value: Any) -> float | None:
    """A number of the record, where what is not finite is text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
