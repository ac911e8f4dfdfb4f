"""train.py's claims, with real processes where they speak of some. Longer: python tests/kill_loop.py 200"""
import argparse
import gc
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity

import train
from kill_loop import ONE_THREAD, SMALL, command, curve, kill_loop, untouched_run
from mamba import Mamba, MambaConfig
from train import (RECIPES, Objective, Recipe, Source, Trainer, batch_size, byte_tokenizer, context_length,
                   flops_per_token, learning_rate, memory, mixture, optimizer, training_row)

SEVEN, GT = RECIPES["falcon-mamba-7b"], 10**9


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Sixty short documents."""
    folder = tmp_path_factory.mktemp("corpus")
    text = Path(train.__file__).read_text()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(text[700 * (i % 40):][:1100])
    return folder


@pytest.fixture
def trained(monkeypatch, capsys):
    """Run train.py's main in this process with these flags; returns its exit status, output and errors."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        status, threads = 0, torch.get_num_threads()
        torch.set_num_threads(1)        # as the runs beside it: two threads may sum in another order
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            train.main()
        except SystemExit as e:
            status = e.code or 0
        torch.set_num_threads(threads)
        after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert status or after == before, "a run that is done still takes Ctrl-C for a wish to save"
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
        text = capsys.readouterr()
        return (1, text.out, status) if isinstance(status, str) else (status, text.out, text.err)
    return call


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    seconds = untouched_run(data, out)
    out.with_name("seconds").write_text(str(seconds))
    return out


def torchrun(ranks, data, out, *flags):
    # --standalone picks a free port, so that two test runs on a machine do not meet
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(launch + command(data, out, *flags)[1:], env=ONE_THREAD, capture_output=True,
                          text=True)


