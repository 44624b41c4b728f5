"""The page: well-formed, escaped, self-contained, accessible, complete, and the same bytes each time."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re

import pytest
import torch
from torch import nn

from foldexport.report.html.page import page
from tests.benchmark.records import measurement, timing
from tests.networks import Head, Residual, conv_bn
from tests.report import pages
from tests.report.pages import HOSTILE, gated, gated_facts
from tests.statistics import randomise


@pytest.fixture(scope="module")
def text() -> str:
    return page(gated_facts())


@pytest.fixture(scope="module")
def found(text) -> pages.Page:
    return pages.read(text)


# ---- what it may not do


def test_it_asks_the_network_for_nothing(text, found):
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert not [tag for tag in found.tags if tag.name in ("link", "img", "iframe", "object", "embed", "form", "base", "a")
                and not (tag.attributes.get("href") or "").startswith("#")]  # fmt: skip
    assert not [tag for tag in found.tags for name in tag.attributes if name in ("src", "srcset", "action", "xlink:href", "data")]


def test_it_runs_our_script_and_no_other(text, found):
    (script,) = found.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = [tag.attributes["content"] for tag in found.all("meta") if tag.attributes.get("http-equiv")]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [name for tag in found.tags for name in tag.attributes if name.startswith("on")]


def test_names_of_the_file_are_text_and_never_markup(text, found):
    assert HOSTILE not in text and "<script>alert" not in text
    assert HOSTILE in found.text  # as a module, a file, in a reason and in the command line
    assert f"net {HOSTILE}" in found.all("h1")[0].text and HOSTILE in found.all("title")[0].text
    assert "script>&amp;.pth" in found.all("pre")[0].text  # a command line shows no folders
    for tag in found.tags:
        assert not set(tag.name) - set("abcdefghijklmnopqrstuvwxyz0123456789"), tag


def test_a_benchmark_s_names_are_text_too():
    found = timing(measurement(), measurement("openvino", batch=8), subject=f"net {HOSTILE}", unavailable={HOSTILE: HOSTILE})
    record = {"kind": "bench", "record": {}, "timing": found.to_dict(), "command": ["foldexport"], "version": "1", "versions": {}}
    text = page(record)
    assert HOSTILE not in text and HOSTILE in pages.read(text).text
    assert len(pages.read(text).of_class("bar-row")) == 4


def test_the_same_values_give_the_same_bytes(text):
    again = json.loads(json.dumps(gated_facts()))
    assert page(copy.deepcopy(again)) == text
    assert page(pages.facts(gated())) == text


# ---- what it says


def test_every_module_of_the_ledger_is_there(found):
    rows = [tag for tag in found.all("th") if tag.attributes.get("scope") == "row"]
    named = {tag.text for tag in rows}
    assert {entry.module for entry in gated().ledger} <= named
    assert len(gated().ledger) > 7


def test_what_was_kept_is_there_with_its_reason(found):
    kept = " ".join(" ".join(tag.text.split()) for tag in found.all("li") if "kept" in tag.parents or "section" in tag.parents)
    reasons = [entry.reason.replace("`", "") for entry in gated().ledger if entry.status == "kept"]
    assert reasons
    for reason in reasons:
        assert " ".join(reason.split()) in kept


def test_a_repeated_block_is_drawn_once_and_every_operator_counted(found):
    (repeated,) = [tag for tag in found.of_class("block") if "times" in tag.classes]
    assert "blocks.0" in repeated.text and "blocks.2" in repeated.text and "× 3" in repeated.text
    shown = found.of_class("op")
    both = gated_facts()["graph"]
    assert len(shown) == len(both["before"]) + len(both["after"]) - 2 * (7 + 5)


def test_the_picture_counts_what_the_table_counts():
    for name, costs in (("before", gated().before), ("after", gated().after)):
        kinds = [each["kind"] for each in gated_facts()["graph"][name]]
        assert {kind: kinds.count(kind) for kind in kinds} == costs.operators


def test_links_go_from_what_was_folded_to_what_absorbed_it():
    graph = gated_facts()["graph"]
    bn = next(each for each in graph["before"] if each["module"] == "blocks.1.bn2")
    assert bn["how"] == "folded" and [graph["after"][place]["module"] for place in bn["became"]] == ["blocks.1.conv2"]
    conv = next(each for each in graph["before"] if each["module"] == "blocks.1.conv2")
    assert conv["how"] == "stays" and conv["became"] == bn["became"]
    assert conv["detail"] == "3×3" and conv["shape"] == [8, 16, 16]
    added = [each for each in graph["before"] if each["kind"] == "add"]
    assert [len(each["reads"]) for each in added] == [2, 2, 2]


def test_skip_connections_are_drawn(found):
    gutters = [tag for tag in found.tags if tag.name == "path" and "head" in tag.classes]
    assert len(gutters) == 2 + 2  # x + f(x) of the block that stands for three, and the gate's, in both networks


def test_numbers_of_charts_stand_in_tables(found):
    cells = [tag.text for tag in found.all("td") if "num" in tag.classes]
    for row in gated_facts()["graph"]["weights"]:
        assert f"{row['after']:.3g}" in cells


# ---- for everybody


def test_structure(found):
    assert found.all("html")[0].attributes == {"lang": "en"}
    assert len(found.all("h1")) == 1 and len(found.all("main")) == 1 and len(found.all("title")) == 1
    levels = [int(tag.name[1]) for tag in found.tags if re.fullmatch(r"h[1-6]", tag.name)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    assert any(tag.attributes.get("name") == "viewport" for tag in found.all("meta"))


def test_ids_are_unique_and_references_meet_them(found):
    ids = [tag.attributes["id"] for tag in found.tags if "id" in tag.attributes]
    assert len(ids) == len(set(ids))
    for tag in found.tags:
        for name in ("aria-describedby", "aria-labelledby"):
            assert set((tag.attributes.get(name) or "").split()) <= set(ids)
        if (tag.attributes.get("href") or "").startswith("#"):
            assert tag.attributes["href"][1:] in ids


def test_tables_have_headers_and_pictures_words(found):
    for tag in found.all("th"):
        assert tag.attributes.get("scope") in ("row", "col")
    for tag in found.all("svg"):
        assert tag.attributes.get("aria-hidden") == "true" or tag.attributes.get("role") == "img" and tag.attributes["aria-label"]
    for tag in found.of_class("op") + found.of_class("scroll"):
        assert tag.attributes["tabindex"] == "0"  # reached without a mouse


def test_contrast_of_text_is_enough_in_both_schemes(text):
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    schemes = re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    light, dark = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme)) for scheme in schemes]
    for scheme in (light, dark):
        for ground in (scheme["page"], scheme["card"]):
            for name in ("ink", "quiet", "good", "warn", "bad", "accent"):
                assert contrast(scheme[name], ground) >= 4.5, (name, ground)
            for name in ("conv", "norm", "scalar", "act", "join", "pool", "view", "other"):
                assert contrast(scheme[name], ground) >= 3.0, (name, ground)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# ---- other networks


def test_a_large_network_makes_a_small_page():
    """Bottlenecks 3-4-6-3, as ResNet-50 has them, with few channels."""
    layers, channels = [conv_bn(3, 8, 3)], 8
    for stage, count in enumerate((3, 4, 6, 3)):
        blocks = []
        for place in range(count):
            stride = 2 if stage and not place else 1
            blocks.append(Residual(channels, 4, stride, bottleneck=True, preactivation=False))
            channels = 16
        layers.append(nn.Sequential(*blocks))
    network = randomise(nn.Sequential(*layers, Head(channels, 5)), 0, signs=False)
    found = pages.facts(pages.study(network, torch.randn(1, 3, 16, 16)))
    text = page(found)
    assert len(found["graph"]["before"]) > 160
    assert len(text.encode()) < 600_000
    assert len(pages.read(text).of_class("op")) < 200


def test_a_chain_has_no_skip_connections_left():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), pages.Block(), pages.Block())
    found = pages.facts(pages.study(randomise(network, 0), torch.randn(1, 3, 8, 8), chain=True))
    names = {each["name"] for each in found["graph"]["after"]}
    assert all(len(names & set(each["reads"])) <= 1 for each in found["graph"]["after"])
    shown = pages.read(page(found))
    assert any("skip connection" in tag.text for tag in shown.all("td"))


def test_a_network_that_was_not_folded_has_one_column():
    whole = copy.deepcopy(gated_facts())
    whole["record"] |= {"ledger": None, "certificate": None, "extremes": None}
    whole["record"]["costs"]["after"] = None
    whole["graph"] |= {"after": None, "weights": []}
    for each in whole["graph"]["before"]:
        each |= {"entries": [], "became": [], "how": "stays"}
    found = pages.read(page(whole))
    assert not found.of_class("after") and not found.of_class("links") and not found.of_class("ledger")
    assert "Not folded" in found.text


def test_what_was_kept_is_marked_in_the_picture(found):
    marked = [tag for tag in found.of_class("op") if "kept" in tag.classes]
    assert len(marked) == 2 and all("kept" in tag.text for tag in marked)  # the first batch norm and the gate
