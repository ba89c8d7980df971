"""Check the data sets under a data root before training: which splits are there, and what is missing.

Examples:
  python scripts/check_data.py /data
  python scripts/check_data.py /data --datasets coco --decode

Exit status: 0 complete, 1 something is missing or damaged, 2 wrong command line.

"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.inspection import LOOKED_FOR, describe, inspect_data_set, present_data_sets
from hacan.errors import path, printable


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=path, help="folder that contains the data set's folder, as for run.py")
    parser.add_argument("--datasets", choices=list(LOOKED_FOR), help="check only this one (default: all found)")
    parser.add_argument("--decode", action="store_true", help="decode every image and list those that fail")
    parser.add_argument("--no-restval", action="store_true", help="COCO: without the restval images")
    parser.add_argument("--all", action="store_true", help="list all missing or damaged images (default: ten)")
    options = parser.parse_args(arguments)
    root = options.data_root
    if not root.is_dir():
        print(f"{root} {'is not a folder' if root.exists() else 'does not exist'}", file=sys.stderr)
        return 1
    names = [options.datasets] if options.datasets else present_data_sets(root)
    if not names:
        print(f"nothing found under {root}; looked for")
        for name, places in LOOKED_FOR.items():
            print(f"  {name:<9}{' or '.join(str(root / place) for place in places)}")
        return 1
    complete = True
    for name in names:
        findings = inspect_data_set(name, root, use_restval=not options.no_restval, decode=options.decode)
        lines = describe(findings, most=sys.maxsize if options.all else 10).split("\n")
        print("\n".join(map(printable, lines)))
        complete &= findings.complete
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
