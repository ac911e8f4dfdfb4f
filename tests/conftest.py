"""What all tests share: the project's files can be imported, and nothing reaches the network."""
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# The same examples everywhere, so a failure can be repeated. HYPOTHESIS_PROFILE=default looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not torch.cuda.is_available():   # Triton reads this as it decorates the kernels, so before their import
    os.environ["TRITON_INTERPRET"] = "1"


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
