"""Draw which regions of an image each word of a caption attends to, for the three streams of the alignment.

Examples:
  python scripts/explain.py dog.jpg "a dog on a beach" --checkpoint result/hacan/1/checkpoints/best.ckpt
  python scripts/explain.py dog.jpg "a dog on a beach" --checkpoint EXPORTED_FOLDER --out heatmaps.png

The image is drawn as the model gets it, resized and cropped. Exit status: 0 done, 2 error.

"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=path, help="an image file")
    parser.add_argument("caption", help="a sentence")
    parser.add_argument("--checkpoint", type=path, required=True, help="checkpoint of a training, or exported folder")
    parser.add_argument(
        "--out", type=path, help="PNG file to write (default: IMAGE.heatmaps.png in the current folder)"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.75, help="opacity of the heatmap, 0 to 1 (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path(f"{options.image.stem}.heatmaps.png")
    try:
        if not 0 <= options.alpha <= 1:
            raise UserError(f"--alpha {options.alpha:g}: expected a number from 0 to 1")
        if not options.caption.strip():
            raise UserError("the caption is empty: give a sentence")
        from hacan.checkpoints.pretrained import Pretrained  # imports torch
        from hacan.report.heatmaps import STREAM_NAMES, explain, save_figure

        found = explain(Pretrained.load(options.checkpoint), options.image, options.caption)
        save_figure(found, out, alpha=options.alpha)
    except UserError as error:
        return print_error(error)
    parts = " + ".join(f"{STREAM_NAMES[stream.stream]} {stream.score:.4f}" for stream in found.streams)
    print(f"fine similarity {found.score:.4f} = {parts}\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
