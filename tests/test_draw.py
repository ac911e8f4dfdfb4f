"""`python tests/draw.py out` draws the losses of any run, or says in one sentence why it cannot."""
import json
from xml.etree import ElementTree

import pytest
import torch
from conftest import call

import copying
import draw
import mamba
from mamba import Mamba, MambaConfig
from scan import selective_scan
from tests.marks import shades
from train import byte_tokenizer
from without import selection_without

def elements(picture):
    return [*ElementTree.parse(picture).iter()]

def texts(picture):
    return [element.text for element in elements(picture)]

def run(steps, **held_out):
    row = {"loss": 2.5, "lr": 1e-3, "held_out": held_out}
    rows = [json.dumps({"tokens": 512 * step} | row) + "\n" for step in range(1, steps + 1)]
    return "".join(rows)

@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw these runs, folder by folder -> the picture, or what was said instead."""
    def drawn(**runs):
        monkeypatch.chdir(tmp_path)
        for name, metrics in runs.items():
            (tmp_path / name).mkdir()
            if metrics is not None:
                (tmp_path / name / "metrics.jsonl").write_text(metrics)
        status, out, err = call(draw, *runs)
        return err.splitlines()[-1] if status else tmp_path / out.strip()
    return drawn

@pytest.mark.parametrize("steps", [1, 9, 30_000])
def test_a_runs_losses_are_a_line_and_the_held_out_ones_dots_by_source(drawn, steps):
    names = [f"</svg>&{i}" for i in range(8)]       # more than there are colours
    picture = drawn(out=run(steps, **dict.fromkeys(names, [1.25, 0.5])))
    [curve] = [e for e in elements(picture) if e.get("class") == "line0"]
    points = 1 + curve.get("d").count("L")
    assert points == steps or 500 < points <= 1000
    assert {f"held-out {name}: 1.25" for name in names} <= {*texts(picture)}
    circles = [e for e in elements(picture) if e.tag.endswith("circle")]
    assert len(circles) == 1 + 8 + 8 * steps        # the legend's, the chart's

@pytest.mark.parametrize("steps", [1, 4])
def test_runs_of_one_name_and_several_seeds_have_one_colour(drawn, steps):
    end = [run(steps, text=[nats, 0.5]) for nats in (1.25, 1.5, 1.75)]
    picture = drawn(**{"a-0": end[0], "a-1": end[1], "b": end[2]})
    assert {"a", "b"} <= {*texts(picture)}
    dots = [e.get("class") for e in elements(picture) if e.tag.endswith("circle")]
    assert dots == ["dot0", "dot0", "dot1"]

@pytest.mark.parametrize("words, metrics", [
    ("there is no", [None]),
    ("is empty", [""]),
    ("line 4", [run(3) + '{"step": 4, "tok']),
    ("line 4", [run(3) + "null"]),
    ("line 1", [run(1).replace("2.5", "NaN")]),
    ("line 1", [run(1).replace("512", "-512")]),
    ("line 1", [run(1).replace("lr", "rate")]),
    ("a1 has no loss on held-out text yet", [run(2, text=2), run(2)]),
])
def test_metrics_that_cannot_be_drawn_are_one_sentence(drawn, words, metrics):
    assert words in drawn(**{f"a{i}": each for i, each in enumerate(metrics)})

@pytest.mark.parametrize("layers, dtype", [(1, torch.float32), (64, torch.bfloat16)])
def test_steps_have_a_cell_for_each_layer_and_token_of_any_text(tmp_path, layers, dtype):
    model = Mamba(MambaConfig(vocab_size=257, d_model=16, n_layer=layers)).to(dtype)
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode("<a>\x00\n\té" * 80).ids
    draw.draw_steps(model, tokenizer, tokens, tmp_path / "steps.svg")
    found = elements(tmp_path / "steps.svg")
    assert sum(e.get("d").count("M") for e in found if e.get("class") == "dot0") == 500 * layers
    assert [e.text for e in found if e.get("textLength")][:9] == [*"<a>�↵⇥��<"]

def test_a_longer_step_is_a_darker_cell():
    assert shades([1, 10, 100]) == [0.1, 0.6, 1.0]
    assert shades([0.01, 0.01]) == [0.6, 0.6]

def test_the_steps_drawn_are_those_that_the_scan_takes(monkeypatch):
    model = Mamba(MambaConfig(vocab_size=9, d_model=16, n_layer=2))
    taken = []

    def scan(x, dt, A, B, C, D, z, bias, *more):
        taken.append(torch.nn.functional.softplus(dt + bias).mean(-1)[0])
        return selective_scan(x, dt, A, B, C, D, z, bias, *more)
    monkeypatch.setattr(mamba, "selective_scan", scan)
    steps = draw.mean_steps(model, [1, 2, 3])
    torch.testing.assert_close(torch.tensor(steps), torch.stack(taken), rtol=1e-3, atol=0)

@pytest.mark.parametrize("learned", [True, False])
def test_steps_of_the_copying_toy_differ_between_tokens_only_if_learned(learned):
    torch.manual_seed(0)
    model = copying.fresh_model(learned)
    curve = copying.train(model, steps=30, length=8)
    assert curve[-1][1] > 0.2
    steps = copying.telling_steps(model, 8)
    assert len(steps["delta"]) == len(steps["text"]) == 8 + copying.COUNT
    assert (len({*steps["delta"]}) > 1) == learned

@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_variant_leaves_out_one_norm_and_nothing_else(part):
    mixer = Mamba(MambaConfig(vocab_size=9, d_model=16, n_layer=1)).backbone.layers[0].mixer
    x = torch.randn(1, 5, 32)
    variant = selection_without([["dt", "B", "C"][part]])
    pairs = zip(mixer.selection(x), variant(mixer, x))
    differs = [not torch.allclose(whole, other) for whole, other in pairs]
    assert differs == [i == part for i in range(3)]
