"""Four-choice questions scored on the CPU, against lm-eval's own `hf` model on the exported checkpoint.

    python benchmarks/evaluate.py [--smoke] [--shape 1m|10m] [--seconds 20] [--only many one one-alone] [--data FOLDER]

Timed is `loglikelihood`, from texts to numbers, of the same requests, in turns in one process; each contender is
compared at its fastest tenth:
  many       ARC-Easy: choices of several tokens, no examples
  one        MMLU with its five examples before each question; the choices are letters
  one-alone  MMLU without examples, where no two questions share anything
`hf` runs at batches of 1, its default, 8 and 32, and the best of them counts.
"""

import argparse
import csv
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.generate import rounds
from benchmarks.rounds import fastest, forja_environment, say

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
SHAPES = {
    "1m": {"context": 2048, "layers": 4, "width": 128, "heads": 4, "vocab": 2048},
    "10m": {"context": 2048, "layers": 6, "width": 384, "heads": 6, "vocab": 4096},
    "tiny": {"context": 512, "layers": 1, "width": 32, "heads": 2, "vocab": 400},
}
BATCHES = (1, 8, 32)
CASES = ("many", "one", "one-alone")
SUBJECTS = ("astronomy", "college_medicine")
Pairs = list[tuple[str, str]]


def many(data: Path, items: int) -> Pairs:
    with (data / "eval" / "world_knowledge_arc_easy.jsonl").open(encoding="utf-8") as f:
        rows = [json.loads(line) for _, line in zip(range(items), f, strict=False)]
    return [(f"{row['query']}\nAnswer:", f" {choice}") for row in rows for choice in row["choices"]]


def one(data: Path, items: int, examples: int) -> Pairs:
    """As lm-eval's mmlu words it: the subject, the first examples of its dev split, the question."""

    def rows(split: str, subject: str, most: int) -> list[dict[str, str]]:
        with (data / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as f:
            return list(csv.DictReader(f))[:most]

    def asked(row: dict[str, str]) -> str:
        choices = "".join(f"{letter}. {row[f'choice{i}']}\n" for i, letter in enumerate("ABCD"))
        return f"{row['question'].strip()}\n{choices}Answer:"

    pairs = []
    for subject in SUBJECTS:
        said = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in rows("dev", subject, examples):
            said += f"{asked(row)} {'ABCD'[int(row['answer'])]}\n\n"
        for row in rows("test", subject, items // len(SUBJECTS)):
            pairs += [(said + asked(row), f" {letter}") for letter in "ABCD"]
    return pairs


def written(items: int) -> dict[str, Pairs]:
    """Questions of our own, for a moment's trial where no data lie."""
    questions = [f"Question: what comes behind the number {i} and before {i + 2}?\nAnswer:" for i in range(items)]
    found = [(q, f" the number {i + j}") for i, q in enumerate(questions) for j in range(4)]
    letters = [(q, f" {letter}") for q in questions for letter in "ABCD"]
    return {"many": found, "one": [("".join(questions[:5]) + q, c) for q, c in letters], "one-alone": letters}


def models(name: str, texts: list[str], work: Path) -> tuple[Any, dict[int, Any]]:
    """A model of random weights and a tokenizer learnt from the texts, as forja and as `hf` have it."""
    import torch
    import yaml
    from lm_eval.models.huggingface import HFLM

    from components.data.tokenize import train_bpe
    from components.model.checkpoint import load, save
    from components.model.gpt import GPT, GPTConfig
    from components.model.interop import export_model
    from components.release.harness import Adapter

    s = SHAPES[name]
    tokenizer = train_bpe(texts, s["vocab"], 1)
    tokenizer.save(str(work / "tokenizer.json"))
    shape = {k: s[k] for k in ("context", "layers", "width", "heads")} | {"kv_heads": s["heads"]}
    shape |= {"head_width": s["width"] // s["heads"], "mlp_width": 4 * s["width"]}
    preset = yaml.safe_load((Path(__file__).parents[1] / "conf" / "models" / "gpt.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**preset | shape, vocab_size=tokenizer.get_vocab_size(), head="lm"))
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)  # so that the choices differ by more than rounding
    save(model, work / "ours", work / "tokenizer.json")
    export_model(work / "ours", work / "hf")
    theirs = {n: HFLM(pretrained=str(work / "hf"), device="cpu", batch_size=n, dtype="float32") for n in BATCHES}
    return Adapter(load(work / "ours", "cpu"), work / "ours"), theirs


def compare(ours: Any, theirs: dict[int, Any], pairs: Pairs, seconds: float) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    contenders = {"forja": lambda: ours.loglikelihood(requests)}
    for n, lm in theirs.items():
        contenders[f"hf-{n}"] = lambda lm=lm: lm.loglikelihood(requests, disable_tqdm=True)
    found, want = contenders["forja"](), contenders["hf-8"]()
    taken = rounds(contenders, seconds)
    best = {name: fastest(times) for name, times in taken.items()}
    peer = min(v for name, v in best.items() if name != "forja")
    return {
        "ratio": peer / best["forja"],
        "ratio_to_default": best["hf-1"] / best["forja"],
        "questions_per_s": {name: round(len(pairs) / 4 / v, 1) for name, v in best.items()},
        "difference": max(abs(a[0] - b[0]) for a, b in zip(found, want, strict=True)),
        "rounds": len(taken["forja"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--shape", choices=["1m", "10m"], default="1m")
    parser.add_argument("--seconds", type=float, default=20, help="of each case")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--data", type=Path, default=DATA)
    args = parser.parse_args()
    forja_environment()
    import torch

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not args.smoke and not args.data.is_dir():
        raise SystemExit(f"--data {args.data}: no such folder; it has to hold eval/ and mmlu/")
    cases = (
        written(4)
        if args.smoke
        else {"many": many(args.data, 80), "one": one(args.data, 40, 5), "one-alone": one(args.data, 80, 0)}
    )
    row: dict[str, Any] = {"benchmark": "evaluate", "smoke": args.smoke, "threads": torch.get_num_threads()}
    row["shape"] = "tiny" if args.smoke else args.shape
    with tempfile.TemporaryDirectory() as work:
        texts = [text for pairs in cases.values() for text in dict.fromkeys(a + b for a, b in pairs)]
        ours, theirs = models(row["shape"], texts, Path(work))
        for name in args.only:
            row[name] = compare(ours, theirs, cases[name], 0.2 if args.smoke else args.seconds)
            say(f"{name}: {json.dumps(row[name])}")
    print(json.dumps({"ratio": min(row[name]["ratio"] for name in args.only), **row}))


if __name__ == "__main__":
    main()
