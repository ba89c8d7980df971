"""Index a folder of images, so that it can be searched by sentences and images.

Examples:
  python scripts/index.py PICTURES_DIR --model EXPORTED_FOLDER --index INDEX
  python scripts/index.py PICTURES_DIR --index INDEX                          again, after changes
  python scripts/index.py PICTURES_DIR --index INDEX --captions texts.csv     also texts, which images find

Known images are not encoded again, deleted ones are removed, and an interrupted run resumes.
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
    parser.add_argument("pictures", type=path, help="folder of images, at any depth")
    parser.add_argument("--model", type=path, help="exported folder or checkpoint; required for a new index, "
                        "later runs use the same model")  # fmt: skip
    parser.add_argument("--index", required=True, help="folder of the index, or s3://BUCKET/FOLDER; created if needed")
    parser.add_argument("--captions", type=path, help="CSV file with a column caption: texts that images find")
    parser.add_argument("--store", help=argparse.SUPPRESS)  # the address of a Qdrant server, before LanceDB
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.store is not None:
            raise UserError(
                "--store: there is no Qdrant any more; keep the whole index there, --index s3://BUCKET/FOLDER"
            )
        from hacan.search.folder import images_below, texts_of_csv
        from hacan.search.index import Index

        texts = texts_of_csv(options.captions) if options.captions else None
        images_below(options.pictures)  # a wrong folder is found before the model is loaded
        if Index.exists(options.index):
            index = Index.open(options.index, model=options.model, device=options.device)
        elif options.model is None:
            raise UserError(f"{options.index} is not there yet: give --model OUT_DIR_OR_CKPT to make it")
        else:
            index = Index.create(options.index, model=options.model, device=options.device)
        update = index.update(options.pictures)
        changes = index.set_texts(texts) if texts is not None else None
        for place, reason in update.bad:
            print(printable(f"skipped {place}: {reason}"), file=sys.stderr)
        print(
            f"{options.index}: {index.count()} images ({update.added} added, {update.kept} kept, "
            f"{update.moved} of them moved, {update.removed} removed, {len(update.bad)} files skipped)"
        )
        if update.left_out:
            kinds = sorted(update.left_out.items(), key=lambda kind: (-kind[1], kind[0]))
            print(printable(f"left out: {', '.join(f'{count} {kind}' for kind, count in kinds)}"))
        if changes:
            print(f"{index.count('texts')} texts ({changes.added} added, {changes.removed} removed)")
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
