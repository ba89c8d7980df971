"""Second part of `make demo`: index the demo's test images with the newest trained model and run one query.

Examples:
  python scripts/demo_search.py
  python scripts/demo_search.py --runs result/demo --data data/demo

"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=path, default=Path("result/demo"), help="folder of the demo's runs (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=path, default=Path("data/demo"), help="data root of the demo (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        found = list(options.runs.glob("*/checkpoints/best.ckpt"))
        if not found:
            raise UserError(f"no {options.runs}/*/checkpoints/best.ckpt: train the demo first, run.py with demo_config")
        checkpoint = max(found, key=lambda path: path.stat().st_mtime)
        home = checkpoint.parents[1] / "search"
        shutil.rmtree(home, ignore_errors=True)  # of an earlier demo search
        sentence = copy_test_images(options.data, home / "pictures")

        from hacan.search import Index
        from hacan.search.results_page import format_table, write_page

        with Index.create(home / "index", model=checkpoint) as index:
            index.update(home / "pictures")
            results = index.search(sentence)
            print(f'\n"{sentence}" among {index.count()} images:\n{format_table(results)}')
            page = home / "found.html"
            write_page(page, results, text=sentence, explain_with=index.pretrained)
            print(
                f"\nResults with word heatmaps: {page.resolve()}\n"
                f'Try: {sys.executable} scripts/search.py {index.address} "..." or scripts/serve.py {index.address}'
            )
    except UserError as error:
        return print_error(error)
    return 0


def copy_test_images(data: Path, folder: Path) -> str:
    """Copy the demo's test images to a folder; return a caption of one."""
    source = data / "scenes" / "dataset_scenes.json"
    if not source.is_file():
        raise UserError(f"there is no {source}: train the demo first, run.py with demo_config")
    images = [image for image in json.loads(source.read_text(encoding="utf-8"))["images"] if image["split"] == "test"]
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        shutil.copy(source.parent / image["filepath"] / image["filename"], folder)
    return images[0]["sentences"][0]["raw"]


if __name__ == "__main__":
    sys.exit(main())
