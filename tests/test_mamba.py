"""The model: equal to the reference, to itself in pieces, and to what it saved."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import sample
from mamba import Mamba, MambaConfig

GOLDEN = Path(__file__).parent / "golden"      # by make_golden.py, with transformers
NEAR = dict(rtol=1e-4, atol=1e-4)
TINY = dict(vocab_size=101, d_model=16, n_layer=3, d_state=5, d_conv=4, dt_rank=3)

def tiny(**changes):
    torch.manual_seed(0)
    model = Mamba(MambaConfig(**TINY | changes)).eval()
    with torch.no_grad():       # no parameter at a value, 0 or 1, that would hide a missing one
        for name, p in model.named_parameters():
            if p.dim() == 1 and "dt_proj" not in name:
                p += 0.3 * torch.randn_like(p)
    return model

def draw(*shape, seed=0):
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(seed))

def read(model, tokens, cuts):
    """The logits of tokens that are read in pieces, and the state in the end."""
    parts, state = [], None
    for piece in tokens.split(cuts, 1):
        logits, state = model(piece, state)
        parts.append(logits)
    return torch.cat(parts, 1), state

@torch.no_grad()
@pytest.mark.parametrize("step", [1, 7, 40])
def test_logits_are_those_that_the_reference_gave_once(step):
    """However many tokens are read at a time. Without any one of the norms of dt, B and C it is off by 2."""
    golden = load_file(GOLDEN / "logits.safetensors")
    logits, _ = read(Mamba.from_pretrained(GOLDEN), golden["tokens"], step)
    assert_close(logits, golden["logits"], **NEAR)

def reference(model, folder):
    """The same model as transformers loads it."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers to compare")
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)

@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"bias": True, "conv_bias": False},
                                     {"d_inner": 24, "d_conv": 2, "mixer_norm_eps": 1e-2}])
def test_transformers_loads_what_we_save_and_agrees(tmp_path, changes):
    model, x = tiny(**changes), draw(2, 37)
    theirs = reference(model, tmp_path).eval()
    assert_close(model(x)[0], theirs(x).logits, **NEAR)
    assert theirs.dtype == torch.float32 and reference(model.bfloat16(), tmp_path).dtype == torch.bfloat16

@pytest.mark.parametrize("cuts", [20, 1])
def test_gradients_agree_with_the_reference(tmp_path, cuts):
    """Also through states, which where gradients are wanted no token overwrites."""
    model, x = tiny(), draw(2, 20)
    theirs = reference(model, tmp_path).train()
    read(model, x, cuts)[0].logsumexp(-1).sum().backward()
    theirs(x).logits.logsumexp(-1).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        near = 1e-3 * expected[name].abs().max().item()
        assert_close(p.grad, expected[name], rtol=1e-3, atol=near, msg=name)

@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 23, [22, 1], [1, 22], [2, 3, 18]])
@pytest.mark.parametrize("changes", [{}, {"bias": True, "conv_bias": False, "d_conv": 1}])
def test_reading_in_pieces_is_reading_at_once(cuts, changes):
    model, x = tiny(**changes), draw(2, 23)
    whole, end = model(x)
    parts, state = read(model, x, cuts)
    assert_close(parts, whole, **NEAR)
    assert_close(state.conv + state.ssm, end.conv + end.ssm, **NEAR)

@torch.no_grad()
def test_unequal_prompts_in_a_batch_equal_each_alone():
    model, prompts = tiny(), [draw(1, n, seed=n) for n in (1, 2, 4, 11)]
    batch = torch.cat([torch.cat([draw(1, 11 - p.shape[1], seed=99), p], 1) for p in prompts])
    first = torch.tensor([[11 - p.shape[1]] for p in prompts])
    logits, state = model(batch, reset=torch.arange(11) == first)
    after, _ = model(draw(4, 1, seed=7), state)
    for row, p in enumerate(prompts):
        alone, own = model(p)
        assert_close(logits[row, -p.shape[1]:], alone[0], **NEAR)
        assert_close(after[row], model(draw(4, 1, seed=7)[row:row + 1], own)[0][0], **NEAR)

@torch.no_grad()
def test_packed_documents_do_not_leak():
    model, first, second = tiny(), draw(1, 9), draw(1, 8, seed=1)
    reset = torch.arange(17)[None] == 9
    logits, _ = model(torch.cat([first, second], 1), reset=reset)
    other, _ = model(torch.cat([draw(1, 9, seed=5), second], 1), reset=reset)
    assert torch.equal(logits[:, 9:], other[:, 9:])
    assert_close(logits[:, 9:], model(second)[0], **NEAR)

