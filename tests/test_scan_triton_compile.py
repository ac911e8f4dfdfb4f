"""The Triton kernels compiled for GPUs that are not here: nothing spills, and the inner loops stay lean.

Compilation needs Triton without its interpreter, so one process of its own counts everything, once. Where
the repository has an emulator of compiled kernels beside it, another one compares their results.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LABELS = ("pass 1: reduce", "pass 2: carry", "pass 3: scan", "backward: replay", "backward: carry",
          "backward: adjoint", "one token: step")
# Most registers, instructions and MUFU per state update on an H100: what was counted, and a little room.
BOUNDS = {"pass 1: reduce": (80, 6.9, 1.13), "pass 3: scan": (112, 9.7, 1.26),
          "backward: replay": (150, 13.6, 1.26), "backward: adjoint": (255, 31.5, 2.4)}

EMULATOR = HERE.parent.parent / "shared" / "ptxemu"
# The comparisons that the emulator runs: few shapes, because each is compiled, and all six kernels.
EMULATED = "document_may_start or longer_sequences or (one_token_is and bfloat16)"

def python(code, *args, **extra):
    """Run Python with Triton's interpreter off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True,
                          env=env | extra, cwd=HERE.parent)

def ahead(folder):
    counted = python("""if True:
        import json, sys
        sys.path[:0] = ["tests", "."]
        import triton_report as r
        from scan_triton import block_steps
        found = [(k, t, z, r.count(k, t, z)) for k in r.KERNELS for t in r.TARGETS for z in (False, True)
                 if not z or "carry" not in k]
        wide = r.count("backward: adjoint", n=32, BLOCK=block_steps(32))
        special = [f"{k}: {p.name}" for k, kernel in r.KERNELS.items() for p in kernel.params
                   if not (p.name.endswith("_ptr") or p.is_constexpr or p.do_not_specialize)]
        print(json.dumps(dict(found=found, ms=[r.total(False), r.total(True)], memory=r.memory(),
                              wide=wide, special=special)))
    """)
    if not EMULATOR.is_dir() or not shutil.which("gcc"):
        return counted, None
    return counted, python("""if True:
        import sys
        sys.path[:0] = [".", sys.argv[1]]
        import pytest, torch, triton, scan_triton, ptxemu
        triton.JITFunction = type(None)         # or else CPU tensors are refused
        sys.exit(pytest.main(["-q", "tests/test_scan_triton.py", "-p", "no:cacheprovider", "-k", sys.argv[2]]))
    """, str(EMULATOR), EMULATED, EMU_NOISE="1", EMU_BACKWARDS="1")

@pytest.fixture(scope="module")
def report(begun):
    counted, _ = begun
    assert counted.returncode == 0, counted.stderr
    return json.loads(counted.stdout.splitlines()[-1])

@pytest.fixture(scope="module")
def found(report):
    return {(label, target, reset): counts for label, target, reset, counts in report["found"]}

@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
@pytest.mark.parametrize("label", LABELS)
def test_nothing_spills(found, label, target):
    for reset in [False] if "carry" in label else [False, True]:       # a carry knows no resets
        counts = found[label, target, reset]
        assert counts["STACK"] == 0 and counts["LOCAL"] == 0

@pytest.mark.parametrize("label", BOUNDS)
def test_the_inner_loop_stays_lean(found, label):
    registers, instructions, mufu = BOUNDS[label]
    counts = found[label, "sm_90", False]
    assert counts["REG"] <= registers and counts["issue"] <= instructions and counts["MUFU"] <= mufu
    assert counts["MUFU"] >= 1, "the loop that was counted is not the inner loop"

def test_one_layer_of_the_7b_is_estimated_within_its_budget(report):
    for ms in report["ms"]:                                        # without and with resets
        assert ms["forward"] < 0.8 and sum(ms.values()) < 2.6

def test_the_backward_keeps_and_borrows_little_memory(report):
    kept, scratch = report["memory"]
    assert kept <= 2 * 8192 * 8192 / 4 and scratch <= 600e6

def test_a_state_of_32_numbers_spills_nothing(report):
    assert report["wide"]["STACK"] == 0

def test_compiled_for_an_h100_and_run_on_a_cpu_the_results_are_the_float64_loops(begun):
    _, emulated = begun
    if emulated is None:
        pytest.skip(f"needs gcc and an emulator of compiled kernels in {EMULATOR}")
    assert emulated.returncode == 0 and " passed" in emulated.stdout, emulated.stdout + emulated.stderr

def test_every_length_is_served_by_one_compilation(report):
    assert report["special"] == []