def printed(code):
    """What this code prints, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, env=ONE_THREAD,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def trainer(checkpoint_activations=False, **sizes):
    """A Trainer of a small random model in this process."""
    torch.manual_seed(0)
    small = {"vocab_size": 257, "d_model": 32, "n_layer": 2, "d_state": 8, "initializer_range": 0.2}
    config = MambaConfig(**small | sizes)
    args = argparse.Namespace(device=torch.device("cpu"), micro_batch=16,
                              checkpoint_activations=checkpoint_activations, compile=False,
                              eval_only=False)
    return Trainer(args, Recipe(), Mamba(config), byte_tokenizer(), {})


# The recipe

def test_the_7b_recipe_has_the_published_values():
    assert SEVEN.total_tokens == 5500 * GT and SEVEN.decay_tokens == 500 * GT
    assert [batch_size(SEVEN, t * GT) for t in (0, 25, 50, 51, 5500)] == [128, 1088, 2048, 2048, 2048]
    for t in (1, 10, 25, 49.9):
        scaling = math.sqrt(batch_size(SEVEN, t * GT) / 2048)
        assert learning_rate(SEVEN, t * GT) == pytest.approx(6.4e-4 * scaling)
    noise = [learning_rate(SEVEN, t * GT) / math.sqrt(batch_size(SEVEN, t * GT)) for t in range(1, 5000)]
    assert max(noise) == pytest.approx(min(noise))
    assert learning_rate(SEVEN, 60 * GT) == learning_rate(SEVEN, 5000 * GT) == 6.4e-4
    for t in (0, 100, 250, 500):
        assert learning_rate(SEVEN, (5000 + t) * GT) == pytest.approx(6.4e-4 * 256 ** (-t / 500))
    assert learning_rate(SEVEN, 5250 * GT) == pytest.approx(4.0e-5)
    assert learning_rate(SEVEN, 5500 * GT) == learning_rate(SEVEN, 5600 * GT) == 2.5e-6
    assert learning_rate(SEVEN, 0) == 0


def test_context_and_sources_of_the_7b_change_in_stages():
    lengths = [context_length(SEVEN, t * GT) for t in range(5500)]
    assert sorted(set(lengths)) == [2048, 4096, 8192] and lengths == sorted(lengths)
    for t in range(0, 5500, 100):
        assert sum(mixture(SEVEN, t * GT).values()) == pytest.approx(1)
    assert "finewebedu" not in mixture(SEVEN, 4999 * GT) and mixture(SEVEN, 5000 * GT)["finewebedu"] > 0
    assert mixture(SEVEN, 0)["refinedweb"] > mixture(SEVEN, 4500 * GT)["refinedweb"]


def test_continuing_starts_from_the_pre_decay_checkpoint_and_decays_to_a_256th():
    recipe = RECIPES["continue"]
    assert recipe.init_from == "tiiuae/falcon-mamba-7b-pre-decay" and learning_rate(recipe, 0) == 0
    peak = max(learning_rate(recipe, t * GT) for t in range(503))
    assert peak <= 6.4e-4 and learning_rate(recipe, recipe.total_tokens) == pytest.approx(peak / 256)
    assert batch_size(recipe, 0) == 2048 and context_length(recipe, 0) == 8192


def test_a_shorter_run_keeps_the_shape_of_the_schedule_and_phases_that_do_not_fit_are_refused(trained):
    short = train.scaled(SEVEN, 5500 * GT // 1000)
    for t in (0, 3, 25, 1000, 5200, 5500):
        assert learning_rate(short, t * GT // 1000) == pytest.approx(learning_rate(SEVEN, t * GT))
        assert context_length(short, t * GT // 1000) == context_length(SEVEN, t * GT)
    _, recipe, _ = train.flags(["--total-tokens", "9000", "--ramp-tokens", "500"])
    lengths = recipe.total_tokens, recipe.warmup_tokens, recipe.ramp_tokens, recipe.decay_tokens
    assert lengths == (9000, 270, 500, 2700)
    status, _, err = trained("--total-tokens", 1000, "--decay-tokens", 980)
    assert status == 1 and "--total-tokens 1000" in err and "980" in err


def test_every_field_of_recipe_and_model_is_a_flag_and_unknown_flags_fail(trained):
    status, out, _ = trained("--help")
    assert status == 0
    for f in [*fields(Recipe), *fields(MambaConfig)]:
        assert f"--{f.name.replace('_', '-')} " in out.replace(",", " ").replace("\n", " ")
    assert trained("--learning-rate", "1")[0] == 2
    assert trained("--lr", "-1")[0] == 2
    assert trained("--context", "0")[0] == 2
    assert trained("--total-tokens", "1.5")[0] == 2


# The data

def test_a_source_is_read_once_in_shuffled_order_and_then_in_another(monkeypatch):
    monkeypatch.setattr(train, "GROUP", 2000)        # and 5000 rows: twice so many, and a rest

    class Numbers:
        rows, row = (lambda self, part, length: 5000), (lambda self, part, start, length: start // 256)
    once, again = ([training_row(Recipe(), {"text": Numbers()}, 0, i) for i in range(start, start + 5000)]
                   for start in (0, 5000))
    assert sorted(once) == sorted(again) == [*range(5000)]
    for a, b in (once, range(2000)), (again, range(2000)), (once, again):
        assert abs(np.corrcoef(a[:2000], b[:2000])[0, 1]) < 0.1


def test_a_run_reads_every_row_of_a_source_once_before_any_twice_and_keeps_the_shares(monkeypatch):
    class Numbers:
        rows = lambda self, part, length: 10**5

        def __init__(self, name):
            self.row = lambda part, start, length: (name, start // 128)
    monkeypatch.setattr(train, "order", lambda n, *key: np.arange(n))           # as if nothing were shuffled
    recipe = replace(Recipe(), context=(64, 128), stages=(0, 640_000),
                     mixture=("web:3 code:1", "web:1 code:1"))
    sources, seen, tokens = {name: Numbers(name) for name in ("web", "code")}, Counter(), 0
    while tokens < 640_000:
        seen.update(training_row(recipe, sources, tokens, i) for i in range(batch_size(recipe, tokens)))
        tokens += batch_size(recipe, tokens) * 64
    assert {*seen.values()} <= {1, 2}           # the rows of a piece, but for a last one half read
    pieces = Counter(name for name, _ in seen)
    assert pieces["web"] == pytest.approx(3750, abs=8) and pieces["code"] == 1250
    assert sum(seen.values()) in (2 * pieces.total(), 2 * pieces.total() - 1)
    for name in pieces:
        assert {number for source, number in seen if source == name} == {*range(pieces[name])}
    # In the next stage each source goes on where it stopped, but for what the last step took beyond its end.
    later = Counter(training_row(recipe, sources, 640_000, i) for i in range(2000))
    assert later.keys() == {("web", n) for n in range(3750, 4750)} | {("code", n) for n in range(1250, 2250)}


@pytest.mark.parametrize("context", [(64,), (64, 128), (128, 32)])
def test_a_stage_of_another_context_goes_on_where_the_one_before_stopped(context):
    class Positions:
        rows = lambda self, part, length: 999_999 // length
        row = lambda self, part, start, length: np.arange(start, start + length)
    recipe = replace(Recipe(), context=context, stages=(0, 512_000)[:len(context)], total_tokens=960_000)
    seen, tokens = np.zeros(10**6, int), 0
    while tokens < 960_000:
        length = context_length(recipe, tokens)
        seen[training_row(recipe, {"text": Positions()}, tokens, 0)] += 1
        tokens += length
    # A deck of a thousand rows that a stage's end leaves half drawn is left so, in the end too.
    assert (seen == 0).mean() < 0.1 and (seen > 1).mean() < 0.06 and seen.max() <= 2


def test_a_batch_is_a_function_of_seed_and_tokens(data):
    recipe, tokenizer = replace(Recipe(), context=(64,)), byte_tokenizer()
    sources = [{"text": Source("text", [data], tokenizer, recipe)} for _ in range(2)]
    for tokens, i in [(0, 0), (0, 3), (6400, 1), (10**6, 7)]:
        a = training_row(recipe, sources[0], tokens, i)
        train.order.cache_clear()
        b = training_row(recipe, sources[1], tokens, i)
        assert len(a) == 65 and np.array_equal(a, b)
    rows = [training_row(replace(recipe, seed=seed), sources[0], 0, 0).tobytes() for seed in range(5)]
    assert len(set(rows)) == 5


def test_documents_do_not_see_each_other():
    """What a document's last token costs does not depend on the document before it, only on its own."""
    t, end = trainer(), 256
    before, others = np.arange(40), np.arange(40)[::-1].copy()

    def cost(first, closed):
        own = [90, 91, 92, 93]
        rows = [np.concatenate([first, [end] if closed else [99], own, [last]]) for last in (94, 95)]
        a, b = (t.objective(torch.from_numpy(row[None])).item() for row in rows)
        return a - b        # all but the last target cancels
    assert cost(before, True) == pytest.approx(cost(others, True), abs=2e-4)
    assert abs(cost(before, False) - cost(others, False)) > 1e-3


def test_a_text_that_names_the_end_token_does_not_end_there(tmp_path):
    (tmp_path / "a.py").write_text("END = '<|endoftext|>'\n")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = train.open_tokenizer(tmp_path / "tokenizer.json")
    tokens = np.concatenate([*train.tokenized([tmp_path / "a.py"], tokenizer)])
    assert [*np.flatnonzero(tokens == 256)] == [22] == [len(tokens) - 1]
    assert tokenizer.decode(tokens[:-1].tolist()) == "END = '<|endoftext|>'\n"
    assert tokenizer.to_str() == byte_tokenizer().to_str()      # what a run saves


