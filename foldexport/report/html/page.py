"""Plain values → the page, one self-contained file: a pure function, the same bytes for the same values.

Everything from the user's file is escaped by the template engine; beside that the page's own policy allows one script, ours, by
its digest, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from foldexport.report import precision
from foldexport.report.html import evidence, sections
from foldexport.report.html.picture import picture

PACKAGE = "foldexport.report.html"


def page(document: Mapping[str, Any]) -> str:
    """HTML of what :mod:`foldexport.report.html.document` collects of a conversion, an inspection or a benchmark."""
    if document["kind"] == "bench":
        title, _, rest = document["timing"]["subject"].partition(", ")
        found = {"title": title, "rest": rest, "file": "", "rows": []}
        return _render("bench.html", head=found, latency=evidence.latency(document["timing"]), again=sections.reproduce(document))
    record = document["record"]
    return _render(
        "study.html", head=sections.heading(record), costs=sections.costs(record),
        picture=picture(document["graph"], record["ledger"]), folded=sections.folded(record), kept=sections.kept(record),
        proof=evidence.proof(record), rounding=evidence.rounding(record), precision=precision.said(record.get("precision") or {}),
        artifacts=evidence.artifacts(record), weights=evidence.weights(document), signal=evidence.signal(document),
        ledger=sections.ledger(record), again=sections.reproduce(document),
    )  # fmt: skip


def _render(template: str, **context: Any) -> str:
    style, script = _asset("report.css"), _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(style=Markup(style), script=Markup(script), digest=digest, **context)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters["code"] = _code
    return made


@cache
def _asset(name: str) -> str:
    return (files(PACKAGE) / "static" / name).read_text(encoding="utf-8")


def _code(text: str) -> Markup:
    """What stands between backticks as code; all of it escaped."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts))
