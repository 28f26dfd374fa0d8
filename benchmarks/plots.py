"""The plots of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.case import CALLBACK, COMPILED, FLAX, OURS, OURS_XLA, TORCH, WRAP, XLA

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    TORCH: "#000000",
    OURS: "#D55E00",
    OURS_XLA: "#56B4E9",
    WRAP: "#0072B2",
    XLA: "#999999",
    FLAX: "#009E73",
    CALLBACK: "#CC79A7",
    COMPILED: "#E69F00",
}
MARKERS = {TORCH: "s", OURS: "o", WRAP: "^", XLA: "x", CALLBACK: "D"}
BARS = (OURS, OURS_XLA, WRAP, FLAX)
BAR_LIMIT = 4.0
"""Bars end here; higher ones are cut, with their number at the end."""


def short(value: float) -> str:
    """A tick's label: 1, 300, 10k, 10M."""
    for size, sign in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def lines(axes: Axes, result: dict[str, Any], xlabel: str) -> None:
    """Time against the row, a line for each competitor, both axes logarithmic."""
    for name in COLOURS:
        points = []
        for label, row in result["rows"].items():
            if "spread" in row.get(name, {}):
                points.append((int(label.replace(" ", "")), row[name]["spread"]["median"] * 1e6))
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[name],
                marker=MARKERS[name],
                lw=2.4 if name == OURS else 1.5,
                ms=6,
                label=name,
                zorder=3 if name == OURS else 2,
            )
    plain = FuncFormatter(lambda value, _: short(value))
    axes.set(xscale="log", yscale="log", xlabel=xlabel, title=result["title"].partition(",")[0])
    axes.set_xticks(sorted({int(label.replace(" ", "")) for label in result["rows"]}))
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def call_cost(cases: dict[str, Any], jitted: str, eager: str, xlabel: str, title: str, path: Path) -> None:
    """Two panels, jitted and eager, on the same scale."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    for axes, name in zip(panels, (jitted, eager), strict=True):
        lines(axes, cases[name], xlabel)
    panels[0].set_ylabel("time of one call (µs)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(axes: Axes, result: dict[str, Any]) -> None:
    """Ratio to torch, a group of bars for each model."""
    height = 0.8 / len(BARS)
    for place, row in enumerate(result["rows"].values()):
        for index, name in enumerate(BARS):
            y = place + (index - (len(BARS) - 1) / 2) * height
            ratio = row.get(name, {}).get("ratio")
            if ratio is None:
                axes.text(0.03, y, "–", va="center", fontsize=9, color=COLOURS[name])
                continue
            low, high = (max(0.0, abs(ratio[k] - ratio["median"])) for k in ("low", "high"))
            shown = min(ratio["median"], BAR_LIMIT)
            cut = ratio["median"] > BAR_LIMIT
            high = min(high, BAR_LIMIT - shown)
            axes.barh(
                y,
                shown,
                height * 0.92,
                color=COLOURS[name],
                label=name if place == 0 else None,
                xerr=None if cut else [[low], [high]],
                error_kw=dict(lw=1, ecolor="#444444"),
            )
            at = shown if cut else ratio["median"] + high
            text = f"{ratio['median']:.2f}" + (" →" if cut else "")
            box = dict(boxstyle="square,pad=0.1", facecolor="white", edgecolor="none")
            axes.text(at + 0.05, y, text, va="center", fontsize=8.5, bbox=box)
    axes.axvline(1.0, color="black", lw=1.2, ls="--")
    labels = [label.replace(", ", "\n", 1) for label in result["rows"]]
    axes.set(yticks=range(len(labels)), yticklabels=labels)
    axes.set(title=result["title"], xlabel="time, as a multiple of torch's", xlim=(0, BAR_LIMIT + 0.5))
    axes.set_ylim(len(result["rows"]) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def models(cases: dict[str, Any], path: Path) -> None:
    """The forward pass and the value and gradient of all models."""
    rows = len(cases["value-and-grad"]["rows"])
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.8 + 0.85 * rows), sharey=True, layout="constrained")
    for axes, name in zip(panels, ("forward", "value-and-grad"), strict=True):
        bars(axes, cases[name])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Models: how long they take beside torch (dashed line; shorter is better)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(cases: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what there are results for; returns the pictures."""
    drawn = []
    plt.rcParams["font.size"] = 11
    if {"arguments-jitted", "arguments-eager"} <= cases.keys():
        drawn.append(folder / "call_cost_by_arguments.png")
        title = "What a call costs: arguments of 10 floats each"
        call_cost(cases, "arguments-jitted", "arguments-eager", "number of arguments", title, drawn[-1])
    if {"sizes-jitted", "sizes-eager"} <= cases.keys():
        drawn.append(folder / "call_cost_by_size.png")
        title = "What a call costs: x + 1, by the size of x"
        call_cost(cases, "sizes-jitted", "sizes-eager", "floats in x", title, drawn[-1])
    if {"forward", "value-and-grad"} <= cases.keys():
        drawn.append(folder / "models.png")
        models(cases, drawn[-1])
    return drawn
