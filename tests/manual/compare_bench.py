"""What changed between two runs of bench.py: python -m tests.manual.compare_bench A.json B.json

Compares the mean time per image of each row. The machine's own change is divided out: it is taken
to be the median change of the rows of that device and protocol that do not run the operator, as one
row alone, such as `copy`, is not steady enough. It compares means, since a shared core is fast and
slow in turns, and a median jumps between the two. Lists the rows that changed beyond their spread
(half the IQRs of both runs), and those that only one run has. Exits with 1 where a row changed by
more than --limit percent, or none can be compared.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

Key = tuple[str, ...]


def rows_of(path: Path) -> dict[Key, dict]:
    document = json.loads(path.read_text())
    keys = ("device", "protocol", "name", "dtype", "batch", "synchronised")
    rows = document["rows"] + document.get("chains", [])
    return {tuple(str(row.get(key, "")) for key in keys): row for row in rows if row["median_s"]}


def compare(first: Path, second: Path) -> list[tuple[str, float, float]]:
    """(row, relative change beside the machine's own, spread), the largest change first."""
    a, b = rows_of(first), rows_of(second)
    growth, groups = {}, {}  # of the time of each row; of the rows that are not the operator's
    for key in a.keys() & b.keys():
        before, after = (rows[key]["mean_s"] / rows[key]["images"] for rows in (a, b))
        growth[key] = after / before
        if not key[2].startswith("fuse"):
            groups.setdefault(key[:2], []).append(growth[key])
    changes = []
    for key in growth:
        if key[:2] in groups:
            name = "{} {:8} {:36} {:8} batch {}".format(*key)
            spread = sum((rows[key]["iqr_s"] or 0) / rows[key]["median_s"] / 2 for rows in (a, b))
            changes.append((name, growth[key] / median(groups[key[:2]]) - 1, spread))
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
