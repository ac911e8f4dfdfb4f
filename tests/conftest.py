"""What all tests share: the files can be imported, nothing reaches the network, and two cores are busy."""
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# The same examples everywhere, so a failure can be repeated. HYPOTHESIS_PROFILE=default looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not torch.cuda.is_available():   # Triton reads this as it decorates the kernels, so before their import
    os.environ["TRITON_INTERPRET"] = "1"

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
    found = []

    def keep(graph, inputs, **_):
        found.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    torch.compiler.reset()
    yield found
    torch.compiler.reset()
