"""Ours beside every peer that is installed, on the same weights with the same threads.

    python tests/bench.py               all of these, in some ten minutes
    python tests/bench.py generate      reading 512 tokens, then writing 32: 190M weights in bf16
    python tests/bench.py training      a step of AdamW on 8 x 256 tokens: 2M weights in fp32
    python tests/bench.py length        a token after ever longer texts, beside attention

The weights are random. Each peer has a process and so a peak memory of its own. All load first,
then take turns, so that whatever else the machine does falls on all of them. The tables give
medians. mamba_ssm has no row, because its kernels lack the norms of dt, B and C.

With ONEDNN_MAX_CPU_ISA=AVX512_CORE in front, PyTorch and ours do as on a CPU without units for
16-bit products. llama.cpp must be built for such a one. `--save assets/bench.json` keeps the
figures for the README's tables and for cost.svg.
"""
import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, pairwise, repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FULL = {
    "generate": {"d_model": 768, "n_layer": 24, "vocab_size": 65024},
    "training": {"d_model": 256, "n_layer": 4, "vocab_size": 257},
    "prompt": 512, "written": 32, "batch": 8, "context": 256, "rounds": 5,
    "lengths": [128, 512, 2048, 8192, 32768],
}
QUICK = {
    "generate": {"d_model": 32, "n_layer": 2, "vocab_size": 300},
    "training": {"d_model": 32, "n_layer": 2, "vocab_size": 257},
    "prompt": 16, "written": 4, "batch": 2, "context": 16, "rounds": 2,
    "lengths": [16, 64],
}

# What runs in a peer's process. Imports stand in the functions that need them, because every one
# counts in the peak memory of the process.

def memory() -> float:
    """The most that this process has held, in GB."""
    status = Path("/proc/self/status")      # getrusage's figure begins with the parent's
    if not status.exists():                 # no Linux
        return math.nan
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9

def tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(12, vocab_size), k=count)

# Each of these loads a model and returns a function, from a prompt to the tokens that follow it,
# one by one, likeliest first.

def ours(folder: Path, threads: int, compiled=False, quantize=False):
    import torch
    from mamba import Mamba
    from sample import compile_blocks, generate, keep_memory
    model = Mamba.from_pretrained(folder, quantize=quantize)
    keep_memory()       # as sample.py does
    if compiled:
        compile_blocks()

    def write(prompt, steps):
        for token in generate(model, torch.tensor([prompt]), steps, 0):
            yield token.item()
    return write

def reference(folder: Path, threads: int):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def write(prompt, steps):
        cache = None
        rows = torch.tensor([prompt])
        for _ in range(steps):
            out = model(rows, cache_params=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache_params
            rows = out.logits[:, -1:].argmax(-1)
            yield rows.item()
    return write

def llama_cpp(folder: Path, threads: int, file="model.gguf"):
    import llama_cpp
    import numpy as np
    llama = llama_cpp.Llama(str(folder / file), n_ctx=4096, n_batch=512, n_threads=threads,
                            n_threads_batch=threads, verbose=False)
    size = llama.n_vocab()

    def write(prompt, steps):
        llama.reset()
        for _ in range(steps):
            llama.eval(prompt)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(size,)).argmax())
            yield token
            prompt = [token]
    return write

