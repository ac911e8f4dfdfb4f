"""Selective copying, a toy that shows what a step computed from the token is for.

    python tests/copying.py             two models of one layer, in about a minute

Letters stand scattered among noise, and at the end the model must say them in order (Mamba,
arXiv 2312.00752, sec. 4.1.1, but far shorter):

    . . c . . . a . . h . b . . . . ? ? ? ?     ->  c a h b

How far apart they stand tells nothing. A model that can make the noise's step 0 stops the clock
there, and so counts letters only. The other model's steps are fixed: learned, but the same for
each token. All else is alike, so its B, C, x and z still depend on the token.
"""
import argparse
import json

import conftest     # it finds mamba.py
import torch
import torch.nn.functional as F

import draw
from mamba import Mamba, MambaConfig

NOISE, LETTERS, ASK = 0, 8, 9       # tokens: the noise, eight letters from 1 to 8, a question
COUNT = 4                           # letters in a sequence

def sequences(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, length + COUNT) tokens to read, (rows, COUNT) letters to say at their end."""
    letters = torch.randint(1, LETTERS + 1, (rows, COUNT))
    places = torch.rand(rows, length).argsort(dim=1)[:, :COUNT].sort(dim=1).values
    tokens = torch.full((rows, length + COUNT), NOISE)
    tokens.scatter_(1, places, letters)
    tokens[:, length:] = ASK
    return tokens, letters

def fresh_model(learned: bool) -> Mamba:
    sizes = {"vocab_size": LETTERS + 2, "d_model": 32, "n_layer": 1, "initializer_range": 0.02}
    model = Mamba(MambaConfig(**sizes))
    if not learned:
        for layer in model.backbone.layers:     # delta = softplus(weight @ dt + bias)
            layer.mixer.dt_proj.weight.requires_grad_(False).zero_()
    return model

def train(model: Mamba, steps: int, length: int) -> list[tuple[int, float]]:
    """Trains it. Returns what part of the letters it said correctly, from time to time."""
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    curve = []
    for step in range(1, steps + 1):
        adam.param_groups[0]["lr"] = 8e-3 * min(step / 20, (steps - step) / steps / 0.3, 1)
        tokens, letters = sequences(64, length)
        logits = model(tokens)[0][:, length:]                               # (rows, COUNT, vocab)
        F.cross_entropy(logits.flatten(0, 1), letters.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        if step % 25 == 0 or step == steps:
            curve.append((step, round(accuracy(model, length), 4)))
    return curve

@torch.no_grad()
def accuracy(model: Mamba, length: int) -> float:
    tokens, letters = sequences(256, length)
    said = model(tokens)[0][:, length:].argmax(-1)
    return (said == letters).float().mean().item()

def telling_steps(model: Mamba, length: int) -> dict:
    """A sequence, and its steps in the channel where letters last longest beside noise."""
    tokens = sequences(1, length)[0][0]
    found = {}

    def see(mixer, x, delta, B):
        is_letter = (tokens != NOISE) & (tokens != ASK)
        logs = delta.log()                                                  # (l, d)
        longer = logs[is_letter].mean(0) - logs[tokens == NOISE].mean(0)    # (d,)
        found["delta"] = draw.rounded(delta[:, longer.argmax()])
    draw.read_along(model, tokens.tolist(), see)
    return found | {"text": "".join("·abcdefgh?"[token] for token in tokens)}

def main() -> None:
    parser = argparse.ArgumentParser(description="Train on selective copying, twice.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=32, help="tokens before the questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="show these models in the README")
    args = parser.parse_args()
    found = {}
    for name in "learned", "fixed":
        torch.manual_seed(args.seed)
        model = fresh_model(learned=name == "learned")
        found[name] = train(model, args.steps, args.length)
        parts = [f"{accuracy(model, times * args.length):.1%} in {times * args.length}"
                 for times in (1, 2, 4)]
        print(f"steps {name}: of the letters {', '.join(parts)} tokens", flush=True)
        if name == "learned":
            found |= telling_steps(model, args.length)
    if args.keep:
        (draw.ASSETS / "copying.json").write_text(json.dumps(found) + "\n")
        (draw.ASSETS / "copying.svg").write_text(draw.copying(), encoding="utf-8")

if __name__ == "__main__":
    main()
