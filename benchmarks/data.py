"""Data at machine speed: encoding, near-duplicates, cleaning, and a second run, against what others use for each.

    python benchmarks/data.py [--smoke] [--rounds 3] [--only encoding near_duplicates cleaning second_run]

The documents are Python's own reference, docstrings and code, with copies of some of them. The competitors of a part
take turns in one process; compared are their least processor seconds, so that it does not matter how many cores there
are. A part whose peer is not installed beside forja says so in place of figures.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import again
import cleaning
import encode
import numpy as np
import stdlib

from components.data import neardup
from components.data.tokenize import train_bpe
from components.data.words import cut

THRESHOLD = 0.8
VOCABULARY = 32_768


def encoding(smoke: bool, rounds: int) -> dict[str, Any]:
    """As benchmarks/encode.py, which compares every id, at one vocabulary."""
    parts = encode.corpora(smoke)
    texts = [text for part in parts.values() for text in part]
    found = encode.encoding(texts, 300 if smoke else VOCABULARY, rounds, parts)
    return {"ratio": min(part["ratio"] for part in found.values()), "mb_per_cpu_s": found, "identical_ids": True}


def shingles(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[k : k + 5]) for k in range(max(1, len(words) - 4))]


def ours(documents: list[str]) -> tuple[np.ndarray, set[tuple[int, int]]]:
    """The first text of each one's cluster, and the pairs."""
    signed = [neardup.of_texts(documents[i : i + 256], THRESHOLD) for i in range(0, len(documents), 256)]
    keys = (np.concatenate([s.bands[b] for s in signed]) for b in range(len(signed[0].bands)))
    pairs = neardup.pairs(keys, np.concatenate([s.bytes for s in signed]), THRESHOLD)
    return neardup.clusters(len(documents), pairs), {(min(p), max(p)) for p in pairs.tolist()}


def theirs(documents: list[str]) -> set[tuple[int, int]]:
    """datasketch, given its fast way in (`update_batch`)."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=neardup.HASHES)
    pairs = set()
    for i, text in enumerate(documents):
        signature = MinHash(num_perm=neardup.HASHES)
        signature.update_batch([w.encode() for w in set(shingles(text))])
        pairs |= {(other, i) for other in index.query(signature)}
        index.insert(i, signature)
    return pairs


def similarity(one: str, other: str) -> float:
    """Jaccard's, of the sets themselves."""
    sets = [set(shingles(text)) for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def near_duplicates(documents: list[str], rounds: int) -> dict[str, Any]:
    """Shingles, 128 hashes, banding, pairs and clusters."""
    documents = [*documents, *stdlib.near_copies(documents, 4)]
    ours(documents[:300])
    least = {"forja": float("inf"), "datasketch": float("inf")}
    for _ in range(rounds):
        start = time.process_time()
        label, found = ours(documents)
        middle = time.process_time()
        pairs = theirs(documents)
        least["forja"] = min(least["forja"], middle - start)
        least["datasketch"] = min(least["datasketch"], time.process_time() - middle)
    alike = {pair for pair in found | pairs if similarity(*(documents[i] for i in pair)) >= THRESHOLD}
    return {
        "ratio": round(least["datasketch"] / least["forja"], 2),
        "recall": round(sum(bool(label[a] == label[b]) for a, b in pairs) / max(1, len(pairs)), 4),
        "pairs": len(pairs),
        "above": {
            "pairs": len(alike),
            "forja": sum(bool(label[a] == label[b]) for a, b in alike),
            "datasketch": len(alike & pairs),
        },
        "texts": len(documents),
        "mb": round(sum(map(len, documents)) / 1e6, 2),
        "seconds": {name: round(seconds, 3) for name, seconds in least.items()},
    }


def clean(documents: list[str], rounds: int) -> dict[str, Any]:
    """From rows to packed windows, against datatrove's blocks (cleaning.py)."""
    asked = stdlib.questions(documents, 40)
    documents = [*documents, *documents[::10]]
    least: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, few, tokenizer = folder / "data", folder / "few", folder / "tokenizer.json"
        train_bpe(documents, VOCABULARY, 2).save(str(tokenizer))
        cleaning.write_tables(data, documents, asked)
        cleaning.write_tables(few, documents[:400], asked)
        for turn in range(rounds + 1):  # the first, on a few documents, is for what is loaded once
            at = data if turn else few
            seconds = {"forja": cleaning.forja(at, folder / "forja", tokenizer)}
            seconds["datatrove"] = cleaning.datatrove(at, folder / "datatrove", tokenizer, asked)
            for who, parts in seconds.items() if turn else ():
                if sum(parts.values()) < sum(least.get(who, parts).values()) or who not in least:
                    least[who] = parts
            print("cleaning", seconds, file=sys.stderr)
        by_id = {f"corpus-{i}": text for i, text in enumerate(documents)}  # of copies either may keep another
        names = cleaning.kept_by_forja(folder / "forja"), cleaning.kept_by_datatrove(folder / "datatrove")
        kept = [{by_id[name] for name in of} for of in names]
    whole = {who: sum(parts.values()) for who, parts in least.items()}
    return {
        "ratio": round(whole["datatrove"] / whole["forja"], 2),
        "texts": len(documents),
        "mb": round(sum(map(len, documents)) / 1e6, 2),
        "kept": {"forja": len(kept[0]), "datatrove": len(kept[1]), "both": len(kept[0] & kept[1])},
        "seconds": {who: {part: round(s, 3) for part, s in parts.items()} for who, parts in least.items()},
    }


def second_run(documents: list[str]) -> dict[str, Any]:
    """How many raw files, and files of data/, are opened the first time and the second (again.py)."""
    with tempfile.TemporaryDirectory() as folder:
        return again.opened(Path(folder), documents, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few texts and one round: that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parts = ("encoding", "near_duplicates", "cleaning", "second_run")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    asked = parser.parse_args()
    rounds = 1 if asked.smoke else asked.rounds
    documents = stdlib.documents(0.3 if asked.smoke else 6)
    cut(documents[:1])
    run = {
        "encoding": (["tokenizers"], lambda: encoding(asked.smoke, rounds)),
        "near_duplicates": (["datasketch"], lambda: near_duplicates(documents, rounds)),
        "cleaning": (["datatrove", "spacy", "xxhash"], lambda: clean(documents, rounds)),
        "second_run": (["dvc"], lambda: second_run(documents[:400])),
    }
    found = {}
    for name in asked.only:
        peers, part = run[name]
        missing = [peer for peer in peers if not find_spec(peer)]
        found[name] = {"missing": missing} if missing else part()
        print(name, found[name], file=sys.stderr)
    ratios = [part["ratio"] for part in found.values() if "ratio" in part]
    print(json.dumps({"benchmark": "data", "smoke": asked.smoke, "ratio": min(ratios, default=None), **found}))


if __name__ == "__main__":
    main()
