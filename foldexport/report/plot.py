"""Signal propagation as a picture: panels over one axis of points, logarithmic, legible on paper and in grey.

The only file that imports matplotlib, and only when something is drawn. Lines differ in dash, marker and lightness, so that no
meaning hangs on a colour. The same values give the same bytes.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldexport.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from foldexport.propagation import Pending, Propagation, Signal

INSTALL = "pip install 'foldexport[plot]'"
WIDTH_INCHES, PANEL_INCHES, DPI = 8.0, 2.2, 150
TITLE_COLUMNS = 80
BESIDE_TITLE = 2  # lines that a legend beside a panel's title has room for
LEGEND_COLUMNS = 96  # characters of a row of the legend, of which a dash and its blanks take eight
MOST_LABELS = 36  # of points; more are thinned out
LONGEST_LABEL = 22  # characters; the end of a name says more than its beginning
FEWEST_DECADES = 1.2  # of a panel: what is flat shall look flat
SHOWN_DECADES = 290.0  # up and down; what lies beyond is nearly no float any more
FEW_DECADES = 2.0  # below it numbers between the powers of ten are written out
VISIBLE = 1.01  # a factor that can be seen
# Colours of Okabe and Ito (2008), told apart by the colour-blind; from dark to light, each with its own dash and marker.
STYLES = (
    {"color": "#004488", "linestyle": "-", "marker": "o", "markersize": 5.5},
    {"color": "#D55E00", "linestyle": (0, (4, 2)), "marker": "s", "markersize": 8, "markerfacecolor": "none"},
    {"color": "#009E73", "linestyle": (0, (1, 1.2)), "marker": "^", "markersize": 5.5},
    {"color": "#333333", "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "D", "markersize": 4.5},
)
FONT = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10, "legend.fontsize": 9.5,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.edgecolor": "#555555", "axes.linewidth": 0.8,
    "svg.hashsalt": "foldexport",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One value per point, and from where to where it spreads. style: of `STYLES`. label: "" for none in the legend."""

    label: str
    values: Sequence[float]
    style: int = 0
    spread: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Panel:
    """Lines over the points, on a logarithmic axis."""

    title: str
    lines: Sequence[Line]


def require() -> None:
    """Raise MissingDependencyError, with the command that installs it, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(f"--plot needs matplotlib, which is not installed: {INSTALL}")


def propagation(found: Propagation, title: str, path: Path) -> None:
    """Draw what :func:`foldexport.propagation.measure` found as a PNG at ``path``.

    Panels: activation variance, gradient variance, and the pending scale where there is one. Raises MissingDependencyError.
    """
    save(propagation_panels(found), found.names, axis_label(found.kind), title, path)


def propagation_panels(found: Propagation) -> list[Panel]:
    """The panels of :func:`propagation`; nothing that is empty."""
    networks = [("training graph", found.training)]
    if found.folded is not None:
        networks.append((_folded_label(found.folded), found.folded))
    panels = [
        Panel(text, [Line(name, getattr(signal, what), style) for style, (name, signal) in enumerate(networks)])
        for what, text in (("activation", "activation variance"), ("gradient", "gradient variance"))
        if any(_drawn(getattr(signal, what)) for _, signal in networks)
    ]
    if found.pending is not None:
        panels += _pending_panels(found.pending)
    return panels


def _folded_label(folded: Signal) -> str:
    """With how many points there are, where merging left some without a stored value."""
    held = sum(value == value for value in folded.activation)
    every = len(folded.activation)
    return "folded network, as stored" + ("" if held == every else f" ({held} of {every} points)")


def _pending_panels(pending: Sequence[Pending]) -> list[Panel]:
    """``v = a ⊙ s + t``: nothing where every known a is 1 and t is 0."""
    lines = []
    if any(each.smallest < 1 / VISIBLE or each.largest > VISIBLE for each in pending):
        several = any(each.largest > VISIBLE * each.smallest for each in pending)
        spread = ([each.smallest for each in pending], [each.largest for each in pending]) if several else None
        lines.append(Line("scale |a|", [each.scale for each in pending], 2, spread))
    if any(each.shift > 0 for each in pending):
        lines.append(Line("shift |t|", [each.shift for each in pending], 3))
    over = " (median over channels)" if any(line.spread for line in lines) or len(lines) > 1 else ""
    return [Panel(f"pending: value = a · stored + t{over}", lines)] if lines else []


def axis_label(kind: str) -> str:
    """What a point of the horizontal axis is."""
    return {
        "residual sum": "output of a residual sum, by the module that adds",
        "layer": "output of a layer (convolution or linear, with what is affine behind it)",
    }.get(kind, kind)


def save(panels: Sequence[Panel], names: Sequence[str], axis: str, title: str, path: Path) -> None:
    """Draw panels over the points ``names`` as a PNG at ``path``. Raises MissingDependencyError."""
    # Without the version of matplotlib in it, the file changes only with the picture.
    figure(panels, names, axis, title).savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def figure(panels: Sequence[Panel], names: Sequence[str], axis: str, title: str) -> Figure:
    """The picture of :func:`save`, of matplotlib's own kind; no window and no global state."""
    require()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = [_short(name) for name in names]
    with rc_context(FONT):
        height = 0.9 + PANEL_INCHES * len(panels) + 0.055 * max(map(len, labels), default=0)
        made = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(made)
        made.suptitle(_balanced(title), fontsize=11.5, x=0.012, ha="left", fontweight="bold")
        for place, panel in enumerate(panels):
            axes = made.add_subplot(len(panels), 1, place + 1)
            _draw(axes, panel, names)
            if _labels(panel) and (place == 0 or _labels(panel) != _labels(panels[place - 1])):
                _legend(axes)
            _label_points(axes, labels if place == len(panels) - 1 else None)
            if place == len(panels) - 1:
                axes.set_xlabel(axis)
        made.draw_without_rendering()
    return made


