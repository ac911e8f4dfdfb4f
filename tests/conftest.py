"""What all tests share: the files can be imported, nothing reaches the network, and two cores are busy."""
import contextlib
import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"     # what is no part of the repository
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GOMP_SPINCOUNT"] = "5000"       # as train.py and sample.py

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)    # as in the processes beside the tests: two may sum in another order

# The same examples everywhere, so a failure can be repeated. HYPOTHESIS_PROFILE=default looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not torch.cuda.is_available():   # Triton reads this as it decorates the kernels, so before their import
    os.environ["TRITON_INTERPRET"] = "1"

class Ended(NamedTuple):
    status: int
    out: str
    err: str

def call(program, *flags):
    """Run a program's main here -> its exit status, its output, and what it told on the way."""
    sys.argv = [program.__file__, *map(str, flags)]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")    # as Python's own
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            program.main()
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):     # Python prints it, and exits with 1
                print(status, file=err)
                status = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out.seek(0)
    err.seek(0)
    return Ended(status, out.read(), err.read())

def complaints(told):
    """The lines that the programs and argparse do not tell when all is well."""
    notes = r"loading |reading |compiling |skipping |usage: | |\d+ steps|.* GB of weights|$"
    return [line for line in told.splitlines() if not re.match(notes, line)]

def assert_plain(text, *words):
    """It is a line that a person can read at a glance, holding all `words`."""
    assert " " in text and len(text) < 600 and text.isprintable(), text
    for word in words:
        assert str(word) in text, f"{word!r} is not in {text!r}"

def assert_sentence(told, *words):
    """What is complained of is one such line."""
    lines = complaints(told)
    assert len(lines) == 1, f"not one line: {lines}"
    assert re.match(r"(sample|train)\.py: ", lines[0]), lines
    assert_plain(lines[0], *words)

def assert_refused(ended, *words):
    assert ended.status in (1, 2)
    assert_sentence(ended.err, *words)

def python(code, *args, **variables):
    """Run this code in a process of its own, in which Triton compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True,
                          env=env | variables, cwd=ROOT)

@contextlib.contextmanager
def largest_file(size):
    """As on a full disk, no file can grow beyond this size. It stops root as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "begun" in item.fixturenames)       # last: by then it has been done

def pytest_collection_finish(session):
    """Begin what only waits for other processes, one after the other, beside the tests that run in this one.

    A module says what that is as ahead(folder); its tests are given what it returned as the fixture `begun`.
    """
    if session.config.option.collectonly:
        return
    pool, folder = ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
    session.config.add_cleanup(folder.cleanup)
    session.config.add_cleanup(lambda: pool.shutdown(cancel_futures=True))      # before the folder goes
    modules = dict.fromkeys(item.module for item in session.items if "begun" in item.fixturenames)
    session.config.begun = {module: pool.submit(module.ahead, Path(folder.name) / module.__name__)
                            for module in modules}

@pytest.fixture(scope="module")
def begun(request):
    return request.config.begun[request.module].result()

@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile finds, which run as they are: to make C++ of one takes half a minute."""
    import mamba
    import scan
    found = []
    monkeypatch.setattr(mamba.Block, "forward", mamba.Block.forward)    # what --compile replaces comes back
    monkeypatch.setattr(mamba.Block, "step", mamba.Block.step)
    monkeypatch.setitem(scan.BACKENDS, "chunked", scan.BACKENDS["chunked"])

    def keep(graph, inputs, **_):
        found.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()
