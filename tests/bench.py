"""Ours beside every peer that is installed, on the same weights with the same threads: python tests/bench.py

    generate    reading 512 tokens, then writing 32: a random Falcon-Mamba of 190M weights in bf16
    training    one step of AdamW on 8 x 256 tokens: a random one of 2M weights in fp32
    length      writing a token after ever longer texts, beside attention: a random Llama of the 190M's size

Each peer has a process of its own, so that its peak memory is its own. All are loaded first, then take turns,
round after round, so that whatever else the machine does falls on all of them; the tables give medians. A
line says how to get a peer that is not installed. mamba_ssm has no row: its kernels lack the norms of dt, B
and C, and transformers calls its own on a GPU.

`python tests/bench.py --save assets/bench.json` keeps the figures: for the README's tables, and for cost.svg.
"""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# peer -> its packages: name to import, name to install. A dash joins a peer and the way it is run.
PEERS = {"generate": {"ours": {}, "ours, --compile": {}, "transformers": {"transformers": "transformers"},
                      "llama.cpp": {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}},
         "training": {"ours": {},
                      "transformers, mambapy": {"transformers": "transformers", "mambapy": "mambapy"}},
         "length": {"ours": {}, "attention": {"transformers": "transformers"}}}
FULL = dict(generate=dict(d_model=768, n_layer=24, vocab_size=65024), prompt=512, written=32, rounds=8,
            training=dict(d_model=256, n_layer=4, vocab_size=257), batch=8, context=256,
            lengths=[128, 512, 2048, 8192, 32768])
QUICK = dict(generate=dict(d_model=32, n_layer=2, vocab_size=300), prompt=16, written=4, rounds=2,
             training=dict(d_model=32, n_layer=2, vocab_size=257), batch=2, context=16, lengths=[16, 64])


# What runs in a peer's process. Each peer is a generator: every next() is one round, and yields its figures.

def memory(device: str) -> float:
    """The most that this process has held, in GB."""
    import torch
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():     # Linux hands ru_maxrss down from the parent; this count begins with the process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def make(folder: Path, sizes: dict) -> None:
    """The models that all peers load."""
    import torch
    from mamba import Mamba, MambaConfig
    for name, dtype in ("generate", torch.bfloat16), ("training", torch.float32):
        torch.manual_seed(0)
        Mamba(MambaConfig(**sizes[name], initializer_range=0.02)).to(dtype).save_pretrained(folder / name)
    if importlib.util.find_spec("gguf"):
        to_gguf(folder / "generate")


