"""The plan's claims: it counts the steps that training takes, and the memory that a rank and a step take."""
import re
from dataclasses import replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from conftest import call, python
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

import train
from mamba import Mamba, MambaConfig
from tests import plan
from tests.plan import AT_LEAST, check_memory, count_steps, flops_per_token, memory
from train import RECIPES, batch_size, context_length

SEVEN = RECIPES["falcon-mamba-7b"]

def planned(flags):
    status, out, told = call(train, "--plan", *flags.split())
    assert status == 0, told
    return out

# Steps

def test_the_plan_of_the_7b_prints_the_whole_run():
    out = planned("--recipe falcon-mamba-7b --world-size 256")
    assert re.search(r"ramp .*-> 2048 .*6.40e-04 .*1.41e-05 -> 1.41e-05", out)
    assert re.search(r"decay +5e\+12 +5.5e\+12 .*8192 .*6.40e-04 -> 2.50e-06", out)
    days, ours, theirs = re.search(r"on 256 H100 ([\d.]+) days at (\d+)% MFU, two months at ([\d.]+)%", out).groups()
    assert float(days) * float(ours) == pytest.approx(61 * float(theirs), rel=0.01)     # the report: "about two months"
    assert f"that is {ours}% MFU" in planned("--recipe falcon-mamba-7b --checkpoint-activations")
    assert re.search(r"context 2048, passes: 1, +with --checkpoint-activations .* together [3-5]\d% of 80 GB", out)
    assert re.search(r"context 8192, passes: 4, ", out) and "hold --micro-tokens" in out

@pytest.mark.parametrize("recipe", [
    RECIPES["tiny"], replace(RECIPES["tiny"], batch_start=8, batch_end=2),
    train.scaled(RECIPES["continue"], {"total_tokens": 2 * 10**9}),
    train.scaled(SEVEN, {"total_tokens": 5 * 10**9})])
def test_the_steps_that_it_counts_are_those_that_training_takes(recipe):
    tokens = 0
    steps = 0
    while tokens < recipe.total_tokens:
        tokens += batch_size(recipe, tokens) * context_length(recipe, tokens)
        steps += 1
    assert count_steps(recipe) == steps

@pytest.mark.parametrize("flags, config", [
    ("--d-model 64", MambaConfig(vocab_size=257, **train.TINY | {"d_model": 64})),
    ("--recipe falcon-mamba-7b --total-tokens 1_000_000_000_000_000", MambaConfig()),
    ("--init-from small", MambaConfig(vocab_size=300, d_model=16, n_layer=1)),
    ("--init-from tiiuae/Falcon3-Mamba-7B-Base", MambaConfig())])
def test_a_plan_is_of_the_model_that_the_command_would_train(monkeypatch, tmp_path, flags, config):
    monkeypatch.chdir(tmp_path)
    Mamba(MambaConfig(vocab_size=300, d_model=16, n_layer=1)).save_pretrained("small")
    assert f"({flops_per_token(config):.3g} a token)" in planned(flags)

def test_the_plan_counts_the_operations_of_every_product():
    """6 a parameter, but for embeddings, which are looked up, and what is no matrix; the scan adds < 1%."""
    with torch.device("meta"):
        model = Mamba(MambaConfig())
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert 6 * matrices < flops_per_token(MambaConfig()) < 6.06 * matrices

# Memory

SHARDED_7B = """
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import mamba, train
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=256)
with torch.device("meta"):
    objective = train.Objective(mamba.Mamba(mamba.MambaConfig()), 11)
train.shard(objective, "cpu", torch.bfloat16)
print(sum(4 * p.to_local().numel() for p in objective.parameters()))
"""

def test_the_plan_knows_what_fully_shard_leaves_on_each_of_256_gpus():
    run = python(SHARDED_7B)
    assert run.returncode == 0, run.stderr
    mine = int(run.stdout)
    needs = memory(MambaConfig(), 256, torch.bfloat16)
    kept = "parameters", "gradients", "optimizer: Adam's two averages"
    assert [needs.gpu[part] for part in kept] == [mine, mine, 2 * mine]

@pytest.mark.parametrize("layers, kind", [(4, "without"), (8, "with")])
def test_the_planned_memory_is_what_a_step_takes(layers, kind):
    """By PyTorch's own allocator, because what a process holds besides depends on the machine."""
    config = MambaConfig(vocab_size=2000, d_model=256, n_layer=layers)
    rows = torch.randint(2000, (2, 4, 257))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = Mamba(config)
        if kind == "with":
            for block in model.backbone.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        objective = train.Objective(model, 0)
        adam = train.optimizer(model, RECIPES["tiny"])
        for step in rows:
            objective(step).backward()
            adam.step()
            adam.zero_grad()
    moves = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    moves.sort(key=lambda e: e.start_ns())
    measured = max(accumulate(e.nbytes() for e in moves))
    needs = memory(config, 1, torch.float32)
    expected = sum(needs.gpu.values()) + 4 * 256 * needs.activations[kind]
    assert AT_LEAST < measured / expected < 1.05     # a plan may ask for too much, hardly for too little

def test_one_gpu_keeps_116_gb_of_the_7b_or_its_host_does():
    out = planned("--recipe continue")
    assert "116.4 GB" in out and "--offload" in out and "80 GB hold" not in out
    out = planned("--recipe continue --offload")
    assert re.search(r"memory of the host.*\n(.*\n){3}  together +116.36\n", out)
    assert re.search(r"80 GB hold --micro-tokens \d+ with --checkpoint-activations", out)

@pytest.mark.parametrize("world, flags, host, words", [
    (1, "", 160e9, ["has 80.0 GB: 116.4 GB for weights", " for a step", "--offload keeps"]),
    (1, "", 100e9, ["use more GPUs"]),
    (1, "--device cpu", 100e9, ["has 100.0 GB: 116.4 GB", "use more GPUs"]),
    (1, "--offload", 100e9, ["--offload needs 116.4 GB", "there are 100.0 GB", "use more GPUs"]),
    (1, "--offload", 160e9, ["has 80.0 GB", "--checkpoint-activations with --micro-tokens 16384 fits"]),
    (8, "--checkpoint-activations --micro-tokens 81920", 160e9, ["14.5 GB for weights", "; --micro-tokens "]),
])
def test_a_run_that_cannot_fit_is_told_so_with_both_values_and_the_flag_that_helps(monkeypatch, world, flags,
                                                                                 host, words):
    monkeypatch.setattr(plan, "gpu_memory", lambda device: 80e9)
    monkeypatch.setattr(plan, "host_memory", lambda: host)
    device = torch.device("cpu" if "cpu" in flags else "cuda")
    options, _ = train.parse(flags.replace("--offload", "").split())
    options.device = device
    options.offload = "--offload" in flags
    with pytest.raises(ValueError) as error:
        check_memory(options, RECIPES["continue"], MambaConfig(), world)
    assert all(word in str(error.value) for word in words), error.value
    fits = re.search(r"--micro-tokens (\d+) fits", str(error.value))
    if fits:
        options.micro_tokens = int(fits[1])
        options.checkpoint_activations = True
        check_memory(options, RECIPES["continue"], MambaConfig(), world)
