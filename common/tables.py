"""bench.py's tables, on the terminal and as Markdown, beside the JSON and the charts."""

import json
from pathlib import Path
from typing import Any

from common import bench_figures
from common.checkpoints import write_text
from common.photos import BASE, PIL_BASE
from common.timing import BATCHED, NOISY, SEQUENTIAL

# Sections 1.4.1 and 2.2.1 of the report: mean seconds for 10,000 images on its machine.
REPORT = {
    ("cuda", "fc"): 0.139562,
    ("cpu", "fc"): 0.13146,
    ("cpu", SEQUENTIAL): 0.754336,
    ("cuda", "cnn"): 0.587102,
    ("cpu", "cnn"): 2.900498,
}
COLUMNS = [
    "row", "dtype", "batch", "images", "runs", "median ms", "IQR", "min ms", "mean ms", "us/image",
    "x batched", "x single", "of copy", "error", ">= 0.95",
]  # fmt: skip
CHAIN_COLUMNS = [
    "row", "batch", "runs", "ms/image", "IQR", "x tensor", "x PIL", "equal", "mean", "max levels",
]  # fmt: skip
TITLES = {
    "report": "protocol report: mean ms is the report's figure",
    "tensor": "protocol tensor",
    "eval": "Resize(256), CenterCrop(224), ToDtype, Normalize on 375 x 500",
    "train": "RandomResizedCrop(224), RandomHorizontalFlip, ToDtype, Normalize on 375 x 500",
}
LEGEND = (
    f"x batched: times as fast as {BATCHED}, x single: as {SEQUENTIAL}, each at its fastest batch "
    "size on the same device in the same protocol",
    "of copy: bytes that must be moved per second, as a share of the fastest copy's",
    f"! marks an IQR of more than {NOISY:.0%} of the median",
    f"photographs: x tensor: times as fast as {BASE}, image by image or in a batch, x PIL: as "
    f"{PIL_BASE}; equal: share of values within half a level of torchvision on uint8 tensors",
)


def order(row: dict) -> tuple:
    """Sorts rows: by device and protocol, the fastest first, those without a time last."""
    return row["device"], row["protocol"], row["us_per_image"] or float("inf")


