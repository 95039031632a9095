"""bench.py's three charts: the rows as bars, time against batch size, the chains on photographs."""

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.patches import Patch

from common.figures import plt, save

HERE, PEER, TORCHVISION, REPORT = "tab:blue", "tab:orange", "tab:gray", "white"
MARKS = {"torchvision sequential": "o", "torchvision batched": "s", "fused": "D"}


def bars(
    path: Path, rows: list[dict[str, Any]], report: dict[tuple[str, str], float], title: str
) -> None:
    """A bar for each row that has a time, microseconds an image on a log scale, in a panel for each
    device and protocol. report: (device, row) -> seconds for 10,000 images by the report."""
    panels: dict[tuple, list] = {}
    for row in rows:
        if row["median_s"]:
            # the report's figure is the mean
            value = row["us_per_image"]
            if row["protocol"] == "report":
                value *= row["mean_s"] / row["median_s"]
            panels.setdefault((row["device"], row["protocol"]), []).append(
                (label(row), value, color(row))
            )
    for (device, name), value in report.items():
        if (device, "report") in panels:
            panels[device, "report"].append((f"{name}, by the report", 100 * value, REPORT))
    kinds = {HERE: "this repository", TORCHVISION: "torchvision", PEER: "other libraries"}
    kinds[REPORT] = "the report's own figures, on its machine"
    draw(path, panels, kinds, title, "microseconds per image", "protocol {}")


def chains(path: Path, rows: list[dict[str, Any]], titles: dict[str, str], title: str) -> None:
    """A bar for each form of a chain on photographs, milliseconds an image, with the speed-up over
    torchvision's fastest form and the error."""
    panels: dict[tuple, list] = {}
    for row in rows:
        if row["median_s"] and row["name"] != "copy":
            text = f"{row['name']}, {'one by one' if row['batch'] == 1 else 'batch'}"
            beside = f"{row['speedup']:.3g}x" if row["speedup"] else ""
            if row.get("mean_levels") is not None:
                beside += f", off by {row['mean_levels']:.2g} levels"
            key = row["device"], titles[row["protocol"]]
            panels.setdefault(key, []).append((text, row["us_per_image"] / 1e3, color(row), beside))
    kinds = {HERE: "fuse", TORCHVISION: "torchvision", PEER: "other libraries"}
    unit = "milliseconds per image; times as fast as torchvision on uint8; mean difference from it"
    draw(path, panels, kinds, title, unit, "{}")


def label(row: dict) -> str:
    text = f"{row['name']}, " + (
        "one by one" if row["batch"] == 1 else f"batches of {row['batch']}"
    )
    return text if row["synchronised"] else text + ", not waited for"


def color(row: dict) -> str:
    if row["peer"] or row["note"].endswith("not compared"):
        return PEER
    return TORCHVISION if row["name"].startswith("torchvision") else HERE


def draw(path: Path, panels: dict, kinds: dict, title: str, unit: str, heading: str) -> None:
    """Horizontal bars (label, value, color, text beside the value) in a panel for each key."""
    heights = [len(panel) + 2 for panel in panels.values()] or [1]
    figure, axes = plt.subplots(
        max(1, len(panels)), figsize=(9, 0.21 * sum(heights) + 1.3), height_ratios=heights,
        layout="constrained", squeeze=False, sharex=True,
    )  # fmt: skip
    for axis, ((device, name), panel) in zip(axes[:, 0], panels.items(), strict=False):
        panel.sort(key=lambda bar: bar[1], reverse=True)
        positions = range(len(panel))
        colors = [bar[2] for bar in panel]
        axis.barh(positions, [bar[1] for bar in panel], color=colors, edgecolor="black", lw=0.5)
        axis.set_yticks(positions, [bar[0] for bar in panel])
        for y, (_, value, _, *beside) in enumerate(panel):
            text = "  ".join([f" {value:.4g}", *beside])
            axis.text(value, y, text, va="center", fontsize=7)
        axis.set_title(f"{device}, {heading.format(name)}", fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3, axis="x", which="both")
        axis.set_axisbelow(True)
        axis.margins(y=0.01)
    values = [bar[1] for panel in panels.values() for bar in panel]
    if values:  # one scale for all panels, with room for the text
        longest = max(len("".join(bar[3:])) for panel in panels.values() for bar in panel)
        axes[-1, 0].set_xlim(min(values) / 2, max(values) * (4 if longest == 0 else 10))
    axes[-1, 0].set_xlabel(unit, fontsize=8)
    patches = [Patch(fc=fill, ec="black", lw=0.5, label=text) for fill, text in kinds.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=7)
    finish(figure, path, title)


def growth(path: Path, rows: list[dict], crossovers: list[dict], title: str) -> None:
    """Time of an image against the size of its batch, both logarithmic, in a panel for each device.
    A mark on a net's line shows from which batch size on it is faster than an opponent."""
    devices = sorted({row["device"] for row in rows}) or ["cpu"]
    figure, axes = plt.subplots(
        1, len(devices), figsize=(8.5 * len(devices), 5), layout="constrained", squeeze=False
    )
    for axis, device in zip(axes[0], devices, strict=True):
        lines = {}
        for row in rows:
            if row["device"] == device:
                lines.setdefault(row["name"], {})[row["batch"]] = row["us_per_image"]
        for i, (name, points) in enumerate(lines.items()):
            if len(points) == 1:  # the chain image by image takes no batch
                axis.axhline(*points.values(), c="black", ls="--", label=name)
            else:
                axis.plot(points.keys(), points.values(), ("-", "--")[i % 2], c=f"C{i}", label=name)
        for entry in crossovers:
            batch, mark = entry["from_batch"], MARKS[entry["against"]]
            if entry["device"] == device and batch is not None:
                value = lines[entry["net"]][batch]
                axis.plot(batch, value, mark, ms=8, mfc="none", mec="black")
        for name, mark in MARKS.items():
            axis.plot([], [], mark, mfc="none", mec="black", label=f"from here faster than {name}")
        axis.set(yscale="log", title=device)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("images in a batch")
        axis.set_ylabel("microseconds per image (median)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    finish(figure, path, title)


def finish(figure, path: Path, title: str) -> None:
    figure.suptitle(textwrap.fill(title, 120), fontsize=8)
    save(figure, path)