def to_gguf(folder: Path) -> None:
    """The same model for llama.cpp: matrices in bf16 as they are, all that is small in fp32."""
    import gguf
    import torch
    from mamba import Mamba
    model = Mamba.from_pretrained(folder)
    c, file = model.config, gguf.GGUFWriter(folder / "model.gguf", "mamba")
    file.add_context_length(2**20)
    file.add_embedding_length(c.d_model)
    file.add_feed_forward_length(0)
    file.add_head_count(0)
    file.add_block_count(c.n_layer)
    file.add_ssm_conv_kernel(c.d_conv)
    file.add_ssm_inner_size(c.d_inner)
    file.add_ssm_state_size(c.d_state)
    file.add_ssm_time_step_rank(c.dt_rank)
    file.add_layer_norm_rms_eps(c.norm_eps)
    file.add_ssm_dt_b_c_rms(True)               # Falcon-Mamba's three norms
    file.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    file.add_tokenizer_model("gpt2")            # a stand-in: the bench gives and takes numbers, no text
    file.add_tokenizer_pre("falcon")
    file.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    file.add_token_types([1] * c.vocab_size)
    file.add_token_merges(["t 1"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(11)
    names = {"backbone.embeddings.weight": "token_embd.weight", "lm_head.weight": "output.weight",
             "backbone.norm_f.weight": "output_norm.weight"}
    parts = {"norm.weight": "attn_norm.weight", "in_proj.weight": "ssm_in.weight", "A_log": "ssm_a",
             "conv1d.weight": "ssm_conv1d.weight", "conv1d.bias": "ssm_conv1d.bias", "D": "ssm_d",
             "x_proj.weight": "ssm_x.weight", "out_proj.weight": "ssm_out.weight",
             "dt_proj.weight": "ssm_dt.weight", "dt_proj.bias": "ssm_dt.bias"}
    for name, p in model.named_parameters():
        if name.startswith("backbone.layers."):
            layer, _, part = name.removeprefix("backbone.layers.").partition(".")
            names[name] = f"blk.{layer}.{parts[part.removeprefix('mixer.')]}"
        p = -torch.exp(p.detach().float()) if name.endswith("A_log") else p.detach().squeeze()
        if p.dim() == 2 and p.dtype == torch.bfloat16:
            raw = p.contiguous().view(torch.uint8).numpy()
            file.add_tensor(names[name], raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            file.add_tensor(names[name], p.float().contiguous().numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    import torch
    return torch.randint(12, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ours(folder: Path, device: str):
    """A writer: the tokens after a prompt, likeliest first, as an iterator."""
    import torch
    from mamba import Mamba
    from sample import generate
    model = Mamba.from_pretrained(folder, device)
    return lambda prompt, count: map(int, generate(model, torch.tensor([prompt], device=device), count, 0))


def ours_compiled(folder: Path, device: str):
    from sample import compile_blocks
    compile_blocks()
    return ours(folder, device)


def reference(folder: Path, device: str):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)

    @torch.inference_mode()
    def write(prompt, count):
        cache, now = None, torch.tensor([prompt], device=device)
        for _ in range(count):
            out = model(now, cache_params=cache, use_cache=True, logits_to_keep=1)
            cache, now = out.cache_params, out.logits[:, -1:].argmax(-1)
            yield now.item()
    return write


def llama_cpp(folder: Path, threads: int):
    import ctypes
    import numpy as np
    import llama_cpp
    llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=4096, n_batch=512, n_threads=threads,
                            n_threads_batch=threads, verbose=False)

    def write(prompt, count):
        llama.reset()
        for _ in range(count):
            llama.eval(prompt)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            prompt = [int(np.ctypeslib.as_array(logits, shape=(llama.n_vocab(),)).argmax())]
            yield prompt[0]
    return write


def generating(peer: str, folder: Path, sizes: dict, device: str, threads: int):
    folder = folder / "generate"
    write = llama_cpp(folder, threads) if peer == "llama.cpp" else {
        "ours": ours, "ours, --compile": ours_compiled, "transformers": reference}[peer](folder, device)
    for seed in range(10**6):
        prompt = tokens(sizes["prompt"], seed, sizes["generate"]["vocab_size"])
        times, made = [time.perf_counter()], []
        for token in write(prompt, sizes["written"] + 1):
            times.append(time.perf_counter())
            made.append(token)
        steps = [b - a for a, b in zip(times[1:], times[2:])]
        yield {"prefill": len(prompt) / (times[1] - times[0]), "decode": 1 / statistics.median(steps),
               "first": made[0]}


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
    for seed in range(10**6):
        text = torch.tensor(tokens(shape[0] * shape[1], seed, 257)).view(shape).to(device)
        start = time.perf_counter()
        logits = model(text[:, :-1])
        logits = logits[0] if peer == "ours" else logits.logits
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        yield {"loss": loss.item(), "seconds": time.perf_counter() - start}


def length(peer: str, folder: Path, sizes: dict, device: str, threads: int):
    """A round is one length: the milliseconds of a token there, and the MB that are kept of the text."""
    import torch
    from mamba import Mamba, MambaConfig
    from sample import generate
    c, count, state, seen = MambaConfig(**sizes["generate"]), sizes["written"] + 1, None, 0

    def timed(steps):
        times = [time.perf_counter() for _ in steps]
        return 1e3 * statistics.median(b - a for a, b in zip(times, times[1:]))
    if peer == "ours":
        model = Mamba.from_pretrained(folder / "generate", device)

        def steps(text):
            nonlocal state
            state = yield from generate(model, text, count, 0, state=state)
    else:                   # as many weights, in half as many layers
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
        llama = LlamaConfig(hidden_size=c.d_model, intermediate_size=c.d_model * 8 // 3,
                            num_hidden_layers=c.n_layer // 2, num_attention_heads=c.d_model // 32,
                            vocab_size=c.vocab_size, max_position_embeddings=2**20)
        model = LlamaForCausalLM(llama).bfloat16().eval().to(device)
    for now in sizes["lengths"]:
        if peer == "ours":  # each text is the one before it, read on from its state
            text = torch.tensor([tokens(now - seen, now, c.vocab_size)], device=device)
            ms = timed(steps(text))
            kept, seen = [*state.conv, *state.ssm], now + count - 1
        else:               # keys and values of any numbers cost the same, so no text need be read
            shape = 1, llama.num_key_value_heads, now, llama.head_dim
            keys = torch.randn(shape, device=device).bfloat16()
            cache = DynamicCache(config=llama)
            for layer in range(llama.num_hidden_layers):
                cache.update(keys, keys, layer)
            kept = [keys] * 2 * llama.num_hidden_layers

            @torch.inference_mode()
            def steps(token=torch.zeros(1, 1, dtype=torch.int64, device=device)):
                for _ in range(count):
                    token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                    yield token.item()
            ms = timed(steps())
        yield {"tokens": now, "ms": ms, "state_mb": sum(v.numel() * v.element_size() for v in kept) / 1e6}


def worker(job: str, peer: str, folder: Path, sizes: dict, device: str, threads: int) -> None:
    """Load, say so, then a round for every line that comes in."""
    import torch
    torch.set_num_threads(threads)
    if job == "make":
        return make(folder, sizes)
    measured = {"generate": generating, "training": training, "length": length}[job]
    rounds = measured(peer, folder, sizes, device, threads)
    answers = sys.stdout
    sys.stdout = sys.stderr         # what libraries print is no answer
    for _ in sys.stdin:
        row = next(rounds)
        print(json.dumps({"peer": peer, **row, "gb": memory(device)}), file=answers, flush=True)


# What runs in the process that was started: it imports no torch, and only asks.

def measure(jobs: list[str], sizes: dict, device: str, threads: int) -> dict:
    """Every round of every peer: {job: [figures]}."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                                "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}

    def start(job, peer, **pipes):
        settings = json.dumps([job, peer, str(folder), sizes, device, threads])
        command = [sys.executable, __file__, "--worker", settings]
        return subprocess.Popen(command, text=True, env=environment, **pipes)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if start("make", "").wait():
            raise SystemExit("bench.py: the models could not be made; the reason stands above")
        for job in jobs:
            here = {}
            for peer, packages in PEERS[job].items():
                if missing := [packages[name] for name in packages if not importlib.util.find_spec(name)]:
                    print(f"without {peer}: pip install {' '.join(missing)}", file=sys.stderr)
                elif peer == "llama.cpp" and device != "cpu":
                    print("without llama.cpp: its package is built for the CPU", file=sys.stderr)
                else:
                    here[peer] = start(job, peer, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            found[job] = []
            # The first round warms up, compiles and is not counted. A length needs no second.
            counted = [False] + [True] * sizes["rounds"]
            if job == "length":
                counted = [True] * len(sizes["lengths"])
            for counts in counted:
                for peer, process in here.items():
                    process.stdin.write("\n")
                    process.stdin.flush()
                    if not (answer := process.stdout.readline()):
                        raise SystemExit(f"bench.py: {peer} ended early; the reason stands above")
                    found[job] += [json.loads(answer)] * counts
            for process in here.values():
                process.stdin.close()
                process.wait()
    return found


def machine(threads: int, device: str) -> str:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next((row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines()
                     if row.startswith("model name")), name)
    installed = {package: importlib.metadata.version(package) for package in (
        "torch", "transformers", "mambapy", "llama-cpp-python") if package in
        {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}}
    return f"{name}, {threads} threads, {device}; " + ", ".join(f"{k} {v}" for k, v in installed.items())


def table(head: list[str], rows: list[list]) -> str:
    """As Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def tables(found: dict) -> dict[str, str]:
    """The figures as the README shows them: medians over rounds, and ours over theirs."""
    made = {}
    for job, columns in ("generate", {"prefill": "reads, tokens/s (over ours)",
                                                 "decode": "writes, tokens/s (over ours)"}), (
            "training", {"seconds": "a step, s (over ours)"}):
        if job not in found:
            continue
        peers = list(dict.fromkeys(row["peer"] for row in found[job]))
        middle = {peer: {name: statistics.median(row[name] for row in found[job] if row["peer"] == peer)
                         for name in (*columns, "gb")} for peer in peers}
        rows = []
        for peer in peers:
            cells = [peer]
            for name in columns:
                value, own = middle[peer][name], middle["ours"][name]
                cells.append(f"{value:.2f}" if name == "seconds" else f"{value:.1f}")
                cells[-1] += f" ({value / own:.2g})" if peer != "ours" else ""
            rows.append([*cells, f"{middle[peer]['gb']:.2f}"])
        made[job] = table(["", *columns.values(), "peak memory, GB"], rows)
    if "length" in found:
        peers = list(dict.fromkeys(row["peer"] for row in found["length"]))
        figures = "ms a token", "MB kept"
        head = ["tokens before it", *(f"{peer}: {figure}" for peer in peers for figure in figures)]
        rows = {}
        for row in found["length"]:
            rows.setdefault(row["tokens"], []).extend([f"{row['ms']:.1f}", f"{row['state_mb']:.1f}"])
        made["length"] = table(head, [[f"{tokens:,}", *cells] for tokens, cells in rows.items()])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure ours beside every peer that is installed.")
    add = parser.add_argument
    add("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(PEERS)} (default all)")
    add("--quick", action="store_true", help="tiny sizes, in seconds: that it runs, not how fast")
    add("--threads", type=int, default=os.cpu_count(), help="of each peer (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default %(default)s)")
    add("--save", type=Path, help="a JSON file for the figures; those of other tables in it stay")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        job, peer, folder, *rest = json.loads(args.worker)
        return worker(job, peer, Path(folder), *rest)
    if unknown := {*args.tables} - {*PEERS}:
        parser.error(f"there is no table {', '.join(sorted(unknown))}, only {', '.join(PEERS)}")
    import torch        # here, as not every worker needs it, and it takes memory
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here that PyTorch can use; leave out --device cuda")
    if args.save and not args.save.absolute().parent.is_dir():
        parser.error(f"--save {args.save} is in no folder; make {args.save.parent} first")
    found = {"machine": machine(args.threads, args.device)}
    found |= measure(args.tables or [*PEERS], QUICK if args.quick else FULL, args.device, args.threads)
    print(found["machine"])
    for job, text in tables(found).items():
        print(f"\n{job}\n{text}")
    # It was the same model, or the times mean nothing.
    for job, name, words in ("generate", "first", "first token"), ("training", "loss", "loss"):
        own = [row[name] for row in found.get(job, []) if row["peer"] == "ours"]
        for peer in dict.fromkeys(row["peer"] for row in found.get(job, [])):
            theirs = [row[name] for row in found[job] if row["peer"] == peer]
            same = sum(a == b if name == "first" else abs(a - b) < 1e-3 * abs(a) for a, b in zip(own, theirs))
            print(f"{peer}: {words} as ours in {same} of {len(own)} rounds")
    if args.save:
        old = json.loads(args.save.read_text()) if args.save.exists() else {}
        args.save.write_text(json.dumps(old | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
