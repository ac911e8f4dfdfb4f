"""What train.py publishes works for others as for us: transformers, llama.cpp, lm-eval."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from mamba import Mamba, MambaConfig
from sample import encode, generate, read_tokenizer, vocabulary
from train import byte_tokenizer, write_tokenizer

FALCON = SHARED / "falcon-tokenizer" / "tokenizer.json"
END = "<|endoftext|>"
PROMPTS = ["def f(", "import os, sys\n\nclass Foo:\n", "a", "return self._x[0] !!!!"]
PIECES = [END, "<|endoftext", ">>TITLE<<", "<|padding|>", " ", "  \n", "\r\n", "1234", "...",
          " , .", "don't", "e\u0301", "\u212b", "\ufb01", "\ufeff", "\ufffd", "\x00", "\u200d"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join) | st.text(st.characters(codec="utf-8"))
# Its UTF-8 holds every byte that UTF-8 can hold.
ALL_BYTES = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 37)]))

@pytest.fixture(scope="module", params=["bytes", "falcon"])
def published(request, tmp_path_factory):
    """A folder as train.py leaves it, its tokenizer, and its model, which soon ends a text."""
    if request.param == "falcon" and not FALCON.exists():
        pytest.skip(f"{FALCON} is not there")
    tokenizer = byte_tokenizer() if request.param == "bytes" else read_tokenizer(FALCON)
    end = tokenizer.token_to_id(END)
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = Mamba(MambaConfig(vocab_size=vocabulary(tokenizer), d_model=32, n_layer=2,
                              bos_token_id=end, eos_token_id=end, pad_token_id=end))
    usual = written(tokenizer, model, PROMPTS[0])[5]
    model.lm_head.weight.data[end] = 1.01 * model.lm_head.weight.data[usual]
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, end, None)
    return folder, tokenizer, model

def written(tokenizer, model, prompt):
    """The twelve tokens that we write after the prompt, or fewer if one is the end."""
    tokens = torch.tensor([encode(tokenizer, prompt)])
    return [int(token) for token in generate(model, tokens, 12, 0, stop=model.config.eos_token_id)]

def test_transformers_makes_our_tokens_of_any_text_and_writes_what_we_write(published):
    hf = pytest.importorskip("transformers", reason="pip install 'transformers>=5'")
    folder, tokenizer, model = published
    theirs = hf.AutoTokenizer.from_pretrained(folder)

    def check(text):
        tokens = encode(tokenizer, text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens) == tokenizer.decode(tokens, skip_special_tokens=False)
    check(ALL_BYTES)
    given(TEXTS)(check)()

    # A finished row of a batch, and a text without a prompt, hold the end, which no reader sees.
    end = model.config.eos_token_id
    network = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert len(theirs) == model.config.vocab_size and theirs.pad_token_id == end
    assert network.generate(max_new_tokens=1)[0, 0] == end
    assert theirs.decode([end], skip_special_tokens=True) == ""

    batch = theirs(PROMPTS, return_tensors="pt", padding=True)
    made = network.generate(**batch, max_new_tokens=12, do_sample=False)
    ours = [written(tokenizer, model, prompt) for prompt in PROMPTS]
    assert min(map(len, ours)) < 12 == max(map(len, ours))      # some end, and the batch goes on
    padded = [row + [end] * (12 - len(row)) for row in ours]
    assert made[:, batch["input_ids"].shape[1]:].tolist() == padded

    write = hf.pipeline("text-generation", str(folder))
    text = write(PROMPTS[0], max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text == PROMPTS[0] + tokenizer.decode(ours[0])

def test_a_continued_model_keeps_its_sources_files_and_learns_where_texts_end(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = byte_tokenizer()
    kept = {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": "{{ m }}",
            "tokenizer_config.json": '{"chat_template": "x"}', "special_tokens_map.json": "{}\r\n"}
    for name, text in kept.items():
        (source / name).write_bytes(text.encode())
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.7}')
    write_tokenizer(tmp_path, tokenizer, 256, source)
    assert {name: (tmp_path / name).read_bytes().decode() for name in kept} == kept
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found == {"eos_token_id": [256], "temperature": 0.7}

@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no llama.cpp sources")
@pytest.mark.parametrize("published", ["falcon"], indirect=True)    # bytes are not on its list
def test_llama_cpp_converts_it(published, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    folder, _, model = published
    converter = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    out = tmp_path / "out.gguf"
    subprocess.run([sys.executable, converter, folder, "--outfile", out], check=True)
    fields = gguf.GGUFReader(out).fields
    assert len(fields["tokenizer.ggml.tokens"].data) == model.config.vocab_size
    assert fields["tokenizer.ggml.eos_token_id"].contents() == model.config.eos_token_id

def test_lm_evaluation_harness_finds_our_bits_per_byte(published, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm-eval[hf]'")
    folder, tokenizer, model = published
    text = "".join(PROMPTS) * 7
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": text}))
    task = {"task": "bits", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte"}]}
    found = lm_eval.simple_evaluate("hf", f"pretrained={folder}", tasks=[task], device="cpu")
    # It puts the end of a former text before this one. Here we do so, too.
    tokens = torch.tensor([model.config.eos_token_id, *encode(tokenizer, text)])
    logits = model(tokens[None, :-1])[0][0]
    nats = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
    ours = nats.item() / math.log(2) / len(text.encode())
    assert found["results"]["bits"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-5)
