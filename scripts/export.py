"""Export a checkpoint as a folder to share: safetensors, config, tokenizer files and a model card with the results.

Examples:
  python scripts/export.py result/hacan/1/checkpoints/best.ckpt EXPORTED_FOLDER
  python scripts/export.py best.ckpt EXPORTED_FOLDER --onnx

`hacan.load_pretrained(EXPORTED_FOLDER)` loads it. Exit status: 0 done, 2 error.

"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path, help="checkpoint of a training, such as best.ckpt")
    parser.add_argument("folder", type=path, help="folder to write; created if needed")
    parser.add_argument(
        "--onnx", action="store_true", help="also write both encoders as ONNX files, verified with onnxruntime"
    )
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a pickle of more than tensors, which can run code"
    )
    options = parser.parse_args(arguments)
    try:
        from hacan.checkpoints.pretrained import export  # imports torch
        from scripts.onnx_export import export_onnx

        write_onnx = export_onnx if options.onnx else None
        files = export(options.checkpoint, options.folder, write_onnx=write_onnx, trust=options.trust_checkpoint)
    except UserError as error:
        return print_error(error)
    for file in files:
        print(f"{file} ({file.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
