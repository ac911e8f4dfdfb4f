"""What a layer costs, found without a GPU. `python scan_triton.py` prints it.

Each kernel of the scan is compiled ahead of time with the 7B's constants. Its registers and its machine code are
read back with the cuobjdump and nvdisasm that come in Triton's wheel, and the instructions of its inner loop are
counted. From these, and from the bytes that it must move, follows an estimate: the slowest of four resources of an
H100 SXM. layer_report.py adds what torch.compile makes of the rest of a layer.
"""
import functools
import os
import re
import subprocess
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import scan_triton as st
from mamba import Mamba, MambaConfig
from scan import selective_scan
from tests import layer_report

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
SIZES = b, l, d, n = 1, 8192, 8192, 16      # one layer of the 7B
SMS, CLOCK, HBM = 132, 1.755e9, 3.35e12     # H100 SXM: multiprocessors, boost clock in Hz, bytes a second
PEAK, PRODUCTS = 989e12, 0.7                # its bf16 FLOP/s, and the part that large products reach: assumed
REACHED, GAP = 0.8, 1.5e-6                  # of HBM by products of one token; seconds between kernels: assumed
FLOPS = 2 * b * l * d * (3 * 4096 + 2 * 256 + 2 * n)        # of the products: d_model is 4096, dt_rank 256
LANES = {"issue": 128, "MUFU": 16, "SHFL": 32}             # lanes a clock and SM, by kind of instruction
# Cycles that a warp by itself takes for an instruction, and beyond that for a shuffle, for a barrier, and for
# the loads of a block. They are assumed, from what is known of such GPUs.
WAITS, LOADS = {"issue": 2, "SHFL": 6, "BAR": 30}, 500

ROWS = {"x_ptr", "dt_ptr", "z_ptr", "y_ptr", "dy_ptr", "dx_ptr", "ddt_ptr", "dz_ptr"}    # in bf16
KERNELS = {
    "pass 1: reduce": st.reduce_kernel,
    "pass 2: carry": st.carry_kernel,
    "pass 3: scan": st.scan_kernel,
    "backward: replay": st.replay_kernel,
    "backward: carry": st.carry_kernel,
    "backward: adjoint": st.adjoint_kernel,
    "one token: step": st.step_kernel,
}

