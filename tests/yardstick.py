"""How good is the default run? Its bits a byte beside gzip, xz and an n-gram model: python tests/yardstick.py out

All are measured on one text that `python train.py` holds out of Python's standard library. All have seen what
the run has trained on, and nothing else: a compressor's figure is by how much that text grows by this one.
"""
import argparse
import lzma
import math
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from draw import read_metrics
from mamba import Mamba
from train import RECIPES, byte_tokenizer, read_source, standard_library

ROWS = 1024         # of held-out text, a quarter of a megabyte


def model_nats(model: Mamba, rows: np.ndarray) -> float:
    """-log p of each row (l + 1 tokens) but its first token, read from a blank state, as train.py does."""
    nats = 0.0
    for part in torch.from_numpy(rows.astype(np.int64)).split(64):
        with torch.no_grad():
            logits, _ = model(part[:, :-1])
        nats += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return nats


def ngram_bits(seen: bytes, text: bytes, order: int) -> float:
    """Bits to write the text, each byte's chance from its last `order` bytes, smoothed by Witten and Bell.

    What followed these bytes before is mixed with what followed one byte less. The more different bytes have
    followed, the more the shorter context weighs.
    """
    after = Counter()       # context and next byte -> how often
    total = Counter()       # context -> how often
    kinds = Counter()       # context -> how many different bytes have followed
    for n in range(order + 1):
        for i in range(n, len(seen)):
            after[seen[i - n:i + 1]] += 1
    for gram, count in after.items():
        total[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    bits = 0.0
    for i in range(order, len(text)):
        p = 1 / 256
        for n in range(order + 1):
            context = text[i - n:i]
            if total[context]:
                p = (after[text[i - n:i + 1]] + kinds[context] * p) / (total[context] + kinds[context])
        bits -= math.log2(p)
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the default run with compressors.")
    parser.add_argument("out", type=Path, help="the folder that `python train.py` made")
    folder = parser.parse_args().out
    try:
        trained_on = read_metrics(folder / "metrics.jsonl")[-1]["tokens"]
        model = Mamba.from_pretrained(folder)
    except ValueError as e:
        parser.error(str(e))
    tokenizer = byte_tokenizer()
    source = read_source("text", standard_library(), tokenizer, tokenizer.token_to_id("<|endoftext|>"))
    recipe = RECIPES["tiny"]
    l = recipe.longest
    seen = [source.row(read, l, l, recipe.seed)[:-1] for read in range(0, trained_on, l)]
    rows = np.stack([source.held_out[i * l:(i + 1) * l + 1] for i in range(ROWS)])
    before = tokenizer.decode(np.concatenate(seen).tolist()).encode()
    text = tokenizer.decode(rows[:, 1:].flatten().tolist()).encode()
    bits = {"the run in " + str(folder): model_nats(model, rows) / math.log(2)}
    for order in range(1, 7):
        bits[f"{order + 1}-grams of bytes"] = ngram_bits(before, text, order)
    bits["xz -9e"] = 8 * (len(lzma.compress(before + text, preset=9 | lzma.PRESET_EXTREME))
                          - len(lzma.compress(before, preset=9 | lzma.PRESET_EXTREME)))
    bits["gzip -9"] = 8 * (len(zlib.compress(before + text, 9)) - len(zlib.compress(before, 9)))
    print(f"bits a byte, on {len(text):,} bytes held out, after {len(before):,} bytes to learn from")
    for name, number in bits.items():
        print(f"  {name:20} {number / len(text):.3f}")


if __name__ == "__main__":
    main()
