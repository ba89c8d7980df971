"""Draws what a model looked at for each word of a caption: the three streams' heatmaps, laid over the picture.

    python scripts/explain.py image.jpg "a caption" --checkpoint CKPT_OR_FOLDER [--out out.png]

The picture is drawn as the model sees it, resized and cut. Exit status: 0 done, 2 something is to be mended.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.checkpoints.pretrained import Pretrained
from hacan.errors import UserError
from hacan.report.heatmaps import ALPHA, STREAM_NAMES, explain, save_figure


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, draw, name the file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="a picture file")
    parser.add_argument("caption", help="a sentence")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a checkpoint of a training, or a folder of scripts/export.py"
    )
    parser.add_argument("--out", type=Path, help="the PNG to write; without it, IMAGE's name with .heatmaps.png, here")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="opacity of the heatmap, 0 to 1")
    options = parser.parse_args(arguments)
    out = options.out or Path(f"{options.image.stem}.heatmaps.png")
    try:
        if not 0 <= options.alpha <= 1:
            raise UserError(f"--alpha {options.alpha:g}: expected a number from 0 to 1")
        if not options.caption.strip():
            raise UserError("the caption is empty: give a sentence")
        found = explain(Pretrained.load(options.checkpoint), options.image, options.caption)
        save_figure(found, out, alpha=options.alpha)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = " + ".join(f"{STREAM_NAMES[stream.stream]} {stream.score:.4f}" for stream in found.streams)
    print(f"fine similarity {found.score:.4f} = {parts}\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
