"""`python tests/draw.py out` draws the losses of any run, or says in one sentence why it cannot."""
import json
import sys
from xml.etree import ElementTree

import pytest
import torch

import draw
from mamba import Mamba, MambaConfig
from train import byte_tokenizer

@pytest.fixture
def drawn(tmp_path, monkeypatch, capsys):
    """Write metrics.jsonl, draw it -> the picture's elements, or what was said instead."""
    def call(metrics):
        if metrics is not None:
            (tmp_path / "metrics.jsonl").write_text(metrics)
        monkeypatch.setattr(sys, "argv", ["draw.py", str(tmp_path)])
        try:
            draw.main()
        except SystemExit:
            return capsys.readouterr().err.splitlines()[-1]
        return [*ElementTree.parse(tmp_path / "loss.svg").iter()]
    return call

def run(steps, **held_out):
    row = {"loss": 2.5, "lr": 1e-3, "held_out": held_out}
    return "".join(json.dumps({"tokens": 512 * step} | row) + "\n" for step in range(1, steps + 1))

@pytest.mark.parametrize("steps", [1, 9, 30_000])
def test_a_runs_losses_are_a_line_and_the_held_out_ones_dots_by_source(drawn, steps):
    names = [f"</svg>&{i}" for i in range(8)]       # more than there are colours
    elements = drawn(run(steps, **dict.fromkeys(names, [1.25, 0.5])))
    curve = next(e for e in elements if e.get("class") == "line0")
    points = 1 + curve.get("d").count("L")
    assert points == steps or 500 < points <= 1000
    assert {f"held-out {name}: 1.25" for name in names} <= {e.text for e in elements}
    assert sum(e.tag.endswith("circle") for e in elements) == 1 + 8 + 8 * steps      # the legend's, the chart's

@pytest.mark.parametrize("metrics, words", [
    (None, "there is no"),
    ("", "is empty"),
    (run(3) + '{"step": 4, "tok', "line 4"),
    (run(3) + "null", "line 4"),
    (run(1).replace("2.5", "NaN"), "line 1"),
    (run(1).replace("512", "-512"), "line 1"),
    (run(1).replace("lr", "rate"), "line 1"),
])
def test_metrics_that_cannot_be_drawn_are_one_sentence(drawn, metrics, words):
    assert words in drawn(metrics)

@pytest.mark.parametrize("layers, dtype", [(1, torch.float32), (64, torch.bfloat16)])
def test_steps_have_a_cell_for_each_layer_and_token_and_any_text_beside(tmp_path, layers, dtype):
    sizes = MambaConfig(vocab_size=257, d_model=16, n_layer=layers)
    model = Mamba(sizes).to(dtype)
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("<a>\x00\n\té" * 80).ids + [256]
    before = model(torch.tensor([tokens[:9]]))[0]
    draw.draw_steps(model, tokenizer, tokens, tmp_path / "steps.svg")
    elements = [*ElementTree.parse(tmp_path / "steps.svg").iter()]
    cells = sum(e.get("d").count("M") for e in elements if e.get("class") == "dot0")
    assert cells == 500 * layers
    words = [e.text for e in elements if e.get("textLength")]
    assert words[:9] == [*"<a>�↵⇥��<"]
    assert torch.equal(model(torch.tensor([tokens[:9]]))[0], before)

def test_a_long_step_is_a_full_cell_in_each_layer_by_itself():
    assert draw.shades_of([1, 10, 100]) == [0.1, 0.6, 1.0]
    assert draw.shades_of([0.01, 0.01]) == [0.6, 0.6]
