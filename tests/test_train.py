"""train.py's claims, with real processes where they speak of some. Longer: python tests/kill_loop.py 200"""
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import assert_refused, call, largest_file
from safetensors.torch import load_file

import mamba
import scan_triton
import train
from kill_loop import ONE_THREAD, curve, flags, kill_loop, start
from mamba import Mamba, MambaConfig
from sample import read_tokenizer
from tests.plan import count_steps
from train import (GT, RECIPES, Objective, Recipe, Source, Stage, Trainer, batch_size, byte_tokenizer,
                   choose_rows, context_length, learning_rate, optimizer, read_source, shares)

SEVEN = RECIPES["falcon-mamba-7b"]
END = 256       # the byte tokenizer's

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Sixty short documents."""
    folder = tmp_path_factory.mktemp("texts")
    text = Path(train.__file__).read_text()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(text[700 * (i % 40):][:1100])
    return folder

@pytest.fixture(scope="session")
def run(data):
    """run(out, *flags) trains a small model on them in this process -> its exit status, output and errors."""
    return lambda out, *more: call(train, *flags(data, out, *more))

@pytest.fixture(scope="session")
def uninterrupted(run, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert run(out, "--keep", 100)[0] == 0
    return out

@pytest.fixture
def at_9(uninterrupted, tmp_path):
    """A copy of that run's folder as a kill after the ninth step leaves it."""
    out = Path(shutil.copytree(uninterrupted, tmp_path / "at 9"))
    for folder in train.checkpoints(out)[3:]:
        shutil.rmtree(folder)
    for name in ("model.safetensors", "config.json"):       # which the end of a run writes
        (out / name).unlink()
    return out

def assert_same_curve(out, other):
    np.testing.assert_allclose(curve(out), curve(other), rtol=2e-5)

def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

@contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()

def trainer(recipe=Recipe(), sources=None, micro_tokens=4096, **sizes):
    """A Trainer of a small random model in this process."""
    torch.manual_seed(0)
    small = {"vocab_size": 257, "d_model": 32, "n_layer": 2, "d_state": 8, "initializer_range": 0.2}
    config = MambaConfig(**small | sizes)
    options, _ = train.parse(f"--device cpu --micro-tokens {micro_tokens}".split())
    objective = train.build(options, config, END, Mamba(config))
    return Trainer(options, recipe, objective, byte_tokenizer(), sources or {})

def numbers(size):
    """A source whose tokens are numbered, so that a row tells where it is from."""
    return Source(held_out=np.arange(0), training=np.arange(size))

# The recipe

def test_the_7b_recipe_has_the_published_values():
    assert SEVEN.total_tokens == 5500 * GT and SEVEN.decay_tokens == 500 * GT
    assert [batch_size(SEVEN, t * GT) for t in (0, 25, 50, 51, 5500)] == [128, 1088, 2048, 2048, 2048]
    for t in (1, 10, 25, 49.9):
        scaling = math.sqrt(batch_size(SEVEN, t * GT) / 2048)
        assert learning_rate(SEVEN, t * GT) == pytest.approx(6.4e-4 * scaling)
    assert learning_rate(SEVEN, 0) == 0
    assert learning_rate(SEVEN, 60 * GT) == learning_rate(SEVEN, 5000 * GT) == 6.4e-4
    for t in (0, 100, 250, 500):
        assert learning_rate(SEVEN, (5000 + t) * GT) == pytest.approx(6.4e-4 * 256 ** (-t / 500))
    assert learning_rate(SEVEN, 5500 * GT) == learning_rate(SEVEN, 5600 * GT) == 2.5e-6
    assert (SEVEN.weight_decay, SEVEN.beta1, SEVEN.beta2) == (0.1, 0.9, 0.95)

def test_context_and_sources_of_the_7b_change_in_stages():
    lengths = [context_length(SEVEN, t * GT) for t in range(5500)]
    assert sorted(set(lengths)) == [2048, 4096, 8192] and lengths == sorted(lengths)
    first, *_, stable, decay = [shares(stage.mixture) for stage in SEVEN.stages]
    assert SEVEN.stages[-1].start == 5000 * GT
    assert "finewebedu" not in stable and decay["finewebedu"] == 0.25
    assert first["refinedweb"] > stable["refinedweb"] and sum(decay.values()) == pytest.approx(1)

