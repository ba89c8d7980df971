"""Indexes a folder of pictures, so that sentences and pictures can be searched for in it.

    python scripts/index.py PICTURES_DIR --model OUT_DIR_OR_CKPT --index INDEX [--captions texts.csv]

Run it again after changes: known pictures are not encoded again, deleted ones leave; interrupted, it goes on. Exit
status: 0 done, 2 something is to be mended.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, index, say what was done; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder of jpg, png and webp files, at any depth")
    parser.add_argument("--model", type=Path, help="a folder of scripts/export.py or a training's checkpoint; a new "
                        "index needs it, a later run takes the same one")  # fmt: skip
    parser.add_argument("--index", type=Path, required=True, help="the index: a folder, made if it is not there")
    parser.add_argument("--captions", type=Path, help="a CSV file with a column caption: texts for pictures to find")
    parser.add_argument("--store", default="", help="of a new index: URL of a Qdrant server or cluster")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    try:
        from hacan.search.folder import images_below, texts_of_csv
        from hacan.search.index import FILE, Index

        texts = texts_of_csv(options.captions) if options.captions else None
        images_below(options.pictures)  # a wrong folder is found before the model is loaded
        if (options.index / FILE).exists():
            index = Index.open(options.index, model=options.model, device=options.device)
            if options.store and options.store != index.about["store"]:
                raise UserError(f"{options.index} keeps its vectors elsewhere: index into a new folder with --store")
        elif options.model is None:
            raise UserError(f"{options.index} is not there yet: give --model OUT_DIR_OR_CKPT to make it")
        else:
            index = Index.create(options.index, model=options.model, store=options.store, device=options.device)
        with index:
            update = index.update(options.pictures)
            changes = index.set_texts(texts) if texts is not None else None
            for path, reason in update.bad:
                print(f"skipped {path}: {reason}", file=sys.stderr)
            print(
                f"{options.index}: {index.count()} pictures ({update.added} added, {update.kept} kept, "
                f"{update.moved} of them moved, {update.removed} removed, {len(update.bad)} files skipped)"
            )
            if changes:
                print(f"{index.count('texts')} texts ({changes.added} added, {changes.removed} removed)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
