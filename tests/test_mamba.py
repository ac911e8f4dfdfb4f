"""The model: equal to the reference, to itself in pieces, and to what it saved."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mamba import Mamba, MambaConfig

GOLDEN = Path(__file__).parent / "golden"      # by make_golden.py, with transformers
NEAR = dict(rtol=1e-4, atol=1e-4)
TINY = dict(vocab_size=101, d_model=16, n_layer=3, d_state=5, d_conv=4, dt_rank=3)

def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = Mamba(MambaConfig(**TINY | changes)).eval()
    with torch.no_grad():       # no parameter at a value, 0 or 1, that would hide a missing one
        for name, p in model.named_parameters():
            if p.dim() == 1 and "dt_proj" not in name:
                p += 0.3 * torch.randn_like(p)
    return model

def draw(*shape, seed=0):
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(seed))

@torch.no_grad()
@pytest.mark.parametrize("step", [1, 7, 40])
def test_logits_are_those_that_the_reference_gave_once(step):
    """However many tokens are read at a time. Without any one of the norms of dt, B and C it is off by 2."""
    model, golden, state = Mamba.from_pretrained(GOLDEN), load_file(GOLDEN / "logits.safetensors"), None
    for tokens, logits in zip(golden["tokens"].split(step, 1), golden["logits"].split(step, 1)):
        ours, state = model(tokens, state)
        assert_close(ours, logits, **NEAR)

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

def test_gradients_agree_with_the_reference(tmp_path):
    model, x = tiny(), draw(2, 20)
    theirs = reference(model, tmp_path).train()
    model(x)[0].logsumexp(-1).sum().backward()
    theirs(x).logits.logsumexp(-1).sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in model.named_parameters():
        near = 1e-3 * expected[name].abs().max().item()
        assert_close(p.grad, expected[name], rtol=1e-3, atol=near, msg=name)

@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 23, [22, 1], [1, 22], [2, 3, 18], [17, 6]])
def test_reading_in_pieces_is_reading_at_once(cuts):
    model, x = tiny(), draw(2, 23)
    whole, end = model(x)
    parts, state = [], None
    for piece in x.split(cuts, 1):
        logits, state = model(piece, state)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, **NEAR)
    assert_close(state.conv + state.ssm, end.conv + end.ssm, **NEAR)

@torch.no_grad()
def test_unequal_prompts_in_a_batch_equal_each_alone():
    model, prompts = tiny(), [draw(1, n, seed=n) for n in (1, 2, 4, 11)]
    batch = torch.cat([torch.cat([draw(1, 11 - p.shape[1], seed=99), p], 1) for p in prompts])
    reset = torch.zeros_like(batch, dtype=torch.bool)
    for row, p in enumerate(prompts):
        reset[row, 11 - p.shape[1]] = True
    logits, state = model(batch, reset=reset)
    after, _ = model(draw(4, 1, seed=7), state)
    for row, p in enumerate(prompts):
        alone, own = model(p)
        assert_close(logits[row, -p.shape[1]:], alone[0], **NEAR)
        assert_close(after[row], model(draw(4, 1, seed=7)[row:row + 1], own)[0][0], **NEAR)

@torch.no_grad()
def test_packed_documents_do_not_leak():
    model, first, second = tiny(), draw(1, 9), draw(1, 8, seed=1)
    reset = torch.zeros(1, 17, dtype=torch.bool)
    reset[0, 9] = True
    logits, _ = model(torch.cat([first, second], 1), reset=reset)
    other, _ = model(torch.cat([draw(1, 9, seed=5), second], 1), reset=reset)
    assert torch.equal(logits[:, 9:], other[:, 9:])
    assert_close(logits[:, 9:], model(second)[0], **NEAR)

@torch.no_grad()
def test_the_state_handed_in_is_left_as_it_was():
    model = tiny()
    _, state = model(draw(1, 5))
    copy = [v.clone() for v in state.conv + state.ssm]
    model(draw(1, 1), state)
    model(draw(1, 6), state)
    assert all(map(torch.equal, state.conv + state.ssm, copy))

@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
def test_saved_and_loaded_is_the_same_bits(tmp_path, changes):
    model = tiny(**changes)
    model.save_pretrained(tmp_path / "m")
    again = Mamba.from_pretrained(tmp_path / "m")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(draw(1, 9))[0], model(draw(1, 9))[0])

def test_what_is_small_and_exact_stays_fp32_in_bf16(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = Mamba.from_pretrained(tmp_path, dtype=torch.bfloat16)
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    exact = mixer.A_log, mixer.D, mixer.conv1d.weight, mixer.dt_proj.bias
    assert {p.dtype for p in exact} == {torch.float32}
    logits, state = model(draw(1, 4))
    assert logits.dtype == state.ssm[0].dtype == torch.float32

def test_a_state_of_another_number_of_layers_is_refused():
    deeper, model = tiny(n_layer=3), tiny(n_layer=2)
    with pytest.raises(ValueError):
        model(draw(1, 4), deeper.blank_state(1))
    with pytest.raises(ValueError):
        deeper(draw(1, 4), model.blank_state(1))

def test_one_token_alone_is_multiplied_without_onednn_and_all_threads_leave_it_as_it_was():
    mkldnn, model, seen = torch.backends.mkldnn, tiny(), []
    model.backbone.register_forward_hook(lambda *_: seen.append(mkldnn.enabled))
    for on in (False, True):
        with mkldnn.flags(on, None, None, None), torch.no_grad():
            for x in draw(1, 1), draw(1, 2), draw(2, 1):
                model(x)
                assert mkldnn.enabled == on
    assert seen == [False, False, False, False, True, True]

    def decode(_):
        with torch.no_grad():
            for length in [1, 2] * 150:
                model(draw(1, length))
    with mkldnn.flags(True, None, None, None), ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(4)))
        assert mkldnn.enabled

def test_the_published_config_with_its_wrong_expand_loads(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "falcon_mamba", "hidden_size": 4096, "expand": 16,
                                "intermediate_size": 8192, "num_hidden_layers": 64, "vocab_size": 65024,
                                "time_step_rank": "auto", "tie_word_embeddings": False}))
    config = MambaConfig.from_json(path)
    assert config == MambaConfig() and (config.d_inner, config.dt_rank) == (8192, 256)

def test_the_7b_has_7272665088_parameters_in_643_tensors():
    with torch.device("meta"):
        parameters = dict(Mamba(MambaConfig()).named_parameters())
    assert len(parameters) == 643 and sum(p.numel() for p in parameters.values()) == 7_272_665_088

def test_fresh_states_fade_at_n_speeds_in_steps_from_a_thousandth_to_a_tenth():
    for name, p in Mamba(MambaConfig(**TINY)).named_parameters():
        if name.endswith("A_log"):
            assert_close(p.exp(), torch.arange(1.0, 6).expand(32, 5))
        if name.endswith("dt_proj.bias"):
            step = torch.nn.functional.softplus(p)
            assert 0.999e-3 < step.min() and step.max() < 0.1001
        if name.endswith((".D", "norm.weight", "norm_f.weight")):
            assert (p == 1).all()
