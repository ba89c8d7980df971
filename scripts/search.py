"""Searches an index by a sentence or by a picture.

    python scripts/search.py INDEX "two dogs run on grass" [--top 10] [--html out.html] [--explain]
    python scripts/search.py INDEX --image query.jpg [--find pictures]

Exit status: 0 done, 2 something is to be mended.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, search, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", type=Path)
    parser.add_argument("text", nargs="?", default="", help="a sentence")
    parser.add_argument("--image", type=Path, help="search by this picture: finds texts, or similar pictures")
    parser.add_argument("--find", choices=["pictures", "texts"], default="", help="what a picture is to find")
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--shortlist", type=int, default=50, help="K: how many the fine stage re-ranks")
    parser.add_argument("--html", type=Path, help="also write a contact sheet: one file, pictures inside")
    parser.add_argument("--explain", action="store_true", help="heatmaps of the words, in the sheet (search.html if "
                        "none is named)")  # fmt: skip
    parser.add_argument("--model", type=Path, help="where the model is now, if it has moved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    try:
        from hacan.search import Index
        from hacan.search.results_page import format_table, write_page

        sheet = options.html or (Path("search.html") if options.explain else None)
        with Index.open(options.index, model=options.model, device=options.device) as index:
            results = index.search(
                options.text, image=options.image, find=options.find, top=options.top, shortlist=options.shortlist
            )
            print(format_table(results))
            if sheet:
                skipped = write_page(
                    sheet,
                    results,
                    text=options.text,
                    image=options.image,
                    explain_with=index.pretrained if options.explain else None,
                )
                for line in skipped:
                    print(f"left out: {line}", file=sys.stderr)
                print(f"contact sheet: {sheet}")
                if options.explain and all(result.fine is None for result in results):
                    print("without heatmaps: between two pictures there are no words to map", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
