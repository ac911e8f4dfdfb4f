"""The sampler: what it draws, what it shows, and what it keeps."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models

import sample
from mamba import Block, Mamba, MambaConfig
from sample import Text, choose, end_tokens, generate
from train import byte_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "falcon-tokenizer"

def small_model(path):
    """A model whose every token counts, and which never writes half a character. Token 256 ends a text."""
    torch.manual_seed(0)
    model = Mamba(MambaConfig(vocab_size=257, d_model=16, n_layer=2, d_state=4, eos_token_id=256))
    for layer in model.backbone.layers:
        layer.mixer.dt_proj.bias.data += 3
        layer.mixer.out_proj.weight.data *= 8
    model.lm_head.weight.data[128:256] = 0
    model.save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))

@pytest.fixture
def run(monkeypatch, capsys):
    def run(folder, *flags):
        flags = ["sample.py", "--model", str(folder), "--device", "cpu", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", flags)
        sample.main()
        return capsys.readouterr()
    return run

def tokens_of(model, prompt, count, **options):
    return torch.stack(list(generate(model, prompt, count, **options)), 1)

def last_state(steps):
    """What is left when all steps have been taken."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value

# What is drawn.

def test_greedy_generation_is_the_argmax_of_rereading_everything(folder):
    model = Mamba.from_pretrained(folder)
    text = torch.tensor([[1, 2, 3], [9, 8, 7]])
    made = tokens_of(model, text, 6, temperature=0)
    for i in range(6):
        expected = model(torch.cat([text, made[:, :i]], 1))[0][:, -1].argmax(-1)
        assert torch.equal(made[:, i], expected)

