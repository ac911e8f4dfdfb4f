"""Ours beside every peer that is installed, on the same weights with the same threads: python tests/bench.py

    generate    reading 512 tokens, then writing 32: a random Falcon-Mamba of 190M weights in bf16
    training    one step of AdamW on 8 x 256 tokens: a random one of 2M weights in fp32
    length      writing a token after ever longer texts, beside attention: a random Llama of the 190M's size

Each peer has a process and so a peak memory of its own. All load first, then take turns, round after round,
so that whatever else the machine does falls on all of them. The tables give medians. mamba_ssm has no row,
because its kernels lack the norms of dt, B and C.

`python tests/bench.py --save assets/bench.json` keeps the figures for the README's tables and for cost.svg.
"""
import argparse
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Table -> peer -> the packages that it needs, as pip calls them.
PEERS = {
    "generate": {"ours": [], "ours, --compile": [], "transformers": ["transformers"],
                 "llama.cpp": ["llama-cpp-python", "gguf"], "ours, 4 bits, --compile": [],
                 "llama.cpp, Q4_0": ["llama-cpp-python", "gguf"]},
    "training": {"ours": [], "transformers, mambapy": ["transformers", "mambapy"]},
    "length": {"ours": [], "attention": ["transformers"]},
}
FULL = {
    "generate": {"d_model": 768, "n_layer": 24, "vocab_size": 65024},
    "training": {"d_model": 256, "n_layer": 4, "vocab_size": 257},
    "prompt": 512, "written": 32, "batch": 8, "context": 256, "rounds": 8,
    "lengths": [128, 512, 2048, 8192, 32768],
}
QUICK = {
    "generate": {"d_model": 32, "n_layer": 2, "vocab_size": 300},
    "training": {"d_model": 32, "n_layer": 2, "vocab_size": 257},
    "prompt": 16, "written": 4, "batch": 2, "context": 16, "rounds": 2,
    "lengths": [16, 64],
}

# What runs in a peer's process. Imports stand in the functions that need them, because every one counts in
# the peak memory of the process.

def memory(device: str) -> float:
    """The most that this process has held, in GB."""
    import torch
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():     # Linux, whose ru_maxrss begins with the parent's
        kilobytes = status.read_text().split("VmHWM:")[1].split()[0]
        return int(kilobytes) * 1024 / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9

def make(folder: Path, sizes: dict) -> None:
    """The models that all peers load."""
    import torch
    from mamba import Mamba, MambaConfig
    for name, dtype in ("generate", torch.bfloat16), ("training", torch.float32):
        torch.manual_seed(0)
        config = MambaConfig(**sizes[name], initializer_range=0.02)
        Mamba(config).to(dtype).save_pretrained(folder / name)
    if version("gguf"):
        to_gguf(folder / "generate")
    if version("gguf") and version("llama-cpp-python"):
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
        "context_length": 2**20, "embedding_length": c.d_model, "feed_forward_length": 0, "head_count": 0,
        "block_count": c.n_layer, "ssm_conv_kernel": c.d_conv, "ssm_inner_size": c.d_inner,
        "ssm_state_size": c.d_state, "ssm_time_step_rank": c.dt_rank, "layer_norm_rms_eps": c.norm_eps,
        "ssm_dt_b_c_rms": True,         # Falcon-Mamba's three norms
        "file_type": gguf.LlamaFileType.MOSTLY_BF16,
        # A stand-in for a tokenizer: the bench gives and takes numbers, no text.
        "tokenizer_model": "gpt2", "tokenizer_pre": "falcon", "bos_token_id": 0, "eos_token_id": 11,
        "token_list": [f"t{i}" for i in range(c.vocab_size)], "token_types": [1] * c.vocab_size,
        "token_merges": ["t 1"],
    }
    for name, value in settings.items():
        getattr(file, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MAMBA, c.n_layer)
    for name, p in model.named_parameters():
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        p = p.detach().squeeze()                # the convolution's weights have a dimension of one number
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
    llama_cpp.llama_model_quantize(source, str(folder / "q4_0.gguf").encode(), ctypes.byref(settings))

def tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    import torch
    return torch.randint(12, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

# Writers: each loads the model and returns a function, from a prompt to an iterator over the tokens that
# follow it, likeliest first.

def ours(folder: Path, device: str, threads: int, compiled: bool = False, quantize: bool = False):
    import torch
    from mamba import Mamba
    from sample import compile_blocks, generate
    model = Mamba.from_pretrained(folder, device, quantize=quantize)
    if compiled:
        compile_blocks()

    def write(prompt, count):
        for token in generate(model, torch.tensor([prompt], device=device), count, 0):
            yield token.item()
    return write

def reference(folder: Path, device: str, threads: int):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)

    @torch.inference_mode()
    def write(prompt, count):
        cache = None
        tokens = torch.tensor([prompt], device=device)
        for _ in range(count):
            out = model(tokens, cache_params=cache, use_cache=True, logits_to_keep=1)
            cache = out.cache_params
            tokens = out.logits[:, -1:].argmax(-1)
            yield tokens.item()
    return write

