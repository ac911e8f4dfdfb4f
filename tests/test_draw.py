"""`python tests/draw.py out` draws the losses of any run, or says in one sentence why it cannot."""
import json
import sys
from xml.etree import ElementTree

import pytest

import draw


@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """Write metrics.jsonl, draw it -> the picture's elements, or what was said instead."""
    def call(metrics):
        if metrics is not None:
            (tmp_path / "metrics.jsonl").write_bytes(metrics)
        monkeypatch.setattr(sys, "argv", ["draw.py", str(tmp_path)])
        try:
            draw.main()
        except SystemExit as e:
            assert e.code == 2 and not (tmp_path / "loss.svg").exists()
            return capsys.readouterr().err.splitlines()[-1]
        return [*ElementTree.parse(tmp_path / "loss.svg").iter()]
    return call


def run(steps, **held_out):
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "tokens": 512 * step, "loss": 5 / step, "lr": 1e-3, "grad_norm": 1.0})
        if step % 2 == 0:
            rows[-1]["held_out"] = held_out
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_runs_losses_are_a_line_and_the_held_out_ones_dots_by_source(drawn):
    elements = drawn(run(9, web=[1.25, 0.5], code=2.5))
    curve = next(e for e in elements if e.get("class") == "line0")
    assert curve.get("d").count("L") == 8
    words = [e.text for e in elements if e.text]
    assert "held-out web: 1.25" in words and "held-out code: 2.5" in words
    for color in "dot1", "dot2":
        assert sum(e.get("class") == color for e in elements) == 1 + 4      # the legend's, and four


@pytest.mark.parametrize("steps", [1, 2, 30_000])
def test_short_and_long_runs_are_drawn(drawn, steps):
    curve = next(e for e in drawn(run(steps)) if e.get("class") == "line0")
    assert curve.get("d").count("L") < 1000


def test_eight_sources_share_the_colours_and_a_name_cannot_break_the_picture(drawn):
    names = {f"</svg>&{i}": 1.0 for i in range(8)}
    words = [e.text for e in drawn(run(2, **names))]
    assert all(f"held-out {name}: 1" in words for name in names)


ROW = run(1).decode().strip()


@pytest.mark.parametrize("metrics, words", [
    (None, "there is no"),
    (b"", "is empty"),
    (run(3) + b'{"step": 4, "tok', "line 4"),
    (run(3) + b"null\n", "line 4"),
    (b"\xff\xfe\n", "line 1"),
    (b"[" * 100_000, "line 1"),
    (ROW.replace("5.0", "NaN").encode(), "line 1"),
    (ROW.replace("5.0", '"5"').encode(), "line 1"),
    (ROW.replace("512", "-1").encode(), "line 1"),
    (ROW.replace("512", "9" * 500).encode(), "line 1"),
    (ROW.replace('"lr"', '"rate"').encode(), "line 1"),
    (ROW.replace("1.0}", '1.0, "held_out": 3}').encode(), "line 1"),
    (ROW.replace("1.0}", '1.0, "held_out": {"a": []}}').encode(), "line 1"),
    (ROW.replace("1.0}", '1.0, "held_out": {"\\u0000": 1}}').encode(), "line 1"),
])
def test_metrics_that_cannot_be_drawn_are_one_sentence(drawn, metrics, words):
    assert words in drawn(metrics)