def test_a_long_prompt_is_read_in_pieces_without_a_trace(folder, monkeypatch):
    model = Mamba.from_pretrained(folder)
    states = []
    for size in (512, 7):
        monkeypatch.setattr(sample, "PIECE", size)
        states.append(last_state(generate(model, torch.arange(100)[None], 0)))
    for a, b in zip(*map(sum, states, ([], []))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_the_state_in_the_end_can_be_read_on_from_and_differentiated(folder):
    model = Mamba.from_pretrained(folder)
    state = last_state(generate(model, torch.tensor([[1, 2, 3]]), 3, temperature=0))
    model(torch.tensor([[4]]), state)[0].sum().backward()
    assert model.backbone.embeddings.weight.grad[4].abs().sum() > 0

@pytest.mark.parametrize("several", [False, True])
def test_a_stopped_row_goes_on_yielding_its_stop_and_all_stopped_ends(folder, several):
    model = Mamba.from_pretrained(folder)
    prompt = torch.tensor([[1, 2], [3, 4]])
    free = tokens_of(model, prompt, 12, temperature=0)
    stop = [int(free[0, 2]), int(free[1, 4])] if several else int(free[0, 2])
    made = tokens_of(model, prompt, 12, temperature=0, stop=stop)
    for row in range(1 + several):
        first = torch.isin(free[row], torch.tensor(stop)).nonzero()[0, 0]
        assert torch.equal(made[row, :first], free[row, :first]) and (made[row, first:] == free[row, first]).all()
    assert tokens_of(model, prompt[:1], 12, temperature=0, stop=stop).shape[1] <= 3
    assert made.shape[1] <= 5 if several else 12

def test_top_k_and_top_p_draw_only_from_the_likeliest():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(2000, 4)
    g = torch.Generator().manual_seed(0)
    for top_k, top_p, drawn in [(2, None, {1, 3}), (None, 0.75, {1, 3}), (None, 0.9, {0, 1, 3}),
                                (3, 0.8, {1, 3}),       # .5 and .3 are 84 % of the three
                                (None, 1e-9, {1}), (10**9, None, {0, 1, 2, 3})]:
        assert set(choose(logits, 1.0, top_k, top_p, g).tolist()) == drawn
    counts = choose(logits, 1.0, None, None, g).bincount(minlength=4) / 2000
    assert (counts - logits[0].exp()).abs().max() < 0.05

@pytest.mark.parametrize("top_k, top_p", [(None, None), (3, None), (None, 0.9), (10**9, 1.0)])
def test_no_temperature_overflows(top_k, top_p):
    logits = torch.tensor([[1e30, 3e38, -3e38, 2e38]]).expand(500, 4)
    g = torch.Generator().manual_seed(0)
    for temperature in (0, 1e-320, 1e-46, 1e-39, 1e-30, 1):
        assert set(choose(logits, temperature, top_k, top_p, g).tolist()) == {1}
    flat = choose(torch.tensor([[3.0, 5.0, 1.0, 4.0]]).expand(500, 4), 1e6, top_k, top_p, g)
    assert len(set(flat.tolist())) == (3 if top_k == 3 else 4)

def test_the_same_seed_writes_the_same_text_and_only_text(folder, run):
    flags = ["--prompt", "def ", "--max-new-tokens", "30"]
    first, second = (run(folder, *flags, "--seed", "5") for _ in range(2))
    assert first.out == second.out and first.out.startswith("def ")
    for word in "scan: ", "loaded in", "seed 5", "prefill ", "decode ", "tokens/s", "memory", "GB of weights":
        assert word in first.err and word not in first.out
    new = run(folder, *flags)
    assert new.out != run(folder, *flags).out
    seed = new.err.split("seed ")[1].split()[0]         # which is printed, so any text can be had again
    assert run(folder, *flags, "--seed", seed).out == new.out

def test_unequal_prompts_write_what_each_writes_alone(folder, run):
    flags = ["--max-new-tokens", "12", "--temperature", "0"]
    alone = [run(folder, "--prompt", prompt, *flags).out for prompt in ("a", "hello there")]
    assert run(folder, "--prompt", "a", "--prompt", "hello there", *flags).out == "".join(alone)

def test_compiled_steps_write_the_same_text_from_one_graph_for_all_layers(folder, run, monkeypatch, graphs):
    flags = ["--prompt", "a", "--prompt", "bcd", "--max-new-tokens", "6", "--temperature", "0"]
    plain = run(folder, *flags).out
    monkeypatch.setattr(Block, "forward", Block.forward)        # what --compile replaces comes back
    compiled = run(folder, *flags, "--compile")
    assert compiled.out == plain and len(graphs) == 1 and "compiling for up to a minute" in compiled.err

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: nothing else replays graphs")
def test_replaying_the_graph_writes_what_eager_steps_write(folder):
    model = Mamba.from_pretrained(folder, "cuda")
    text = torch.tensor([[1, 2, 3], [9, 8, 7]], device="cuda")
    for token in generate(model, text, 20, temperature=0):
        with torch.no_grad():
            expected = model(text)[0][:, -1].argmax(-1)
        assert torch.equal(token, expected)
        text = torch.cat([text, token[:, None]], 1)

# What is shown.

BYTES = {f"<0x{i:02X}>": i for i in range(256)}
WORDS = {word: 256 + i for i, word in enumerate(["▁", "a", "▁a", "##a", ".", "n't", "€", "\ufffd", "▁▁"])}

def tokenizer_of(model, decoder):
    tokenizer = Tokenizer(model)
    if decoder:
        tokenizer.decoder = decoder
    return tokenizer

# As Llama's and Phi-3's: what has no token is written in tokens of bytes.
FALLBACK = tokenizer_of(
    models.BPE(vocab=BYTES | WORDS, merges=[("▁", "a")], byte_fallback=True),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]))
KINDS = {
    "byte level": byte_tokenizer(), "byte fallback": FALLBACK,
    "unigram": tokenizer_of(models.Unigram([(word, -1.0) for word in BYTES | WORDS], 0), decoders.Metaspace()),
    "word piece": tokenizer_of(models.WordPiece(BYTES | WORDS, unk_token="a"), decoders.WordPiece()),
    "words": tokenizer_of(models.WordLevel(BYTES | WORDS, unk_token="a"), None)}
