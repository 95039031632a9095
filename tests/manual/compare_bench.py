"""What changed between two runs of bench.py: python -m tests.manual.compare_bench A.json B.json

Compares each row's time per image as a ratio to that of a copy, timed right before each pass: the
machine's own speed cancels. Lists the rows whose ratios differ beyond their spread (half the IQRs
of both runs), and those that only one run has. Exits with 1 where a row differs by more than
--limit percent, or none can be compared.
"""

import argparse
import json
import sys
from pathlib import Path

Key = tuple[str, ...]


def ratios(path: Path) -> dict[Key, tuple[float, float]]:
    """For each row its time over the copy's, and the relative spread of this ratio."""
    document = json.loads(path.read_text())
    keys = ("device", "protocol", "name", "dtype", "batch", "synchronised")
    found = {}
    for row in document["rows"] + document.get("chains", []):
        if ratio := row.get("times_copy"):
            found[tuple(str(row[key]) for key in keys)] = ratio, row["times_copy_iqr"] / ratio / 2
    return found


def compare(first: Path, second: Path) -> list[tuple[str, float, float]]:
    """(row, relative change of its ratio, spread of both), the largest change first."""
    a, b = ratios(first), ratios(second)
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
    a, b = ratios(args.first).keys(), ratios(args.second).keys()
    for key in sorted(a ^ b):
        print(f"only in {(args.first if key in a else args.second).name}: {' '.join(key)}")
    over = sum(abs(change) > args.limit / 100 for _, change, _ in changes)
    largest = abs(changes[0][1]) if changes else 0
    print(f"{len(changes)} rows, {over} beyond {args.limit:g} %, the largest change {largest:.1%}")
    sys.exit(over > 0 or not changes)


if __name__ == "__main__":
    main()
