"""The sampler: what it draws, what it shows, and what it keeps."""
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from conftest import SHARED, call, python
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models

import sample
from mamba import Mamba, MambaConfig
from sample import Text, choose, end_tokens, generate
from train import byte_tokenizer

PUBLISHED = SHARED / "falcon-tokenizer"
GREEDY = ["--temperature", 0, "--max-new-tokens"]

def small_model(path):
    """A model whose every token counts, and which writes ASCII. Token 256 ends a text."""
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

@pytest.fixture(scope="module")
def model(folder):
    return Mamba.from_pretrained(folder)

@pytest.fixture
def run(folder):
    def run(*flags):
        ended = call(sample, "--model", folder, "--device", "cpu", *flags)
        assert ended.status == 0, ended.err
        return ended
    return run

def last_state(steps):
    """What is left when all steps have been taken."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value

# What is drawn.

@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                         reason="only a CUDA GPU replays graphs"))])
def test_greedy_generation_is_the_argmax_of_rereading_everything(folder, device):
    model = Mamba.from_pretrained(folder, device)
    text = torch.tensor([[1, 2, 3], [9, 8, 7]], device=device)
    for token in generate(model, text, 20, temperature=0):
        token = token.to(device)
        assert torch.equal(token, model(text)[0][:, -1].argmax(-1))
        text = torch.cat([text, token[:, None]], 1)

def test_a_long_prompt_is_read_in_pieces_without_a_trace(model, monkeypatch):
    states = []
    for size in 512, 7:
        monkeypatch.setattr(sample, "PIECE", size)
        states.append(last_state(generate(model, torch.arange(100)[None], 0)))
    for whole, pieces in zip(*states):
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)

def test_the_state_in_the_end_can_be_read_on_from_and_differentiated(model):
    state = last_state(generate(model, torch.tensor([[1, 2, 3]]), 3, temperature=0))
    ends = [[*generate(model, torch.tensor([[4]]), 9, 0, state=state)] for _ in range(2)]
    assert ends[0] == ends[1]           # because a state that is handed in is left as it was
    model(torch.tensor([[4]]), state)[0].sum().backward()
    assert model.backbone.embeddings.weight.grad[4].abs().sum() > 0

def test_a_stopped_row_goes_on_yielding_its_stop_and_all_stopped_ends(model):
    def made(count, **options):
        steps = generate(model, torch.tensor([[1, 2], [3, 4]]), count, temperature=0, **options)
        return torch.stack([*steps], 1).tolist()
    free = made(12)
    stop = [free[0][2], free[1][4]]
    stopped = made(12, stop=stop)
    for row, whole in zip(stopped, free):
        first = min(whole.index(token) for token in stop if token in whole)
        assert row == whole[:first] + [whole[first]] * (len(row) - first)
    assert len(stopped[0]) == 5
    assert made(4, stop=stop[0])[0] == free[0][:3] + [stop[0]]

@pytest.mark.parametrize("top_k, top_p, drawn", [
    (None, None, {0, 1, 2, 3}), (10**9, 1.0, {0, 1, 2, 3}), (2, None, {1, 3}), (None, 0.75, {1, 3}),
    (None, 0.9, {0, 1, 3}), (None, 1e-9, {1}), (3, 0.8, {1, 3})])   # .5 and .3: 84 % of the three
def test_only_the_likeliest_are_drawn_and_nothing_overflows(top_k, top_p, drawn):
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    g = torch.Generator().manual_seed(0)
    found = choose(probs.log().expand(2000, 4), 1.0, top_k, top_p, g)
    assert {*found.tolist()} == drawn
    if len(drawn) == 4:
        assert (found.bincount() / 2000 - probs).abs().max() < 0.05
    huge = torch.tensor([[1e30, 3e38, -3e38, 2e38]])
    for temperature in 0, 1e-320, 1e-46, 1e-30, 1:
        assert choose(huge, temperature, top_k, top_p, g).item() == 1

def test_the_same_seed_writes_the_same_text_and_only_text(run):
    flags = ["--prompt", "def ", "--max-new-tokens", 30]
    new = run(*flags)
    assert new.out.startswith("def ") and new.out != run(*flags).out
    fixed = run(*flags, "--seed", 0)        # another may end the text at once
    for word in "scan: ", "loaded in", "prefill ", "decode ", "tokens/s", "memory", "GB of weights":
        assert word in fixed.err and word not in fixed.out
    seed = new.err.split("seed ")[1].split()[0]     # it is printed, so any text can be had again
    assert run(*flags, "--seed", seed).out == new.out

@pytest.mark.parametrize("flags", [["--top-k", 1], ["--top-p", 1e-9], ["--temperature", 1e-9]])
def test_flags_that_leave_only_the_likeliest_write_the_greedy_text(run, flags):
    greedy = run("--prompt", "def ", *GREEDY, 12).out
    assert run("--prompt", "def ", "--max-new-tokens", 12, *flags).out == greedy

def test_unequal_prompts_write_what_each_writes_alone(run):
    alone = run("--prompt", "a", *GREEDY, 12).out + run("--prompt", "hello there", *GREEDY, 12).out
    assert run("--prompt", "a", "--prompt", "hello there", *GREEDY, 12).out == alone

def test_compiled_steps_write_the_same_text_from_one_graph_for_all_layers(run, graphs):
    flags = ["--prompt", "a", "--prompt", "bcd", *GREEDY, 6]
    plain = run(*flags).out
    compiled = run(*flags, "--compile")
    assert compiled.out == plain and len(graphs) == 1
    assert "compiling for up to a minute" in compiled.err

# What is shown.

BYTES = {f"<0x{i:02X}>": i for i in range(256)}
WORDS = ["▁", "a", "▁a", "##a", ".", "n't", "€", "\ufffd", "▁▁"]
VOCABULARY = BYTES | {word: 256 + i for i, word in enumerate(WORDS)}

def tokenizer_of(model, decoder):
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return tokenizer

# As Llama's and Phi-3's: what has no token is written in tokens of bytes.
FALLBACK = tokenizer_of(
    models.BPE(vocab=VOCABULARY, merges=[("▁", "a")], byte_fallback=True),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                       decoders.Strip(" ", 1, 0)]))
UNIGRAM = models.Unigram([(word, -1.0) for word in VOCABULARY], 0)
KINDS = {
    "byte level": byte_tokenizer(), "byte fallback": FALLBACK,
    "unigram": tokenizer_of(UNIGRAM, decoders.Metaspace()),
    "word piece": tokenizer_of(models.WordPiece(VOCABULARY, unk_token="a"), decoders.WordPiece()),
}
TOKENS = st.integers(0, 255) | st.sampled_from([*"aé€😀".encode()]) | st.integers(256, 264)

@pytest.mark.parametrize("kind", KINDS)
@given(prompt=st.lists(TOKENS, min_size=1), tokens=st.lists(TOKENS, max_size=80))
def test_the_pieces_joined_are_what_decoding_the_whole_gives(kind, prompt, tokens):
    text = Text(KINDS[kind], [], prompt.copy(), [])
    shown = text.show()
    for token in tokens:
        text.unprinted.append(token)
        shown += text.show()
    text.ended = True
    shown += text.show()
    assert shown == KINDS[kind].decode(prompt + tokens, skip_special_tokens=False)

END = 999       # no tokenizer here has it
LETTERS = byte_tokenizer().encode("aé€").ids

@pytest.mark.parametrize("kind, tokens, goes_on, shown", [
    ("byte level", [*LETTERS, END], False, ["a", "", "é", "", "", "€", "", ""]),
    ("byte fallback", [VOCABULARY["▁a"]], False, [" a", ""]),       # the space is kept
    ("byte fallback", [0xe2, 0x82, 0xe2], False, ["", "", "", "\ufffd" * 3]),
    ("byte fallback", [0xe2, 0x82, 0xe2], True, ["", "", "", ""]),
    ("byte fallback", [0xe2, 0x82, END], True, ["", "", "\ufffd" * 2, ""])])
def test_a_character_is_shown_once_it_is_whole(capsys, kind, tokens, goes_on, shown):
    def steps():
        for token in tokens:
            pieces.append(capsys.readouterr().out)
            yield torch.tensor([token, END])        # the second text has ended before the first
        pieces.append(capsys.readouterr().out)
        return "state"
    pieces = []
    prompt = KINDS[kind].encode("a").ids
    texts = [Text(KINDS[kind], [], [*prompt], []) for _ in range(2)]
    times, state = sample.write(steps(), texts, [END], goes_on)
    assert pieces == ["a", *shown[:-1]] and state == "state"
    assert capsys.readouterr().out == shown[-1] + "\na\n"
    assert times == sorted(times) and len(times) == len(tokens) + 1

@pytest.mark.parametrize("config, generation, endoftext, expected", [
    (256, None, True, [256]), (0, None, True, [256]), (0, None, False, [0]),
    (None, None, False, []), ([5, 7], None, False, [5, 7]), ([5, 0], None, True, [256, 5]),
    (11, [11, 10], False, [11, 10]), (0, 9, True, [256, 9]), (7, None, True, [256, 7])])
def test_a_text_ends_at_all_that_the_files_name(tmp_path, config, generation, endoftext, expected):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation:
        text = json.dumps({"eos_token_id": generation})
        (tmp_path / "generation_config.json").write_text(text)
    assert end_tokens(tmp_path, byte_tokenizer() if endoftext else FALLBACK) == expected

def test_a_turn_of_a_chat_ends_at_any_of_its_end_tokens(tmp_path, run):
    flags = ["--prompt", "def f(", "--model", small_model(tmp_path), *GREEDY, 20]
    free = run(*flags).out.removeprefix("def f(")
    ends = [255, *byte_tokenizer().encode(free[7]).ids]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert run(*flags).out == "def f(" + free[:free.index(free[7])] + "\n"

# What is kept.

@pytest.mark.parametrize("cut", range(5))
@pytest.mark.parametrize("letters", [None, "Привет, мир"])
def test_a_kept_state_goes_on_as_if_its_text_had_just_been_read(run, tmp_path, monkeypatch,
                                                                letters, cut):
    def letter(*_):     # a Russian one has two tokens
        written.append(byte_tokenizer().encode(letters).ids[len(written)])
        return torch.tensor(written[-1:])
    if letters:
        monkeypatch.setattr(sample, "choose", letter)
    written = []
    whole = run("--prompt", "Где", *GREEDY, 12).out
    written = []
    start = run("--prompt", "Где", *GREEDY, cut, "--save-state", tmp_path / "kept").out
    end = run("--load-state", tmp_path / "kept", *GREEDY, 12 - cut).out
    assert start.removesuffix("\n") + end == whole

def test_one_kept_state_goes_on_in_several_samples(run, tmp_path):
    run("--prompt", "abc", *GREEDY, 0, "--save-state", tmp_path / "kept")
    flags = ["--load-state", tmp_path / "kept", "--num-samples", 2]
    end = run(*flags, "--prompt", "d", *GREEDY, 9).out
    assert end == 2 * run("--prompt", "abcd", *GREEDY, 9).out.removeprefix("abc")

@pytest.mark.parametrize("made, end", [("П", "\ufffdb\n"), ("<|endoftext|>", "b\n")])
def test_half_a_character_before_a_prompt_is_none(run, tmp_path, monkeypatch, made, end):
    token = byte_tokenizer().encode(made).ids[:1]
    monkeypatch.setattr(sample, "choose", lambda *_: torch.tensor(token))
    run("--prompt", "a", *GREEDY, 1, "--save-state", tmp_path / "kept")
    assert load_file(tmp_path / "kept")["unread"].tolist() == token
    assert run("--load-state", tmp_path / "kept", "--prompt", "b", *GREEDY, 0).out == end

def test_ctrl_c_keeps_the_state_of_what_was_written(folder, run, tmp_path):
    flags = [*GREEDY, 100000, "--prompt", "abc", "--save-state", tmp_path / "kept"]
    command = [sys.executable, sample.__file__, "--model", folder, "--device", "cpu", *flags]
    with subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as program:
        start = program.stdout.read(20)
        program.send_signal(2)
        start += program.stdout.read().removesuffix("\n")
    assert program.returncode == 130 and [*tmp_path.iterdir()] == [tmp_path / "kept"]
    end = run("--load-state", tmp_path / "kept", *GREEDY, 9).out
    assert start + end == run("--prompt", "abc", *GREEDY, len(start) - len("abc") + 9).out

def test_the_steps_of_a_prompt_are_drawn_and_nothing_is_written(run, tmp_path):
    assert run("--prompt", "def f(é)", "--show-steps", tmp_path / "steps.svg").out == ""
    picture = (tmp_path / "steps.svg").read_text()
    assert picture.startswith("<svg") and "layer 1" in picture and ">f<" in picture

KEPT = """
import os, sample, torch
def pages():
    return int(open("/proc/self/statm").read().split()[1])
