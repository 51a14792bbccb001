"""Near-duplicates, forja against datasketch: shingles, 128 hashes, banding, pairs and clusters, one core each.

The two take turns on the same texts, in processor seconds; datasketch is given its fast way in (`update_batch`). Recall
is the share of datasketch's pairs that forja has in one cluster. The place for further parts (reading with filters,
encoding) is beside `near_duplicates`, one function a part.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from components.data import neardup

THRESHOLD = 0.8


def texts(data: Path | None, most: int) -> list[str]:
    """Documents and, for every fourth of them, a copy with some words changed."""
    whole = data.read_text(encoding="utf-8") if data else "\n".join(topics.values())
    found = [whole[i : i + 1200] for i in range(0, len(whole), 1200)][:most]
    rng = random.Random(0)
    vocabulary = sorted(set(whole.split()))
    for text in found[::4]:
        words = text.split()
        for _ in range(rng.choice([0, 1, 2, 4, 8, 16])):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        found.append(" ".join(words))
    return found


def ours(documents: list[str]) -> np.ndarray:
    signed = [neardup.of_texts(documents[i : i + 256], THRESHOLD) for i in range(0, len(documents), 256)]
    keys = (np.concatenate([s.bands[b] for s in signed]) for b in range(len(signed[0].bands)))
    pairs = neardup.pairs(keys, np.concatenate([s.bytes for s in signed]), THRESHOLD)
    return neardup.clusters(len(documents), pairs)


def theirs(documents: list[str]) -> set[tuple[int, int]]:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=neardup.HASHES)
    pairs = set()
    for i, text in enumerate(documents):
        words = re.findall(r"\w+", text.lower())
        signature = MinHash(num_perm=neardup.HASHES)
        signature.update_batch(
            [w.encode() for w in {" ".join(words[k : k + 5]) for k in range(max(1, len(words) - 4))}]
        )
        pairs |= {(other, i) for other in index.query(signature)}
        index.insert(i, signature)
    return pairs


def near_duplicates(documents: list[str], rounds: int) -> dict[str, float]:
    ours(documents[:300])
    seconds: dict[str, list[float]] = {"forja": [], "datasketch": []}
    for _ in range(rounds):
        start = time.process_time()
        label = ours(documents)
        middle = time.process_time()
        pairs = theirs(documents)
        seconds["forja"].append(middle - start)
        seconds["datasketch"].append(time.process_time() - middle)
    best = {name: min(found) for name, found in seconds.items()}
    return {
        "ratio": best["datasketch"] / best["forja"],
        "recall": sum(label[a] == label[b] for a, b in pairs) / max(1, len(pairs)),
        "pairs": len(pairs),
        "texts": len(documents),
        **{f"{name}_seconds": found for name, found in best.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a text file; by default the reference that ships with Python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="few texts, one round")
    asked = parser.parse_args()
    documents = texts(asked.data, 60 if asked.smoke else 20_000)
    found = near_duplicates(documents, 1 if asked.smoke else asked.rounds)
    print(json.dumps({"benchmark": "near-duplicates", **{k: round(v, 4) for k, v in found.items()}}))


if __name__ == "__main__":
    main()
