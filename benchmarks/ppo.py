"""Seconds a PPO batch on the CPU, against TRL's PPOTrainer and against transformers' `generate` with a plain loop.

    python benchmarks/ppo.py [--smoke] [--seconds 200] [--trl PYTHON]

A batch is 32 prompts of 32 tokens, answers of 64, four epochs of one step each for policy and value model; policy,
value, reference and reward model have 6 layers, 384 wide, and a vocabulary of 4,096. All begin with random weights,
and no answer ends early. Each contender takes a whole batch a turn, in fp32 and with its products in bf16:
  forja    a step of the stage ppo as `forja run` takes it: DeepSpeed, alarms' measurements and gradient norms included
  plain    somebody careful with GPT2LMHeadModel (ppo_peers.py)
  trl      PPOTrainer; PYTHON is an interpreter whose environment has trl, up to 1.12: 1.13 has no PPO any more
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.ppo_peers import CLIP, END, EPOCHS, GAMMA, KL, LAM, PAD, SHAPE, SMOKE, VOCAB, prompts
from benchmarks.rounds import Turns, begin, end, fastest, forja_environment, say, take

ROOT = Path(__file__).parents[1]
PHASES = ("rollout", "scoring", "update")


def forja(s: dict[str, int], bf16: bool, spool: Path) -> None:
    """The stage's own step; its phases go to `spool`, a line a turn."""
    import torch
    import yaml

    from components.model.engine import Engine
    from components.model.gpt import GPT, GPTConfig
    from components.train import ppo
    from components.train.loop import Skips
    from components.train.questions import by_model

    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text(encoding="utf-8"))
    shape = {k: s[k] for k in ("context", "layers", "width", "heads")} | {"kv_heads": s["heads"]}
    shape |= {"head_width": s["width"] // s["heads"], "mlp_width": 4 * s["width"], "vocab_size": VOCAB}
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(**preset | shape, head="lm")) for _ in range(2))
    value, reward = (GPT(GPTConfig(**preset | shape, head="scalar")) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value.load_state_dict(reward.state_dict())

    steps = 1 << 16
    recipe = yaml.safe_load((ROOT / "conf/demo.yaml").read_text(encoding="utf-8"))["ppo"]
    recipe |= {"seed": 0, "steps": steps, "batch": s["batch"], "minibatches": 1, "epochs": EPOCHS, "value_first": 0}
    recipe |= {"max_new_tokens": s["answer"], "lr": 3e-6, "value_lr": 3e-6, "gamma": GAMMA, "lam": LAM, "kl_coef": KL}
    recipe |= {"clip_ratio": CLIP, "clip_value": CLIP, "precision": "bf16" if bf16 else "fp32"}
    cfg = ppo.Config.model_validate(recipe)
    asked = [{"ids": row} for step in range(16) for row in prompts(s, step).tolist()]
    engines = Engine(policy, cfg, s["batch"]), Engine(value, cfg, s["batch"])
    # Nothing ends an answer, so that all are as long as the others' are.
    learner = ppo.Learner(*engines, reference, by_model(reward, PAD), asked, (PAD, -END), Skips())

    ppo.learn(cfg, learner, [], 0)
    turns, step = Turns(), 0
    with spool.open("w", buffering=1) as out:
        while turns.begin():
            row = ppo.learn(cfg, learner, [], step := step + 1)
            turns.end()
            out.write(json.dumps([row[f"perf/{phase}_s"] for phase in PHASES]) + "\n")


def contenders(trl: str | None) -> dict[str, tuple[str, list[str], str]]:
    """{name: script, arguments, interpreter}."""
    peers = {"plain": sys.executable} | ({"trl": trl} if trl else {})
    found = {}
    for kind in ("fp32", "bf16"):
        more = ["--bf16"] if kind == "bf16" else []
        found[f"forja {kind}"] = (__file__, ["--contender", *more], sys.executable)
        for peer, python in peers.items():
            found[f"{peer} {kind}"] = (str(ROOT / "benchmarks/ppo_peers.py"), [peer, *more], python)
    return found


def compare(smoke: bool, seconds: float, trl: str | None) -> dict[str, Any]:
    asked = contenders(trl)
    with tempfile.TemporaryDirectory() as folder:
        children, spools = {}, {}
        for name, (script, arguments, python) in asked.items():
            more = ["--smoke"] if smoke else []
            if "--contender" in arguments:
                spools[name] = Path(folder, name)
                more += ["--spool", str(spools[name])]
            children[name] = begin(script, [*arguments, *more], python)
        taken: dict[str, list[float]] = {name: [] for name in asked}
        until = time.monotonic() + seconds
        while time.monotonic() < until or not taken["forja bf16"]:
            for name, child in children.items():
                taken[name] += take(child, 1)
            say("  ".join(f"{name} {min(t):.2f} s" for name, t in taken.items()))
        end(list(children.values()))
        best = {name: fastest(t) for name, t in taken.items()}
        shares = {name: share(path, taken[name]) for name, path in spools.items()}
    peers = ["plain", *(["trl"] if trl else [])]
    to = {f"{mine}_to_{theirs}": mine_to(best, mine, theirs, peers) for mine, theirs in PAIRS}
    return {
        "benchmark": "ppo",
        "ratio": min(to["bf16_to_fp32"].values()),
        "ratios": to,
        "seconds": {name: round(s, 3) for name, s in best.items()},
        "shares": shares,
        "rounds": len(taken["forja bf16"]),
        "smoke": smoke,
    }


PAIRS = (("bf16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"))


def mine_to(best: dict[str, float], mine: str, theirs: str, peers: list[str]) -> dict[str, float]:
    """How many times as fast forja is, of the one precision, as each peer of the other."""
    return {peer: best[f"{peer} {theirs}"] / best[f"forja {mine}"] for peer in peers}


def share(spool: Path, seconds: list[float]) -> dict[str, float]:
    """The part that each phase took of the fastest turn."""
    rows = [json.loads(line) for line in spool.read_text().splitlines()]
    at = min(range(len(seconds)), key=seconds.__getitem__)
    return {phase: round(s / seconds[at], 3) for phase, s in zip(PHASES, rows[at], strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bf16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--spool", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and one round: that it runs")
    parser.add_argument("--seconds", type=float, default=200, help="of measuring (default 200)")
    parser.add_argument("--trl", metavar="PYTHON", help="an interpreter whose environment has trl; without it, no TRL")
    args = parser.parse_args()
    if args.contender:
        forja_environment()
        forja(SMOKE if args.smoke else SHAPE, args.bf16, args.spool)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        print(json.dumps(compare(args.smoke, 0 if args.smoke else args.seconds, args.trl)))


if __name__ == "__main__":
    main()
