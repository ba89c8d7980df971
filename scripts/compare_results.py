"""Compares two evaluated runs query by query, or says why they cannot be compared.

    python scripts/compare_results.py RUN_A RUN_B [--across top_k]

RUN is a run's folder, or its metrics.json with ranks.npz beside it. Exit status: 0 compared, 2 not comparable or not
readable.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError
from hacan.retrieval.significance import compare_results, load_result


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compare, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument(
        "--across", action="append", default=[], metavar="FIELD", help="a rule in which they may differ on purpose"
    )
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap and the sign-flip test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        first, second = load_result(options.first), load_result(options.second)
        print(
            compare_results(first, second, across=tuple(options.across), resamples=options.resamples, seed=options.seed)
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
