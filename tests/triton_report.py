"""What the Triton kernels cost, found without a GPU. `python scan_triton.py` prints it.

test_scan_triton_compile.py bounds it. Each kernel is compiled ahead of time with the 7B's constants. The
registers and the machine code are then read back with the cuobjdump and nvdisasm that come in Triton's wheel,
and the instructions of the inner loop are counted. From these, and from the bytes a kernel must move, follows
an estimate: the slowest of four resources of an H100 SXM.
"""
import functools
import os
import re
import subprocess
import tempfile
import weakref
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import scan_triton as st

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
SIZES = b, l, d, n = 1, 8192, 8192, 16      # one layer of the 7B
SMS, CLOCK, HBM = 132, 1.755e9, 3.35e12     # H100 SXM: multiprocessors, boost clock in Hz, bytes a second
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
    """Registers, stack, spills, shared memory, and the instructions of the inner loop per state update."""
    compiled = build(label, target, reset, **sizes)
    if target.startswith("gfx"):
        names = {"REG": "vgpr_count", "STACK": "private_segment_fixed_size", "LOCAL": "vgpr_spill_count",
                 "SHARED": "group_segment_fixed_size"}
        text = compiled.asm["amdgcn"]
        return {kind: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for kind, name in names.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", f.name)))
        code = tool("nvdisasm", "-c", f.name)
    instructions, loops = parse(code)
    innermost = [loop for loop in loops if not any(other != loop and other[0] in range(*loop) for other in loops)]
    longest = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    counted = instructions[slice(*longest)]
    updates = n * st.STEPS                  # of each thread, in one turn of the loop
    if "step" in label:                     # one step, and no loop
        counted = instructions
        updates = n
    if "carry" in label:                    # one state a thread; Triton may have unrolled the loop
        updates = counted.count("STG")
    found = {kind: int(value) for kind, value in usage.items()}
    found["issue"] = len(counted) / updates
    for kind in ("MUFU", "SHFL", "BAR"):
        found[kind] = counted.count(kind) / updates
    return found

def parse(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions of a disassembly, and the loops: where each begins and ends, a jump back."""
    instructions = []
    labels = {}
    loops = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        if label:
            labels[label[1]] = len(instructions)
        instruction = re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)(.*);", line)
        if instruction:
            name = instruction[1].split(".")[0]
            goal = re.search(r"`\((\.L\w+)\)", instruction[2])
            start = labels.get(goal[1]) if name == "BRA" and goal else None
            if start is not None and start < len(instructions):
                loops.append((start, len(instructions) + 1))
            instructions.append(name)
    return instructions, loops

def chunks() -> int:
    count, chunk, keep = st.cut_time(torch.empty(b, l, d, device="meta"))
    assert chunk == keep, "forward and backward share their chunks, as the arithmetic below takes for granted"
    return count

def traffic() -> dict:
    """Bytes each kernel must move to and from HBM. B, C and the like are small, and stay in the caches."""
    row, states = 2 * b * l * d, 4 * b * d * n            # x in bf16; all states at one time, in fp32
    blocks, sums = states * l // st.STEPS, 2 * 4 * b * l * n * triton.cdiv(d, st.CHANNELS)
    tiles = chunks() * states                             # one tensor of a state a chunk
    return {"pass 1: reduce": 2 * row + 2 * tiles, "pass 2: carry": 3 * tiles,
            "pass 3: scan": 4 * row + 2 * tiles, "backward: replay": 5 * row + blocks + 3 * tiles,
            "backward: carry": 3 * tiles, "backward: adjoint": 6 * row + blocks + sums + 2 * tiles,
            "backward: sums": sums + tiles, "one token: step": 2 * states + 4 * d * n + 4 * row // l}

def estimate(label: str, found: dict) -> dict:
    """Milliseconds each resource needs for a layer, at the least; the kernel takes as long as the slowest."""
    updates = b * d * n * (chunks() if "carry" in label else 1 if "step" in label else l)
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

def floors() -> dict[str, dict]:
    """Milliseconds a forward, and a forward and backward, take of each resource at the least, however made.

    Rows of x, dt, z and y pass once forward, and of x, dt, z, dy, dx, d_dt and dz backward. A state update
    takes one exp2 and four instructions: delta A, the drive, h and y. The backward, which has no h, repeats
    three of them and takes nine more: u, dh plus C g, dB, dC, dw, du, dA, d_delta and dh's decay.
    """
    row, updates = 2 * b * l * d / HBM * 1e3, b * l * d * n / (SMS * CLOCK) * 1e3
    return {name: {"HBM": rows * row, "MUFU": exps * updates / LANES["MUFU"],
                   "issue": instructions * updates / LANES["issue"]}
            for name, rows, exps, instructions in (("forward", 4, 1, 4), ("forward and backward", 11, 2, 16))}

class Live(TorchDispatchMode):
    """Counts the bytes that are alive, and their peak, of the tensors made inside."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size

def memory() -> tuple[int, int]:
    """Bytes that the 7B's layer keeps from forward to backward beyond its inputs, and the backward's scratch
    at its peak, beyond the gradients: measured on meta tensors, which have a size and no data."""
    def no_launch(*args, **sizes):
        pass

    with Live() as live, torch.device("meta"), mock.patch.object(st, "launch", no_launch):
        dy, x, dt, z = (torch.empty(b, l, d, dtype=torch.bfloat16) for _ in range(4))
        B, C = torch.empty(2, b, l, n)
        D, bias = torch.empty(2, d)
        A = torch.empty(d, n).mT
        dh = torch.empty(b, d, n).mT
        kept = torch.empty(b, chunks(), n, d)
        before = live.now
        grads = st.scan_backward._init_fn(dy, dh, kept, x, dt, A, B, C, D, bias, z, None)
        return kept.nbytes, live.peak - before - sum(g.nbytes for g in grads)

def measured() -> None:
    """On a GPU: medians of CUDA events over eight sets of inputs, mamba_ssm's kernel beside, if installed."""
    scans = {"ours": ours}
    try:
        import mamba_ssm
        scans["mamba_ssm"] = theirs
    except ImportError:
        print("mamba_ssm is not installed: no kernel to compare with")
    sets = [inputs() for _ in range(8)]
    for name, scan in scans.items():
        def both_ways(p):
            return torch.autograd.grad(scan(*p), p, torch.ones_like(p[0]))

        with torch.no_grad():
            took = {"forward": median(lambda p: scan(*p), sets)}
        took["forward and backward"] = median(both_ways, sets)
        for way, ms in took.items():
            print(f"measured on {torch.cuda.get_device_name()}, {name}: {way} {ms:.2f} ms "
                  f"({max(floors()[way].values()) / ms:.0%} of an H100's floor)")

def inputs() -> list[torch.Tensor]:
    """x, dt, A, B, C, D, z and dt_bias of a layer."""
    x, dt, z = torch.randn(3, b, l, d, device="cuda", dtype=torch.bfloat16)
    B, C = torch.randn(2, b, l, n, device="cuda", dtype=torch.bfloat16)
    A = -torch.arange(1.0, n + 1, device="cuda").repeat(d, 1)
    D = torch.ones(d, device="cuda")
    return [v.clone().requires_grad_() for v in (x, dt, A, B, C, D, z, D - 5)]

def ours(*p):
    return st.selective_scan(*p)[0]

def theirs(x, dt, A, B, C, D, z, dt_bias):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    y = selective_scan_fn(x.mT, dt.mT, A, B.mT, C.mT, D, z.mT, dt_bias, True)
    return y.mT

def median(run, sets: list) -> float:
    times = []
    for p in sets[:2] + sets:                 # the first two warm up
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run(p)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[len(sets) // 2]

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

def main() -> None:
    if not isinstance(st.scan_kernel, triton.JITFunction):
        raise SystemExit("the report compiles the kernels, which Triton's interpreter does not: unset "
                         "TRITON_INTERPRET, which is 1")
    print(f"One layer of the 7B, (b, l, d, n) = {SIZES}, in {chunks()} chunks, Triton {triton.__version__}.\n"
          f"upd = state update: there are {b * l * d * n / 1e9:.2f} G, for a carry one a chunk, for a token "
          "one. Estimates, not measurements:\nthe ms each resource of an H100 SXM needs at least; * is the "
          "slowest. Beside them, how many warps fit on an\nSM by registers, and the ms of so many if a warp "
          f"takes {WAITS['issue']} cycles an instruction, {WAITS['SHFL']} more a shuffle,\n{WAITS['BAR']} a "
          f"barrier, and waits {LOADS} for the loads of a block.\n")
    print(f"{'kernel':18} {'target':7} {'regs':>4} {'stack':>5} {'spill':>5} {'shared':>6} {'instr/upd':>9} "
          f"{'MUFU/upd':>8} {'MB':>6} {'HBM':>6} {'MUFU':>6} {'issue':>6} {'SHFL':>6} {'warps':>5} {'waits':>5}")
    for label in (*KERNELS, "backward: sums"):
        for target in TARGETS if label in KERNELS else ("sm_90",):
            found = count(label, target) if label in KERNELS else {}
            widths = dict(REG=4, STACK=5, LOCAL=5, SHARED=6).items()
            line = f"{label:18} {target:7} " + " ".join(f"{found.get(k, '-'):>{w}}" for k, w in widths)
            line += f" {found['issue']:9.1f} {found['MUFU']:8.2f}" if "issue" in found else " " * 19
            if target == "sm_90":
                ms = estimate(label, found)
                line += f" {traffic()[label] / 1e6:6.0f}" + "".join(
                    f" {ms[k]:5.2f}{'*' if ms[k] == max(ms.values()) else ' '}"
                    for k in ("HBM", "MUFU", "issue", "SHFL"))
                if "REG" in found:
                    line += f" {warps(found):5} {waiting(label, found):5.2f}"
            print(line.rstrip())
    print()
    for name, reset, waits in (("estimated", False, False), ("with resets", True, False),
                               ("with waits", False, True)):
        ms = total(reset, waits)
        print(f"{name}: forward {ms['forward']:.2f} ms, backward {ms['backward']:.2f} ms, "
              f"both {sum(ms.values()):.2f} ms")
    for way, ms in floors().items():
        print(f"floors of a {way}: " + ", ".join(f"{kind} {value:.2f} ms" for kind, value in ms.items()))
    kept, scratch = memory()
    print(f"kept for the backward beyond the inputs: {kept / 1e6:.1f} MB ({kept / (2 * b * l * d):.3f} of x "
          f"in bf16); scratch of a backward: {scratch / 1e6:.0f} MB")
    if torch.cuda.is_available():
        measured()
    else:
        print("no GPU here: nothing was timed")

if __name__ == "__main__":
    main()