TOKENS = st.integers(0, 255) | st.sampled_from([*"aé€😀".encode()]) | st.integers(256, 265)

@pytest.mark.parametrize("kind", KINDS)
@given(tokens=st.lists(TOKENS, max_size=80))
def test_the_pieces_joined_are_what_decoding_the_whole_gives(kind, tokens):
    text = Text(KINDS[kind])
    pieces = []
    for token in tokens:
        text.waiting.append(token)
        pieces.append(text.show(ended=False))
    assert "".join(pieces) + text.show(ended=True) == KINDS[kind].decode(tokens, skip_special_tokens=False)

def test_a_character_is_shown_once_all_its_bytes_are_there_and_the_end_never(capsys):
    tokenizer = byte_tokenizer()
    shown = []

    def steps():        # the second text has ended before the first
        for token in [*tokenizer.encode("aé€").ids, 256]:
            yield torch.tensor([token, 256])
            shown.append(capsys.readouterr().out)
        return "state"
    made, times, state = sample.write(steps(), tokenizer, [">", "b"], [256])
    assert shown == [">a", "", "é", "", "", "€", ""] and capsys.readouterr().out == "\nb\n"
    assert len(made) == 7 and made[-1] == [256, 256] and state == "state"
    assert times == sorted(times) and len(times) == 8

@pytest.mark.parametrize("tokens, goes_on, shown", [
    ([WORDS["▁a"]], False, " a"),       # the first new word keeps the space before it
    ([0xe2, 0x82, 0xe2], False, "\ufffd" * 3), ([0xe2, 0x82, 0xe2], True, ""),
    ([0xe2, 0x82, 256], False, "\ufffd" * 2), ([0xe2, 0x82, 256], True, "\ufffd" * 2)])
def test_what_never_becomes_a_character_is_shown_in_the_end(capsys, tokens, goes_on, shown):
    steps = (torch.tensor([token]) for token in tokens)
    sample.write(steps, FALLBACK, ["a"], [256], goes_on=goes_on)
    assert capsys.readouterr().out == f"a{shown}\n"

@pytest.mark.parametrize("config, generation, endoftext, expected", [
    (256, None, True, [256]), (0, None, True, [256]), (0, None, False, [0]), (None, None, False, []),
    ([5, 7], None, False, [5, 7]), ([5, 0], None, True, [256, 5]), (11, [11, 10], False, [11, 10]),
    (0, 9, True, [256, 9]), (7, None, True, [256, 7])])
def test_a_text_ends_at_all_that_the_files_name(tmp_path, config, generation, endoftext, expected):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(tmp_path, byte_tokenizer() if endoftext else FALLBACK) == expected

def test_a_turn_of_a_chat_ends_at_any_of_its_end_tokens(tmp_path, run):
    folder = small_model(tmp_path)
    flags = ["--prompt", "def f(", "--temperature", "0", "--max-new-tokens", "20"]
    free = run(folder, *flags).out.removeprefix("def f(")
    end = byte_tokenizer().encode(free[7]).ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [255, *end]}))
    assert run(folder, *flags).out == "def f(" + free[:free.index(free[7])] + "\n"

# What is kept.

@pytest.mark.parametrize("prompt, cut", [("abc", 0), ("abc", 1), ("abc", 4), ("Где", 1), ("Где", 2), ("Где", 3)])
def test_a_kept_state_goes_on_as_if_the_text_had_just_been_read(folder, run, tmp_path, monkeypatch, prompt, cut):
    if prompt == "Где":         # the model writes Russian, two tokens a letter
        letters = byte_tokenizer().encode("Привет, мир").ids
        monkeypatch.setattr(sample, "choose", lambda logits, *_: torch.tensor([letters[written.pop(0)]]))
    greedy = ["--temperature", "0", "--max-new-tokens"]
    written = [*range(12)]
    whole = run(folder, "--prompt", prompt, *greedy, 12).out
    written = [*range(12)]
    start = run(folder, "--prompt", prompt, *greedy, cut, "--save-state", tmp_path / "kept").out
    end = run(folder, "--load-state", tmp_path / "kept", *greedy, 12 - cut).out
    assert start.removesuffix("\n") + end == whole

