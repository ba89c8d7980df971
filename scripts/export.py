"""Writes a checkpoint as a folder to share: safetensors, config, tokenizer files, a model card with the receipt.

    python scripts/export.py CKPT OUT_DIR [--onnx] [--trust-checkpoint]

`hacan.load_pretrained(OUT_DIR)` reads it. Exit status: 0 done, 2 something is to be mended.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.checkpoints.pretrained import export
from hacan.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, export, name the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that a training wrote, such as best.ckpt")
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--onnx", action="store_true", help="also write both encoders as ONNX, checked in onnxruntime")
    parser.add_argument("--trust-checkpoint", action="store_true", help="read a pickle of more than tensors")
    options = parser.parse_args(arguments)
    try:
        files = export(options.checkpoint, options.folder, onnx=options.onnx, trust=options.trust_checkpoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in files:
        print(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
