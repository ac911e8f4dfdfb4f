"""What train.py publishes works for others as it does for us: transformers, llama.cpp, lm-evaluation-harness."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import sample

from mamba import Mamba, MambaConfig
from train import byte_tokenizer, write_tokenizer

END = "<|endoftext|>"

FALCON = Path(__file__).resolve().parents[2] / "shared" / "falcon-tokenizer" / "tokenizer.json"
PROMPTS = ["def f(", "import os, sys\n\nclass Foo:\n", "a", "return self._x[0] !!!!"]
PIECES = [END, "<|endoftext", ">>TITLE<<", "<|padding|>", " ", "  \n", "\r\n", "1234", "...", " , .", "don't",
          "e\u0301", "\u212b", "\ufb01", "\ufeff", "\ufffd", "\x00", "\U0001f680\u200d"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join) | st.text(st.characters(codec="utf-8"))
# Its UTF-8 holds every byte that UTF-8 can hold.
ALL_BYTES = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 37)]))

@pytest.fixture(scope="module", params=["bytes", "falcon"])
def published(request, tmp_path_factory):
    """A folder as `python train.py` leaves it, its tokenizer and its model, which soon ends a text."""
    if request.param == "falcon" and not FALCON.exists():
        pytest.skip(f"{FALCON} is not there")
    tokenizer = byte_tokenizer() if request.param == "bytes" else sample.read_tokenizer(FALCON)
    end, folder = tokenizer.token_to_id(END), tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = Mamba(MambaConfig(vocab_size=sample.vocabulary(tokenizer), d_model=32, n_layer=2,
                              bos_token_id=end, eos_token_id=end, pad_token_id=end))
    usual = written((folder, tokenizer, model), PROMPTS[0])[5]
    model.lm_head.weight.data[end] = 1.01 * model.lm_head.weight.data[usual]
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, end, None)
    return folder, tokenizer, model

def written(published, prompt):
    """The twelve tokens that we write after the prompt, or fewer if one is the end."""
    _, tokenizer, model = published
    tokens = torch.tensor([sample.encode(tokenizer, prompt)])
    return [int(token) for token in sample.generate(model, tokens, 12, 0, stop=model.config.eos_token_id)]

@pytest.fixture(scope="module")
def theirs(published):
    """The tokenizer and the model that transformers reads there."""
    hf = pytest.importorskip("transformers", reason="pip install 'transformers>=5'")
    return [kind.from_pretrained(published[0]) for kind in (hf.AutoTokenizer, hf.AutoModelForCausalLM)]

def test_transformers_makes_our_tokens_of_any_text(published, theirs):
    def check(text):
        tokens = published[1].encode(text, add_special_tokens=False).ids
        assert theirs[0](text)["input_ids"] == tokens
        assert theirs[0].decode(tokens) == published[1].decode(tokens, skip_special_tokens=False)
    check(ALL_BYTES)
    given(TEXTS)(check)()

def test_padding_and_an_empty_prompt_are_the_end_that_no_reader_sees(published, theirs):
    tokenizer, model = theirs
    assert len(tokenizer) == published[2].config.vocab_size
    end = published[2].config.eos_token_id
    assert [tokenizer.pad_token_id, model.generate(max_new_tokens=1)[0, 0]] == [end, end]
    assert tokenizer.decode([end], skip_special_tokens=True) == ""

def test_a_padded_batch_writes_what_we_write_after_each_prompt_and_ends_where_we_end(published, theirs):
    tokenizer, model = theirs
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    texts = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1]:]
    ours = [written(published, prompt) for prompt in PROMPTS]
    assert min(map(len, ours)) < 12 == max(map(len, ours))      # some end, and the batch goes on
    for text, row in zip(texts.tolist(), ours):
        assert text == row + [tokenizer.pad_token_id] * (12 - len(row))

def test_a_pipeline_writes_what_we_write(published, theirs):
    from transformers import pipeline
    made = pipeline("text-generation", str(published[0]))(PROMPTS[0], max_new_tokens=12, do_sample=False)
    assert made[0]["generated_text"] == PROMPTS[0] + published[1].decode(written(published, PROMPTS[0]))

def test_a_continued_model_keeps_its_sources_files_and_learns_where_texts_end(tmp_path):
    source, folder, tokenizer = tmp_path / "source", tmp_path / "folder", byte_tokenizer()
    source.mkdir()
    folder.mkdir()
    kept = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": '{"chat_template": "x"}',
            "special_tokens_map.json": "{}\r\n", "chat_template.jinja": "{{ messages }}"}
    for name, text in kept.items():
        (source / name).write_bytes(text.encode())
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7}')
    write_tokenizer(folder, tokenizer, 256, source)
    assert {name: (folder / name).read_bytes().decode() for name in kept} == kept
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"eos_token_id": [256], "temperature": 0.7}

def test_llama_cpp_converts_it(published, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP does not name a folder with llama.cpp's sources")
    if published[2].config.vocab_size == 257:
        pytest.skip("the converter has a list of tokenizers: Falcon's is on it, one of bytes is not")
    converter, out = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py", tmp_path / "out.gguf"
    subprocess.run([sys.executable, converter, published[0], "--outfile", out], check=True)
    fields = gguf.GGUFReader(out).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == published[2].config.vocab_size
    assert fields["tokenizer.ggml.eos_token_id"].contents() == published[2].config.eos_token_id

def test_lm_evaluation_harness_finds_our_bits_per_byte(published, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]'")
    _, tokenizer, model = published
    text, file = "".join(PROMPTS) * 7, tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": text}))
    task = {"task": "bits", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "text", "metric_list": [{"metric": "bits_per_byte"}]}
    found = lm_eval.simple_evaluate("hf", f"pretrained={published[0]}", tasks=[task], device="cpu")
    # It puts the end of a former text before this one. Here we do so, too.
    tokens = torch.tensor([model.config.eos_token_id, *sample.encode(tokenizer, text)])
    nats = torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0][0], tokens[1:], reduction="sum")
    ours = nats.item() / math.log(2) / len(text.encode())
    assert found["results"]["bits"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)
