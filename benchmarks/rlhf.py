"""Does learning from a reward do what it says? A task whose right answers are known: arithmetic, some of it by calling
the calculator, and answers of a wanted form.

    python benchmarks/rlhf.py [--smoke] [--seeds 1 2 3 4 5] [--work DIR] [--page FILE]

A model of the demo's shape, which has seen no other text, is fine-tuned on these tasks until a fifth of its answers is
right. Half of what it learns from does not answer at all, as the data of a lazy writer. Then, for each seed, PPO and
GRPO learn from the judge below, on the prompts that SFT saw. Counted is the true share of right answers to prompts
that none of them saw, sampled as the policy speaks, and greedy. `--work` keeps what is made; the same command goes on
from there.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from hh_rlhf import Chain
from rounds import say

from components.data import problems, tokenize
from components.data.chat import answer_text, encode_prompt
from components.data.sources import hashed
from components.data.templates import stop
from components.data.tokenize import rows as read_rows
from components.model.checkpoint import TOKENIZER, load, save
from components.model.generate import generate
from components.train import ppo, pretrain, sft
from components.train.reward import with_scalar_head
from components.train.verify import right_answer
from pipelines.charts import Series, line_chart
from pipelines.recipe import compose

ROOT = Path(__file__).parents[1]
WORDS = ["sun", "dog", "cat", "tea", "red", "sea", "ice", "map", "pen", "bus", "box", "cup", "hat", "key", "owl", "pie"]
WORDS += [
    "rain",
    "snow",
    "tree",
    "wind",
    "lamp",
    "milk",
    "road",
    "ship",
    "moon",
    "corn",
    "gold",
    "lake",
    "bird",
    "door",
]
ALGORITHMS = ("ppo", "grpo")
GAIN = 0.15  # what each has to gain on SFT, in every seed
SAMPLES = 4  # answers to each held-out prompt by which the share is counted
LAZY = "I do not know."  # what half of SFT's answers say
ENOUGH, ROUNDS = 0.2, 10  # the share of right answers at which SFT ends, or after so many rounds of sft.steps

COMMON = [
    *("sft.prompts=[en]", "pretrain.steps=0", "pretrain.samples=[]", "tokenize.vocab_size=512"),
    *("sft.keep=last", "sft.sample_rows=0", "sft.eval_every=1000", "ppo.sample_rows=8", "ppo.keep=best"),
    *("ppo.max_new_tokens=40", "ppo.value_first=2", "ppo.unfinished=0.0", "ppo.kl_target=null", "ppo.kl_budget=10.0"),
]
FULL = ["sft.steps=120", "ppo.steps=30", "ppo.batch=64", "ppo.val_rows=80", "ppo.lr=6e-4"]
TINY = ["pretrain.model.layers=1", "sft.steps=3", "ppo.steps=2", "ppo.batch=8", "ppo.val_rows=8", "ppo.eval_every=1"]
PPO: dict[str, Any] = {"algorithm": "ppo", "kl_estimator": "k1", "kl_coef": 0.01}
GRPO: dict[str, Any] = {"algorithm": "grpo", "kl_estimator": "k3", "kl_coef": 0.01, "group": 8}
Row = dict[str, Any]


def right(prompt: str, answer: str, truth: str) -> float:
    """The judge: of a calculation the right number or a call for it, of a form exactly what was asked for."""
    if prompt.startswith(FORMS):
        return float(answer == truth)
    return right_answer(prompt, answer, truth)


FORMS = ("Say", "Count", "Spell", "Put", "List")


def forms(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Questions for an answer of one form, each once, with that answer."""
    rng = random.Random(f"forms/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        a, b, c = rng.sample(WORDS, 3)
        n, m = rng.randint(2, 5), rng.randint(1, 30)
        question, answer = rng.choice(
            [
                (f"Say {a} and {b} {n} times.", " ".join([f"{a} {b}"] * n) + "."),
                (f"Count from {m} to {m + n}.", ", ".join(map(str, range(m, m + n + 1))) + "."),
                (f"Spell {a} {b}.", " ".join("-".join(word) for word in (a, b)) + "."),
                (f"Put {a} and {b} in brackets.", f"({a}) ({b})."),
                (f"List {a}, {b}, {c} backwards.", f"{c}, {b}, {a}."),
            ]
        )
        if question not in seen:
            seen.add(question)
            yield question, answer


def write_tables(folder: Path, count: int, seed: int) -> None:
    """Half calculations and half forms, a tenth of each to choose the step by and a fifth to count on."""
    talks: list[tuple[list[Row], str]] = []
    for problem in problems.generate(count // 2, seed, ("en",)):
        talks.append((problems.dialogue(problem), problem.result))
    for question, answer in forms(count // 2, seed):
        talks.append(([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], answer))
    tables: dict[str, list[Row]] = {"corpus": [], "instructions": [], "prompts": [], "preferences": []}
    for i, (messages, truth) in enumerate(talks):
        split = (*["train"] * 7, "val", "test", "test")[hashed(messages[0]["content"]) % 10]
        row = {"id": str(i), "lang": "en", "split": split}
        said = "\n".join(json.dumps(m.get("tool_calls")) if m.get("tool_calls") else m["content"] for m in messages)
        tables["corpus"].append(row | {"text": said})
        lazy = [messages[0], {"role": "assistant", "content": LAZY}]
        tables["instructions"] += [row | {"messages": messages}, row | {"id": f"{i}/lazy", "messages": lazy}]
        tables["prompts"].append(row | {"messages": messages[:1], "truth": truth})
    folder.mkdir(parents=True)
    for name, table in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")


def rates(folder: Path, heldout: list[Row], samples: int = SAMPLES) -> dict[str, float]:
    """The share of right answers to held-out prompts: sampled from the model as it is, and greedy."""
    model, tokenizer, templates = load(folder)
    asked = [encode_prompt(tokenizer, row["messages"], templates["en"]) for row in heldout]
    found = {}
    for name, temperature, times in (("sampled", 1.0, samples), ("greedy", 0.0, 1)):
        end = stop(tokenizer, templates)
        said = generate(model, asked * times, max_new_tokens=40, stop=end, temperature=temperature, seed=977)
        good = [
            right(row["messages"][-1]["content"], answer_text(tokenizer, ids), row["truth"])
            for row, ids in zip(heldout * times, said, strict=True)
        ]
        found[name] = sum(good) / len(good)
    return found


def fine_tuned(chain: Chain, rounds: int, table: Path, heldout: list[Row]) -> Path:
    """SFT in short rounds, each from where the last one ended, until a share of ENOUGH is right."""
    tokens = chain.run(tokenize, "tokenize", "tokenize", validate=table)
    tuned = chain.run(pretrain, "pretrain", "pretrain", tokenize=tokens)
    for i in range(1, rounds + 1):
        chain.params["sft"] |= {"seed": i}
        tuned = chain.run(sft, "sft", f"sft-{i}", validate=table, tokenize=tokens, pretrain=tuned)
        if rates(tuned, heldout, 1)["sampled"] >= ENOUGH:
            break
    return tuned


def learnt(work: Path, seeds: list[int], sets: list[str], count: int, rounds: int) -> list[Row]:
    """SFT, and from it PPO and GRPO for each seed."""
    params = compose(ROOT, Path("conf/demo.yaml"), [*COMMON, *sets])
    chain = Chain(work, params)
    table = chain.work / "validate"
    if not table.is_dir():
        write_tables(table, count, 1)
    prompts = list(read_rows(table / "prompts.jsonl"))
    tuned = fine_tuned(chain, rounds, table, [row for row in prompts if row["split"] == "val"])
    start = chain.work / "reward"  # PPO's value model begins with a head that says 0
    if not start.is_dir():
        model, _, templates = load(tuned)
        save(with_scalar_head(model), start, tuned / TOKENIZER, templates)
    heldout = [row for row in prompts if row["split"] == "test"]
    before = rates(tuned, heldout)
    say(f"SFT {before}")
    found: list[Row] = []
    for seed in seeds:
        row: Row = {"seed": seed, "prompts": len(heldout), "sft": before}
        for name, own in zip(ALGORITHMS, (PPO, GRPO), strict=True):
            changes = own | {"batch": params["ppo"]["batch"] // own.get("group", 1), "seed": seed}
            cfg = ppo.Config.model_validate(params["ppo"] | changes | {"judge": "rlhf.py:right"})
            started = time.perf_counter()
            made = trained(chain, f"{name}-{seed}", cfg, validate=table, sft=tuned, reward=start)
            row[name] = counted(made, heldout)
            say(f"seed {seed}: {name} {rates_of(row[name])} in {time.perf_counter() - started:.0f} s")
        found.append(row)
    return found


def counted(made: Path, heldout: list[Row]) -> Row:
    """What came of one run."""
    told = map(json.loads, (made / "curves.jsonl").read_text().splitlines())
    rows = list({row["step"]: row for row in told}.values())  # a killed run tells some steps again
    best = json.loads((made / "metrics.json").read_bytes())["best_step"]
    kl = max(row["kl"] for row in rows if row["step"] <= best + 1)
    found = rates(made, heldout) | {"kl": kl, "steps": len(rows), "best_step": best}
    return found | {"curve": [(row["step"], row["reward"]) for row in rows]}


def rates_of(found: Row) -> Row:
    return {key: round(found[key], 4) for key in ("sampled", "greedy", "kl")}


def trained(chain: Chain, name: str, cfg: ppo.Config, **folders: Path) -> Path:
    """A run of the stage, with its curves beside its model."""
    done = chain.work / name
    if not done.is_dir():
        building, scratch = chain.work / f"{name}.building", chain.work / f"{name}.scratch"
        for folder in (building, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        log = building / "curves.jsonl"

        def told(row: Row, step: int) -> None:
            with log.open("a") as f:
                f.write(json.dumps({**row, "step": step}) + "\n")

        metrics = ppo.run(cfg, **folders, out=building, scratch=scratch, log=told, judge=Path(__file__))
        (building / "metrics.json").write_text(json.dumps(metrics))
        building.rename(done)
    return done


def page(found: list[Row]) -> str:
    """The reward of every rollout, one figure a seed."""
    charts = [
        line_chart(
            f"seed {row['seed']}: share of right answers in a rollout; SFT had {row['sft']['sampled']:.2f}",
            [Series(name, row[name]["curve"]) for name in ALGORITHMS],
        )
        for row in found
    ]
    css = (ROOT / "pipelines/templates/report.css").read_text(encoding="utf-8")
    body = "".join(map(str, charts))
    return f"<!doctype html><meta charset=utf-8><title>benchmarks/rlhf.py</title><style>{css}</style>{body}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape and few steps: that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--page", type=Path, help="where the curves go, as HTML")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        size = (TINY, 400, 1) if args.smoke else (FULL, 1600, ROUNDS)
        found = learnt(work, args.seeds, *size)
    if args.page:
        args.page.write_text(page(found), encoding="utf-8")
    gains = {name: [row[name]["sampled"] - row["sft"]["sampled"] for row in found] for name in ALGORITHMS}
    for row in found:
        for name in ALGORITHMS:
            del row[name]["curve"]
    least = min(min(values) for values in gains.values())
    told = {"benchmark": "rlhf", "smoke": args.smoke, "ratio": round(least / GAIN, 3), "least_gain": round(least, 4)}
    told |= {"held": [name for name in ALGORITHMS if min(gains[name]) >= GAIN], "seeds": found}
    print(json.dumps(told | {"seconds": round(time.perf_counter() - started)}))


if __name__ == "__main__":
    main()
