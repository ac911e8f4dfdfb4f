"""The Triton kernels compiled for GPUs that are not here: nothing spills, and the inner loops stay lean.

Compilation needs Triton without its interpreter, so one process of its own counts everything, once. Where
the repository has an emulator of compiled kernels beside it, another one compares their results.
"""
import json
import shutil

import pytest
from conftest import SHARED, python

# Most registers, instructions and MUFU per state update on an H100: what was counted, and a little room.
BOUNDS = {"pass 1: reduce": (104, 7.9, 1.13), "pass 3: scan": (112, 9.7, 1.26),
          "backward: replay": (150, 13.6, 1.26), "backward: adjoint": (255, 31.5, 2.4)}

EMULATOR = SHARED / "ptxemu"
# The comparisons that the emulator runs: few shapes, because each is compiled, and all kernels.
EMULATED = "document_may_start or longer_sequences or (one_token_is and bfloat16)"

def ahead(folder):
    counted = python("""if True:
        import json
        from scan_triton import block_steps
        from tests import triton_report as r
        found = [(k, t, z, r.count(k, t, z)) for k in r.KERNELS for t in r.TARGETS for z in (False, True)
                 if not z or "reset_ptr" in r.KERNELS[k].arg_names]
        wide = r.count("backward: adjoint", n=32, BLOCK=block_steps(32))
        special = [f"{k}: {p.name}" for k, kernel in r.KERNELS.items() for p in kernel.params
                   if not (p.name.endswith("_ptr") or p.is_constexpr or p.do_not_specialize)]
        print(json.dumps(dict(found=found, layers=[r.layer(False), r.layer(True)], memory=r.memory(),
                              token=r.token(), wide=wide, special=special)))
    """)
    if not EMULATOR.is_dir() or not shutil.which("gcc"):
        return counted, None
    return counted, python("""if True:
        import sys
        sys.path.append(sys.argv[1])
        import pytest, torch, triton, scan_triton, ptxemu
        triton.JITFunction = type(None)         # or else CPU tensors are refused
        sys.exit(pytest.main(["-q", "tests/test_scan_triton.py", "-p", "no:cacheprovider", "-k", sys.argv[2]]))
    """, str(EMULATOR), EMULATED, EMU_NOISE="1", EMU_BACKWARDS="1")

@pytest.fixture(scope="module")
def report(begun):
    counted, _ = begun
    assert counted.returncode == 0, counted.stderr
    return json.loads(counted.stdout.splitlines()[-1])

def test_nothing_spills(report):
    assert len(report["found"]) == 33           # 7 kernels, 3 GPUs, 4 kernels with resets too
    spilled = [counts for *_, counts in report["found"] if counts["STACK"] or counts["LOCAL"]]
    assert not spilled and report["wide"]["STACK"] == 0         # wide: a state of 32 numbers

@pytest.mark.parametrize("label", BOUNDS)
def test_the_inner_loop_stays_lean(report, label):
    registers, instructions, mufu = BOUNDS[label]
    counts, = [counts for *of, counts in report["found"] if of == [label, "sm_90", False]]
    assert counts["REG"] <= registers and counts["issue"] <= instructions and counts["MUFU"] <= mufu
    assert counts["MUFU"] >= 1, "the loop that was counted is not the inner loop"

def test_one_layer_of_the_7b_is_estimated_within_its_budget(report):
    """Compiled in one graph, with resets and without, in few kernels that move few bytes."""
    for layer in report["layers"]:
        ms = {name: part["products"] + part["scan"] + part["rest"] for name, part in layer.items()}
        assert layer["forward, training"]["scan"] < 0.8 and layer["backward"]["scan"] < 1.9
        assert ms["forward, inference"] < 4.2 and 2 * ms["forward, training"] + ms["backward"] < 17
        assert all(0 < part["kernels"] <= 18 for part in layer.values())
        assert all(part["floor GB"] < part["GB"] < 3 * part["floor GB"] for part in layer.values())

def test_a_token_is_estimated_to_take_few_kernels_and_little_more_than_its_weights_bytes(report):
    token = report["token"]
    assert token["kernels"] <= 12 and 1e3 / token["ms"] > 150
    assert token["states"] < 0.01 * token["weights"]

def test_the_backward_keeps_and_borrows_little_memory(report):
    kept, scratch = report["memory"]
    assert kept <= 2 * 8192 * 8192 / 4 and scratch <= 600e6

def test_compiled_for_an_h100_and_run_on_a_cpu_the_results_are_the_float64_loops(begun):
    _, emulated = begun
    if emulated is None:
        pytest.skip(f"needs gcc and an emulator of compiled kernels in {EMULATOR}")
    assert emulated.returncode == 0 and " passed" in emulated.stdout, emulated.stdout + emulated.stderr

def test_every_length_is_served_by_one_compilation(report):
    assert report["special"] == []