@torch.no_grad()
def test_the_state_handed_in_is_left_as_it_was_and_changed_weights_count_at_once():
    model = tiny()
    _, state = model(draw(1, 5))
    before = state.copy()
    for _ in range(2):
        alone, _ = model(draw(1, 1), state)
        assert_close(alone, model(draw(1, 6), state)[0][:, :1], **NEAR)
        assert all(map(torch.equal, state.conv + state.ssm, before.conv + before.ssm))
        for p in model.parameters():
            p += 0.3

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4])
def test_a_state_of_another_number_of_layers_is_refused(length):
    models = tiny(n_layer=3), tiny(n_layer=2)
    for model, other in models, models[::-1]:
        with pytest.raises(ValueError):
            model(draw(1, length), other.blank_state(1))

@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_saved_and_loaded_is_the_same_bits_and_in_bf16_what_is_small_and_exact_stays_fp32(tmp_path, changes):
    model = tiny(**changes)
    model.save_pretrained(tmp_path)
    again = Mamba.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(draw(1, 9))[0], model(draw(1, 9))[0])
    half = Mamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    small = "A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"
    assert exact == {f"backbone.layers.{i}.mixer.{name}" for i in range(3) for name in small}
    logits, state = half(draw(1, 4))
    assert logits.dtype == state.ssm[0].dtype == torch.float32

@torch.no_grad()
def test_one_token_alone_is_multiplied_without_onednn_and_all_threads_leave_it_as_it_was(monkeypatch):
    model, mkldnn, linear, seen = tiny(), torch.backends.mkldnn, F.linear, set()

    def spy(x, *rest):
        seen.add((x.shape[:-1].numel() == 1, mkldnn.enabled))
        return linear(x, *rest)
    monkeypatch.setattr(F, "linear", spy)
    for on in (False, True):
        with mkldnn.flags(on, None, None, None):
            for x in draw(1, 1), draw(1, 2), draw(2, 1):
                model(x)
            assert mkldnn.enabled == on
    assert seen == {(True, False), (False, False), (False, True)}

    def decode(_):
        with torch.no_grad():
            for length in [1, 2] * 150:
                model(draw(1, length))
    with mkldnn.flags(True, None, None, None), ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(4)))
        assert mkldnn.enabled

class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph. What runs below it is noted, and replay() repeats it on the same memory."""
    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op is not torch.ops.aten._local_scalar_dense.default, "the graph would wait for the CPU"
        writes = op._schema.is_mutable
        out = args[0] if writes else op(*args, **kwargs or {})
        is_view = any(info.alias_info for info in op._schema.arguments) and not writes
        if not is_view:
            self.kernels.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        for op, args, kwargs, out in self.kernels:
            tree_map(lambda old, new: old is new or old.copy_(new), out, op(*args, **kwargs))

@torch.no_grad()
@pytest.mark.parametrize("how", [(0, None, None), (1.0, None, None), (0.7, 9, 0.9)])
def test_a_step_replayed_from_a_recording_writes_what_steps_write(monkeypatch, how):
    """With the draw and its checks, on the same memory, and with no word from the CPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda recording: recording)
    model = tiny()
    constants = model.constants()

    def write(record):
        generator = torch.Generator().manual_seed(0)
        _, state = model(draw(3, 4))
        token = draw(3)

        def step():
            logits = model.step(token[:, None], state, constants)
            token.copy_(sample.choose(logits[:, 0], *how, generator))
        step = record(step, None)
        for _ in range(6):
            step()
            yield token.clone()
    steps = write(lambda step, _: step)
    assert torch.equal(torch.stack([*write(sample.recorded)]), torch.stack([*steps]))

def test_the_published_config_with_its_wrong_expand_is_the_7b_of_7272665088_parameters(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "falcon_mamba", "hidden_size": 4096, "expand": 16,
                                "intermediate_size": 8192, "num_hidden_layers": 64, "vocab_size": 65024,
                                "time_step_rank": "auto", "tie_word_embeddings": False}))
    config = MambaConfig.from_json(path)
    assert config == MambaConfig() and (config.d_inner, config.dt_rank) == (8192, 256)
    with torch.device("meta"):
        parameters = [*Mamba(config).parameters()]
    assert len(parameters) == 643 and sum(p.numel() for p in parameters) == 7_272_665_088

def test_fresh_states_fade_at_n_speeds_in_steps_from_a_thousandth_to_a_tenth():
    for name, p in Mamba(MambaConfig(**TINY)).named_parameters():
        if name.endswith("A_log"):
            assert_close(p.exp(), torch.arange(1.0, 6).expand(32, 5))
        if name.endswith("dt_proj.bias"):
            assert 0.999e-3 < F.softplus(p).min() and F.softplus(p).max() < 0.1001
        if name.endswith((".D", "norm.weight", "norm_f.weight")):
            assert (p == 1).all()