sample.keep_memory()
before = pages()
block = torch.ones(20_000_000, dtype=torch.uint8)
del block
print((pages() - before) * os.sysconf("SC_PAGE_SIZE"))
"""

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_memory_that_was_freed_stays_for_the_next_block():
    assert int(python(KEPT).stdout) > 15_000_000
    assert int(python(KEPT.replace("sample.keep_memory()", "")).stdout) < 5_000_000

# What was published.

@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published vocabulary is not here")
def test_the_tokenizer_agrees_with_the_published_vectors():
    tokenizer = Tokenizer.from_file(str(PUBLISHED / "tokenizer.json"))
    for vector in json.loads((PUBLISHED / "vectors.json").read_text()):
        assert sample.encode(tokenizer, vector["text"]) == vector["ids"], vector["text"]

@pytest.mark.skipif("FALCON_MAMBA_7B" not in os.environ,
                    reason="FALCON_MAMBA_7B names no folder with tiiuae/falcon-mamba-7b")
def test_the_published_7b_writes_its_published_text(run):
    flags = ["--model", os.environ["FALCON_MAMBA_7B"], "--prompt", "Hello today", *GREEDY, 20]
    assert run(*flags).out.startswith("Hello today I am going to show you how to make a simple "
                                      "and easy to make paper plane.\nStep")