def test_line_ends_are_tokens_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    tokens = np.concatenate([*train.tokenized([tmp_path], byte_tokenizer())])
    assert byte_tokenizer().decode(tokens[:-1].tolist()) == "one\r\ntwo\rthree\n"


def test_held_out_documents_are_not_trained_on(data):
    source = Source("text", [data], byte_tokenizer(), train.scaled(Recipe(), 10**6))
    training, held_out = source.parts["training"], source.parts["held out"]
    assert held_out[-1] == 256 and source.size // 20 <= len(held_out) <= source.size // 10
    assert len(training) + len(held_out) == source.size
    # and no other recipe sees them in another place
    for other in (train.scaled(Recipe(), 1000), replace(Recipe(), seed=5, context=(64,), stages=(0,))):
        assert np.array_equal(Source("text", [data], byte_tokenizer(), other).parts["held out"], held_out)


def test_of_a_corpus_larger_than_the_run_the_same_part_is_held_out(monkeypatch):
    parts = [np.full(2**20, i, np.uint32) for i in range(48)]
    seen = []

    def tokenized(paths, tokenizer, enough=2**60):
        for part in parts[:enough // 2**20 + 1]:
            seen.append(enough)
            yield part
    monkeypatch.setattr(train, "tokenized", tokenized)
    held_out = [Source("text", [Path("a")], byte_tokenizer(), train.scaled(Recipe(), total)).parts["held out"]
                for total in (10**6, 10**7)]
    assert len({*seen}) == 2 and np.array_equal(*held_out) and len(held_out[0]) == 2**20


def test_a_corpus_beside_its_own_file_of_tokens_is_read_without_it(trained, data, tmp_path):
    shutil.copytree(data, tmp_path / "text")
    sizes = []
    for name in ("text/a.bin", "text/b.bin", "c.bin"):
        assert trained("--data", tmp_path / "text", "--tokenize-to", tmp_path / name)[0] == 0
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] == sizes[1] == sizes[2] > 1000
    status, _, err = trained("--data", tmp_path / "c.bin", "--tokenize-to", tmp_path / "d.bin")
    assert status == 1 and "no text in" in err and not (tmp_path / "d.bin").exists()


def test_a_file_of_tokens_trains_as_its_text_does(trained, data, tmp_path):
    flags = [*SMALL, "--total-tokens", "2000"]
    status, out, _ = trained("--data", data, "--tokenize-to", tmp_path / "corpus.bin")
    assert status == 0 and (tmp_path / "corpus.bin").stat().st_size > 60 * 1100
    assert "tokens" in out
    for name in ("corpus.bin", "text"):
        path = tmp_path / name if name == "corpus.bin" else data
        # enough tokens wanted that the text is read whole, as the file is
        assert trained("--data", path, "--out", tmp_path / f"out-{name}", *flags, "--total-tokens", "17000",
                       "--ramp-tokens", "0")[0] == 0
    assert curve(tmp_path / "out-corpus.bin") == curve(tmp_path / "out-text")
    source = Source("text", [tmp_path / "corpus.bin"], byte_tokenizer(), Recipe())
    assert isinstance(source.parts["training"], np.memmap)
    with (tmp_path / "corpus.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="had .* tokens and now has 500"):
        source.row("training", 0, 64)
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(FileNotFoundError):
        source.row("training", 0, 64)


# The model

@pytest.mark.parametrize("tied", [[], ["lm_head.weight"]])
def test_weight_decay_touches_matrices_only(tied):
    model = Mamba(MambaConfig(vocab_size=11, d_model=32, n_layer=1, tie_embeddings=bool(tied)))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)].removeprefix("backbone.layers.0.") for p in group["params"]}
                       for group in optimizer(model, Recipe()).param_groups)
    assert decayed == {"backbone.embeddings.weight", "mixer.in_proj.weight", "mixer.x_proj.weight",
                       "mixer.dt_proj.weight", "mixer.out_proj.weight"} | {"lm_head.weight"} - set(tied)
    assert others == {"backbone.norm_f.weight", "norm.weight", "mixer.A_log", "mixer.D",
                      "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.dt_proj.bias"}
    assert [group["weight_decay"] for group in optimizer(model, Recipe()).param_groups] == [0.1, 0]


