"""Pretraining and decoding on one GPU, as shares of what the card can do.

  python benchmarks/gpu.py [--only 124m 1.3b decode zero3 offload] [--steps 30]
  python benchmarks/gpu.py --device cpu --tiny     that the script runs; its numbers say nothing

124m, 1.3b  model FLOPs utilisation of `fit` at sequence 2,048, with optimiser, loader, loss and log, against the
            card's bf16 peak (--peak, 989 TFLOP/s of an H100 or H200)
decode      batch-1 decoding of 1.3B in bf16: bytes of weights read a second, against the measured copy bandwidth
zero3, offload   124M by ZeRO-3, and with its optimiser in the CPU's memory: that they run, and their losses
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import fastest, forja_environment, say

ROOT = Path(__file__).parents[1]
VOCAB, TINY_VOCAB = 50304, 512  # GPT-2's 50,257 rounded up to a multiple of 128
TINY = {"context": 64, "layers": 2, "width": 64, "heads": 2, "kv_heads": 2, "head_width": 32, "mlp_width": 256}
TRAINED = {
    "124m": {"preset": "gpt2-124m", "rows": 16, "micro": 16, "env": {}},
    "1.3b": {"preset": "gpt3-1.3b", "rows": 8, "micro": 4, "env": {}},
    "zero3": {"preset": "gpt2-124m", "rows": 16, "micro": 16, "env": {"FORJA_ZERO": "3"}},
    "offload": {
        "preset": "gpt2-124m",
        "rows": 16,
        "micro": 16,
        "env": {"FORJA_ZERO": "2", "FORJA_OFFLOAD_OPTIMIZER": "cpu"},
    },
}


def model_of(preset: str, tiny: bool, context: int) -> Any:
    import torch

    from components.model.gpt import GPT, GPTConfig
    from pipelines.recipe import named

    shape = dict(named(ROOT, "models", preset, "model"))
    shape |= TINY if tiny else {"context": context}
    torch.manual_seed(0)
    return GPT(GPTConfig(**shape, vocab_size=TINY_VOCAB if tiny else VOCAB, head="lm"))


def flops(model: Any, tokens: int) -> float:
    """Of one step, there and back: 6 a parameter in a matrix product, and attention (Chowdhery et al. 2022, app. B)."""
    c = model.config
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and not n.startswith(("wte", "wpe")))
    matrices += c.vocab_size * c.width if c.tied else 0
    return tokens * (6 * matrices + 12 * c.layers * c.heads * c.head_width * c.context)


def train(name: str, tiny: bool, steps: int) -> dict[str, Any]:
    """`fit` as the stage pretrain calls it; a step begins where the next batch is asked for."""
    import numpy as np
    import torch
    import yaml

    from components.data.batches import windows
    from components.train.loop import Training, fit
    from components.train.pretrain import window_loss

    what = TRAINED[name]
    rows = 2 if tiny else what["rows"]
    model = model_of(what["preset"], tiny, 2048)
    context, work = model.config.context, flops(model, rows * model.config.context)
    recipe = yaml.safe_load((ROOT / "conf/demo.yaml").read_text(encoding="utf-8"))["pretrain"]
    recipe = {k: v for k, v in recipe.items() if k in Training.model_fields} | {"steps": steps, "batch": rows}
    recipe |= {"lr": 3e-4, "matrix_lr": None, "eval_every": steps, "save_every": steps, "seed": 0}
    began: list[float] = []
    losses: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was asked of the card is done
        return time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train.npy"
        vocab = model.config.vocab_size
        np.save(shard, np.random.default_rng(0).zipf(1.3, 4_000_000).clip(max=vocab - 1).astype(np.uint16))

        def batch_at(step: int) -> Any:
            began.append(now())
            return windows(shard, context, 0, step, rows)

        def validate(model: Any) -> dict[str, float]:
            began.append(now())
            return {}

        cfg = Training.model_validate(recipe)
        log = lambda metrics, step: losses.append(metrics["loss"])  # noqa: E731
        fit(model, cfg, batch_at, window_loss, lambda w: len(w) - 1, validate, Path(folder) / "scratch", log)
    seconds = fastest([b - a for a, b in itertools.pairwise(began[2:])] or [began[-1] - began[0]])
    return {
        "step_s": seconds,
        "tokens_per_s": rows * context / seconds,
        "tflops": work / seconds / 1e12,
        "losses": [losses[0], losses[-1]],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }


def decode(tiny: bool, steps: int) -> dict[str, Any]:
    """Seconds a token at batch 1, from two lengths so that reading the prompt cancels, and the bandwidth of a copy."""
    import torch

    from components.model.checkpoint import default_device
    from components.model.generate import generate

    device = default_device()
    model = model_of("gpt3-1.3b", tiny, 2048).to(device, torch.bfloat16).eval()
    short, long = 1, 33 + steps  # far apart: on busy cores close ones may come in either order

    def seconds(new: int) -> float:
        started = time.perf_counter()
        generate(model, [[1, 2, 3, 4]], max_new_tokens=new, stop=model.config.vocab_size)  # which no token is
        return time.perf_counter() - started

    seconds(long)
    each = (min(seconds(long) for _ in range(3)) - min(seconds(short) for _ in range(3))) / (long - short)
    read = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n != "wpe.weight")
    if not model.config.tied:
        read -= model.wte.weight.numel() * model.wte.weight.element_size()  # of which one row is read
    return {"token_s": each, "read_gb_per_s": read / each / 1e9, "copy_gb_per_s": copied(device, tiny) / 1e9}


def copied(device: Any, tiny: bool) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    import torch

    a = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=device)
    b, best = torch.empty_like(a), float("inf")
    for _ in range(10):
        started = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * a.numel() / best


def measured(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part, in a process and on a card of its own."""
    command = [sys.executable, __file__, "--part", name, "--steps", str(args.steps), "--device", args.device]
    command += ["--tiny"] if args.tiny else []
    environment = os.environ | {"FORJA_DEVICE": args.device}
    if name in TRAINED:
        environment |= TRAINED[name]["env"] | {"FORJA_MICRO_BATCH": "2" if args.tiny else str(TRAINED[name]["micro"])}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if said.returncode:
        say(f"{name}: ended with {said.returncode}")
        return {"failed": said.returncode}
    result: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    say(f"{name}: {result}")
    return result


def main() -> None:
    parts = [*TRAINED, "decode"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=int, default=30, help="of each training, and tokens decoded (default 30)")
    parser.add_argument("--peak", type=float, default=989.0, help="the card's bf16 peak in TFLOP/s (default 989)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: that it runs, nothing else")
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    args = parser.parse_args()
    forja_environment()
    if args.part:
        said = decode(args.tiny, args.steps) if args.part == "decode" else train(args.part, args.tiny, args.steps)
        print("\n" + json.dumps(said))
        return
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use; run this on one, or try the script by --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("--device cpu measures nothing and would take days; add --tiny to try the script")
    results = {name: measured(name, args) for name in args.only}
    for name in ("124m", "1.3b"):
        if "tflops" in results.get(name, {}) and not args.tiny:
            results[name]["mfu"] = results[name]["tflops"] / args.peak
    if "token_s" in results.get("decode", {}):
        results["decode"]["ratio"] = results["decode"]["read_gb_per_s"] / results["decode"]["copy_gb_per_s"]
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    ratio = next((r["mfu"] for r in results.values() if "mfu" in r), None)
    print(json.dumps({"benchmark": "gpu", "ratio": ratio, "device": card, "tiny": args.tiny, **results}))
    if any("failed" in result for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