def test_one_kept_state_goes_on_in_several_samples(folder, run, tmp_path):
    flags = ["--prompt", "d", "--temperature", "0", "--max-new-tokens"]
    run(folder, "--prompt", "abc", *flags[2:], 0, "--save-state", tmp_path / "kept")
    end = run(folder, "--load-state", tmp_path / "kept", "--num-samples", 2, *flags, 9).out
    assert end == 2 * run(folder, "--prompt", "abcd", *flags[2:], 9).out.removeprefix("abc")

@pytest.mark.parametrize("made, end", [("П", "\ufffdb\n"), ("<|endoftext|>", "b\n")])
def test_half_a_character_before_a_new_prompt_is_no_character(folder, run, tmp_path, monkeypatch, made, end):
    token = byte_tokenizer().encode(made).ids[:1]
    monkeypatch.setattr(sample, "choose", lambda logits, *_: torch.tensor(token))
    run(folder, "--prompt", "a", "--max-new-tokens", 1, "--save-state", tmp_path / "kept")
    found = load_file(tmp_path / "kept")
    assert [*found["shown"], *found["waiting"]][-1] == token[0]         # which the state has not read
    assert run(folder, "--load-state", tmp_path / "kept", "--prompt", "b", "--max-new-tokens", 0).out == end

@pytest.mark.parametrize("prompt, made", [("é", "😀" * 50), ("😀", ""), ("é", "€")])
def test_a_state_file_keeps_what_waits_and_not_what_was_shown(folder, tmp_path, capsys, prompt, made):
    model = Mamba.from_pretrained(folder)
    texts = [Text(FALLBACK)]
    steps = (torch.tensor([token]) for token in made.encode())
    sample.write(steps, FALLBACK, [prompt], [256], texts, goes_on=True)
    assert capsys.readouterr().out == prompt + "\n"
    sample.save_state(tmp_path / "kept", model.blank_state(1), texts[0])
    _, shown, waiting = sample.load_state(tmp_path / "kept", model, 1)
    assert Text(FALLBACK, shown, waiting).show(ended=True) == made

def test_ctrl_c_keeps_the_state_of_what_was_written(folder, run, tmp_path):
    flags = f"--model {folder} --prompt abc --device cpu --temperature 0 --save-state {tmp_path / 'kept'}"
    command = [sys.executable, sample.__file__, "--max-new-tokens", "100000", *flags.split()]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        start = program.stdout.read(20)
        program.send_signal(2)
        start += program.stdout.read()
    start = start.removesuffix("\n")
    assert program.returncode == 130 and [*tmp_path.iterdir()] == [tmp_path / "kept"]
    greedy = ["--temperature", 0, "--max-new-tokens"]
    end = run(folder, "--load-state", tmp_path / "kept", *greedy, 9).out
    assert start + end == run(folder, "--prompt", "abc", *greedy, len(start) - len("abc") + 9).out

# What was published.

@pytest.mark.skipif(not SHARED.exists(), reason="the published vocabulary is not here")
def test_the_tokenizer_agrees_with_the_published_vectors():
    tokenizer = Tokenizer.from_file(str(SHARED / "tokenizer.json"))
    for vector in json.loads((SHARED / "vectors.json").read_text()):
        assert tokenizer.encode(vector["text"], add_special_tokens=False).ids == vector["ids"], vector["text"]

@pytest.mark.skipif("FALCON_MAMBA_7B" not in os.environ,
                    reason="set FALCON_MAMBA_7B to a folder with tiiuae/falcon-mamba-7b to run it")
def test_the_published_7b_writes_its_published_text(run):
    flags = ["--prompt", "Hello today", "--temperature", "0", "--max-new-tokens", "20"]
    out = run(os.environ["FALCON_MAMBA_7B"], *flags).out
    assert out.startswith("Hello today I am going to show you how to make "
                          "a simple and easy to make paper plane.\nStep")
