"""Serve a web page for searching an index.

Examples:
  python scripts/serve.py INDEX
  python scripts/serve.py INDEX --host 0.0.0.0 --port 8080    reachable from the whole network

Exit status: 0 ended, 2 error.

"""

import argparse
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hacan.errors import UserError, path, print_error


def main(arguments: list[str] | None = None) -> int:
    """Run the command until it is interrupted; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="folder of the index, or s3://BUCKET/FOLDER")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets the whole network search (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument("--model", type=path, help="location of the model, if it was moved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        _check_free(options.host, options.port)  # before the model is loaded

        import uvicorn

        from hacan.search import Index
        from hacan.search.server import HttpProtocol, make_app

        with Index.open(options.index, model=options.model, device=options.device) as index:
            local = options.host in ("127.0.0.1", "localhost", "::1")
            app = make_app(index) if local else make_app(index, hosts=("*",))
            print(f"http://{options.host}:{options.port}/ (end with Ctrl-C)", flush=True)
            uvicorn.run(app, host=options.host, port=options.port, log_level="warning", http=HttpProtocol, ws="none")
    except UserError as error:
        return print_error(error)
    return 0


def _check_free(host: str, port: int) -> None:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(kind, socket.SOCK_STREAM) as wanted:
            wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            wanted.bind((host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error}): give another one with --port") from error


if __name__ == "__main__":
    sys.exit(main())
