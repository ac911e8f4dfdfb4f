"""The sampler: what it draws, what it keeps, and what it shows."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import sample
from mamba import Block, Mamba, MambaConfig
from sample import choose, generate
from train import byte_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "falcon-tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model = Mamba(MambaConfig(vocab_size=257, d_model=16, n_layer=2, d_state=4, eos_token_id=256))
    for layer in model.backbone.layers:         # long steps, loud layers: what it read decides what it writes
        layer.mixer.dt_proj.bias.data += 3
        layer.mixer.out_proj.weight.data *= 8
    model.lm_head.weight.data[128:256] = 0      # greedy text is ASCII, so no cut falls within a character
    model.save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def run(monkeypatch, capsys, folder, *flags):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(folder), "--device", "cpu", *flags])
    sample.main()
    return capsys.readouterr()


def tokens_of(model, prompt, count, **options):
    return torch.stack(list(generate(model, prompt, count, **options)), 1)


def test_greedy_generation_is_the_argmax_of_rereading_everything(folder):
    model = Mamba.from_pretrained(folder)
    text = torch.tensor([[1, 2, 3], [9, 8, 7]])
    made = tokens_of(model, text, 6, temperature=0)
    for i in range(6):
        expected = model(torch.cat([text, made[:, :i]], 1))[0][:, -1].argmax(-1)
        assert torch.equal(made[:, i], expected)


def test_a_long_prompt_is_read_in_pieces_without_a_trace(folder, monkeypatch):
    model, states = Mamba.from_pretrained(folder), []
    for size in (512, 7):
        monkeypatch.setattr(sample, "PIECE", size)
        steps = generate(model, torch.arange(100)[None], 0)
        with pytest.raises(StopIteration) as end:
            next(steps)
        states.append(end.value.value)      # what the prompt left, all but its last token
    for a, b in zip(*map(sum, states, ([], []))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_stopped_row_goes_on_yielding_stop_and_all_stopped_ends(folder):
    model, prompt = Mamba.from_pretrained(folder), torch.tensor([[1, 2], [3, 4]])
    free = tokens_of(model, prompt, 12, temperature=0)
    stop = int(free[0, 2])
    made = tokens_of(model, prompt, 12, temperature=0, stop=stop)
    first = (made[0] == stop).nonzero()[0, 0]
    assert first <= 2 and (made[0, first:] == stop).all()
    assert tokens_of(model, prompt[:1], 12, temperature=0, stop=stop).shape == (1, first + 1)


def test_top_k_and_top_p_draw_only_from_the_likeliest():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(2000, 4)
    g = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, 2, None, g).tolist()) == {1, 3}
    assert set(choose(logits, 1.0, None, 0.75, g).tolist()) == {1, 3}
    assert set(choose(logits, 1.0, None, 0.9, g).tolist()) == {0, 1, 3}
    assert set(choose(logits, 1.0, None, 1e-9, g).tolist()) == {1}
    counts = choose(logits, 1.0, None, None, g).bincount(minlength=4) / 2000
    assert (counts - logits[0].exp()).abs().max() < 0.05
    for temperature in (1e-30, 1e-39, 1e-46, 1e-320):
        assert set(choose(logits, temperature, None, None, g).tolist()) == {1}


def test_the_same_seed_writes_the_same_text_and_only_text(folder, monkeypatch, capsys):
    flags = ["--prompt", "def ", "--max-new-tokens", "30", "--seed", "5"]
    first, second = (run(monkeypatch, capsys, folder, *flags) for _ in range(2))
    assert first.out == second.out and first.out.startswith("def ")
    for words in ("scan: ", "loaded in", "prefill ", "decode ", "tokens/s", "GB/s", "memory"):
        assert words in first.err and words not in first.out
    one, other = (run(monkeypatch, capsys, folder, *flags[:-2]).out for _ in range(2))
    assert one != other


def test_unequal_prompts_write_what_each_writes_alone(folder, monkeypatch, capsys):
    flags = ["--max-new-tokens", "12", "--temperature", "0"]
    alone = [run(monkeypatch, capsys, folder, "--prompt", p, *flags).out for p in ("a", "hello there")]
    both = run(monkeypatch, capsys, folder, "--prompt", "a", "--prompt", "hello there", *flags).out
    assert both == "".join(alone)


def test_a_character_is_printed_once_all_its_bytes_are_there_and_the_stop_never(capsys):
    tokenizer, shown = byte_tokenizer(), []

    def steps():        # the second text has ended before the first
        for token in [*tokenizer.encode("aé€").ids, 256]:
            yield torch.tensor([token, 256])
            shown.append(capsys.readouterr().out)
    made, times = sample.write(steps(), tokenizer, [">", "b"], 256)
    assert shown == [">a", "", "é", "", "", "€", ""] and capsys.readouterr().out == "\nb\n"
    assert len(made) == 7 and made[-1] == [256, 256] and times == sorted(times) and len(times) == 8


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_kept_state_goes_on_as_if_the_text_had_just_been_read(folder, monkeypatch, capsys, tmp_path, cut):
    greedy = ["--temperature", "0", "--max-new-tokens"]
    whole = run(monkeypatch, capsys, folder, "--prompt", "abc", *greedy, "12").out
    kept = str(tmp_path / "kept")
    start = run(monkeypatch, capsys, folder, "--prompt", "abc", *greedy, str(cut), "--save-state", kept).out
    end = run(monkeypatch, capsys, folder, "--load-state", kept, *greedy, str(12 - cut)).out
    assert start.removesuffix("\n") + end == whole


def test_compiled_steps_write_the_same_text_from_one_graph_for_all_layers(folder, monkeypatch, capsys,
                                                                          graphs):
    flags = ["--prompt", "a", "--prompt", "bcd", "--max-new-tokens", "6", "--temperature", "0"]
    plain = run(monkeypatch, capsys, folder, *flags).out
    monkeypatch.setattr(Block, "forward", Block.forward)        # what --compile replaces comes back
    assert run(monkeypatch, capsys, folder, *flags, "--compile").out == plain and len(graphs) == 1


def test_compiled_steps_keep_the_samples_from_one_state_apart(folder, monkeypatch, capsys, tmp_path):
    kept, seed = str(tmp_path / "kept"), ["--num-samples", "3", "--seed", "1", "--max-new-tokens", "8"]
    run(monkeypatch, capsys, folder, "--prompt", "abc", "--max-new-tokens", "2", "--save-state", kept)
    plain = run(monkeypatch, capsys, folder, "--load-state", kept, *seed).out
    monkeypatch.setattr(Block, "forward", Block.forward)
    strides = []

    def fixed(step, **_):       # as code compiled for the first call, and never checked again
        def run_step(self, stream, past, h0, reset):
            strides.append((past.stride(), h0.stride()))
            return step(self, stream, past, h0, reset)
        return run_step
    monkeypatch.setattr(torch, "compile", fixed)
    assert run(monkeypatch, capsys, folder, "--load-state", kept, *seed, "--compile").out == plain
    assert len(set(strides)) == 1


@pytest.mark.skipif(not SHARED.exists(), reason="the published vocabulary is not here")
def test_the_tokenizer_agrees_with_the_published_vectors():
    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizer.json"))
    for vector in json.loads((SHARED / "vectors.json").read_text()):
        assert tokenizer.encode(vector["text"], add_special_tokens=False).ids == vector["ids"], vector["text"]


@pytest.mark.skipif("FALCON_MAMBA_7B" not in os.environ,
                    reason="set FALCON_MAMBA_7B to a folder with tiiuae/falcon-mamba-7b to run it")
def test_the_published_7b_writes_its_published_text(monkeypatch, capsys):
    flags = ["--prompt", "Hello today", "--temperature", "0", "--max-new-tokens", "20"]
    out = run(monkeypatch, capsys, os.environ["FALCON_MAMBA_7B"], *flags).out
    assert out.startswith("Hello today I am going to show you how to make "
                          "a simple and easy to make paper plane.\nStep")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: nothing else replays graphs")
def test_replaying_the_graph_writes_what_eager_steps_write(folder):
    model, prompt = Mamba.from_pretrained(folder, "cuda"), torch.tensor([[1, 2, 3], [9, 8, 7]], device="cuda")
    text = prompt
    for token in generate(model, prompt, 20, temperature=0):
        with torch.inference_mode():
            expected = model(text)[0][:, -1].argmax(-1)
        assert torch.equal(token, expected)
        text = torch.cat([text, token[:, None]], 1)


def test_a_reader_who_leaves_ends_it_quietly(folder):
    flags = f"--model {folder} --prompt a --max-new-tokens 3000 --device cpu"
    command = f"{sys.executable} {sample.__file__} {flags} | head -c 1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout == "a" and "rror" not in ended.stderr


def test_a_reader_who_leaves_before_the_state_is_kept_is_told(folder, tmp_path):
    flags = f"--model {folder} --prompt a --max-new-tokens 3000 --device cpu --save-state {tmp_path / 'kept'}"
    command = f"{sys.executable} {sample.__file__} {flags} | head -c 1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and last.startswith("sample.py: ") and "kept is not written" in last
    assert not (tmp_path / "kept").exists()