def test_continuing_starts_from_the_pre_decay_checkpoint_and_decays_to_a_256th():
    recipe = RECIPES["continue"]
    assert recipe.init_from == "tiiuae/falcon-mamba-7b-pre-decay"
    rates = [learning_rate(recipe, t * GT) for t in (0, 2, 502)]
    assert rates == pytest.approx([0, 6.4e-4, 2.5e-6])
    assert batch_size(recipe, 0) == 2048 and context_length(recipe, 0) == 8192

@pytest.mark.parametrize("typed, peak", [
    ("--batch-end 8", 4e-3), ("--batch-end 32", 8e-3), ("--batch-end 32 --lr 1e-3", 1e-3),
    ("--batch-end 32 --lr 1e-3 --lr-batch 8", 2e-3), ("--init-from out --batch-end 8", 4e-5)])
def test_the_learning_rate_follows_the_batch_by_its_square_root(typed, peak):
    _, recipe = train.parse(typed.split())
    stable = recipe.total_tokens - recipe.decay_tokens
    assert learning_rate(recipe, stable) == pytest.approx(peak)

@pytest.mark.parametrize("tokens, context", [(20_000, 64), (300_000, 1024), (3_000_000, 8192)])
def test_a_continued_run_is_an_epoch_in_at_least_200_steps_whose_rows_follow_the_text_alone(tokens, context):
    sources = {"text": Source(held_out=np.zeros(tokens // 20, int), training=np.zeros(tokens, int))}
    for typed in "", "--eval-only", "--total-tokens 20000":
        options, recipe = train.parse(f"--init-from x {typed}".split())
        recipe = train.pick_recipe(options, recipe, sources)
        assert recipe.longest == context
        assert recipe.total_tokens == options.given.get("total_tokens", tokens)
        assert count_steps(recipe) >= 200 or "total" in typed

def test_a_shorter_run_keeps_the_shape_of_the_schedule():
    short = train.scaled(SEVEN, {"total_tokens": 5500 * GT // 1000})
    for t in (0, 3, 25, 1000, 5200, 5500):
        assert learning_rate(short, t * GT // 1000) == pytest.approx(learning_rate(SEVEN, t * GT))
        assert context_length(short, t * GT // 1000) == context_length(SEVEN, t * GT)
    for more in "", "--decay-tokens 0":
        _, recipe = train.parse(f"--total-tokens 9000 --ramp-tokens 500 {more}".split())
        assert (recipe.warmup_tokens, recipe.ramp_tokens) == (270, 500)
    assert learning_rate(recipe, 9000) == learning_rate(recipe, 10**6) == recipe.lr     # without a decay

# The data

@pytest.mark.parametrize("contexts", [(64,), (64, 128), (128, 32), (32, 128, 64)])
def test_every_piece_of_a_source_is_read_once_before_any_again(contexts):
    stages = tuple(Stage(i * 21_312, context, "text:1") for i, context in enumerate(contexts))
    recipe = replace(Recipe(), stages=stages, batch_start=1, batch_end=1)
    whole = 1000 * recipe.longest
    sources = {"text": numbers(whole + 9)}
    seen = np.zeros(whole + 9, int)
    read = {"text": 0}
    tokens = 0
    starts = []
    for epoch in (1, 2):
        while read["text"] < epoch * whole:
            [row] = choose_rows(recipe, sources, tokens, read)
            context = context_length(recipe, tokens)
            assert np.array_equal(row, np.arange(row[0], row[0] + context + 1))
            seen[row[:-1]] += 1
            starts.append(row[0])
            tokens += context
        # A stage of longer rows begins where one of them may: less than a row is left out before it.
        left_out = read["text"] - tokens
        assert seen.max() == epoch and (epoch - seen[:whole]).sum() == left_out < sum(contexts[1:]) + 1
    assert abs(np.corrcoef(starts[:300], range(300))[0, 1]) < 0.1       # one after the other is not next to it

def test_contexts_must_divide_the_longest():
    with pytest.raises(ValueError, match="a context of 48 tokens does not divide the longest, 64"):
        replace(Recipe(), stages=(Stage(0, 48, "text:1"), Stage(9, 64, "text:1")))

def test_each_stage_takes_its_shares_of_the_sources():
    recipe = replace(Recipe(), stages=(Stage(0, 64, "web:3 code:1"), Stage(640_000, 64, "web:1 code:1 math:0")))
    sources = {name: numbers(10**6) for name in ("web", "code", "math")}
    read = dict.fromkeys(sources, 0)
    tokens = 0
    for start, share in (0, 0.75), (640_000, 0.5):
        before = read["web"]
        while tokens < start + 640_000:
            tokens += 64 * len(choose_rows(recipe, sources, tokens, read))
        assert (read["web"] - before) / 640_000 == pytest.approx(share, abs=0.02)
    assert read["math"] == 0 and sum(read.values()) == tokens

def test_rows_depend_on_the_seed_and_the_tokens_alone():
    recipe = replace(Recipe(), stages=(Stage(0, 16, "a:1 b:1"),), batch_start=13, batch_end=13)
    sources = {"a": numbers(5000), "b": numbers(7000)}
    rows = [np.stack(choose_rows(replace(recipe, seed=seed), sources, tokens, {"a": 160, "b": 320})).tobytes()
            for tokens, seed in [(6400, 0), (6400, 0), (6416, 0), (6400, 1), (6400, 2)]]
    assert rows[0] == rows[1] and len(set(rows)) == 4
    assert len({sources["a"].row(0, 16, 16, seed)[0] for seed in range(5)}) > 1

@pytest.mark.parametrize("world, at_once", [(1, 16), (1, 4), (2, 3), (5, 1)])
def test_ranks_and_passes_share_the_rows_of_a_batch(monkeypatch, world, at_once):
    rows = [*np.arange(13 * 17).reshape(13, 17)]
    t = trainer(micro_tokens=16 * at_once + 15)
    monkeypatch.setattr(train, "world_size", lambda: world)
    shapes = set()
    given = []
    for rank in range(world):
        monkeypatch.setattr(train, "rank", lambda: rank)
        passes = t.passes(rows)
        shapes.add(tuple(len(part) for part in passes))
        given += [row.tolist() for part in passes for row in part if row[0] != -100]
    assert len(shapes) == 1 and max(shapes.pop()) == min(at_once, 13)       # or one rank waits for the others
    assert sorted(given) == [row.tolist() for row in rows]

def tokens_of(path, tokenizer=byte_tokenizer()):
    return np.concatenate([*train.tokenized(train.text_files([path]), tokenizer, END)])

def test_text_becomes_tokens_as_it_is(tmp_path):
    """Also its line ends, and what spells the token that ends a document."""
    text = "END = '<|endoftext|>'\r\ntwo\rthree\n"
    (tmp_path / "a.py").write_bytes(text.encode())
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path / "tokenizer.json")
    tokens = tokens_of(tmp_path / "a.py", tokenizer)
    assert np.flatnonzero(tokens == END).tolist() == [len(text)]
    assert tokenizer.decode(tokens[:-1].tolist()) == text
    assert tokenizer.to_str() == byte_tokenizer().to_str()      # what a run saves

def test_a_folder_may_hold_what_is_hidden_no_file_or_no_text(tmp_path, capsys):
    folder = tmp_path / ".here" / "texts"       # a hidden folder that was named is read
    for name in (".git/config", "a/.hidden", "a/.b/c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hidden")
    os.mkfifo(folder / "a" / "pipe")            # to read it would wait for ever
    (folder / "a" / "link").symlink_to("nowhere")
    (folder / "a" / "text").write_text("text")
    assert byte_tokenizer().decode(tokens_of(folder)[:-1].tolist()) == "text"
    (folder / "a" / "text").write_bytes(b"x" * 2**19 + b"\xff")
    tokens = tokens_of(folder)
    assert tokens[-1] == END and len(tokens) > 2**18        # what follows is another document
    assert "a/text from where it is not UTF-8" in capsys.readouterr().err
    for content in (b"", b"\xff"):
        (folder / "a" / "text").write_bytes(content)
        assert [*train.tokenized(train.text_files([folder]), byte_tokenizer(), END)] == []      # no document

def test_megabytes_in_one_line_are_read_in_small_pieces(tmp_path):
    (tmp_path / "text").write_text("words " * 2**20)
    pieces = [len(piece) for piece in train.tokenized([tmp_path / "text"], byte_tokenizer(), END)]
    assert max(pieces) < 2**19 and sum(pieces) == 6 * 2**20 + 1

def test_held_out_documents_are_not_trained_on_and_are_the_same_for_all_recipes(data):
    whole = tokens_of(data)
    source = read_source([data], byte_tokenizer(), END)     # which knows of no recipe
    assert np.array_equal(np.concatenate([source.held_out, source.training]), whole)
    assert source.held_out[-1] == END and len(whole) // 20 <= len(source.held_out) <= len(whole) // 10
    alone = read_source([data / "00.txt"], byte_tokenizer(), END)
    assert len(alone.held_out) == len(tokens_of(data / "00.txt")) // 20

def test_a_corpus_trains_as_its_text_does(uninterrupted, data, tmp_path):
    corpus = tmp_path / "corpus"
    status, out, _ = call(train, "--data", data, "--tokenize-to", corpus)
    assert status == 0 and f"{len(tokens_of(data)):,} tokens" in out
    assert {path.name for path in corpus.iterdir()} == {"tokens.bin", "tokenizer.json"}
    assert call(train, *flags(corpus, tmp_path / "out"))[0] == 0
    assert curve(tmp_path / "out") == curve(uninterrupted)
    source = read_source([corpus], byte_tokenizer(), END)
    assert isinstance(source.training, np.memmap)       # a text beyond memory

def test_bits_are_counted_per_byte_of_characters_that_have_several(tmp_path):
    (tmp_path / "text").write_text("日本語のテキスト" * 600)
    source = read_source([tmp_path / "text"], byte_tokenizer(), END)
    nats, bits = trainer(sources={"text": source}).held_out(32)["text"]
    assert bits == pytest.approx(nats / math.log(2), rel=0.03)      # a byte a token

# The loss and the step

def test_the_loss_in_pieces_is_the_cross_entropy_of_all_logits():
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=50, d_model=32, n_layer=1, d_state=4))
    rows = torch.randint(50, (3, 701))
    rows[:, 600:][rows[:, 600:] == 7] = -100            # a document ends with 7, and some tokens do not count
    loss = Objective(model, 7)(rows)
    starts = F.pad(rows[:, :-2] == 7, (1, 0))           # so that documents do not see each other
    logits, _ = model(rows[:, :-1].clamp(min=0), reset=starts)
    whole = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, whole)
    weights = model.lm_head.weight, model.backbone.embeddings.weight
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(whole, weights))

@pytest.mark.parametrize("tied", [False, True])
def test_weight_decay_touches_matrices_only(tied):
    model = Mamba(MambaConfig(vocab_size=11, d_model=32, n_layer=1, tie_embeddings=tied))
    decayed, others = optimizer(model, Recipe()).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    mixer = model.backbone.layers[0].mixer
    matrices = mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj, model.backbone.embeddings, model.lm_head
    assert {*decayed["params"]} == {matrix.weight for matrix in matrices}
    assert {*others["params"]} == {*model.parameters()} - {*decayed["params"]}

@pytest.mark.parametrize("clip", [0.125, 1000.0])
def test_adam_averages_the_clipped_gradient_and_its_square_with_the_recipes_betas(clip):
    t = trainer(replace(Recipe(), clip=clip), {"text": numbers(257)})
    norm = t.update()["grad_norm"]
    averages = [t.adam.state[p] for p in t.objective.parameters()]
    mean = torch.cat([each["exp_avg"].flatten() for each in averages]).norm().item()
    square = sum(each["exp_avg_sq"].sum().item() for each in averages)
    clipped = min(norm, clip)
    assert 0.125 < norm < 1000
    assert mean / (1 - 0.9) == pytest.approx(clipped, rel=1e-4)
    assert square / (1 - 0.95) == pytest.approx(clipped**2, rel=1e-4)
    assert {group["lr"] for group in t.adam.param_groups} == {learning_rate(t.recipe, t.tokens)}

def test_on_gpus_products_are_bf16_and_the_small_exact_tensors_fp32_and_gradients_travel_once(monkeypatch):
    """By the same fully_shard, here on a CPU."""
    recipe = replace(Recipe(), batch_start=5, stages=(Stage(0, 64, "text:1"),))
    t = trainer(recipe, {"text": numbers(257)}, micro_tokens=2 * recipe.longest)
    rows = torch.arange(130).view(2, 65)
    exact = t.objective(rows).item()
    mixer = t.model.backbone.layers[0].mixer
    halves = set()
    streams = set()
    t.model.backbone.layers[1].norm.register_forward_pre_hook(lambda _, inputs: streams.add(inputs[0].dtype))

    def spy(*inputs, scan=mamba.selective_scan):
        names = "x", "dt", "A", "B", "C", "D", "z", "dt_bias"
        tensors = dict(zip(names, inputs)) | dict(mixer.named_parameters())     # gathered, as the first layer runs
        halves.update(name for name, v in tensors.items() if v.dtype == torch.bfloat16)
        return scan(*inputs)
    monkeypatch.setattr(mamba, "selective_scan", spy)
    arrived = []                # parameters that have a gradient before each pass, and before the step

    def count(*_):
        arrived.append(sum(p.grad is not None for p in t.model.parameters()))
    with one_rank():
        train.shard(t.objective, "cpu", torch.bfloat16)
        loss = t.objective(rows).item()
        t.adam = optimizer(t.model, recipe)
        t.objective.register_forward_pre_hook(count, prepend=True)      # before it gathers anything
        t.adam.register_step_pre_hook(count)
        t.update()
    assert halves == {"x", "dt", "z", *(f"{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj"))}
    assert streams == {p.dtype for p in t.model.parameters()} == {torch.float32}
    assert loss == pytest.approx(exact, rel=0.01) and loss != exact
    assert arrived == [0, 0, 0, len([*t.model.parameters()])]

# Ranks, passes, restarts

def test_four_passes_a_step_draw_the_curve_of_one(run, uninterrupted, tmp_path):
    assert run(tmp_path, "--micro-tokens", 64)[0] == 0
    assert_same_curve(tmp_path, uninterrupted)

def test_compiled_blocks_and_checkpointed_activations_change_nothing(run, uninterrupted, tmp_path, monkeypatch,
                                                                     graphs):
    calls = []
    recomputed = train.recomputed
    monkeypatch.setattr(train, "recomputed", lambda *args: calls.append(args) or recomputed(*args))
    assert run(tmp_path, "--compile", "--checkpoint-activations")[0] == 0
    assert_same_curve(tmp_path, uninterrupted)
    assert graphs and len(calls) > 2 * len(curve(uninterrupted))

@pytest.mark.parametrize("sharded", [False, True])
def test_one_compiled_code_serves_all_layers_and_batches_and_at_most_another_each_context(monkeypatch, graphs,
                                                                                         sharded):
    """Also with FSDP, whose hooks must not cut a block. The GPU's scan stands in it, and is not run: what is
    compiled hangs on sizes alone."""
    monkeypatch.setattr(scan_triton, "launch", lambda *args, **sizes: None)
    monkeypatch.setattr(train.scan, "default_backend", lambda *_: "triton")
    options, _ = train.parse(["--device", "cpu", "--compile", "--checkpoint-activations"])
    config = MambaConfig(vocab_size=257, d_model=8, n_layer=3, d_state=2)
    found = []
    with one_rank() if sharded else nullcontext():
        objective = train.build(options, config, END, Mamba(config))
        for context, batch in (512, 2), (512, 3), (512, 8), (1024, 4), (2048, 2):
            objective(torch.randint(257, (batch, context + 1))).backward()
            found.append(len(graphs))
    assert found[0] == 1 and found[-1] <= 3

RANK = """
import os, sys, torch
sys.path.insert(0, os.environ["ROOT"])
import mamba, train
if os.environ["RANK"] == "1":   # which must never hold a whole model
    def initialize(model):
        assert model.lm_head.weight.is_meta
    mamba.initialize = initialize
    mamba.Mamba.from_pretrained = None
if "BF16" in os.environ:        # the products' dtype on GPUs
    shard = train.shard
    train.shard = lambda objective, device, dtype, *more: shard(objective, device, torch.bfloat16, *more)
train.main()
"""

def two_ranks(*flags, signalled_at=None, **env):
    """Two processes that train together, the second of which gets SIGTERM after this step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env |= ONE_THREAD | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                         "ROOT": str(Path(train.__file__).parent)}
    launch = [sys.executable, "-c", RANK, *map(str, flags)]
    ranks = [subprocess.Popen(launch, env=env | {"RANK": rank, "LOCAL_RANK": rank}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        for line in ranks[0].stdout:
            if line.startswith(f"step {signalled_at} "):
                ranks[1].send_signal(signal.SIGTERM)
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0] and errors == ["", ""], errors

@pytest.mark.parametrize("env, tolerance", [({}, 2e-5), ({"BF16": "1"}, 0.02)], ids=["fp32", "bf16"])
def test_two_processes_draw_the_curve_of_one(run, uninterrupted, data, tmp_path, env, tolerance):
    """Also with products in bf16, as on GPUs, where older versions of PyTorch forgot to cast them again."""
    # Each checkpoint comes right after an evaluation, which leaves the outer weights gathered.
    two_ranks(*flags(data, tmp_path, "--checkpoint-activations", "--micro-tokens", 192, "--eval-every", 3), **env)
    exact = np.array(curve(uninterrupted))
    np.testing.assert_allclose(curve(tmp_path), exact, rtol=tolerance)
    assert (np.abs(curve(tmp_path) / exact - 1).max() > 1e-4) == ("BF16" in env)
    shutil.rmtree(train.checkpoints(tmp_path)[-1])
    assert run(tmp_path, "--resume")[0] == 0        # one process goes on from what two wrote
    np.testing.assert_allclose(curve(tmp_path), exact, rtol=tolerance)

def test_a_signal_to_one_of_two_ranks_stops_both_and_one_goes_on(data, tmp_path):
    """With a tied model in bf16, whose weights travel from rank 0."""
    model = Mamba(MambaConfig(vocab_size=257, d_model=32, n_layer=2, d_state=8, tie_embeddings=True,
                              eos_token_id=0))       # as the pre-decay file says, in which 0 ends nothing
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    flags = ["--init-from", tmp_path / "model", "--data", data, "--context", 64, "--batch-end", 4,
             "--total-tokens", 3000, "--lr", 1e-2, "--device", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    two_ranks(*flags, "--out", two, signalled_at=3)
    assert 3 <= len(curve(two)) < 12 and (two / "model.safetensors").exists()
    assert call(train, *flags, "--out", two, "--resume")[0] == 0
    assert call(train, *flags, "--out", one)[0] == 0
    assert_same_curve(two, one)
    tensors = load_file(two / "model.safetensors")
    assert "lm_head.weight" not in tensors and {t.dtype for t in tensors.values()} == {torch.bfloat16}

def test_signals_save_and_leave_with_0_and_resuming_gives_the_same_bits(run, uninterrupted, data, tmp_path):
    at = 0
    for number, times, step in (signal.SIGTERM, 2, 4), (signal.SIGINT, 1, 10):     # a scheduler may send two
        # Only the signal saves.
        process = start(flags(data, tmp_path, "--resume", "--checkpoint-every", 1000))
        for line in process.stdout:
            if line.startswith(f"step {step} "):
                for _ in range(times):
                    process.send_signal(number)
                    time.sleep(0.01)
                break
        stdout, stderr = process.communicate()
        assert process.returncode == 0 and "stopped and saved" in stdout and not stderr, stderr
        assert at < step <= len(curve(tmp_path)) < len(curve(uninterrupted))
        at = len(curve(tmp_path))
        assert train.checkpoints(tmp_path)[-1].name == f"step-{at:09}"
        assert (tmp_path / "model.safetensors").exists()
    assert run(tmp_path, "--resume")[0] == 0
    assert curve(tmp_path) == curve(uninterrupted)
    assert (tmp_path / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()

def test_slow_steps_are_saved_by_the_clock(run, tmp_path):
    assert run(tmp_path, "--checkpoint-every", 1000, "--checkpoint-minutes", 0, "--keep", 1000)[0] == 0
    assert len(train.checkpoints(tmp_path)) == len(curve(tmp_path))

def test_a_second_ctrl_c_does_not_wait_for_the_save(run, tmp_path, monkeypatch):
    handlers = []

    def interrupted(trainer, update=Trainer.update):
        signal.raise_signal(signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        return update(trainer)
    monkeypatch.setattr(Trainer, "update", interrupted)
    status, out, _ = run(tmp_path)
    assert status == 0 and "stopped and saved at step 1;" in out and handlers == [signal.SIG_DFL]

def test_sigkill_loses_neither_the_folder_nor_the_curve(uninterrupted, data, tmp_path):
    kill_loop(2, data, tmp_path / "out", uninterrupted, seed=1)

def test_resuming_unpickles_nothing(run, at_9):
    unpickled = []
    sys.addaudithook(lambda event, args: unpickled.append(args) if event == "pickle.find_class" else None)
    assert run(at_9, "--resume")[0] == 0 and unpickled == []
    assert {path.suffix for path in contents(at_9)} <= {".json", ".jsonl", ".safetensors"}

@pytest.mark.parametrize("kept", [24, 5, 0])      # after a kill, after a power cut, after they were deleted
def test_after_a_resume_each_step_stands_in_the_metrics_once(run, uninterrupted, at_9, kept):
    metrics = at_9 / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:kept]) + b'{"step": 25, "tok')
    if kept == 0:
        metrics.unlink()
    assert run(at_9, "--resume")[0] == 0
    whole = curve(uninterrupted)
    assert curve(at_9) == whole[:min(kept, 9)] + whole[9:]
    assert len(train.checkpoints(at_9)) == 2

@pytest.mark.parametrize("typed, says", [
    ("--lr 0.001", "lr 0.004, this command 0.001"), ("--d-state 4", "d_state 8, this command 4"),
    ("--seed 7", "seed 0, this command 7"), ("--total-tokens 30000", "total_tokens 20000, this command 30000")])
def test_resuming_another_run_is_refused_with_both_values(run, uninterrupted, typed, says):
    """Another corpus or tokenizer, too: test_bad_train.py."""
    before = contents(uninterrupted)
    assert_refused(run(uninterrupted, "--resume", *typed.split()), says)
    assert contents(uninterrupted) == before

def test_what_cannot_be_written_is_a_sentence_and_is_written_by_resuming(run, uninterrupted, at_9):
    before = contents(at_9 / "checkpoints")
    with largest_file(60_000):
        assert_refused(run(at_9, "--resume"), "too large")
    assert before.items() <= contents(at_9 / "checkpoints").items()
    assert train.checkpoints(at_9)[-1].name == "step-000000009"
    (at_9 / "model.safetensors").mkdir()        # in the place of a file, which the end writes
    assert_refused(run(at_9, "--resume"), "cannot write the checkpoint")
    (at_9 / "model.safetensors").rmdir()
    assert run(at_9, "--resume")[0] == 0
    assert curve(at_9) == curve(uninterrupted) and not [*at_9.rglob("*.partial")]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (at_9 / name).read_bytes() == (uninterrupted / name).read_bytes()

def test_a_held_out_loss_that_is_not_finite_stops_the_run_before_it_is_saved(run, tmp_path):
    phases = "--warmup-tokens", 0, "--ramp-tokens", 0, "--decay-tokens", 0, "--total-tokens", 256, "--lr", 1e9
    assert_refused(run(tmp_path / "out", *phases), "held-out loss on text is", "--lr")
    assert not [*tmp_path.rglob("*.safetensors")]

def test_what_takes_another_files_place_is_on_the_disk_before(run, at_9, monkeypatch):
    synced = set()
    replaced = set()

    def state(status):
        return status.st_ino, status.st_size, status.st_mtime_ns

    def sync(file, sync=os.fsync):
        sync(file)
        synced.add(state(os.fstat(file)))

    def move(old, new, move=os.rename):     # a file, or a checkpoint's folder
        for path in [Path(old), *Path(old).rglob("*")]:
            assert path.is_dir() or state(path.stat()) in synced, f"{path}, before {new}"
        replaced.add(Path(new).name)
        move(old, new)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(os, "rename", move)
    assert run(at_9, "--resume", "--keep", 100)[0] == 0
    assert replaced >= {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "step-000000024"}

# What a run leaves

def test_a_run_learns_and_leaves_a_model_its_tokenizer_and_the_metrics(uninterrupted):
    Mamba.from_pretrained(uninterrupted)
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "checkpoints"} <= names
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    wanted = {"step", "tokens", "loss", "lr", "batch_size", "context", "grad_norm", "tokens_per_s"}
    assert all(wanted <= row.keys() for row in rows) and rows[-1]["loss"] < rows[0]["loss"] - 2
    assert [row["step"] for row in rows if "text" in row.get("held_out", [])] == [8, 16, 24]

def test_the_model_is_published_every_so_many_steps_and_not_with_each_checkpoint(run, at_9, monkeypatch):
    written = []

    def spy(*args, save=Mamba.save_pretrained):
        written.append(len(curve(at_9)))
        save(*args)
    monkeypatch.setattr(Mamba, "save_pretrained", spy)
    assert run(at_9, "--resume", "--export-every", 11)[0] == 0
    assert written == [11, 22, 24] and [path.name[-2:] for path in train.checkpoints(at_9)] == ["21", "24"]

def test_eval_only_gives_the_held_out_loss_and_trains_nothing(uninterrupted, data):
    before = contents(uninterrupted)
    status, out, err = call(train, "--eval-only", "--data", f"a={data}", "--data", f"b={data}",
                            "--out", uninterrupted, "--context", 64)       # several sources need no shares here
    found = re.search(r"\na: (([\d.]+) nats per token, perplexity ([\d.]+), .*)\nb: \1\n", out)
    assert status == 0 and found, err
    nats = float(found[2])
    assert float(found[3]) == pytest.approx(math.exp(nats), rel=1e-3)
    assert contents(uninterrupted) == before
    rows = torch.from_numpy(read_source([data], byte_tokenizer(), END).held_out.astype(np.int64)).unfold(0, 65, 64)
    starts = F.pad(rows[:, :-2] == END, (1, 0))
    logits, _ = Mamba.from_pretrained(uninterrupted)(rows[:, :-1], reset=starts)
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss.item() == pytest.approx(nats, abs=1e-4)

def test_continuing_takes_its_recipe_from_the_data(uninterrupted, data, tmp_path):
    """One epoch; a rate that follows the batch; what is published is in the dtype of what it began with."""
    few = tmp_path / "few"
    model = tmp_path / "model"
    shutil.copytree(data, few, ignore=shutil.ignore_patterns("[2-9]*"))
    Mamba.from_pretrained(uninterrupted, dtype=torch.bfloat16).save_pretrained(model)
    shutil.copy(uninterrupted / "tokenizer.json", model)
    epoch = len(read_source([few], byte_tokenizer(), END).training)
    for more, dtype, peak in [([], torch.bfloat16, 6.4e-4 * math.sqrt(8 / 2048)),
                              (["--export-dtype", "fp16", "--lr", 1e-4], torch.float16, 1e-4)]:
        out = tmp_path / str(dtype)
        status, text, err = call(train, "--init-from", model, "--data", few, "--device", "cpu", "--out", out,
                                 "--context", 64, "--batch-end", 8, *more)
        assert status == 0, err
        first = text[:text.index("step 1 ")]
        steps = math.ceil(epoch / 8 / 64)
        assert f"{epoch:,} tokens in {steps} steps" in first and f"{peak:.2e}" in first
        assert len(curve(out)) == steps and curve(out)[0][2] < curve(uninterrupted)[0][2] - 1
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
        assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
