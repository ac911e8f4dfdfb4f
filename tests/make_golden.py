"""A tiny Falcon-Mamba and its logits, both by transformers, into tests/golden: python tests/make_golden.py

test_mamba.py compares ours to them where transformers is not installed. No weight is left at a value, 0 or 1,
that would hide a missing one, and dt, B and C are far from 1, so that each of their norms matters.
"""
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"

if __name__ == "__main__":
    torch.manual_seed(0)
    model = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, state_size=6, num_hidden_layers=2,
        time_step_rank=4, conv_kernel=4, mixer_rms_eps=1e-3, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("A_log", "dt_proj.bias")):
                p += 0.3 * torch.randn_like(p)
            elif p.dim() == 1:
                p.copy_(1 + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
        tokens = torch.randint(64, (2, 40))
        logits = model(tokens).logits
    model.save_pretrained(GOLDEN)
    (GOLDEN / "generation_config.json").unlink()
    save_file({"tokens": tokens, "logits": logits}, GOLDEN / "logits.safetensors")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: logits +- {logits.std():.2f}")
