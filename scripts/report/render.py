"""Renders the records of benchmarks/ into docs/benchmarks.md, with its pictures in docs/benchmarks/.

    python -m scripts.report.render

Run it whenever a record changes; a test compares the page with the records. It needs matplotlib (pip install
penstock[plot]).
"""

import argparse
import sys
from pathlib import Path

from penstock.engine.commands.flags import Parser

from scripts.bench.entry import run_script
from scripts.report.lanes import draw_lanes
from scripts.report.page import render
from scripts.report.plots import draw_all
from scripts.report.records import read_records

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", metavar="FOLDER", help="of page and pictures")
    args = parser.parse_args()
    records = read_records(args.records)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmarks.md").write_text(render(records), encoding="utf-8")
    draw_all(records, args.output / "benchmarks")
    draw_lanes(args.records, args.output / "benchmarks")
    print(f"{len(records)} records -> {args.output / 'benchmarks.md'}")


if __name__ == "__main__":
    sys.exit(run_script(main))
