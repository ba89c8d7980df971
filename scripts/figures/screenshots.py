"""Take the README's screenshots, docs/images/report.png and search.png, with headless Chromium.

Examples:
  python scripts/figures/screenshots.py --report result/demo/1/report.html --index result/demo/1/search/index

`make demo` makes the index; `report=True` of run.py makes the report. Needs chromium and chromedriver.

"""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SENTENCE = "a large red circle above a small blue square"
PORT = 8123


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="report.html of a run")
    parser.add_argument("--index", type=Path, required=True, help="folder of an index")
    parser.add_argument("--text", default=SENTENCE, help="query of the search page (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)

    import uvicorn
    from browser import browsers

    from hacan.search import Index
    from hacan.search.server import make_app

    with Index.open(options.index) as index, tempfile.TemporaryDirectory() as folder:
        server = uvicorn.Server(uvicorn.Config(make_app(index), port=PORT, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        with browsers(Path(folder)) as start:
            browser = start(1100)
            browser.open(options.report.resolve().as_uri())
            browser.wait("document.querySelectorAll('.maps canvas').length === 3")
            browser.run("document.getElementById('heatmaps').scrollIntoView(); return 1")
            time.sleep(1)
            browser.screenshot(options.out / "report.png")
            browser.open(f"http://127.0.0.1:{PORT}/")
            browser.wait("document.getElementById('about').textContent.includes('pictures')")
            browser.type("#text", f"{options.text}\n")
            browser.wait("document.querySelectorAll('#results img').length > 3")
            browser.click("#chips button:nth-child(3)")
            time.sleep(5)  # the heatmaps of the word
            browser.screenshot(options.out / "search.png")
        server.should_exit = True
        thread.join()
    print(f"wrote {options.out / 'report.png'} and search.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
