"""A run on paper: its steps, its days and its memory. `python train.py --plan` prints it.

Steps, rates and contexts come from the functions that train.py trains with. Memory is counted part by part.
test_plan.py holds it against what fully_shard leaves on a rank, and against what a step allocates.
"""
import math
import os
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

import train
from mamba import KEEP_FP32, Mamba, MambaConfig

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}   # NVIDIA's dense bf16 FLOP/s
GPU = 80e9              # bytes of an H100's memory, or of a large A100's
OVERHEAD = 5e9          # bytes that CUDA, NCCL and fragments take: our guess
TWO_MONTHS = 61         # days: about what the report gives for the 7B on 256 H100
# Milliseconds, forward and backward, of a layer of the 7B for 8192 tokens on an H100: `python scan_triton.py`
# estimates them, and prints how. The backward of the scan is with assumed waits.
LAYER = {"matrix products": (2.49, 4.98), "scan": (0.72, 2.55), "the rest": (0.42, 0.98)}
PIECE = 1024            # tokens whose logits exist at a time, in train.py
AT_LEAST = 0.75         # of the memory that is planned here a step takes: test_plan.py measures it

def print_plan(args, recipe) -> None:
    """What `train.py --plan` prints: the run on --world-size H100, of whose peak it reaches the part --mfu."""
    config = planned_config(args, recipe)
    print("stage       from        to       steps context          batch         learning rate"
          "     noise temperature  mixture")
    tokens = 0
    steps = 0
    for start, end, more_tokens, more_steps in stretches(recipe):
        print_row(recipe, start, end, more_steps)
        tokens += more_tokens
        steps += more_steps
    each = flops_per_token(config)
    flops = each * tokens
    days = flops / (args.world_size * PEAKS["H100"]) / 86400
    print("noise temperature: learning rate / sqrt(batch)\n")
    print(f"{steps:,} steps, {tokens:.5g} tokens, {flops:.3g} FLOPs ({each:.3g} a token): on {args.world_size} H100 "
          f"{days / args.mfu:.3g} days at {args.mfu:.0%} MFU, two months at {days / TWO_MONTHS:.1%}")
    print_layer(args.checkpoint_activations)
    print_memory(args, recipe, config)

def print_layer(recomputed: bool) -> None:
    """What part of an H100's peak a layer of the 7B can reach, before optimizer and network."""
    forwards = 2 if recomputed else 1       # --checkpoint-activations
    parts = {name: forwards * forward + backward for name, (forward, backward) in LAYER.items()}
    config = MambaConfig(n_layer=1, vocab_size=1)
    ideal = 8192 * flops_per_token(config) / PEAKS["H100"] * 1e3
    listed = ", ".join(f"{name} {ms:.1f}" for name, ms in parts.items())
    print(f"estimated ms of a layer of the 7B for 8192 tokens {'with' if recomputed else 'without'} "
          f"--checkpoint-activations: {listed}; that is {ideal / sum(parts.values()):.0%} MFU\n")

def planned_config(args, recipe) -> MambaConfig:
    """The sizes of the model that this command would train. Nothing is downloaded to know them."""
    if not recipe.init_from:
        size = 257 if args.recipe == "tiny" else 65024
        if args.tokenizer:
            size = train.vocabulary(train.read_tokenizer(args.tokenizer))
        return train.pick_config(args, None, size, end=0)
    folder = Path(recipe.init_from)
    if folder.is_dir():
        return MambaConfig.from_json(folder / "config.json")
    if "mamba-7b" in recipe.init_from.lower():      # all that tiiuae published under such names
        return MambaConfig()
    raise ValueError(f"there is no folder {folder}, and of the hub's models --plan only knows the sizes of "
                     "tiiuae's Falcon-Mamba-7B")

def flops_per_token(config: MambaConfig) -> float:
    """Of training. A product takes 2 a weight forward and 4 backward, the scan about 8 and 16 a state."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    products = 6 * d * (3 * m + 2 * r + 2 * n)
    return config.n_layer * (products + 24 * d * n) + 6 * m * config.vocab_size

def utilization(rate: float, config: MambaConfig) -> float:
    """The part of its peak that this GPU reaches at `rate` tokens a second; nan of one not in PEAKS."""
    gpu = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAKS.items() if name in gpu), math.nan)
    return rate * flops_per_token(config) / peak

# Steps

def count_steps(recipe) -> int:
    return sum(steps for *_, steps in stretches(recipe))

def stretches(recipe) -> list[tuple[int, int, int, int]]:
    """The run cut where a rule changes: a stretch's start, its end, its tokens and its steps."""
    decay = recipe.total_tokens - recipe.decay_tokens
    marks = {0, recipe.warmup_tokens, recipe.ramp_tokens, decay, recipe.total_tokens}
    marks |= {stage.start for stage in recipe.stages}
    marks = sorted(mark for mark in marks if mark <= recipe.total_tokens)
    found = []
    tokens = 0
    for start, end in pairwise(marks):
        before = tokens
        steps = 0
        while tokens < end:
            alike = steps_alike(recipe, tokens, end)
            steps += alike
            tokens += alike * tokens_a_step(recipe, tokens)
        found.append((start, end, tokens - before, steps))
    return found

