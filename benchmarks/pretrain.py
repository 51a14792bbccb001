"""Tokens a second of pretraining a 10M GPT-2 on the CPU, against transformers' model in a plain loop.

    python benchmarks/pretrain.py [--smoke] [--seconds 170]

All train the same shape on the same batches with AdamW and clipping at 1, and read the loss each step:
  forja      `fit`, as the stage pretrain calls it: DeepSpeed, loader, loss, gradient norm and log included, bf16
  plain      forja's model and loss in a bare loop without DeepSpeed, loader and log, bf16
  fp32       GPT2LMHeadModel in a plain loop
  autocast   the same under bf16 autocast
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import Turns, begin, end, fastest, forja_environment, say, take

ROOT = Path(__file__).parents[1]
VOCAB = 4096
SHAPE = {"context": 256, "layers": 6, "width": 384, "heads": 6, "kv_heads": 6, "head_width": 64, "mlp_width": 1536}
SMOKE = {"context": 16, "layers": 1, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 32}
CONTENDERS = ["forja", "plain", "fp32", "autocast", "products"]


def shape(smoke: bool) -> dict[str, int]:
    return SMOKE if smoke else SHAPE


def write_tokens(path: Path) -> None:
    """A million tokens whose frequencies fall as a language's do (Zipf 1949)."""
    import numpy as np

    p = 1 / np.arange(1, VOCAB + 1)
    np.save(path, np.random.default_rng(0).choice(VOCAB, size=1_000_000, p=p / p.sum()).astype(np.uint16))


def batches(shard: Path, smoke: bool):
    """Batch `step` as a list of windows; the same for all."""
    from components.data.batches import windows

    return lambda step: windows(shard, shape(smoke)["context"], 0, step, 4 if smoke else 16)


def forja_model(smoke: bool):
    import torch
    import yaml

    from components.model.gpt import GPT, GPTConfig

    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    return GPT(GPTConfig(**preset | shape(smoke), vocab_size=VOCAB, head="lm"))


def forja(shard: Path, smoke: bool) -> None:
    """`fit` asks for the next batch where a turn ends and the next one begins."""
    from components.train.loop import Training, fit
    from components.train.pretrain import window_loss

    turns, batch = Turns(), batches(shard, smoke)

    def batch_at(step: int):
        if step > 1:
            turns.end()
        if step > 0 and not turns.begin():  # the first step warms up, and is nobody's turn
            raise SystemExit
        return batch(step)

    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "spool.jsonl").open("w", buffering=1) as spool:
        cfg = Training.model_validate(training(4 if smoke else 16))

        def log(metrics, step):
            spool.write(json.dumps({"step": step, **metrics}) + "\n")

        fit(forja_model(smoke), cfg, batch_at, window_loss, lambda w: len(w) - 1, lambda m: {}, Path(scratch), log)


def training(batch: int) -> dict:
    """The optimiser and its schedule as the demo's recipe states them, but for AdamW at a steady rate."""
    import yaml

    from components.train.loop import Training

    recipe = yaml.safe_load((ROOT / "conf/demo.yaml").read_text(encoding="utf-8"))["pretrain"]
    recipe = {key: value for key, value in recipe.items() if key in Training.model_fields}
    steady = {"lr": 1e-3, "matrix_lr": None, "decay": 0.0, "clip": 1.0, "precision": "bf16", "seed": 0, "batch": batch}
    return recipe | steady | {"steps": 1 << 30, "eval_every": 1 << 30, "save_every": 1 << 30}


def loop(model, loss_of, batch, bf16: bool, **adamw) -> None:
    """The plain loop."""
    import numpy as np
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, **adamw)

    def step(n: int) -> None:
        ids = torch.from_numpy(np.stack(batch(n)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()

    step(0)
    turns, n = Turns(), 0
    while turns.begin():
        step(n := n + 1)
        turns.end()


def plain(shard: Path, smoke: bool) -> None:
    from components.model.fused import keep_freed_memory

    keep_freed_memory()
    model = forja_model(smoke)
    loop(model, lambda x: model(x[:, :-1], targets=x[:, 1:]).mean(), batches(shard, smoke), True, fused=True)


def transformers(shard: Path, smoke: bool, bf16: bool) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    s = shape(smoke)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=s["context"],
        n_embd=s["width"],
        n_layer=s["layers"],
        n_head=s["heads"],
        n_inner=s["mlp_width"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    # Their loss shifts the labels itself: a window of context + 1 tokens would not fit their positions.
    loop(model, lambda x: model(x[:, :-1], labels=x[:, :-1]).loss, batches(shard, smoke), bf16, fused=True)


def products(smoke: bool) -> None:
    """The peak: bf16 products of square matrices, 2,048 wide."""
    import torch

    n = 256 if smoke else 2048
    a, b = torch.randn(2, n, n, dtype=torch.bfloat16)
    a @ b
    turns = Turns()
    while turns.begin():
        a @ b
        turns.end()


def flops(s: dict[str, int], tokens: int) -> float:
    """Of the matrix products of one step, there and back (Chowdhery et al. 2022, appendix B)."""
    matrices = s["layers"] * s["width"] * (4 * s["width"] + 2 * s["mlp_width"]) + VOCAB * s["width"]
    return tokens * (6 * matrices + 12 * s["layers"] * s["width"] * s["context"])


def compare(smoke: bool, seconds: float) -> dict:
    import time

    s, batch, peak_width = shape(smoke), 4 if smoke else 16, 256 if smoke else 2048
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train.npy"
        write_tokens(shard)
        arguments = [str(shard), *(["--smoke"] if smoke else [])]
        children = {name: begin(__file__, ["--contender", name, *arguments]) for name in CONTENDERS}
        taken: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        until = time.monotonic() + seconds
        while time.monotonic() < until or not taken["products"]:
            for name, child in children.items():
                taken[name] += take(child, 1)
            say("  ".join(f"{name} {1e3 * fastest(t):.0f} ms" for name, t in taken.items()))
        end(list(children.values()))
    best = {name: fastest(t) for name, t in taken.items()}
    tokens = batch * s["context"]
    peak = 2 * peak_width**3 / best["products"]
    return {
        "benchmark": "pretrain",
        "ratio": best["fp32"] / best["forja"],
        "ratio_to_autocast": best["autocast"] / best["forja"],
        "tokens_per_s": {name: tokens / best[name] for name in CONTENDERS if name != "products"},
        "engine_share": 1 - best["plain"] / best["forja"],
        "peak_gflops": peak / 1e9,
        "share_of_peak": flops(s, tokens) / best["forja"] / peak,
        "rounds": len(taken["forja"]),
        "smoke": smoke,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and one round: that it runs")
    parser.add_argument("--seconds", type=float, default=170, help="of measuring (default 170)")
    args = parser.parse_args()
    if args.contender is None:
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        print(json.dumps(compare(args.smoke, 0 if args.smoke else args.seconds)))
    elif args.contender == "forja":
        forja_environment()
        forja(args.shard, args.smoke)
    elif args.contender == "plain":
        forja_environment()
        plain(args.shard, args.smoke)
    elif args.contender == "products":
        products(args.smoke)
    else:
        transformers(args.shard, args.smoke, args.contender == "autocast")


if __name__ == "__main__":
    main()
