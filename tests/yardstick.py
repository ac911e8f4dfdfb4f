"""Is the default run any good? Its bits a byte beside n-grams, xz and gzip: python tests/yardstick.py out

All write the rows that `python train.py` holds out and evaluates. All know the text that the run trained on,
and no other. A compressor's figure is by how many bits that text grows when the rows are put after it.
"""
import argparse
import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import conftest     # it finds train.py
import numpy as np
from draw import read_metrics
from train import RECIPES, byte_tokenizer, read_source, standard_library

LAST = 4            # bytes that the n-gram model looks back: with 3 or 5 it takes more bits

def ngram_bits(seen: bytes, text: bytes) -> float:
    """By Witten and Bell's smoothing: the more kinds of bytes followed, the more counts a byte less."""
    grams = Counter(seen[i - n:i + 1] for n in range(LAST + 1) for i in range(n, len(seen)))
    total, kinds = Counter(), Counter()
    for gram, count in grams.items():
        total[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    bits = 0.0
    for i in range(LAST, len(text)):
        p = 1 / 256
        for n in range(LAST + 1):
            last = text[i - n:i]
            if total[last] > 0:
                p = (grams[text[i - n:i + 1]] + kinds[last] * p) / (total[last] + kinds[last])
        bits -= math.log2(p)
    return bits

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, help="the folder that `python train.py` made")
    out = parser.parse_args().out
    try:
        end = read_metrics(out / "metrics.jsonl")[-1]
        nats = end["held_out"]["text"]
    except (ValueError, KeyError) as e:
        parser.error(f"{out} holds no run that has come to its end: {e}")
    tokenizer = byte_tokenizer()
    source = read_source(standard_library(), tokenizer, tokenizer.token_to_id("<|endoftext|>"))
    l = RECIPES["tiny"].longest
    starts = range(0, len(source.held_out) - l, l)
    rows = [source.held_out[start + 1:start + l + 1] for start in starts[::math.ceil(len(starts) / 128)]]
    trained_on = [source.row(read, l, l, seed=0)[:-1] for read in range(0, end["tokens"], l)]
    text = tokenizer.decode(np.concatenate(rows).tolist()).encode()
    seen = tokenizer.decode(np.concatenate(trained_on).tolist()).encode()
    bits = {"the run": nats * l * len(rows) / math.log(2), f"{LAST + 1}-grams": ngram_bits(seen, text)}
    for name, pack in {"xz": lzma, "gzip": gzip}.items():
        bits[name] = 8 * (len(pack.compress(seen + text)) - len(pack.compress(seen)))
    for name, number in bits.items():
        print(f"{name:9}{number / len(text):.2f} bits a byte")
