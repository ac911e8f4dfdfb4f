"""The recipe as functions of tokens, what weight decay touches, and a whole short run."""
import math
import sys

import pytest
import torch

import train
from mamba import Mamba, MambaConfig
from train import Recipe, batch_size, learning_rate, optimizer

GT = 10**9
SEVEN_B = Recipe(total_tokens=5500 * GT, warmup_tokens=GT, ramp_tokens=50 * GT, decay_tokens=500 * GT, batch_start=128,
                 batch_end=2048, lr=6.4e-4)


def test_the_schedule_is_the_published_one():
    assert [batch_size(SEVEN_B, t * GT) for t in (0, 25, 50, 4000)] == [128, 1088, 2048, 2048]
    rate = lambda t: learning_rate(SEVEN_B, t * GT)
    assert rate(25) == pytest.approx(6.4e-4 * math.sqrt(1088 / 2048))
    assert rate(50) == rate(5000) == 6.4e-4
    assert rate(5250) == pytest.approx(4.0e-5) and rate(5500) == rate(9000) == pytest.approx(2.5e-6)
    noise = [rate(t) / math.sqrt(batch_size(SEVEN_B, t * GT)) for t in (1, 10, 40, 60)]
    assert max(noise) == pytest.approx(min(noise))


def test_weight_decay_touches_matrices_and_nothing_else():
    model = Mamba(MambaConfig(vocab_size=50, d_model=8, n_layer=1))
    decayed = {id(p) for p in optimizer(model, Recipe()).param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    mixer = "backbone.layers.0.mixer."
    assert names == {"backbone.embeddings.weight", "lm_head.weight",
                     *(mixer + name + ".weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))}


def test_a_short_run_learns_and_leaves_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("abcdefgh" * 2000)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"),
                                      "--total-tokens", "6000", "--warmup-tokens", "300", "--ramp-tokens", "1000",
                                      "--decay-tokens", "2000", "--context", "32", "--d-model", "16", "--n-layer", "1",
                                      "--device", "cpu", "--lr", "0.02"])
    train.main()
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("step ")]
    assert losses[0] > 5 and losses[-1] < 2
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert Mamba.from_pretrained(tmp_path / "out")(torch.tensor([[97, 98]]))[0].shape == (1, 2, 257)
