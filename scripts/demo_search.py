"""The end of `make demo`: indexes the demo's test pictures with the newest trained model and asks one question.

python scripts/demo_search.py [--runs result/demo] [--data data/demo]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, index, search, name the contact sheet; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("result/demo"), help="the runs of the demo")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="the demo's pictures")
    options = parser.parse_args(arguments)
    try:
        found = list(options.runs.glob("*/checkpoints/best.ckpt"))
        if not found:
            raise UserError(f"no {options.runs}/*/checkpoints/best.ckpt: train the demo first, run.py with demo_config")
        checkpoint = max(found, key=lambda path: path.stat().st_mtime)
        home = checkpoint.parents[1] / "search"
        shutil.rmtree(home, ignore_errors=True)  # of an earlier demo search
        sentence = gather_test_pictures(options.data, home / "pictures")

        from hacan.search import Index
        from hacan.search.results_page import format_table, write_page

        with Index.create(home / "index", model=checkpoint) as index:
            index.update(home / "pictures")
            results = index.search(sentence)
            print(f'\n"{sentence}" among {index.count()} pictures:\n{format_table(results)}')
            sheet = home / "found.html"
            write_page(sheet, results, text=sentence, explain_with=index.pretrained)
            print(
                f"\nContact sheet, with what each word matched: {sheet.resolve()}\n"
                f'Your turn: {sys.executable} scripts/search.py {index.path} "..." or scripts/serve.py {index.path}'
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def gather_test_pictures(data: Path, folder: Path) -> str:
    """Copy the demo's test pictures, which lie among those of training, to a folder; returns a caption of one."""
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
