"""A reward model from hh-rlhf's pairs, end to end: from text to a checkpoint, to how often it is right on dialogues it
has not seen, beside a rule that looks at lengths alone.

    python benchmarks/hh_rlhf.py [--smoke] [--folds 3] [--data DIR] [--work DIR]

A model of the demo's shape with a longer context is pretrained on English prose and fine-tuned on instructions. Then
the dialogues are cut into folds: each fold is judged by a reward model that has learnt from the others, so that every
pair is held out once. `--work` keeps what is made; the same command goes on from there.
"""

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rounds import say

from components.data import ingest, tokenize, validate
from components.data.chat import SEPARATOR, special
from components.data.tokenize import rows as read_rows
from components.log import Metrics
from components.model.checkpoint import load
from components.train import judgement, pretrain, reward, sft
from pipelines.recipe import compose

ROOT = Path(__file__).parents[1]
PROSE = ("llamafactory_demo/c4_demo.jsonl", "llamafactory_demo/wiki_demo.txt", "llamafactory_demo/alpaca_en_demo.json")
LIMITS = [f"validate.tables.{t}.max_rejected_share=0.5" for t in ("corpus", "instructions", "preferences", "prompts")]
LIMITS += ["validate.poison='off'", "validate.pii='off'"]
PAIRS = "hh_rlhf/harmless-base_test.jsonl.gz"
RECIPE = [
    *("sft.prompts=[en]", "pretrain.samples=[]", "sft.sample_rows=0", "pretrain.batch=4", "sft.batch=12"),
    *("reward.lr=3e-4", "reward.matrix_lr=null", "reward.weight_decay=0.1", "reward.val_rows=100"),
    *("reward.share=1", "referee.share=0"),  # there is no policy to referee
]
FULL = ["pretrain.model.context=448", "pretrain.steps=600", "sft.steps=160", "reward.steps=100", "reward.eval_every=20"]
TINY = ["pretrain.model.context=160", "pretrain.steps=2", "sft.steps=2", "reward.steps=2", "reward.batch=2"]
TINY += ["pretrain.model.layers=1", "sft.val_rows=16", "reward.val_rows=8", "pretrain.val_windows=2"]
Pairs = list[dict[str, Any]]


class Chain:
    """Stages into folders of one working folder; one that is done is not run again."""

    def __init__(self, work: Path, params: dict[str, Any]) -> None:
        self.work, self.params = work, params

    def run(self, module: Any, name: str, out: str, **inputs: Path) -> Path:
        done = self.work / out
        if not done.is_dir():
            say(f"{out} ...")
            building, scratch = self.work / f"{out}.building", self.work / f"{out}.scratch"
            for folder in (building, scratch):
                folder.mkdir(parents=True, exist_ok=True)
            folders = {k: v for k, v in {**inputs, "scratch": scratch}.items() if k in module.run.__annotations__}
            metrics = module.run(module.Config.model_validate(self.params[name]), **folders, out=building, log=told)
            (building / "metrics.json").write_text(json.dumps(metrics))
            building.rename(done)
        return done


def told(row: Metrics, step: int) -> None:
    if "val_loss" in row:
        say(f"  step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items() if "loss" in k or "accuracy" in k))


def snapshot(chain: Chain, data: Path) -> Path:
    """The validated rows. No dialogue is held out yet: the folds do that."""
    sources = [{"source": str(data / name), "lang": "en"} for name in PROSE]
    sources.append({"source": str(data / PAIRS), "lang": "en", "split": "train"})
    chain.params["ingest"] |= {"sources": sources}
    if not (chain.work / "data").is_dir():
        ingest.ingest(ingest.Config.model_validate(chain.params["ingest"]), chain.work / "data", told)
    return chain.run(validate, "validate", "validate", data=chain.work / "data")


def folded(rows: Pairs, folds: int, fold: int, val_rows: int) -> Pairs:
    """The rows with their split for this fold. All pairs of a dialogue are in one fold, chosen by a hash."""
    out, held = [], 0
    for row in rows:
        place = int.from_bytes(hashlib.sha256(row["object"].encode()).digest()[:4], "little") % folds
        split = "test" if place == fold else "val" if place == (fold + 1) % folds and held < val_rows else "train"
        held += split == "val"
        out.append({**row, "split": split})
    return out


def judged(chain: Chain, sft_model: Path, rows: Pairs, fold: int) -> dict[str, list[float]]:
    """The leads of the fold's pairs by a reward model that has not seen them, and how much longer the better one is."""
    table = chain.work / f"fold-{fold}"
    table.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (table / "preferences.jsonl").write_text(text, encoding="utf-8")
    made = chain.run(reward, "reward", f"reward-{fold}", validate=table, sft=sft_model)
    model, tokenizer, prompts = load(made)
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "test")}
    items = {n: reward.items_of(tokenizer, s, prompts, model.config.context, long="cut")[0] for n, s in split.items()}
    pad = special(tokenizer, SEPARATOR)
    longer = {name: [item.longer for item in some if isinstance(item, reward.Pair)] for name, some in items.items()}
    deviation = json.loads((made / "metrics.json").read_bytes())["score_deviation"]
    found = [lead * deviation for lead in reward.leads(model, items["test"], pad)]  # in the unit that it learnt in
    rule = judgement.length_only(longer["train"], longer["test"])["length_only.accuracy"]
    say(f"fold {fold}: {judgement.accuracy(found)}, the rule learnt from lengths {rule:.3f}")
    return {"leads": found, "longer": longer["test"], "rule": [rule * len(found)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, a tiny shape: that it runs")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if not (args.data / PAIRS).is_file():
        sys.exit(f"{args.data / PAIRS}: not there; name the folder of public data sets with --data")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        chain = Chain(work, compose(ROOT, Path("conf/demo.yaml"), [*RECIPE, *LIMITS, *(TINY if args.smoke else FULL)]))
        table = snapshot(chain, args.data)
        tokens = chain.run(tokenize, "tokenize", "tokenize", validate=table)
        base = chain.run(pretrain, "pretrain", "pretrain", tokenize=tokens)
        tuned = chain.run(sft, "sft", "sft", validate=table, tokenize=tokens, pretrain=base)
        rows = list(read_rows(table / "preferences.jsonl"))[: 60 if args.smoke else None]
        val_rows = chain.params["reward"]["val_rows"]
        found = [judged(chain, tuned, folded(rows, args.folds, i, val_rows), i) for i in range(args.folds)]
        with gzip.open(args.data / PAIRS) as f:
            texts = [json.loads(line) for line in f]
    leads = [lead for part in found for lead in part["leads"]]
    sure, bins = judgement.accuracy(leads), judgement.calibration(leads)
    rule = sum(part["rule"][0] for part in found) / len(leads)
    print(
        json.dumps(
            {
                "benchmark": "hh_rlhf",
                "smoke": args.smoke,
                "ratio": round(sure.value / rule, 3),
                "accuracy": round(sure.value, 4),
                "interval": [round(sure.low, 4), round(sure.high, 4)],
                "pairs": sure.n,
                "longer_chosen": round(sum(len(t["chosen"]) > len(t["rejected"]) for t in texts) / len(texts), 4),
                "length_rule": round(rule, 4),
                "by_length": judgement.by_length(leads, [x for part in found for x in part["longer"]]),
                "calibration_error": round(judgement.calibration_error(bins), 4),
                "folds": args.folds,
                "seconds": round(time.perf_counter() - started),
            }
        )
    )


if __name__ == "__main__":
    main()