def test_the_loss_in_pieces_is_the_cross_entropy_of_all_logits():
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=50, d_model=32, n_layer=1, d_state=4))
    rows = torch.randint(50, (3, 701))
    rows[:, 600:][rows[:, 600:] == 7] = -100            # a document ends with 7, and some tokens do not count
    loss = Objective(model, 7)(rows)
    tokens, targets = rows[:, :-1].clone(), rows[:, 1:]
    starts = torch.ones(3, 700, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == 7
    tokens[tokens == -100] = 0
    logits, _ = model(tokens, reset=starts)
    counted = targets != -100
    whole = -logits.log_softmax(-1)[counted].gather(1, targets[counted][:, None]).sum()
    torch.testing.assert_close(loss, whole)
    grads = [torch.autograd.grad(v, model.lm_head.weight)[0] for v in (loss, whole)]
    torch.testing.assert_close(*grads)


SHARDED_BF16 = """
import argparse, torch, torch.distributed as dist, warnings
warnings.simplefilter("ignore")
from functools import partial
from torch.utils.checkpoint import checkpoint
import mamba, train
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
model = mamba.Mamba(mamba.MambaConfig(vocab_size=50, d_model=64, n_layer=2, d_state=8, initializer_range=0.1))
rows = torch.randint(50, (2, 65))
exact = train.Objective(model, 49)(rows).item()
for block in model.backbone.layers:
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
objective = train.Objective(model, 49)
train.shard(objective, "cpu", 1, torch.bfloat16)
seen, scan = {}, mamba.selective_scan
def spy(x, dt, A, B, C, D, z, dt_bias, h0, reset):
    mixer = model.backbone.layers[0].mixer
    seen.update(A_log=mixer.A_log, D=D, dt_bias=dt_bias, conv=mixer.conv1d.weight,
                dt_proj=mixer.dt_proj.weight, A=A, x=x, dt=dt, z=z, in_proj=mixer.in_proj.weight)
    seen.update({k: v.dtype for k, v in seen.items() if isinstance(v, torch.Tensor)})
    return scan(x, dt, A, B, C, D, z, dt_bias, h0, reset)
mamba.selective_scan = spy
arrived = []
for last in (False, False, True):
    objective.set_requires_gradient_sync(last)
    loss = objective(rows)
    loss.backward()
    arrived.append(sum(p.grad is not None for p in model.parameters()))
mamba.selective_scan = scan
class Tokens:
    about, rows = "100 tokens", lambda self, part, length: 9
    row = lambda self, part, i, length: torch.arange(length + 1).numpy() % 50
options = argparse.Namespace(device=torch.device("cpu"), micro_batch=2, checkpoint_activations=False,
                             compile=False, eval_only=False)
recipe = train.Recipe(batch_start=5, ramp_tokens=1000, context=(8,))
fresh = mamba.Mamba(model.config)
trainer = train.Trainer(options, recipe, fresh, train.byte_tokenizer(), {"text": Tokens()})
trainer.objective.set_requires_gradient_sync = lambda last: asked.append(last)
asked = []
trainer.update()
p = model.backbone.layers[0].mixer.A_log
print(asked == [False, False, True], seen, exact, loss.item(), arrived, p.dtype, p.grad.dtype,
      model.lm_head.weight.dtype, sep="|")
"""


def test_on_gpus_products_are_bf16_and_the_small_exact_tensors_fp32_and_gradients_travel_once():
    out = printed(SHARDED_BF16)
    asked, seen, exact, loss, arrived, *kept = out.strip().split("|")
    for name in ("A_log", "D", "dt_bias", "conv", "A", "dt_proj"):
        assert f"'{name}': torch.float32" in seen, (name, seen)
    for name in ("in_proj", "x", "dt", "z"):
        assert f"'{name}': torch.bfloat16" in seen, (name, seen)
    assert float(loss) == pytest.approx(float(exact), rel=0.01) and float(loss) != float(exact)
    assert kept == ["torch.float32"] * 3
    assert json.loads(arrived) == [0, 0, 23] and asked == "True"      # and the loop asks for just that


# Ranks, passes, restarts

def test_two_processes_draw_the_curve_of_one(trained, uninterrupted, data, tmp_path):
    # each checkpoint comes right after an evaluation, which leaves the outer weights gathered
    run = torchrun(2, data, tmp_path / "two", "--checkpoint-activations", "--micro-batch", "3",
                   "--eval-every", "3")
    assert run.returncode == 0, run.stderr
    one, two = curve(uninterrupted), curve(tmp_path / "two")
    assert len(one) == len(two) > 20
    np.testing.assert_allclose(two, one, rtol=2e-5)
    # and one process goes on from what two wrote
    last = sorted((tmp_path / "two" / "checkpoints").glob("step-*"))
    (last[-1]).rename(tmp_path / "gone")
    assert trained("--data", data, "--out", tmp_path / "two", *SMALL, "--resume")[0] == 0
    np.testing.assert_allclose(curve(tmp_path / "two"), one, rtol=2e-5)


def test_four_passes_a_step_draw_the_curve_of_one(trained, uninterrupted, data, tmp_path):
    assert trained("--data", data, "--out", tmp_path / "four", *SMALL, "--micro-batch", 4)[0] == 0
    np.testing.assert_allclose(curve(tmp_path / "four"), curve(uninterrupted), rtol=2e-5)


def test_activation_checkpointing_changes_nothing(trained, uninterrupted, data, tmp_path):
    assert trained("--data", data, "--out", tmp_path / "o", *SMALL, "--checkpoint-activations")[0] == 0
    np.testing.assert_allclose(curve(tmp_path / "o"), curve(uninterrupted), rtol=2e-5)


def test_compiled_blocks_draw_the_curve_of_eager_ones(trained, uninterrupted, data, tmp_path, monkeypatch,
                                                     graphs):
    monkeypatch.setitem(train.scan.BACKENDS, "chunked", train.scan.Chunked.apply)     # --compile changes it
    assert trained("--data", data, "--out", tmp_path / "o", *SMALL, "--compile")[0] == 0
    np.testing.assert_allclose(curve(tmp_path / "o"), curve(uninterrupted), rtol=2e-5)
    assert graphs


def test_signals_save_and_leave_with_0_and_resuming_gives_the_same_bits(trained, uninterrupted, data,
                                                                       tmp_path):
    out, at = tmp_path / "out", 0
    for number, times, step in (signal.SIGTERM, 2, 4), (signal.SIGINT, 1, 10):     # a scheduler may send two
        flags = ["--resume", "--checkpoint-every", "1000"]      # so that only the signal saves
        process = subprocess.Popen(command(data, out, *flags), env=ONE_THREAD, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"step {step} "):
                for _ in range(times):
                    process.send_signal(number)
                    time.sleep(0.01)
                break
        stdout, stderr = process.communicate()
        assert process.returncode == 0 and "stopped and saved" in stdout and not stderr, stderr
        assert at < step <= len(curve(out)) < len(curve(uninterrupted))
        at = len(curve(out))
        assert (out / "checkpoints" / f"step-{at:09}").exists()
    assert trained("--data", data, "--out", out, *SMALL, "--resume")[0] == 0
    assert curve(out) == curve(uninterrupted)
    assert (out / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


def test_a_second_ctrl_c_does_not_wait_for_the_save(trained, data, tmp_path, monkeypatch):
    update, save, handlers = Trainer.update, Trainer.save, []

    def interrupted(self):
        handlers.append(signal.getsignal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)
        return update(self)

    def saved(self):
        handlers.append(signal.getsignal(signal.SIGINT))
        save(self)
    monkeypatch.setattr(Trainer, "update", interrupted)
    monkeypatch.setattr(Trainer, "save", saved)
    status, out, _ = trained("--data", data, "--out", tmp_path / "out", *SMALL)
    assert status == 0 and "stopped and saved at step 1;" in out
    assert len(handlers) == 2 and handlers[0] != signal.SIG_DFL == handlers[1]


@pytest.mark.parametrize("gpus, nccl", [(0, True), (2, True), (3, False)])
def test_a_process_without_a_gpu_or_nccl_is_a_sentence(trained, data, monkeypatch, gpus, nccl):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: None)
    monkeypatch.setattr(train.dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(train.sample, "device", lambda text: torch.device("cuda"))
    status, _, err = trained("--data", data)
    assert status == 1 and err.startswith("train.py: ") and "NCCL" in err and f" {gpus} " in err, err
    assert "--nproc-per-node" in err and "--device cpu" in err


def test_sigkill_loses_neither_the_folder_nor_the_curve(uninterrupted, data, tmp_path):
    seconds = float(uninterrupted.with_name("seconds").read_text())
    assert kill_loop(2, data, tmp_path / "out", uninterrupted, seconds, seed=1) >= 2


def test_a_complete_checkpoint_means_a_written_model(trained, data, tmp_path, monkeypatch):
    def full_disk(*_):
        time.sleep(1)           # in which a checkpoint that did not wait would be written
        raise OSError("no space left")
    monkeypatch.setattr(Mamba, "save_pretrained", full_disk)
    assert trained("--data", data, "--out", tmp_path / "out", *SMALL)[0] == 1
    assert not train.checkpoints(tmp_path / "out")


def copy_of(run, tmp_path, step):
    """That run's folder as it was when this checkpoint was the last."""
    shutil.copytree(run, tmp_path / "copy")
    for folder in (tmp_path / "copy" / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return tmp_path / "copy"


def named(flags, recipe):
    paths, shares = train.named_data(flags)
    return paths, train.with_shares(recipe, paths, shares, False)


def test_the_shares_of_a_sources_paths_add_up(data):
    flags = [f"code={data}/00.txt:0.5", f"code={data}/01.txt:.25", f"prose={data}:0.25"]
    paths, recipe = named(flags, Recipe())
    assert [*map(len, paths.values())] == [2, 1] and mixture(recipe, 0) == {"code": 0.75, "prose": 0.25}


def test_data_without_shares_takes_the_recipes_and_a_single_source_needs_none(data):
    two = replace(Recipe(), mixture=("a:3 b:1", "b:1"), stages=(0, 9))
    paths, recipe = named([f"a={data}", f"b={data}/00.txt"], two)
    assert recipe == two and paths == {"a": [data], "b": [data / "00.txt"]}
    for flags in ["a=A"], ["A"], ["a=A:0.3"], ["A", "A/00.txt"]:
        paths, recipe = named([flag.replace("A", str(data)) for flag in flags], two)
        assert mixture(recipe, 0) == mixture(recipe, 9) == {name: 1 for name in paths} and len(paths) == 1
    given = [f"a={data}:0", f"b={data}:1"]
    assert mixture(named(given, two)[1], 0) == {"a": 0, "b": 1}      # a 0 is a share too
    with pytest.raises(ValueError, match="shares above 0"):
        named(given[:1], two)
    for flags in ["a=A", "c=A"], ["a=A:0.5", "b=A"], ["a=A", "b=A", "c=A"]:
        with pytest.raises(ValueError, match="name the same, or give each a share"):
            named([flag.replace("A", str(data)) for flag in flags], two)


def test_shares_given_twice_are_refused_and_a_mixture_of_other_sources_too(trained, data, tmp_path):
    flags = "--out", tmp_path / "out", *SMALL
    for given in [f"code={data}:1", "--data", f"prose={data}:1", "--mixture", "code:1 prose:1"], \
                 [data, "--mixture", "nonsense:1"]:
        status, _, err = trained("--data", *given, *flags)
        assert status == 1 and "--mixture" in err and not (tmp_path / "out").exists()


def test_a_path_that_looks_like_a_name_and_a_share_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b:0.5").write_text("text")
    assert train.named_data(["a=b:0.5"])[0] == {"text": [Path("a=b:0.5")]}


@pytest.mark.parametrize("mixture", ["text:-1 code:3", "text:inf", "text", "text:0", "text:1 code:0.0005"])
def test_shares_that_are_none_are_refused(mixture):
    with pytest.raises(ValueError, match="shares above 0"):
        Recipe(mixture=(mixture,))


def test_a_plan_is_of_the_model_that_the_command_would_train(trained, tmp_path):
    flops = flops_per_token(MambaConfig(**train.SIZES["tiny"], vocab_size=257))
    status, out, _ = trained("--plan", "--out", tmp_path)
    assert status == 0 and f"({flops:.3g} a token)" in out


def test_a_plan_of_a_model_to_start_from_is_of_its_sizes(trained, tmp_path):
    Mamba(MambaConfig(vocab_size=300, d_model=16, n_layer=1)).save_pretrained(tmp_path / "small")
    for start, config in [(tmp_path / "small", MambaConfig(vocab_size=300, d_model=16, n_layer=1)),
                          ("tiiuae/falcon-mamba-7b", MambaConfig())]:
        status, out, _ = trained("--plan", "--out", tmp_path, "--init-from", start)
        assert status == 0 and f"({flops_per_token(config):.3g} a token)" in out


def test_bits_are_counted_per_byte_of_characters_that_have_several(tmp_path):
    (tmp_path / "text").write_text("日本語のテキスト" * 600)
    t = trainer(vocab_size=257)
    source = Source("text", [tmp_path / "text"], t.tokenizer, replace(Recipe(), context=(32,)))
    t.sources = {"text": source}
    nats, bits = t.held_out(32)["text"]
    assert bits == pytest.approx(nats / math.log(2), rel=0.03)      # a byte a token


def test_what_follows_a_file_that_is_no_text_is_another_document(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"text, then none: " + 2**20 * b"x" + b"\n\xff")
    tokenizer = byte_tokenizer()
    parts = [*train.tokenized([tmp_path], tokenizer)]
    assert parts[-1].tolist() == [256] and "a.txt" in capsys.readouterr().err


def test_tokens_of_another_vocabulary_are_not_taken_for_bytes(trained, tmp_path):
    np.tile(np.array([*range(97, 123), 256], np.uint16), 300).tofile(tmp_path / "falcon.bin")
    flags = "--data", tmp_path / "falcon.bin", "--out", tmp_path / "out", *SMALL
    status, _, err = trained(*flags, "--vocab-size", 65024)
    assert status == 1 and "65024" in err and "257" in err and "--tokenizer" in err
    assert not (tmp_path / "out").exists()
    assert trained(*flags)[0] == 0
    np.tile(np.array([97, 300, 256], np.uint16), 3000).tofile(tmp_path / "falcon.bin")
    status, _, err = trained(*flags[:3], tmp_path / "other", *SMALL)
    assert status == 1 and "token 300" in err and "257" in err and "another tokenizer" in err


@pytest.mark.parametrize("flags, words", [
    (["--lr", "0.001"], ["lr", "0.004", "0.001"]), (["--d-state", "4"], ["d_state", "8", "4"]),
    (["--seed", "7"], ["seed", "0", "7"]), (["--total-tokens", "30000"], ["total_tokens", "20000", "30000"]),
    (["--vocab-size", "300"], ["vocab_size", "257", "300"])])
def test_resuming_another_recipe_or_model_is_refused_with_both_values(trained, uninterrupted, data, flags,
                                                                     words):
    before = {p: p.read_bytes() for p in sorted(uninterrupted.rglob("*")) if p.is_file()}
    status, out, err = trained("--data", data, "--out", uninterrupted, *SMALL, "--resume", *flags)
    assert status == 1 and all(re.search(rf"\b{word}\b", err) for word in words), err
    assert {p: p.read_bytes() for p in sorted(uninterrupted.rglob("*")) if p.is_file()} == before


def test_resuming_with_another_vocabulary_or_corpus_is_refused(trained, uninterrupted, data, tmp_path):
    tokenizer, before = byte_tokenizer(), (uninterrupted / "tokenizer.json").read_bytes()
    tokenizer.add_tokens(["self"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    flags = ["--out", uninterrupted, *SMALL, "--resume"]
    status, _, err = trained("--data", data, *flags, "--tokenizer", tmp_path / "tokenizer.json",
                             "--vocab-size", 258)
    assert status == 1 and "vocab_size 257" in err and "258" in err
    assert (uninterrupted / "tokenizer.json").read_bytes() == before
    (tmp_path / "other.txt").write_text("another corpus\n" * 900)
    status, _, err = trained("--data", tmp_path / "other.txt", *flags)
    assert status == 1 and "data" in err and "text" in err
    shutil.copytree(data, tmp_path / "same size")
    for path in (tmp_path / "same size").iterdir():
        path.write_text(path.read_text().swapcase())
    status, _, err = trained("--data", tmp_path / "same size", *flags)
    assert status == 1 and "data" in err and "tokens" in err
    status, _, err = trained("--data", data, "--out", uninterrupted, *SMALL)
    assert status == 1 and "--resume" in err            # and a new run does not overwrite it


def test_after_a_resume_each_step_stands_once_in_the_metrics(trained, uninterrupted, data, tmp_path):
    out = copy_of(uninterrupted, tmp_path, 9)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "tok')                    # as a kill leaves it
    assert trained("--data", data, "--out", out, *SMALL, "--resume")[0] == 0
    assert [row[0] for row in curve(out)] == list(range(1, len(curve(uninterrupted)) + 1))
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_a_run_whose_metrics_were_deleted_goes_on(trained, uninterrupted, data, tmp_path):
    out = copy_of(uninterrupted, tmp_path, 9)
    (out / "metrics.jsonl").unlink()
    assert trained("--data", data, "--out", out, *SMALL, "--resume")[0] == 0
    assert curve(out) == curve(uninterrupted)[9:]


def test_a_recipe_without_decay_does_not_decay():
    recipe = replace(Recipe(), decay_tokens=0)
    assert {learning_rate(recipe, recipe.total_tokens + after) for after in (-1, 0, 1, 10**6)} == {recipe.lr}


def checkpoint_files(out, step):
    return {p.name: p.read_bytes() for p in (out / "checkpoints" / f"step-{step:09}").iterdir()}


def test_a_full_disk_is_a_sentence_and_leaves_the_last_checkpoint(trained, uninterrupted, data, tmp_path):
    out = copy_of(uninterrupted, tmp_path, 9)
    before = checkpoint_files(out, 9)
    weights = (out / "model.safetensors").read_bytes()
    run = subprocess.run(command(data, out, "--resume"), env=ONE_THREAD, capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert run.returncode == 1 and re.fullmatch(r"train\.py: .*too large.*\n", run.stderr), run.stderr
    assert checkpoint_files(out, 9) == before and (out / "model.safetensors").read_bytes() == weights
    assert [p.name for p in sorted((out / "checkpoints").glob("step-*[0-9]"))][-1] == "step-000000009"
    assert trained("--data", data, "--out", out, *SMALL, "--resume")[0] == 0       # once there is room again
    assert curve(out) == curve(uninterrupted)


@pytest.mark.parametrize("every", [3, 1000])       # the next save waits for this one, or the run's end does
def test_a_checkpoint_that_cannot_be_written_is_a_sentence(trained, uninterrupted, data, tmp_path,
                                                          monkeypatch, every):
    out = copy_of(uninterrupted, tmp_path, 9)
    before = checkpoint_files(out, 9)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.Writer, "write_data", full)
    status, _, err = trained("--data", data, "--out", out, *SMALL, "--resume", "--checkpoint-every", every)
    assert status == 1 and "No space left on device" in err and checkpoint_files(out, 9) == before
    assert len(curve(out)) == 15 or every == 1000


def test_a_loss_that_is_not_finite_is_a_sentence_and_leaves_the_last_checkpoint(
        trained, uninterrupted, data, tmp_path, monkeypatch):
    out = copy_of(uninterrupted, tmp_path, 9)
    before, right = checkpoint_files(out, 9), Objective.piece

    def wrong(self, hidden, targets):
        return right(self, hidden, targets) * (math.nan if len(targets) == 16 * 64 else 1)
    monkeypatch.setattr(Objective, "piece", wrong)
    status, _, err = trained("--data", data, "--out", out, *SMALL, "--resume")
    assert status == 1 and "the loss, nan," in err and "not finite at step" in err and "--lr" in err
    assert checkpoint_files(out, 9) == before


def test_a_held_out_loss_that_is_not_finite_stops_the_run_before_it_is_saved(trained, data, tmp_path):
    out, phases = tmp_path / "out", ("--warmup-tokens", 0, "--ramp-tokens", 0, "--decay-tokens", 0)
    flags = "--data", data, "--out", out, *SMALL, *phases, "--total-tokens", 256, "--lr", 1e9
    status, _, err = trained(*flags)
    assert status == 1 and "held-out loss on text is" in err and "--lr" in err, err
    assert {p.name for p in out.iterdir()} == {"checkpoints", "metrics.jsonl", "tokenizer.json"}
    assert not any((out / "checkpoints").iterdir())


def test_after_rows_were_lost_each_step_still_stands_there_once(trained, uninterrupted, data, tmp_path):
    out = copy_of(uninterrupted, tmp_path, 21)
    metrics, rows = out / "metrics.jsonl", curve(uninterrupted)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:5] + lines[20:24]) + b'{"step": 25, "tok')        # a power cut's
    assert trained("--data", data, "--out", out, *SMALL, "--resume")[0] == 0
    assert curve(out) == rows[:5] + rows[20:]


def test_resuming_unpickles_nothing(uninterrupted, data, tmp_path):
    out = copy_of(uninterrupted, tmp_path, 21)
    code = ("import sys; sys.addaudithook("
            "lambda event, args: event == 'pickle.find_class' and sys.exit(f'unpickled {args}'));"
            "import runpy; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    run = subprocess.run([sys.executable, "-c", code, *command(data, out, "--resume")[1:]], env=ONE_THREAD,
                         capture_output=True, text=True)
    assert run.returncode == 0 and f"step {len(curve(uninterrupted))} " in run.stdout, run.stderr
    assert {p.suffix for p in out.rglob("*") if p.is_file()} <= {".json", ".jsonl", ".safetensors", ".png"}


@pytest.mark.parametrize("flags, words", [
    (["--data", "nowhere"], "there is no nowhere"),
    (["--data", "a=README", "--data", "a=README"], "there is no README"),
    (["--recipe", "falcon-mamba-7b", "--data", "a={data}", "--data", "b={data}"], "--data names a, b"),
    (["--data", "{data}", "--context", "1000000"], "--context 1000000"),
    (["--init-from", "nowhere"], "'nowhere' is not a folder"),
    (["--data", "{data}", "--out", "{data}/00.txt/out"], "lies in --data"),
    (["--data", "{data}/00.txt", "--context", "16", "--out", "{data}/01.txt/out"], "Not a directory"),
    (["--data", ""], "there is no ''"),
    (["--data", "text="], "there is no ''"),
    (["--plan", "--init-from", "nowhere"], "nowhere is no checkpoint"),
    (["--stages", "5", "--context", "8"], "begin with 0"),
    (["--context", "8,16"], "2 values"),
    (["--mixture", "web"], "name:share"),
    (["--mixture", "text:1 text:2"], "each name once"),
    (["--data", "{data}", "--tokenizer", "{data}/00.txt"], "cannot read the tokenizer"),
    (["--n-layer", "5000"], "num_hidden_layers"),
    (["--data", "{data}", "--vocab-size", "100"], "has 257 tokens"),
    (["--eval-only", "--out", "nowhere"], "nowhere")])
def test_bad_input_is_one_sentence(trained, data, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    status, _, err = trained(*[flag.format(data=data) for flag in flags])
    assert status == 1 and err.startswith("train.py: ") and "\n" not in err and words in err, err


# What a run leaves

def test_a_short_run_learns(trained, tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 2000)
    flags = "--context", 32, "--d-model", 16, "--n-layer", 1, "--device", "cpu", "--lr", 0.02
    status, out, _ = trained("--data", tmp_path / "text.txt", "--out", tmp_path / "out", *flags,
                             "--total-tokens", 6000)
    assert status == 0 and "products in torch.float32" in out and "scan: chunked" in out
    losses = [row[2] for row in curve(tmp_path / "out")]
    assert losses[0] > 5 and losses[-1] < 2
    assert Mamba.from_pretrained(tmp_path / "out")(torch.tensor([[97, 98]]))[0].shape == (1, 2, 257)


def test_out_holds_the_model_the_metrics_and_a_picture(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "checkpoints"} <= names
    if "matplotlib" in sys.modules or __import__("importlib.util").util.find_spec("matplotlib"):
        assert "loss.png" in names
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "tokens", "loss", "lr", "batch_size", "context", "grad_norm", "tokens_per_s"}
    assert all(wanted <= row.keys() for row in rows) and "text" in rows[-1]["held_out"]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_eval_only_trains_nothing_and_agrees_with_transformers(trained, uninterrupted, data):
    before = (uninterrupted / "model.safetensors").read_bytes()
    status, out, _ = trained("--eval-only", "--data", data, "--out", uninterrupted, "--context", 64,
                             "--total-tokens", 20000)
    found = re.search(r"text: ([\d.]+) nats per token, perplexity ([\d.]+), ([\d.]+) bits per byte", out)
    assert status == 0 and found, out
    nats, perplexity, bits = map(float, found.groups())
    assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    assert bits == pytest.approx(nats / math.log(2), rel=0.03)     # a byte a token, but for documents' ends
    assert (uninterrupted / "model.safetensors").read_bytes() == before
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source = Source("text", [data], byte_tokenizer(), train.scaled(Recipe(), 20000))
    model = transformers.AutoModelForCausalLM.from_pretrained(uninterrupted).eval()
    ours = Mamba.from_pretrained(uninterrupted)
    row = torch.tensor(source.parts["held out"][:200].astype(np.int64))[None]
    with torch.no_grad():
        theirs = model(row, labels=row).loss.item()
        logits = ours(row[:, :-1])[0]
    assert F.cross_entropy(logits[0], row[0, 1:]).item() == pytest.approx(theirs, abs=1e-4)


def test_to_evaluate_or_tokenize_several_sources_no_shares_are_needed(trained, uninterrupted, data, tmp_path):
    sources = "--data", f"a={data}", "--data", f"b={data}"
    status, out, err = trained("--eval-only", *sources, "--out", uninterrupted, "--context", 64)
    assert status == 0 and re.search(r"^a: (.*)\nb: \1$", out, re.M), err
    assert trained(*sources, "--tokenize-to", tmp_path / "both.bin")[0] == 0


def test_training_goes_on_from_a_published_folder(trained, uninterrupted, data, tmp_path):
    status, out, err = trained("--init-from", uninterrupted, "--data", data, "--out", tmp_path / "more",
                               "--context", 64, "--total-tokens", 1024, "--batch-end", 4, "--lr", 1e-4)
    assert status == 0, err
    assert curve(tmp_path / "more")[0][2] < curve(uninterrupted)[0][2] - 1
    status, _, err = trained("--init-from", uninterrupted, "--d-model", 64)
    assert status == 2 and "leave out --d-model" in err


# The plan

def test_the_plan_of_the_7b_prints_the_whole_run(trained, tmp_path):
    start = time.perf_counter()
    status, out, err = trained("--recipe", "falcon-mamba-7b", "--plan", "--world-size", 256,
                               "--out", tmp_path)
    assert status == 0 and time.perf_counter() - start < 30, err
    assert re.search(r"ramp .*147 -> 2048 .*6.40e-04 .*1.41e-05 -> 1.41e-05", out)
    assert re.search(r"decay +5e\+12 +5.5e\+12 .*8192 .*6.40e-04 -> 2.50e-06", out)
    days = float(re.search(r"on 256 H100 ([\d.]+) days at 18% MFU", out)[1])
    assert 50 < days < 70       # "about two months"
    assert re.search(r"context 8192 +with --checkpoint-activations .* 80 GB hold --micro-batch [1-9]", out)
    assert not (tmp_path / "checkpoints").exists()


def test_the_plan_counts_the_operations_of_every_product():
    """6 a parameter, but for embeddings, which are looked up, and what is no matrix; the scan adds < 1%."""
    with torch.device("meta"):
        model = Mamba(MambaConfig())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert 6 * matrices < flops_per_token(MambaConfig()) < 6.06 * matrices


SHARDED_7B = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import mamba, train
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=256)
with torch.device("meta"):
    objective = train.Objective(mamba.Mamba(mamba.MambaConfig()), 11)
train.shard(objective, "cpu", 256, torch.bfloat16)
tensors = [p.to_local() for p in objective.parameters()]
print(len(tensors), sum(p.numel() for p in objective.parameters()),
      sum(p.numel() * p.element_size() for p in tensors))
"""


def test_the_plan_knows_what_fully_shard_leaves_on_each_of_256_gpus():
    out = printed(SHARDED_7B)
    count, whole, mine = map(int, out.split())
    fixed, _ = memory(MambaConfig(), 256, torch.bfloat16)
    assert (count, whole) == (643, 7_272_665_088)
    assert fixed["parameters"] == fixed["gradients"] == mine
    assert fixed["optimizer: Adam's two averages"] == 2 * mine


@pytest.mark.parametrize("layers, kind", [(4, "without"), (8, "with")])
def test_the_plans_memory_is_what_a_step_takes(layers, kind):
    """By PyTorch's own allocator, as what a process holds besides depends on the machine."""
    gc.collect()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        t = trainer(checkpoint_activations=kind == "with", vocab_size=2000, d_model=256, d_state=16,
                    n_layer=layers)
        for rows in np.random.default_rng(0).integers(0, 2000, (2, 4, 257)):
            t.objective(torch.from_numpy(rows)).backward()
            t.adam.step()
            t.adam.zero_grad()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = max(accumulate(e.nbytes() for e in sorted(moves, key=lambda e: e.start_ns())))
    fixed, rows = memory(t.model.config, 1, torch.float32)
    planned = sum(fixed.values()) + 4 * 256 * rows[kind]
    print(f"planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.75 < measured / planned < 1.05     # a plan may ask for too much, hardly for too little