def llama_cpp(folder: Path, device: str, threads: int, file: str = "model.gguf"):
    import llama_cpp
    import numpy as np
    llama = llama_cpp.Llama(str(folder / file), n_ctx=4096, n_batch=512, n_threads=threads,
                            n_threads_batch=threads, verbose=False)
    size = llama.n_vocab()

    def write(prompt, count):
        llama.reset()
        for _ in range(count):
            llama.eval(prompt)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, shape=(size,)).argmax())
            yield token
            prompt = [token]
    return write

WRITERS = {"ours": ours, "ours, --compile": partial(ours, compiled=True), "transformers": reference,
           "llama.cpp": llama_cpp, "llama.cpp, Q4_0": partial(llama_cpp, file="q4_0.gguf"),
           "ours, 4 bits, --compile": partial(ours, compiled=True, quantize=True)}

# Tables: each is a generator. Every next() is one round, and yields its figures.

def generating(peer: str, folder: Path, sizes: dict, device: str, threads: int):
    write = WRITERS[peer](folder / "generate", device, threads)
    for seed in itertools.count():
        prompt = tokens(sizes["prompt"], seed, sizes["generate"]["vocab_size"])
        times = [time.perf_counter()]
        made = []
        for token in write(prompt, sizes["written"] + 1):
            times.append(time.perf_counter())
            made.append(token)
        prefill = len(prompt) / (times[1] - times[0])
        decode = 1 / statistics.median(b - a for a, b in pairwise(times[1:]))
        yield {"prefill": prefill, "decode": decode, "first": made[0]}

def training(peer: str, folder: Path, sizes: dict, device: str, threads: int):
    import torch
    import torch.nn.functional as F
    if peer == "ours":
        from mamba import Mamba
        model = Mamba.from_pretrained(folder / "training", device).train()
    else:
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder / "training").train().to(device)
        for layer in model.backbone.layers:         # asked for in the config, it is lost on the way
            layer.mixer.use_mambapy = True
    adam = torch.optim.AdamW(model.parameters())
    shape = sizes["batch"], sizes["context"] + 1
    for seed in itertools.count():
        text = torch.tensor(tokens(math.prod(shape), seed, 257)).view(shape).to(device)
        start = time.perf_counter()
        out = model(text[:, :-1])
        logits = out[0] if peer == "ours" else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        yield {"loss": loss.item(), "seconds": time.perf_counter() - start}

def length(peer: str, folder: Path, sizes: dict, device: str, threads: int):
    """A round is one length: the milliseconds of a token there, and the MB that are kept of the text."""
    after = after_a_text if peer == "ours" else after_keys_and_values
    for now, (steps, kept) in zip(sizes["lengths"], after(folder / "generate", sizes, device)):
        times = [time.perf_counter() for _ in steps]
        ms = 1e3 * statistics.median(b - a for a, b in pairwise(times))
        size = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        yield {"tokens": now, "ms": ms, "state_mb": size / 1e6}

def after_a_text(folder: Path, sizes: dict, device: str):
    """For each length: an iterator that writes tokens after so many others, and what is kept of these."""
    import torch
    from mamba import Mamba
    from sample import generate
    model = Mamba.from_pretrained(folder, device)
    state = model.blank_state(1)        # as large as any other
    for now in sizes["lengths"]:
        text = torch.tensor([tokens(now, now, model.config.vocab_size)], device=device)
        yield generate(model, text, sizes["written"] + 1, 0), [*state.conv, *state.ssm]