def attention(folder: Path, threads: int):
    """A random Llama with as many weights as ours, in half as many layers."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    ours = json.loads((folder / "config.json").read_text())
    width = ours["hidden_size"]
    layers = ours["num_hidden_layers"] // 2
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, vocab_size=ours["vocab_size"],
        max_position_embeddings=2**20)
    model = LlamaForCausalLM(config).bfloat16().eval()

    @torch.inference_mode()
    def write(prompt, steps):
        # Keys and values of any numbers cost the same, so the prompt is not read.
        shape = 1, width // 32, len(prompt), 32
        keys = torch.randn(shape, dtype=torch.bfloat16)
        cache = DynamicCache(config=config)
        for layer in range(layers):
            cache.update(keys, keys, layer)
        token = torch.zeros(1, 1, dtype=torch.int64)
        for _ in range(steps):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            yield token.item()
    return write

WRITERS = {
    "ours": ours,
    "ours, --compile": partial(ours, compiled=True),
    "transformers": reference,
    "llama.cpp": llama_cpp,
    "ours, 4 bits, --compile": partial(ours, compiled=True, quantize=True),
    "llama.cpp, Q4_0": partial(llama_cpp, file="q4_0.gguf"),
    "attention": attention,
}

# The tables. Each is a generator: one round a next(), with its figures.

def writing(peer: str, folder: Path, sizes: dict, threads: int, lengths=None):
    write = WRITERS[peer](folder / "generate", threads)
    for seed, now in enumerate(lengths or repeat(sizes["prompt"])):
        prompt = tokens(now, seed, sizes["generate"]["vocab_size"])
        times = [time.perf_counter()]
        made = []
        for token in write(prompt, sizes["written"] + 1):
            times.append(time.perf_counter())
            made.append(token)
        step = statistics.median(b - a for a, b in pairwise(times[1:]))
        yield {"prefill": now / (times[1] - times[0]), "decode": 1 / step, "first": made[0]}

def length(peer: str, folder: Path, sizes: dict, threads: int):
    """A round is one length: the milliseconds of a token there, and the MB kept of the text."""
    width = sizes["generate"]["d_model"]
    layers = sizes["generate"]["n_layer"]
    rounds = writing(peer, folder, sizes, threads, sizes["lengths"])
    for now, row in zip(sizes["lengths"], rounds):
        kept = layers * 2 * width * (16 * 4 + 3 * 2)    # 16 states in fp32, 3 inputs in bf16
        if peer == "attention":
            kept = layers // 2 * width * now * 2 * 2    # a key and a value in bf16
        yield {"tokens": now, "ms": 1e3 / row["decode"], "state_mb": kept / 1e6}

def training(peer: str, folder: Path, sizes: dict, threads: int):
    import torch
    import torch.nn.functional as F
    if peer == "ours":
        from mamba import Mamba
        model = Mamba.from_pretrained(folder / "training").train()
    else:
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder / "training").train()
        for layer in model.backbone.layers:         # asked for in the config, it is lost on the way
            layer.mixer.use_mambapy = True
    adam = torch.optim.AdamW(model.parameters())
    shape = sizes["batch"], sizes["context"] + 1
    for seed in count():
        text = torch.tensor(tokens(math.prod(shape), seed, 257)).view(shape)
        start = time.perf_counter()
        out = model(text[:, :-1])
        logits = out[0] if peer == "ours" else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        yield {"loss": loss.item(), "seconds": time.perf_counter() - start}

TABLES = {"generate": writing, "training": training, "length": length}
PEERS = {"generate": [*WRITERS][:-1], "training": ["ours", "transformers, mambapy"],
         "length": ["ours", "attention"]}
# What is in a peer's name, and the packages that it then needs, by pip's names.
NEEDS = {"transformers": ["transformers"], "attention": ["transformers"], "mambapy": ["mambapy"],
         "llama.cpp": ["llama-cpp-python", "gguf"]}

def begin(job: str, peer: str, *settings) -> None:
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX512_CORE" and peer.startswith("ours"):
        import mamba
        import torch
        mamba.NO_UNITS[:] = [torch.bfloat16, torch.float16]
    global rounds       # of this process, which serves one peer
    rounds = TABLES[job](peer, *settings)

def one_round(threads: int) -> dict:
    import torch
    torch.set_num_threads(threads)
    return next(rounds) | {"gb": memory()}

# The models that all peers load.

def make(folder: Path, sizes: dict) -> None:
    import torch
    from mamba import Mamba, MambaConfig
    for name, dtype in ("generate", torch.bfloat16), ("training", torch.float32):
        torch.manual_seed(0)
        config = MambaConfig(**sizes[name], initializer_range=0.02)
        Mamba(config).to(dtype).save_pretrained(folder / name)
    if all(map(version, NEEDS["llama.cpp"])):
        to_gguf(folder / "generate")
        to_q4_0(folder / "generate")

def to_gguf(folder: Path) -> None:
    """The same model for llama.cpp: matrices in bf16 as they are, all that is small in fp32."""
    import gguf
    import torch
    from mamba import Mamba
    model = Mamba.from_pretrained(folder)
    c = model.config
    file = gguf.GGUFWriter(folder / "model.gguf", "mamba")
    settings = {
        "context_length": 2**20, "embedding_length": c.d_model, "feed_forward_length": 0,
        "head_count": 0, "block_count": c.n_layer, "ssm_conv_kernel": c.d_conv,
        "ssm_inner_size": c.d_inner, "ssm_state_size": c.d_state,
        "ssm_time_step_rank": c.dt_rank, "layer_norm_rms_eps": c.norm_eps,
        "ssm_dt_b_c_rms": True,         # Falcon-Mamba's three norms
        "file_type": gguf.LlamaFileType.MOSTLY_BF16,
        # A stand-in for a tokenizer: the bench gives and takes numbers, no text.
        "tokenizer_model": "gpt2", "tokenizer_pre": "falcon", "bos_token_id": 0,
        "eos_token_id": 11, "token_list": [f"t{i}" for i in range(c.vocab_size)],
        "token_types": [1] * c.vocab_size, "token_merges": ["t 1"],
    }
    for name, value in settings.items():
        getattr(file, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, c.n_layer)
    for name, p in model.named_parameters():
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        p = p.detach().squeeze()                # the convolution's weights have a dimension of one
        if name.endswith("ssm_a"):
            p = -torch.exp(p.float())           # A itself, not its logarithm
        if p.dim() == 2 and p.dtype == torch.bfloat16:
            raw = p.contiguous().view(torch.uint8).numpy()
            file.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            file.add_tensor(name, p.float().contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()

def to_q4_0(folder: Path) -> None:
    """The same in 4 bits, with llama.cpp's own quantiser."""
    import ctypes
    import llama_cpp
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    source = str(folder / "model.gguf").encode()
    goal = str(folder / "q4_0.gguf").encode()
    llama_cpp.llama_model_quantize(source, goal, ctypes.byref(settings))

