"""Tinyshakespeare by characters on the CPU, against the well-known small setting in a plain loop.

    python benchmarks/shakespeare.py --part a|b|c [--smoke] [--data FILE]

The setting: 4 layers, 128 wide, 4 heads, context 64, batch 12, no dropout, AdamW 1e-3 to 1e-4, 2,000 steps; it ends
near 1.9 nats a character of the whole validation split (its last tenth, in windows of 64).
  a  forja to 1.898 nats at the same depth, width, context and batch, against the setting's 2,000 steps: they alternate
     in rounds, and the ratio is of the seconds in training
  b  forja to 1.59 in 2,000 steps with at most 0.9M parameters
  c  forja to 1.4697 in at most 10 minutes with at most 2M parameters and a context of 256, which also judges it
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import Turns, begin, end, fastest, forja_environment, heard, say, take

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
PLAIN_STEPS, ROUNDS = 2000, 50
CONTEXT = 64
SMALL = {"context": 64, "layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "head_width": 32, "mlp_width": 512}
OURS = {
    "norm": "layer",
    "bias": "none",
    "tied": False,
    "positions": "rotary",
    "qk_norm": True,
    "activation": "relu2",
    "smear": True,
    "residual_init": "zero",
}
RATES = {"lr": 6e-3, "matrix_lr": 0.02, "lr_floor": 0.0, "warmup": 0, "decay": 1.0, "weight_decay": 0.0, "clip": 1.0}
WIDER = {"context": 256, "layers": 5, "width": 160, "heads": 5, "kv_heads": 5, "mlp_width": 640}
PARTS: dict[str, dict[str, Any]] = {
    "a": {
        "goal": 1.898,
        "shape": SMALL | OURS,
        "training": RATES | {"lr": 1.2e-2, "matrix_lr": 0.012, "steps": 200, "batch": 12},
    },
    "b": {"goal": 1.59, "shape": SMALL | OURS, "training": RATES | {"steps": 2000, "batch": 12}},
    "c": {"goal": 1.4697, "shape": SMALL | OURS | WIDER, "training": RATES | {"steps": 2400, "batch": 8}},
}


def shards(text: str, folder: Path) -> int:
    """train.npy and val.npy, the last tenth; the number of different characters."""
    import numpy as np

    characters = sorted(set(text))
    ids = np.array([characters.index(c) for c in text], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    np.save(folder / "train.npy", ids[:cut])
    np.save(folder / "val.npy", ids[cut:])
    return len(characters)


def judge(model: Any, folder: Path, context: int) -> float:
    """Nats a character of the whole validation split, in windows of `context`."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    ids = np.load(folder / "val.npy").astype(np.int64)
    n = (len(ids) - 1) // context
    rows = torch.from_numpy(np.stack([ids[i * context : (i + 1) * context + 1] for i in range(n)]))
    with torch.no_grad():
        parts = rows.split(max(1, 16384 // context))
        nats = sum(float(F.cross_entropy(model(r[:, :-1]).mT, r[:, 1:], reduction="sum")) for r in parts)
    return nats / (n * context)


def forja(part: str, folder: Path, vocab: int, steps: int | None) -> None:
    """Train by `fit`, as the stage pretrain does; it asks for the next batch where a step ends and the next begins."""
    import torch
    import yaml

    from components.data.batches import windows
    from components.model.gpt import GPT, GPTConfig, parameter_count
    from components.train.loop import Training, fit
    from components.train.pretrain import window_loss

    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((ROOT / "conf/demo.yaml").read_text(encoding="utf-8"))["pretrain"]
    recipe = {k: v for k, v in recipe.items() if k in Training.model_fields} | {"eval_every": 1 << 30, "seed": 1}
    recipe |= PARTS[part]["training"] | {"save_every": 1 << 30} | ({"steps": steps} if steps else {})
    torch.manual_seed(1)
    model = GPT(GPTConfig(**preset | PARTS[part]["shape"], vocab_size=vocab, head="lm"))
    cfg, context, turns = Training.model_validate(recipe), model.config.context, Turns()

    def batch_at(step: int) -> Any:
        if step:
            turns.end()
        if not turns.begin():
            raise SystemExit
        return windows(folder / "train.npy", context, cfg.seed, step, cfg.batch)

    def validate(model: GPT) -> dict[str, float]:
        turns.end()  # judging takes no part in the seconds
        return {"loss": judge(model, folder, context)}

    with tempfile.TemporaryDirectory() as scratch, Path(scratch, "spool.jsonl").open("w", buffering=1) as spool:

        def log(metrics: Any, step: int) -> None:
            spool.write(json.dumps({"step": step, **metrics}) + "\n")

        _, last = fit(model, cfg, batch_at, window_loss, lambda w: len(w) - 1, validate, Path(scratch), log)
    turns.tell({"nats": last["val_loss"], "parameters": parameter_count(model)})


def plain(folder: Path, vocab: int, steps: int) -> None:
    """The setting in torch alone: float32, fused attention, AdamW."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.manual_seed(1)
    model, rng = plain_model(vocab), np.random.default_rng(1)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    ids, turns = np.load(folder / "train.npy").astype(np.int64), Turns()
    for step in range(steps):
        if not turns.begin():
            return
        fall = 0.5 * (1 + math.cos(math.pi * (step - 100) / max(1, steps - 100)))
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + fall * 9e-4
        starts = rng.integers(len(ids) - CONTEXT, size=12)
        rows = torch.from_numpy(np.stack([ids[s : s + CONTEXT + 1] for s in starts]))
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        turns.end()
    turns.tell({"nats": judge(model, folder, CONTEXT)})


def plain_model(vocab: int) -> Any:
    """Pre-norm, learned positions, GELU, tied head, no biases."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    layers, width, heads = SMALL["layers"], SMALL["width"], SMALL["heads"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, T, _ = x.shape
            q, k, v = (
                y.view(B, T, heads, width // heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(width, 2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, width))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(CONTEXT, width)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(layers))), nn.LayerNorm(width, bias=False)
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    last = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
            return F.linear(self.norm(x), self.tokens.weight)

    return Model()


def compare(folder: Path, vocab: int, smoke: bool) -> dict[str, Any]:
    """Part a."""
    part = PARTS["a"]
    rounds = 2 if smoke else ROUNDS
    each = {
        "forja": 2 if smoke else part["training"]["steps"] // rounds,
        "plain": 2 if smoke else PLAIN_STEPS // rounds,
    }
    steps = {name: n * rounds for name, n in each.items()}
    children = {name: begin(__file__, child(name, "a", folder, vocab, n)) for name, n in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in children}
    for _ in range(rounds):
        for name, process in children.items():
            taken[name] += take(process, each[name])
        say("  ".join(f"{name} {sum(t):.1f} s" for name, t in taken.items()))
    ends = {name: heard(process) for name, process in children.items()}
    end(list(children.values()))
    return {
        "ratio": sum(taken["plain"]) / sum(taken["forja"]),
        "ratio_fastest_tenth": steps["plain"] * fastest(taken["plain"]) / (steps["forja"] * fastest(taken["forja"])),
        "nats": ends["forja"]["nats"],
        "goal": part["goal"],
        "plain_nats": ends["plain"]["nats"],
        "parameters": ends["forja"]["parameters"],
        "steps": steps["forja"],
        "plain_steps": steps["plain"],
        "seconds": sum(taken["forja"]),
        "plain_seconds": sum(taken["plain"]),
    }


def alone(name: str, folder: Path, vocab: int, smoke: bool) -> dict[str, Any]:
    """Parts b and c: how low, and in how many seconds."""
    part = PARTS[name]
    steps = 2 if smoke else part["training"]["steps"]
    process = begin(__file__, child("forja", name, folder, vocab, steps))
    started, taken = time.monotonic(), []
    for first in range(0, steps, 50):
        taken += take(process, min(50, steps - first))
        say(f"{len(taken)} steps, {sum(taken):.0f} s")
    ended = heard(process)
    end([process])
    return {
        "ratio": part["goal"] / ended["nats"],
        "goal": part["goal"],
        **ended,
        "steps": steps,
        "seconds": sum(taken),
        "seconds_with_judging": time.monotonic() - started,
    }


def child(name: str, part: str, folder: Path, vocab: int, steps: int) -> list[str]:
    return ["--contender", name, "--part", part, "--folder", str(folder), "--vocab", str(vocab), "--steps", str(steps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), default="a")
    parser.add_argument("--smoke", action="store_true", help="a few steps on made-up text: that it runs")
    parser.add_argument("--data", type=Path, default=DATA, help=f"the text (default {DATA})")
    parser.add_argument("--contender", choices=["forja", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender == "plain":
        plain(args.folder, args.vocab, args.steps)
    elif args.contender == "forja":
        forja_environment()
        forja(args.part, args.folder, args.vocab, args.steps)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        if not args.smoke and not args.data.is_file():
            raise SystemExit(f"{args.data}: not there; name the text of tinyshakespeare by --data")
        text = (
            "To be, or not to be: that is the question. " * 200 if args.smoke else args.data.read_text(encoding="utf-8")
        )
        with tempfile.TemporaryDirectory() as folder:
            vocab = shards(text, Path(folder))
            run = compare if args.part == "a" else lambda *rest: alone(args.part, *rest)
            said = run(Path(folder), vocab, args.smoke)
        print(json.dumps({"benchmark": "shakespeare", "part": args.part, **said, "smoke": args.smoke}))


if __name__ == "__main__":
    main()
