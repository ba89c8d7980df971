"""Compare two evaluated runs query by query with a paired test.

Examples:
  python scripts/compare_results.py result/a/1 result/b/1
  python scripts/compare_results.py result/a/1 result/b/1 --across top_k

A run is its folder, or its metrics.json with ranks.npz beside it. Exit status: 0 compared, 2 not comparable
or unreadable.

"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=path, help="run folder or metrics.json")
    parser.add_argument("second", type=path, help="run folder or metrics.json")
    parser.add_argument(
        "--across",
        action="append",
        default=[],
        metavar="FIELD",
        help="field of the protocol that may differ, such as top_k or coarse; can be repeated",
    )
    parser.add_argument(
        "--resamples", type=int, default=10_000, help="bootstrap resamples and sign flips (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        from hacan.retrieval.significance import compare_results, load_result  # imports torch

        first, second = load_result(options.first), load_result(options.second)
        print(
            compare_results(first, second, across=tuple(options.across), resamples=options.resamples, seed=options.seed)
        )
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