def tokens_a_step(recipe, tokens: int) -> int:
    return train.batch_size(recipe, tokens) * train.context_length(recipe, tokens)

def steps_alike(recipe, tokens: int, end: int) -> int:
    """How many steps from here have one size: to count them one by one would take days for 1e18 tokens."""
    size = tokens_a_step(recipe, tokens)
    most = math.ceil((end - tokens) / size)
    # Between two marks the batch moves in one direction: a size that was left does not come back.
    return 1 + bisect_left(range(1, most), True,
                           key=lambda step: tokens_a_step(recipe, tokens + step * size) != size)

def print_row(recipe, start: int, end: int, steps: int) -> None:
    phase = "stable"
    if start >= recipe.total_tokens - recipe.decay_tokens:
        phase = "decay"
    if start < recipe.ramp_tokens:
        phase = "ramp"
    if start < recipe.warmup_tokens:
        phase = "warmup"
    batch = train.batch_size(recipe, start)
    last_batch = train.batch_size(recipe, end)
    rate = train.learning_rate(recipe, start)
    last_rate = train.learning_rate(recipe, end)
    stage = train.stage_at(recipe, start)
    mixture = " ".join(f"{name} {share:.0%}" for name, share in train.shares(stage.mixture).items())
    print(f"{phase:7}{start:9.4g} {end:9.4g} {steps:11,} {stage.context:7} {batch:6} -> {last_batch:<5}"
          f"{rate:10.2e} -> {last_rate:.2e}"
          f"{rate / batch**.5:10.2e} -> {last_rate / last_batch**.5:.2e}  {mixture}")

def print_memory(args, recipe, config: MambaConfig) -> None:
    needs = memory(config, args.world_size, torch.bfloat16, args.offload)
    if args.offload:
        print("memory of the host for each GPU in GB, in fp32:")
        print_parts(needs.host)
    print("memory of each GPU in GB, with fp32 parameters and bf16 products:")
    used = print_parts(needs.gpu | {"CUDA, NCCL and fragments (our guess)": OVERHEAD})
    print(f"and for a step, which adds up whole gradients if it takes several passes of --micro-tokens "
          f"{args.micro_tokens}:")
    for way, each in needs.activations.items():
        for context in sorted({stage.context for stage in recipe.stages}):
            passes, _ = cut_step(args, recipe, context, args.world_size)
            size = step_memory(args, recipe, context, args.world_size, needs, way)
            print(f"  context {context}, passes: {passes}, {way:>7} --checkpoint-activations{size / 1e9:9.2f}"
                  f", together {(used + size) / GPU:.0%} of 80 GB")
        hold = (GPU - used - needs.whole_gradients) // each
        if hold >= recipe.longest:
            print(f"  80 GB hold --micro-tokens {hold:.0f} {way} --checkpoint-activations")
    smallest = recipe.longest * needs.activations["with"]
    if used + smallest > GPU and not args.offload:
        kept = sum(memory(config, args.world_size, torch.bfloat16, offload=True).host.values())
        print(f"80 GB do not hold a single row: {gb(kept)} are for weights, gradients and Adam's averages. "
              "--offload keeps these in the host's memory, and more GPUs share them.")

