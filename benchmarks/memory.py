"""The peak memory of training, measured, against what components/model/memory.py says beforehand.

    python benchmarks/memory.py [--smoke] [--only NAME ...]

Each case trains three steps in a process of its own, by `fit` as the stage pretrain calls it; its peak is the highest
resident set that Linux saw of it. The ratio is that of the estimate that is farthest off.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import forja_environment, say

ROOT = Path(__file__).parents[1]


def gpt(layers: int, width: int, heads: int, mlp_width: int, **more: Any) -> dict[str, Any]:
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads, "head_width": width // heads}
    return sizes | {"mlp_width": mlp_width} | more


MODERN = {"norm": "rms", "positions": "rotary", "activation": "swiglu", "bias": "none", "tied": False, "qk_norm": True}
SMALL, LARGE = gpt(6, 384, 6, 1536), gpt(12, 768, 12, 3072)
BF16 = {"precision": "bf16"}
# name: (shape, vocabulary, context, batch, micro-batch, what else of the optimiser)
SEEN = {  # while the estimate was made
    "124M shape, one window": (LARGE, 4096, 64, 1, 1, {}),
    "124M shape, bf16": (LARGE, 4096, 256, 4, 4, BF16),
    "10M shape, fp32": (SMALL, 4096, 256, 16, 16, {}),
    "10M shape, bf16": (SMALL, 4096, 256, 32, 32, BF16),
    "accumulated": (LARGE, 4096, 256, 8, 4, {}),
    "Muon": (LARGE, 4096, 128, 2, 2, {"matrix_lr": 0.02}),
    "SwiGLU": (LARGE | MODERN, 4096, 256, 4, 4, {}),
}
UNSEEN = {
    "wide": (gpt(3, 1024, 16, 4096), 4096, 128, 8, 8, {}),
    "deep": (gpt(24, 256, 4, 1024), 8192, 256, 8, 8, BF16),
    "grouped queries": (gpt(8, 512, 8, 1408, **MODERN) | {"kv_heads": 2}, 32000, 512, 4, 4, BF16),
    "Llama's shape": (gpt(12, 768, 12, 2048, **MODERN) | {"qk_norm": False}, 32000, 256, 4, 4, {}),
    "recomputed": (gpt(12, 512, 8, 2048), 8192, 512, 8, 8, BF16),
    "Muon, bf16": (gpt(6, 640, 10, 2560), 16000, 256, 8, 8, BF16 | {"matrix_lr": 0.02}),
    "accumulated, averaged": (gpt(8, 512, 8, 2048), 32000, 256, 16, 4, {"ema": 0.99}),
}
SMOKE = {"tiny": (gpt(2, 128, 4, 512), 512, 64, 8, 8, {})}
CASES = SEEN | UNSEEN | SMOKE


def recipe(more: dict[str, Any]) -> dict[str, Any]:
    import yaml

    from components.train.loop import Training

    demo = yaml.safe_load((ROOT / "conf/demo.yaml").read_text(encoding="utf-8"))["pretrain"]
    steady = {"matrix_lr": None, "precision": "fp32", "seed": 0, "steps": 3, "eval_every": 9, "save_every": 9}
    return {k: v for k, v in demo.items() if k in Training.model_fields} | steady | more


def config(name: str) -> Any:
    import yaml

    from components.model.gpt import GPTConfig

    shape, vocab, context, *_ = CASES[name]
    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text(encoding="utf-8"))
    return GPTConfig(**preset | shape | {"context": context}, vocab_size=vocab, head="lm")


def train(name: str) -> None:
    """Train the case and print its peak in bytes."""
    import numpy as np

    from components.model.gpt import GPT
    from components.train.loop import Training, fit
    from components.train.pretrain import window_loss

    _, vocab, context, batch, _, more = CASES[name]
    cfg = Training.model_validate(recipe(more) | {"batch": batch})
    batch_at = lambda step: list(np.random.default_rng(step).integers(0, vocab, (batch, context + 1)))  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        model = GPT(config(name))
        fit(model, cfg, batch_at, window_loss, lambda w: len(w) - 1, lambda m: {}, Path(scratch), lambda m, s: None)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]))  # getrusage's has the parent's in it


def measure(name: str) -> dict[str, float]:
    from components.model.checkpoint import hollow
    from components.model.gpt import parameter_count
    from components.model.memory import PROCESS, estimate
    from components.model.optim import Optim

    *_, context, batch, micro, more = CASES[name]
    again = name == "recomputed"
    place = {"FORJA_MICRO_BATCH": str(micro), "FORJA_DEVICE": "cpu", "FORJA_RECOMPUTE": str(int(again))}
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stdout.split()[-1])
    optim = Optim.model_validate({k: v for k, v in recipe(more).items() if k in Optim.model_fields})
    said = estimate(config(name), optim, micro, context, accumulation=batch // micro, recompute=again)
    parameters = parameter_count(hollow(config(name)))
    found = {"measured_mb": peak / 1e6, "estimated_mb": said / 1e6, "ratio": said / peak}
    return found | {"parameters": parameters, "bytes_per_parameter": (peak - PROCESS) / parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=[*SEEN, *UNSEEN], help="these cases alone")
    parser.add_argument("--smoke", action="store_true", help="a tiny case: that it runs")
    args = parser.parse_args()
    forja_environment()
    if args.case:
        train(args.case)
        return
    cases = {}
    for name in SMOKE if args.smoke else args.only:
        cases[name] = found = measure(name) | {"seen": float(name in SEEN)}
        say(f"{name}: {found['measured_mb']:,.0f} MB, estimated {found['estimated_mb']:,.0f}, {found['ratio']:.3f}")
    worst = max((c["ratio"] for c in cases.values()), key=lambda r: max(r, 1 / r))
    per_parameter = next(iter(cases.values()))["bytes_per_parameter"]  # of the first, where activations are the least
    line = {"benchmark": "memory", "ratio": worst, "bytes_per_parameter": per_parameter}
    print(json.dumps(line | {"cases": cases, "smoke": args.smoke}))


if __name__ == "__main__":
    main()
