"""What changed between two runs of bench.py: python -m tests.manual.compare_bench A.json B.json

Compares each row's time per image as a ratio to a base of the same run, device and protocol:
`copy`, or on photographs torchvision's fastest form. So the machine's own speed cancels. Lists the
rows whose ratios differ beyond their spread (half the IQRs of row and base, of both runs), and
those that only one run has. Exits with 1 where a row differs by more than --limit percent, or none
can be compared.
"""

import argparse
import json
import sys
from pathlib import Path

from common.photos import BASE, CHAINS

Key = tuple[str, ...]


def rows_of(path: Path) -> dict[Key, dict]:
    document = json.loads(path.read_text())
    keys = ("device", "protocol", "name", "dtype", "batch", "synchronised")
    rows = document["rows"] + document.get("chains", [])
    return {tuple(str(row.get(key, "")) for key in keys): row for row in rows if row["median_s"]}


def ratios(rows: dict[Key, dict]) -> dict[Key, tuple[float, float]]:
    """For each row its time per image over its base's, and the relative spread of this ratio."""
    bases: dict[Key, dict] = {}
    for key, row in rows.items():
        fastest = bases.get(key[:2])
        if row["name"] == (BASE if row["protocol"] in CHAINS else "copy") and (
            fastest is None or row["us_per_image"] < fastest["us_per_image"]
        ):
            bases[key[:2]] = row
    found = {}
    for key, row in rows.items():
        if base := bases.get(key[:2]):
            spread = sum(
                (r["iqr_s"] or 0) / r["median_s"] / 2
                for r in {id(row): row, id(base): base}.values()
            )
            found[key] = row["us_per_image"] / base["us_per_image"], spread
    return found


def compare(first: Path, second: Path) -> list[tuple[str, float, float]]:
    """(row, relative change of its ratio, spread of both), the largest change first."""
    a, b = (ratios(rows_of(path)) for path in (first, second))
    changes = []
    for key in a.keys() & b.keys():
        name = "{} {:8} {:36} {:8} batch {}".format(*key)
        changes.append((name, b[key][0] / a[key][0] - 1, a[key][1] + b[key][1]))
    return sorted(changes, key=lambda change: -abs(change[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--limit", type=float, default=15, help="percent (%(default)s)")
    parser.add_argument("--all", action="store_true", help="list every row")
    args = parser.parse_args()
    changes = compare(args.first, args.second)
    for name, change, spread in changes:
        if args.all or abs(change) > spread:
            verdict = "" if abs(change) <= spread else "slower" if change > 0 else "faster"
            print(f"{name:66} {change:+7.1%}  spread {spread:6.1%}  {verdict}")
    a, b = (rows_of(path).keys() for path in (args.first, args.second))
    for key in sorted(a ^ b):
        print(f"only in {(args.first if key in a else args.second).name}: {' '.join(key)}")
    over = sum(abs(change) > args.limit / 100 for _, change, _ in changes)
    largest = abs(changes[0][1]) if changes else 0
    print(f"{len(changes)} rows, {over} beyond {args.limit:g} %, the largest change {largest:.1%}")
    sys.exit(over > 0 or not changes)


if __name__ == "__main__":
    main()
