"""Search an index by a sentence or by an image.

Examples:
  python scripts/search.py INDEX "two dogs run on grass" --top 10
  python scripts/search.py INDEX "two dogs run on grass" --html found.html --explain
  python scripts/search.py INDEX --image query.jpg --find pictures

Exit status: 0 done, 2 error.

"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error, printable


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="folder of the index, or s3://BUCKET/FOLDER")
    parser.add_argument("text", nargs="?", default="", help="a sentence")
    parser.add_argument("--image", type=path, help="query image: finds texts, or similar images")
    parser.add_argument(
        "--find",
        choices=["pictures", "texts"],
        default="",
        help="what an image finds (default: texts if there are any)",
    )
    parser.add_argument("--top", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument(
        "--shortlist",
        type=int,
        default=50,
        help="number K of items that the fine stage re-ranks (default: %(default)s)",
    )
    parser.add_argument("--html", type=path, help="also write an HTML page with thumbnails")
    parser.add_argument("--explain", action="store_true", help="add word heatmaps to the page (default file: "
                        "search.html)")  # fmt: skip
    parser.add_argument("--model", type=path, help="location of the model, if it was moved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        from hacan.search import Index
        from hacan.search.results_page import format_table, write_page

        page = options.html or (Path("search.html") if options.explain else None)
        with Index.open(options.index, model=options.model, device=options.device) as index:
            results = index.search(
                options.text, image=options.image, find=options.find, top=options.top, shortlist=options.shortlist
            )
            print(format_table(results))
            if page:
                skipped = write_page(
                    page,
                    results,
                    text=options.text,
                    image=options.image,
                    explain_with=index.pretrained if options.explain else None,
                )
                for line in skipped:
                    print(printable(f"skipped: {line}"), file=sys.stderr)
                print(f"wrote {page}")
                if options.explain and all(result.fine is None for result in results):
                    print("no heatmaps: two images have no words", file=sys.stderr)
    except UserError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