# What runs in the process that was started: it only asks.

def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

def measure(jobs: list[str], sizes: dict, threads: int) -> dict:
    """Every round of every peer: table -> peer -> its figures."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                   "TRANSFORMERS_VERBOSITY": "error"}
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), sizes)
        for job in jobs:
            processes = {}
            for peer in PEERS[job]:
                if usable(peer):
                    settings = job, peer, Path(folder), sizes, threads
                    processes[peer] = ProcessPoolExecutor(1, spawn, begin, settings)
            found[job] = {peer: [] for peer in processes}
            for _ in range(len(sizes["lengths"]) if job == "length" else 1 + sizes["rounds"]):
                for peer, process in processes.items():
                    row = process.submit(one_round, threads).result()
                    found[job][peer].append(row)
            for peer, process in processes.items():
                process.shutdown()
                if job != "length":
                    del found[job][peer][0]     # the first round loads, warms up and compiles
    return found

def usable(peer: str) -> bool:
    """Whether this peer is installed; says how it can be."""
    needed = sum([packages for word, packages in NEEDS.items() if word in peer], [])
    missing = [package for package in needed if not version(package)]
    if missing:
        print(f"without {peer}: pip install {' '.join(missing)}", file=sys.stderr)
    return not missing

def machine(threads: int) -> str:
    """What it is and runs, and those of its instructions that make figures differ."""
    import torch
    has = torch.cpu.get_capabilities()
    known = "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "neon", "bf16", "fp16_arith"
    instructions = ", ".join(name for name in known if has.get(name))
    packages = ["torch", "transformers", "mambapy", "llama-cpp-python"]
    versions = [f"{name} {version(name)}" for name in packages if version(name)]
    name = has.get("cpu_name", "a CPU")
    return f"{name} ({instructions}), {threads} threads; {', '.join(versions)}"

# What it prints, and the README shows.

COLUMNS = {"prefill": "reads, tokens/s", "decode": "writes, tokens/s", "seconds": "a step, s",
           "gb": "peak memory, GB"}

def table(peers: dict[str, list[dict]]) -> str:
    """As Markdown: medians over the rounds, and their ratio to ours."""
    names = [name for name in COLUMNS if name in peers["ours"][0]]
    base = {name: statistics.median(row[name] for row in peers["ours"]) for name in names}
    lines = [["", *(COLUMNS[name] for name in names)], ["---"] * (1 + len(names))]
    for peer, rounds in peers.items():
        line = [peer]
        for name in names:
            value = statistics.median(row[name] for row in rounds)
            ratio = "" if peer == "ours" else f" ({value / base[name]:.2g})"
            words = f"{value:.3g}" if value < 100 else f"{value:.0f}"
            line.append(words + ratio)
        lines.append(line)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

def compare(peers: dict[str, list[dict]], name: str, tolerance: float) -> None:
    """It was the same model, or the times mean nothing."""
    for peer, rounds in peers.items():
        pairs = [(a[name], b[name]) for a, b in zip(peers["ours"], rounds)]
        same = sum(abs(a - b) <= tolerance * abs(a) for a, b in pairs)
        print(f"{peer}: {name} as ours in {same} of {len(pairs)} rounds")

def main() -> None:
    from sample import number     # a type for argparse
    parser = argparse.ArgumentParser(description="Measure ours beside every peer installed.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", choices=[*PEERS, []],    # []: none is given
        help=f"some of {', '.join(PEERS)} (default all)")
    add("--quick", action="store_true", help="tiny sizes, in seconds: that it runs, not how fast")
    add("--threads", type=number(int, 1, 1024), default=os.cpu_count(), help="of each peer")
    add("--save", type=Path, help="a JSON file for the figures; those of other tables stay")
    args = parser.parse_args()
    if args.save and not args.save.absolute().parent.is_dir():
        parser.error(f"--save {args.save} is in no folder; make {args.save.parent} first")
    found = {"machine": machine(args.threads)}
    found |= measure(args.tables or [*PEERS], QUICK if args.quick else FULL, args.threads)
    print(found["machine"])
    for job, figure, tolerance in ("generate", "first", 0), ("training", "loss", 1e-3):
        if job in found:
            print(f"\n{job}\n{table(found[job])}")
            compare(found[job], figure, tolerance)
    for peer, rounds in found.get("length", {}).items():
        for row in rounds:
            print(f"{peer}, after {row['tokens']:,} tokens: {row['ms']:.1f} ms a token, "
                  f"{row['state_mb']:.1f} MB kept")
    if args.save:
        old = json.loads(args.save.read_text()) if args.save.exists() else {}
        args.save.write_text(json.dumps(old | found, indent=1) + "\n")

if __name__ == "__main__":
    main()
