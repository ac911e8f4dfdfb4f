"""Train without a part of Falcon-Mamba, to see what it is for.

    python tests/without.py dt,B,C --out without-norms      no norm of dt, B and C
    python tests/without.py scaling --out without-scaling   the batch grows, the rate does not

All else are train.py's flags. `python tests/draw.py runs/*` draws such runs over one another.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mamba
import train

def selection_without(parts: list[str]):
    """mamba.py's Mixer.selection, without the norms of these parts."""
    def selection(self, x):
        r, n = self.widths
        dt, B, C = self.x_proj(x).split([r, n, n], dim=-1)
        found = {"dt": dt, "B": B, "C": C}
        for name, v in found.items():
            if name not in parts:
                found[name] = F.rms_norm(v, v.shape[-1:], eps=self.eps)
        return F.linear(found["dt"], self.dt_proj.weight), found["B"], found["C"]
    return selection

def rate_without_scaling(recipe: train.Recipe, tokens: int) -> float:
    """As if the batch had its last size from the start."""
    return learning_rate(replace(recipe, ramp_tokens=0), tokens)

learning_rate = train.learning_rate

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train without parts of Falcon-Mamba.")
    parser.add_argument("parts", help="of dt, B, C and scaling; several with a comma between them")
    args, flags = parser.parse_known_args()
    parts = args.parts.split(",")
    if not {"dt", "B", "C", "scaling"}.issuperset(parts):
        parser.error(f"{args.parts!r:.80} must be of dt, B, C and scaling, like dt,B,C")
    mamba.Mixer.selection = selection_without(parts)
    if "scaling" in parts:
        train.learning_rate = rate_without_scaling
    sys.argv[1:] = flags
    train.main()
