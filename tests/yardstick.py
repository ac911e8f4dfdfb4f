"""Is the default run any good? Its bits a byte, beside n-grams, xz and gzip.

    python tests/yardstick.py out

All write the rows that `python train.py` holds out and evaluates. All know the text that the run
trained on, and no other. A compressor's figure is by how many bits its file grows when the rows are
put after that text.
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
    """By Witten and Bell's smoothing: a count weighs less, the more kinds of bytes followed."""
    grams = Counter()
    for n in range(1, LAST + 2):
        grams.update(seen[i:i + n] for i in range(len(seen) - n + 1))
    total = Counter()           # of each context: the bytes that followed
    kinds = Counter()           # and the different ones among them
    for gram, count in grams.items():
        total[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    bits = 0.0
    for i in range(LAST, len(text)):
        p = 1 / 256
        for n in range(LAST + 1):
            last = text[i - n:i]
            if total[last] > 0:
                count = grams[text[i - n:i + 1]]
                p = (count + kinds[last] * p) / (total[last] + kinds[last])
        bits -= math.log2(p)
    return bits

def main() -> None:
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
    starts = starts[::math.ceil(len(starts) / 128)]                 # as train.py evaluates
    rows = [source.held_out[start + 1:start + l + 1] for start in starts]
    trained_on = [source.row(read, l, l, seed=0)[:-1] for read in range(0, end["tokens"], l)]
    text = tokenizer.decode(np.concatenate(rows).tolist()).encode()
    seen = tokenizer.decode(np.concatenate(trained_on).tolist()).encode()
    bits = {"the run": nats * l * len(rows) / math.log(2)}
    bits[f"{LAST + 1}-grams"] = ngram_bits(seen, text)
    for name, pack in {"xz": lzma, "gzip": gzip}.items():
        bits[name] = 8 * (len(pack.compress(seen + text)) - len(pack.compress(seen)))
    for name, number in bits.items():
        print(f"{name:9}{number / len(text):.2f} bits a byte")

if __name__ == "__main__":
    main()