def cut_step(args, recipe, context: int, world: int) -> tuple[int, int]:
    """How many passes a rank makes in a step of the last batch's size, and the tokens of the first one."""
    rows = math.ceil(recipe.batch_end / world)
    at_once = min(rows, max(1, args.micro_tokens // context))
    return math.ceil(rows / at_once), at_once * context

def step_memory(args, recipe, context: int, world: int, needs: "Memory", way: str) -> float:
    """Bytes that come and go with a step: a pass's activations, and gradients that add up over several."""
    passes, tokens = cut_step(args, recipe, context, world)
    return tokens * needs.activations[way] + (needs.whole_gradients if passes > 1 else 0)

def gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"

def print_parts(parts: dict[str, float]) -> float:
    together = sum(parts.values())
    for name, size in (parts | {"together": together}).items():
        print(f"  {name:54}{size / 1e9:8.2f}")
    return together

# Memory

class Memory(NamedTuple):
    """What each rank needs, in bytes."""
    gpu: dict[str, float]           # part -> bytes, whatever --micro-tokens is
    host: dict[str, float]          # part -> bytes that --offload keeps in the host's memory
    activations: dict[str, float]   # "without" or "with" --checkpoint-activations -> bytes a token of a pass
    whole_gradients: float          # bytes: they add up on each rank over several passes

def memory(config: MambaConfig, world: int, dtype: torch.dtype, offload: bool = False) -> Memory:
    """The memory of each of `world` ranks. Matrices and norms are gathered in `dtype`."""
    with torch.device("meta"):      # shapes without memory
        model = Mamba(config)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.backbone.layers[0].parameters())
    root = whole - config.n_layer * block       # embeddings, norm_f and lm_head
    exact = sum(p.numel() for name, p in model.backbone.layers.named_parameters() if name.endswith(KEEP_FP32))
    # fully_shard deals out rows of each tensor, and rank 0 has the most.
    mine = sum(math.ceil(len(p) / world) * p.numel() // len(p) for p in model.parameters())
    kept = {
        "parameters": 4 * mine,
        "gradients": 4 * mine,
        "optimizer: Adam's two averages": 8 * mine,
    }
    gpu = {} if offload else dict(kept)
    gpu["logits of 1024 tokens, with gradients"] = 3 * 4 * PIECE * config.vocab_size
    whole_gradients = 0
    # A rank alone multiplies fp32 parameters as they are. In any other case fully_shard makes copies.
    if world > 1 or offload or dtype != torch.float32:
        gpu["gathered: embeddings, head, 3 blocks"] = (root + 3 * block) * dtype.itemsize + 4 * exact
        gpu["their gradients on the way"] = max(root, 2 * block) * (dtype.itemsize + 4) + 4 * exact
        whole_gradients = 4 * whole
    one_block = block_activations(config, dtype)
    streams = 4 * config.d_model * config.n_layer       # what enters each block, in fp32
    return Memory(
        gpu=gpu,
        host=kept if offload else {},
        activations={"without": config.n_layer * one_block, "with": streams + one_block},
        whole_gradients=whole_gradients,
    )

def block_activations(config: MambaConfig, dtype: torch.dtype) -> float:
    """Bytes that a block keeps of each token for its backward."""
    m = config.d_model
    d = config.d_inner
    n = config.d_state
    r = config.dt_rank
    width = dtype.itemsize
    stream = (4 + 4 + width) * m        # the stream, and normalised in fp32 and in dtype
    rows = (4 + 4 + 4 * width) * d      # the convolution's input and output in fp32; x, dt, z, y in dtype
    apart = 16 if dtype == torch.float32 else 128       # tokens from one kept state to the next: CPU, GPU
    states = 4 * n * d / apart
    dt = (4 + width) * r                # before its norm and after
    B_and_C = 2 * (4 + 4) * n           # the same
    return stream + rows + states + dt + B_and_C

def check_memory(args, recipe, config: MambaConfig, world: int) -> None:
    """ValueError, in one sentence with the flag that helps, where this run surely does not fit."""
    on_gpu = args.device.type == "cuda"
    offload = args.offload and on_gpu
    host = host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    has = gpu_memory(args.device) if on_gpu else host
    dtype = torch.bfloat16 if on_gpu else torch.float32
    needs = memory(config, world, dtype, offload)
    kept = sum(memory(config, world, dtype, offload=True).host.values())
    if offload and kept > host:
        raise ValueError(f"--offload needs {gb(kept)} of the host's memory for each process, for weights, "
                         f"gradients and Adam's averages, and there are {gb(host)}; use more GPUs, which share them")
    way = "with" if args.checkpoint_activations else "without"
    step = max(step_memory(args, recipe, stage.context, world, needs, way) for stage in recipe.stages)
    fixed = sum(needs.gpu.values())
    surely_kept = 0 if offload else kept
    if max(surely_kept, AT_LEAST * (fixed + step)) <= has:
        return
    room = has - fixed - needs.whole_gradients
    hold = room // needs.activations[way]
    hold_more = room // needs.activations["with"]
    if hold >= recipe.longest:
        way_out = f"--micro-tokens {hold:.0f} fits"
    elif hold_more >= recipe.longest:
        way_out = f"--checkpoint-activations with --micro-tokens {min(hold_more, args.micro_tokens):.0f} fits"
    elif on_gpu and not offload and kept <= host:
        way_out = f"--offload keeps {gb(kept)} of this in the host's memory"
    else:
        way_out = "use more GPUs, a shorter --context or a smaller model"
    raise ValueError(f"each process needs {gb(fixed + step)} and has {gb(has)}: {gb(surely_kept)} for weights, "
                     f"gradients and Adam's averages, {gb(step)} for a step; {way_out}")

def gpu_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory

def host_memory() -> float:
    """Bytes; without end where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):       # Windows
        return math.inf