def after_keys_and_values(folder: Path, sizes: dict, device: str):
    """The same of a Llama with as many weights, in half as many layers."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    ours = sizes["generate"]
    width = ours["d_model"]
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 8 // 3,
                         num_hidden_layers=ours["n_layer"] // 2, num_attention_heads=width // 32,
                         vocab_size=ours["vocab_size"], max_position_embeddings=2**20)
    model = LlamaForCausalLM(config).bfloat16().eval().to(device)

    @torch.inference_mode()
    def write(cache):
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for _ in range(sizes["written"] + 1):
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            yield token.item()
    for now in sizes["lengths"]:    # keys and values of any numbers cost the same, so no text need be read
        keys = torch.randn(1, config.num_key_value_heads, now, config.head_dim, device=device).bfloat16()
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(keys, keys, layer)
        yield write(cache), [keys] * 2 * config.num_hidden_layers

TABLES = {"generate": generating, "training": training, "length": length}

def begin(job: str, peer: str, *settings) -> None:
    global rounds       # of this process, which serves one peer
    rounds = TABLES[job](peer, *settings)

def one_round(device: str, threads: int) -> dict:
    import torch
    torch.set_num_threads(threads)
    return next(rounds) | {"gb": memory(device)}

# What runs in the process that was started: it only asks.

def measure(jobs: list[str], sizes: dict, device: str, threads: int) -> dict:
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
                if usable(job, peer, device):
                    settings = job, peer, Path(folder), sizes, device, threads
                    processes[peer] = ProcessPoolExecutor(1, spawn, begin, settings)
            found[job] = {peer: [] for peer in processes}
            for _ in range(len(sizes["lengths"]) if job == "length" else 1 + sizes["rounds"]):
                for peer, process in processes.items():
                    found[job][peer].append(process.submit(one_round, device, threads).result())
            for peer, process in processes.items():
                process.shutdown()
                if job != "length":
                    del found[job][peer][0]     # the first round loads, warms up and compiles
    return found

def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

def usable(job: str, peer: str, device: str) -> bool:
    """Whether this peer can run here; says why not."""
    missing = [package for package in PEERS[job][peer] if not version(package)]
    if missing:
        print(f"without {peer}: pip install {' '.join(missing)}", file=sys.stderr)
        return False
    if peer.startswith("llama.cpp") and device != "cpu":
        print("without llama.cpp: its package is built for the CPU", file=sys.stderr)
        return False
    return True

def machine(threads: int, device: str) -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    packages = ["torch", "transformers", "mambapy", "llama-cpp-python"]
    versions = [f"{package} {version(package)}" for package in packages if version(package)]
    return f"{name}, {threads} threads, {device}; {', '.join(versions)}"

def vectors() -> str:
    """Which vector instructions the CPU has: figures of CPUs that have others cannot be compared."""
    import torch
    kinds = "avx", "amx", "fma", "f16c", "neon", "asimd", "sve", "sme", "bf16", "i8mm", "vsx", "rvv"
    has = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    return ", ".join(sorted(name for name in has if name.startswith(kinds))) or "none that PyTorch knows"

# What it prints, and the README shows.

COLUMNS = {
    "generate": {"prefill": "reads, tokens/s (over ours)", "decode": "writes, tokens/s (over ours)"},
    "training": {"seconds": "a step, s (over ours)"},
}

def middle(rounds: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rounds)

def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])

def tables(found: dict) -> dict[str, str]:
    """The figures as the README shows them: medians over rounds, and ours over theirs."""
    made = {}
    for job, columns in COLUMNS.items():
        rows = []
        for peer, rounds in found.get(job, {}).items():
            cells = [peer]
            for name in columns:
                value = middle(rounds, name)
                ratio = value / middle(found[job]["ours"], name)
                words = f"{value:.2f}" if name == "seconds" else f"{value:.1f}"
                cells.append(words if peer == "ours" else f"{words} ({ratio:.2g})")
            rows.append([*cells, f"{middle(rounds, 'gb'):.2f}"])
        if rows:
            made[job] = table(["", *columns.values(), "peak memory, GB"], rows)
    if "length" in found:
        head = ["tokens before it"]
        columns = [[f"{row['tokens']:,}" for row in found["length"]["ours"]]]
        for peer, rounds in found["length"].items():
            head += [f"{peer}: ms a token", f"{peer}: MB kept"]
            columns.append([f"{row['ms']:.1f}" for row in rounds])
            columns.append([f"{row['state_mb']:.1f}" for row in rounds])
        made["length"] = table(head, [*zip(*columns)])
    return made

def compare(rounds: dict[str, list[dict]], name: str, words: str, tolerance: float) -> None:
    """It was the same model, or the times mean nothing."""
    for peer in rounds:
        pairs = [(a[name], b[name]) for a, b in zip(rounds["ours"], rounds[peer])]
        same = sum(abs(a - b) <= tolerance * abs(a) for a, b in pairs)
        print(f"{peer}: {words} as ours in {same} of {len(pairs)} rounds")

def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ours beside every peer that is installed.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(PEERS)} (default all)")
    add("--quick", action="store_true", help="tiny sizes, in seconds: that it runs, not how fast")
    add("--threads", type=int, default=os.cpu_count(), help="of each peer (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default %(default)s)")
    add("--save", type=Path, help="a JSON file for the figures; those of other tables in it stay")
    args = parser.parse_args()
    unknown = {*args.tables} - {*PEERS}
    if unknown:
        parser.error(f"there is no table {', '.join(sorted(unknown))}, only {', '.join(PEERS)}")
    import torch
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use; leave out --device cuda")
    if args.save and not args.save.absolute().parent.is_dir():
        parser.error(f"--save {args.save} is in no folder; make {args.save.parent} first")
    found = {"machine": machine(args.threads, args.device)}
    sizes = QUICK if args.quick else FULL
    try:
        found |= measure(args.tables or [*PEERS], sizes, args.device, args.threads)
    except BrokenProcessPool:
        raise SystemExit("bench.py: a peer ended early; the reason stands above") from None
    print(found["machine"])
    print(f"vector instructions: {vectors()}")
    for job, text in tables(found).items():
        print(f"\n{job}\n{text}")
    compare(found.get("generate", {}), "first", "first token", 0)
    compare(found.get("training", {}), "loss", "loss", 1e-3)
    if args.save:
        old = json.loads(args.save.read_text()) if args.save.exists() else {}
        args.save.write_text(json.dumps(old | found, indent=1) + "\n")

if __name__ == "__main__":
    main()