def _draw(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    axes.set_yscale("log")
    axes.set_title(panel.title, loc="left", color="#222222")
    axes.set_facecolor("white")
    axes.grid(True, axis="y", color="#E2E2E2", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for start in _stages(names):
        axes.axvline(start - 0.5, color="#CFCFCF", linewidth=0.8, zorder=0.5)
    for line in panel.lines:
        _draw_line(axes, line, len(names))
    _limit(axes, panel)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _labels(panel: Panel) -> list[str]:
    return [line.label for line in panel.lines if line.label]


def _legend(axes: Any) -> None:
    """Beside the panel's title; where that is too narrow, on lines of its own above."""
    labels = axes.get_legend_handles_labels()[1]
    common = {"frameon": False, "handlelength": 3.2, "columnspacing": 1.6}
    if len(labels) <= BESIDE_TITLE:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, ncols=len(labels), **common)
        return
    columns = min(len(labels), max(1, LEGEND_COLUMNS // (8 + max(map(len, labels)))))
    if sum(8 + len(label) for label in labels) <= LEGEND_COLUMNS:
        columns = len(labels)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.035, 1.0), borderaxespad=2.2, ncols=columns, **common)


def _draw_line(axes: Any, line: Line, count: int) -> None:
    style = dict(STYLES[line.style % len(STYLES)])
    if count > 2 * MOST_LABELS:  # markers of so many points would touch
        style["markevery"] = math.ceil(count / MOST_LABELS)
    places = range(count)
    if line.spread is not None:
        low, high = (_positive(values) for values in line.spread)
        axes.fill_between(places, low, high, color=style["color"], alpha=0.16, linewidth=0)
    axes.plot(places, _positive(line.values), label=line.label or None, linewidth=1.7, **style)


def _limit(axes: Any, panel: Panel) -> None:
    """From the smallest to the largest value with some air, and never less than `FEWEST_DECADES`."""
    every = [values for line in panel.lines for values in (line.values, *(line.spread or ()))]
    drawn = [value for values in every for value in _drawn(values)]
    if not drawn:
        return
    low, high = max(-SHOWN_DECADES, math.log10(min(drawn))), min(SHOWN_DECADES, math.log10(max(drawn)))
    missing = max(0.0, FEWEST_DECADES - (high - low))
    air = 0.08 * max(high - low, FEWEST_DECADES)
    axes.set_ylim(10 ** (low - missing / 2 - air), 10 ** (high + missing / 2 + air))
    _number(axes, high - low + missing + 2 * air)


def _number(axes: Any, decades: float) -> None:
    """Powers of ten; over few decades plain numbers, and 2 and 5 between them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < FEW_DECADES:
        plain = FuncFormatter(lambda value, _: _number_text(value))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(plain)
        axes.yaxis.set_major_formatter(plain)
        axes.grid(True, axis="y", which="minor", color="#F0F0F0", linewidth=0.7)


def _number_text(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**exponent)
    return f"$10^{{{exponent}}}$" if digit == 1 else f"${digit}\\cdot 10^{{{exponent}}}$"


def _label_points(axes: Any, labels: Sequence[str] | None) -> None:
    count = len(labels) if labels is not None else 0
    if labels is None:
        axes.tick_params(axis="x", labelbottom=False, length=0)
        axes.set_xticks([])
        return
    step = max(1, math.ceil(count / MOST_LABELS))
    turned = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, count, step), [labels[place] for place in range(0, count, step)], **turned)


def _stages(names: Sequence[str]) -> list[int]:
    """Where the module around the points changes, if that groups them at all."""
    around = [name.partition(" #")[0].rpartition(".")[0] for name in names]
    starts = [place for place in range(1, len(around)) if around[place] != around[place - 1]]
    return starts if len(starts) <= len(names) // 2 else []


def _balanced(title: str) -> str:
    """Broken into lines of about one length."""
    lines = math.ceil(len(title) / TITLE_COLUMNS)
    return textwrap.fill(title, TITLE_COLUMNS if lines < 2 else min(TITLE_COLUMNS, len(title) // lines + 10))


def _short(name: str) -> str:
    """The end of a long name, from the start of a part of it where that is short enough."""
    if len(name) <= LONGEST_LABEL:
        return name
    end = name[1 - LONGEST_LABEL :]
    return "…" + (end.partition(".")[2] or end)


def _positive(values: Sequence[float]) -> list[float]:
    """What a logarithmic axis can hold; a gap elsewhere."""
    return [value if math.isfinite(value) and value > 0 else math.nan for value in values]


def _drawn(values: Sequence[float]) -> list[float]:
    return [value for value in _positive(values) if value == value]