def write(stem: Path, document: dict[str, Any]) -> None:
    """The JSON, the tables on the terminal and as Markdown, and the charts. stem: their path
    without a suffix."""
    write_text(stem.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
    title, sections, notes = describe(document), sections_of(document), notes_of(document)
    print(title)
    markdown = f"# {title}\n\n`python {document['environment']['command']}`\n"
    for heading, head, rows in sections:
        print(f"\n{heading}")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in [head, *rows]:
            cells = zip(row, widths, strict=True)
            print("  ".join(f"{x:>{w}}" if i else f"{x:{w}}" for i, (x, w) in enumerate(cells)))
        lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
        markdown += f"\n## {heading}\n\n" + "".join(f"| {' | '.join(x)} |\n" for x in lines)
    print("\n" + "\n".join(notes))
    write_text(stem.with_suffix(".md"), markdown + "\n" + "".join(f"- {x}\n" for x in notes))
    bench_figures.bars(stem.with_suffix(".png"), document["rows"], REPORT, title)
    growth = stem.with_name(stem.name + "-growth.png")
    bench_figures.growth(growth, document["growth"], document["crossover"], title)
    chains = stem.with_name(stem.name + "-chains.png")
    images = max((row["images"] for row in document["chains"]), default=0)
    title = describe(document, f"{images} synthetic photographs")
    bench_figures.chains(chains, document["chains"], TITLES, title)
    print(f"results in {stem}.json, .md, .png, -growth.png and -chains.png")


def describe(document: dict[str, Any], what: str = "") -> str:
    """What was measured where, in one line. what: other images than those of the rows."""
    e, args = document["environment"], document["args"]
    what = what or f"{args['images']} {document['data']} images"
    title = f"{what}, {args['runs']} runs, torch {e['torch']}, "
    title += f"{e['threads']} threads of {e['processor']} "
    title += f"({', '.join(e['instruction_sets'])})"
    title += f", {e['gpu']}" if e["gpu"] else ""
    return title if document["standard"] else f"SHORTER THAN STANDARD: {title}"


def notes_of(document: dict[str, Any]) -> list[str]:
    """What the rows say of themselves, each once, and how to read the tables."""
    rows = document["rows"] + document["chains"]
    notes = list(dict.fromkeys(f"{row['name']}: {row['note']}" for row in rows if row["note"]))
    if document["not_installed"]:
        notes.append(f"not installed: {', '.join(document['not_installed'])}")
    return notes + list(LEGEND)


def sections_of(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, columns, rows of cells) of each table."""
    groups: dict[tuple, list] = {}
    for row in document["rows"]:
        groups.setdefault((row["device"], row["protocol"]), []).append(cells(row))
    sections = [
        (f"{d}, {TITLES[protocol]}", COLUMNS, rows) for (d, protocol), rows in groups.items()
    ]
    head = ["device", "net", "against", "faster from batch", "x at 1", "x near 100", "x at largest"]
    rows = [crossover_cells(entry) for entry in document["crossover"]]
    sections.append(("from which batch size on is the net faster", head, rows))
    groups = {}
    for row in document["chains"]:
        groups.setdefault((row["device"], row["protocol"]), []).append(chain_cells(row))
    return sections + [
        (f"{d}, {TITLES[name]}", CHAIN_COLUMNS, rows) for (d, name), rows in groups.items()
    ]


def crossovers(sweep: list[dict], nets: list[str]) -> list[dict[str, Any]]:
    """For each device, net and opponent: the least batch size from which on, to the largest that
    was tried, the net is faster (None: it is not); and the net's speed over the opponent's at each.

    sweep: rows of one batch each. torchvision image by image takes the time of one image for each
    image of the batch.
    """
    found = []
    for device in dict.fromkeys(row["device"] for row in sweep):
        times: dict[str, dict[int, float]] = {}
        for row in sweep:
            if row["device"] == device and row["median_s"]:
                times.setdefault(row["name"], {})[row["batch"]] = row["median_s"]
        one = times.get(SEQUENTIAL, {}).get(1)
        sizes = [row["batch"] for row in sweep if row["device"] == device]
        opponents = {
            SEQUENTIAL: {n: n * one for n in sizes} if one else {},
            BATCHED: times.get(BATCHED, {}),
            "fused": times.get("fused", {}),
        }
        for net in nets:
            for against, theirs in opponents.items():
                mine = times.get(net, {})
                ratios = {n: theirs[n] / mine[n] for n in sorted(mine.keys() & theirs.keys())}
                batch = None
                for n in reversed(ratios):
                    if ratios[n] <= 1:
                        break
                    batch = n
                entry = {"device": device, "net": net, "against": against, "from_batch": batch}
                found.append(entry | {"times_as_fast": ratios})
    return found


def spread(row: dict) -> str:
    if row["iqr_s"] is None:
        return ""
    return f"{row['iqr_s'] / row['median_s']:.0%}{'!' if row['noisy'] else ''}"


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def cells(row: dict) -> list[str]:
    """A row as text, column by column."""
    text = [row["name"] + ("" if row["synchronised"] else " (not waited for)"), row["dtype"]]
    text += [str(row["batch"]), str(row["images"]), str(row["runs"] or "")]
    if row["median_s"] is None:
        text += ["no time"] + [""] * 7
    else:
        text += [f"{1e3 * row['median_s']:.4g}", spread(row)]
        text += [f"{1e3 * row[key]:.4g}" for key in ("min_s", "mean_s")]
        text += [number(row[key]) for key in ("us_per_image", "speedup", "speedup_sequential")]
        text.append(number(row["share_of_copy"], ".0%"))
    return [*text, number(row["max_abs_error"], ".1e"), number(row["accuracy_0.95"], ".2%")]


def chain_cells(row: dict) -> list[str]:
    """A row of the photographs' tables as text."""
    text = [row["name"], str(row["batch"]), str(row["runs"] or "")]
    if row["median_s"] is None:
        text += ["no time"] + [""] * 3
    else:
        text += [number(row["us_per_image"] / 1e3), spread(row)]
        text += [number(row[key]) for key in ("speedup", "speedup_sequential")]
    forms = {"equal_share": ".1%", "mean_levels": ".2f", "max_levels": ".1f"}
    return text + [number(row.get(key), form) for key, form in forms.items()]


def crossover_cells(entry: dict) -> list[str]:
    """A crossover as text: the batch, and how many times as fast the net is at three sizes."""
    ratios = {int(size): ratio for size, ratio in entry["times_as_fast"].items()}
    text = [entry[key] for key in ("device", "net", "against")]
    if not ratios:
        return [*text, "not timed", "", "", ""]
    largest = max(ratios)
    near = min(ratios, key=lambda size: abs(size - 100))
    batch = entry["from_batch"]
    text.append(f"never up to {largest}" if batch is None else str(batch))
    text += [f"{ratios[min(ratios)]:.3g}", f"{ratios[near]:.3g} at {near}"]
    return [*text, f"{ratios[largest]:.3g} at {largest}"]
