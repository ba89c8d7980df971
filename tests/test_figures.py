"""The committed figures are what their scripts draw."""

import runpy

from tiny_run import ROOT


def test_the_architecture_figure_is_up_to_date(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts" / "figures" / "architecture.py"))
    assert script["main"](["--out", str(tmp_path / "architecture.svg")]) == 0
    drawn = (tmp_path / "architecture.svg").read_text()
    assert drawn == (ROOT / "docs" / "images" / "architecture.svg").read_text()
    labels = {text.get_text() for text in script["draw"]().axes[0].texts}
    for part in ("ConvNeXt", "BERT", "KSF($V_h$, $T_h$)", "LRG($V_h$, $T_m$)", "LRG($V_m$, $T_h$)", "GCD", "shortlist"):
        assert any(part in label for label in labels), part