def build(label: str, target: str, reset: bool = False, **sizes):
    """Compile one kernel with the 7B's constants, or with other `sizes`."""
    kernel = KERNELS[label]
    constants = dict(d=d, n=n, size=n * d, BLOCK=st.STEPS, FROM_END="backward" in label) | sizes
    if not reset:
        constants["reset_ptr"] = None
    signature, aligned, given = {}, {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            given[name] = constants[name]
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in ROWS else "*i1" if name == "reset_ptr" else "*fp32"
            if not parameter.do_not_specialize_on_alignment:        # a launch finds out that it is aligned
                aligned[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=aligned)
    return triton.compile(source, target=TARGETS[target],
                          options={"num_warps": 1, "enable_fp_fusion": True})

def tool(name: str, *args: str) -> str:
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout

@functools.cache
def count(label: str, target: str = "sm_90", reset: bool = False, **sizes) -> dict:
    """Registers, stack, spills, and the instructions of the loop per state update."""
    compiled = build(label, target, reset, **sizes)
    if target.startswith("gfx"):
        names = {"REG": "vgpr_count", "STACK": "private_segment_fixed_size", "LOCAL": "vgpr_spill_count"}
        text = compiled.asm["amdgcn"]
        return {kind: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for kind, name in names.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", f.name))
        code = tool("nvdisasm", "-c", f.name)
    counted = loop_of(code)
    updates = n * st.STEPS                  # of each thread, in one turn of the loop
    if "step" in label:                     # one step, and no loop
        updates = n
    if "carry" in label:                    # one state a thread; Triton may have unrolled the loop
        updates = counted.count("STG")
    found = {kind: int(value) for kind, value in usage}
    found["issue"] = len(counted) / updates
    for kind in ("MUFU", "SHFL", "BAR"):
        found[kind] = counted.count(kind) / updates
    return found

def loop_of(code: str) -> list[str]:
    """The instructions of a disassembly's longest loop, which ends in a jump back; all, if it has none."""
    instructions = []
    labels = {}
    loop = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
        instruction = re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*);", line)
        if instruction:
            instructions.append(instruction[1])
            goal = re.search(r"`\((\.L\w+)\)", instruction[2])
            if instruction[1] == "BRA" and goal and goal[1] in labels:
                loop = max(loop, instructions[labels[goal[1]]:], key=len)
    # At its end a program jumps to its last instruction, for ever.
    return loop if len(loop) > 1 else instructions

CHUNKS = triton.cdiv(l, st.CHUNK)

def traffic() -> dict:
    """Bytes each kernel must move to and from HBM. B, C and the like are small, and stay in the caches."""
    row, states = 2 * b * l * d, 4 * b * d * n            # x in bf16; all states at one time, in fp32
    blocks, sums = states * l // st.STEPS, 2 * 4 * b * l * n * triton.cdiv(d, st.CHANNELS)
    tiles = CHUNKS * states                               # one tensor of a state a chunk
    return {"pass 1: reduce": 2 * row + 2 * tiles, "pass 2: carry": 3 * tiles,
            "pass 3: scan": 4 * row + tiles, "backward: replay": 5 * row + blocks + 3 * tiles,
            "backward: carry": 3 * tiles, "backward: adjoint": 6 * row + blocks + sums + 2 * tiles,
            "backward: sums": sums + tiles, "one token: step": 2 * states + 4 * d * n + 4 * row // l}

def estimate(label: str, found: dict) -> dict:
    """Milliseconds each resource needs for a layer, at the least; the kernel takes as long as the slowest."""
    updates = b * d * n * (CHUNKS if "carry" in label else 1 if "step" in label else l)
    return {"HBM": traffic()[label] / HBM * 1e3} | {
        kind: updates * found.get(kind, 0) / (lanes * SMS * CLOCK) * 1e3 for kind, lanes in LANES.items()}

def warps(found: dict) -> int:
    """How many warps of a kernel fit on an SM: by registers, given out in eights, and 32 at most."""
    registers = triton.cdiv(found["REG"], 8) * 8
    return min(32, 65536 // (32 * registers))

def waiting(label: str, found: dict) -> float:
    """Milliseconds if every warp waits for itself, and only the other warps of its SM fill the gaps."""
    if "carry" in label or "token" in label:
        return 0.0                                        # one state a thread, and no time to speak of
    cycles = LOADS / (n * st.STEPS) + sum(wait * found[kind] for kind, wait in WAITS.items())
    return b * l * d * n / 32 * cycles / (SMS * warps(found) * CLOCK) * 1e3

def memory() -> tuple[int, int]:
    """Bytes that the 7B's layer keeps from forward to backward beyond its inputs, and the backward's scratch
    beyond the gradients: what the adjoint is launched with, on meta tensors, which have a size and no data."""
    given = []

    def no_launch(kernel, count, width, *args, **sizes):
        if kernel is st.adjoint_kernel:
            given.append(sum(v.nbytes for v in args if v is not None))

    with torch.device("meta"), mock.patch.object(st, "launch", no_launch):
        dy, x, dt, z = (torch.empty(b, l, d, dtype=torch.bfloat16) for _ in range(4))
        B, C = torch.empty(2, b, l, n)
        D, bias = torch.empty(2, d)
        A = torch.empty(n, d)
        start = torch.empty(b, CHUNKS, n, d)
        inputs = x, dt, A, B, C, D, z, bias
        _, dx, ddt, *_ = st.scan_backward._init_fn(dy, torch.empty(b, n, d), start, *inputs, None)
        others = sum(v.nbytes for v in (dy, *inputs, dx, ddt))
        return start.nbytes, max(given) - others

def measured() -> None:
    """On a GPU: the scan, timed, and mamba_ssm's kernel beside it, if that is installed."""
    scans = {"ours": lambda *p: selective_scan(*p, backend="triton")[0]}
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        scans["mamba_ssm"] = lambda x, dt, A, B, C, D, z, dt_bias: selective_scan_fn(
            x.mT, dt.mT, A, B.mT, C.mT, D, z.mT, dt_bias, True).mT
    except ImportError:
        print("mamba_ssm is not installed: no kernel to compare with")
    x, dt, z = torch.randn(3, b, l, d, device="cuda", dtype=torch.bfloat16)
    B, C = torch.randn(2, b, l, n, device="cuda", dtype=torch.bfloat16)
    A = -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1)
    D = torch.ones(d, device="cuda")
    inputs = [v.clone().requires_grad_() for v in (x, dt, A, B, C, D, z, D - 5)]
    for name, scan in scans.items():
        def both_ways():
            torch.autograd.grad(scan(*inputs), inputs, torch.ones_like(x))

        with torch.no_grad():
            took = {"forward": triton.testing.do_bench(lambda: scan(*inputs), return_mode="median")}
        took["forward and backward"] = triton.testing.do_bench(both_ways, return_mode="median")
        for way, ms in took.items():
            print(f"measured on {torch.cuda.get_device_name()}, {name}: {way} {ms:.2f} ms")

def total(reset: bool = False, waits: bool = False) -> dict[str, float]:
    """Estimated milliseconds of a layer's forward and of its backward."""
    ms = {"forward": 0.0, "backward": estimate("backward: sums", {})["HBM"]}
    for label, kernel in KERNELS.items():
        if "token" not in label:
            found = count(label, "sm_90", reset and "reset_ptr" in kernel.arg_names)
            slowest = max(estimate(label, found).values())
            if waits:
                slowest = max(slowest, waiting(label, found))
            ms["backward" if "backward" in label else "forward"] += slowest
    return ms

def layer(resets: bool = False) -> dict[str, dict]:
    """What a whole layer takes: ms of its matrix products, of its scan, and of the rest as inductor makes it."""
    scan = total(resets)
    waits = total(resets, waits=True)
    inference = layer_report.layer_kernels(b, l, False, resets)
    training = layer_report.layer_kernels(b, l, True, resets)
    # At the least, the forward moves 6 rows. RMSNorm reads the stream in fp32, and writes half a row. The
    # convolution reads a row and writes one. The last sum reads half a row and the stream, and writes the stream.
    # The backward moves 9. The stream's gradient is rounded: 1.5. The convolution reads x and two gradients and
    # writes one. RMSNorm reads half a row, the stream and its gradient, and writes a gradient.
    passes = {"forward, inference": (1, "forward", inference["forward"], 6),
              "forward, training": (1, "forward", training["forward"], 6),
              "backward": (2, "backward", training["backward"], 9)}
    return {name: {"products": products * FLOPS / (PRODUCTS * PEAK) * 1e3, "scan": scan[way],
                   "waits": waits[way] - scan[way], "rest": sum(sizes) / HBM * 1e3, "kernels": len(sizes),
                   "GB": sum(sizes) / 1e9, "floor GB": rows * 2 * b * l * d / 1e9}
            for name, (products, way, sizes, rows) in passes.items()}

def token() -> dict:
    """What it takes to write one token with the 7B, by --compile, whose kernels a graph replays."""
    config = MambaConfig()
    with torch.device("meta"):
        model = Mamba(config)
    weights = sum(2 * p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    states = sum(2 * v.nbytes for layers in model.blank_state(1) for v in layers)       # read and written
    rest = layer_report.token_kernels()
    kernels = 4 + 1 + len(rest)                 # products, the scan's step, and what inductor fuses
    size = weights + states + config.n_layer * sum(rest)
    ms = size / (REACHED * HBM) * 1e3 + config.n_layer * kernels * GAP * 1e3
    return {"kernels": kernels, "weights": weights, "states": states, "ms": ms}

def print_token() -> None:
    found = token()
    print(f"\nOne token of the 7B with sample.py --compile: {found['kernels']} kernels a layer (four products, the "
          f"scan's step, the rest as inductor fuses it),\n{found['weights'] / 1e9:.2f} GB of weights, "
          f"{found['states'] / 1e6:.0f} MB of states read and written. At {REACHED:.0%} of 3.35 TB/s and with "
          f"{GAP * 1e6} us between the kernels of a graph,\nwhich is assumed, it takes {found['ms']:.2f} ms: "
          f"{1e3 / found['ms']:.0f} tokens/s.")

def print_layer() -> None:
    print(f"\nThe whole layer. Its matrix products reach {PRODUCTS:.0%} of {PEAK / 1e12:.0f} TFLOP/s, which is "
          f"assumed. The rest is what inductor of torch\n{torch.__version__} makes of mamba.py's block for an H100, "
          "from the groups of operations that it fuses: their bytes at 3.35 TB/s.")
    parts = layer()
    ms = {}
    for name, part in parts.items():
        ms[name] = part["products"] + part["scan"] + part["rest"]
        print(f"{name:18} products {part['products']:.2f} ms, scan {part['scan']:.2f}, rest {part['rest']:.2f}: "
              f"{ms[name]:.2f} ms; in the rest {part['kernels']} kernels and {part['GB']:.2f} GB "
              f"(at least {part['floor GB']:.2f})")
    waits = parts["backward"]["waits"]
    needed = (3 * FLOPS + 24 * b * l * d * n) / PEAK * 1e3      # without what is computed again
    for name, forwards in ("forward and backward", 1), ("the same with --checkpoint-activations", 2):
        both = forwards * ms["forward, training"] + ms["backward"]
        print(f"{name}: {both:.1f} ms, or {both + waits:.1f} with waits: {needed / both:.0%} of the peak, or "
              f"{needed / (both + waits):.0%}")
    print("Not in it: the head, the optimizer, and the network.")

def print_kernels() -> None:
    print(f"The scan of one layer of the 7B, (b, l, d, n) = {SIZES}, in {CHUNKS} chunks, Triton "
          f"{triton.__version__}.\nupd = state update: there are {b * l * d * n / 1e9:.2f} G, for a carry one a "
          "chunk, for a token one. Estimates, not measurements:\nthe ms each resource of an H100 SXM needs at "
          "least; * is the slowest. Beside them, how many warps fit on an\nSM by registers, and the ms of so many "
          f"if a warp takes {WAITS['issue']} cycles an instruction, {WAITS['SHFL']} more a shuffle,\n"
          f"{WAITS['BAR']} a barrier, and waits {LOADS} for the loads of a block.\n")
    print(f"{'kernel':18} {'regs':>4} {'instr/upd':>9} {'MUFU/upd':>8} {'MB':>6} {'HBM':>6} {'MUFU':>6} {'issue':>6} "
          f"{'SHFL':>6} {'warps':>5} {'waits':>5}")
    for label in KERNELS:
        found = count(label)
        ms = estimate(label, found)
        line = f"{label:18} {found['REG']:4} {found['issue']:9.1f} {found['MUFU']:8.2f} {traffic()[label] / 1e6:6.0f}"
        for kind in "HBM", "MUFU", "issue", "SHFL":
            line += f" {ms[kind]:5.2f}{'*' if ms[kind] == max(ms.values()) else ' '}"
        print(line + f" {warps(found):5} {waiting(label, found):5.2f}")
    sums = "backward: sums"
    print(f"{sums:41} {traffic()[sums] / 1e6:6.0f} {estimate(sums, {})['HBM']:5.2f}*\n")
    for target in TARGETS:
        found = [count(label, target) for label in KERNELS]
        spilled = sum(each["STACK"] + each["LOCAL"] for each in found)
        print(f"{target}: at most {max(each['REG'] for each in found)} registers, spills: {spilled}")
    for name, reset, waits in (("estimated", False, False), ("with resets", True, False),
                               ("with waits", False, True)):
        ms = total(reset, waits)
        print(f"{name}: forward {ms['forward']:.2f} ms, backward {ms['backward']:.2f} ms, "
              f"both {sum(ms.values()):.2f} ms")
    kept, scratch = memory()
    print(f"kept for the backward beyond the inputs: {kept / 1e6:.1f} MB ({kept / (2 * b * l * d):.3f} of x "
          f"in bf16); scratch of a backward: {scratch / 1e6:.0f} MB")

def main() -> None:
    if not isinstance(st.scan_kernel, triton.JITFunction):
        raise SystemExit("the report compiles the kernels, which Triton's interpreter does not: unset "
                         "TRITON_INTERPRET, which is 1")
    print_kernels()
    print_layer()
    print_token()
    if torch.cuda.is_available():
        measured()
    else:
        print("no GPU here: nothing was timed")

if __name__ == "__main__":
    main()
