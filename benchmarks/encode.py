"""Bytes a second and core of text to token ids, against `tokenizers`, with identical ids; and packing.

    python benchmarks/encode.py [--smoke] [--rounds 5]

The text is Python's own documentation (short documents) and its standard library (long ones). The three take turns:
  forja        `Encoder`, as the stage tokenize calls it: one array of ids for all documents, separators included
  batch        `Tokenizer.encode_batch`
  batch_fast   `Tokenizer.encode_batch_fast`, which keeps no offsets
What is compared is each one's least CPU time, so that it does not matter on how many cores it runs.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from components.data.chat import SEPARATOR, special
from components.data.encode import Encoder
from components.data.packing import best_fit, pieces, truncated
from components.data.sources import chunks, topics
from components.data.tokenize import train_bpe


def corpora(smoke: bool) -> dict[str, list[str]]:
    """Documents of about 600 characters, and whole modules."""
    short = [piece for text in topics().values() for piece in chunks(text, 600)]
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    long = [path.read_text(encoding="utf-8") for path in files[: 5 if smoke else None]]
    return {"short": short[:50] if smoke else short, "long": long}


def encoding(texts: list[str], vocab: int, rounds: int, parts: dict[str, list[str]]) -> dict[str, object]:
    tokenizer = train_bpe(texts, vocab, 2)
    encoder = Encoder(tokenizer, special(tokenizer, SEPARATOR))
    if encoder.why is not None:
        sys.exit(f"tokenizers encodes by itself: {encoder.why}")
    contenders = {
        "forja": encoder,
        "batch": lambda given: tokenizer.encode_batch(given, add_special_tokens=False),
        "batch_fast": lambda given: tokenizer.encode_batch_fast(given, add_special_tokens=False),
    }
    out: dict[str, object] = {}
    for name, given in parts.items():
        ids, ends = encoder(given)
        wanted = contenders["batch"](given)
        got = np.split(ids, ends[:-1])
        if [part[:-1].tolist() for part in got] != [encoding.ids for encoding in wanted]:
            sys.exit(f"{name}: the ids differ")
        least = dict.fromkeys(contenders, float("inf"))
        for _ in range(rounds):
            for contender, encode in contenders.items():
                start = time.process_time()
                encode(given)
                least[contender] = min(least[contender], time.process_time() - start)
        size = sum(len(text.encode()) for text in given) / 1e6
        out[name] = {c: round(size / seconds, 2) for c, seconds in least.items()}
        out[name]["ratio"] = round(least["batch"] / least["forja"], 2)
        print(name, out[name], file=sys.stderr)
    return out


def packing(documents: int, context: int) -> dict[str, float]:
    """Documents whose lengths are drawn log-normally, as those of web pages about are: median 400 tokens, mean 800."""
    lengths = np.random.default_rng(0).lognormal(6.0, 1.2, documents).astype(np.int64) + 1
    ends = np.cumsum(lengths)
    start = time.perf_counter()
    _, length = pieces(ends, context)
    _, windows = best_fit(length, context)
    seconds = time.perf_counter() - start
    cut, cut_by_stream = truncated(ends, context)
    return {
        "documents": documents,
        "context": context,
        "seconds": round(seconds, 2),
        "waste": round(1 - float(length.sum()) / (windows * context), 6),
        "truncated": round(cut, 4),
        "truncated_by_stream": round(cut_by_stream, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few texts and one round: that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    parts = corpora(args.smoke)
    texts = [text for part in parts.values() for text in part]
    vocabularies = [300] if args.smoke else [2048, 32768]
    rounds = 1 if args.smoke else args.rounds
    found = {str(vocab): encoding(texts, vocab, rounds, parts) for vocab in vocabularies}
    ratio = min(part["ratio"] for by_part in found.values() for part in by_part.values())
    packed = [packing(1000 if args.smoke else 1_000_000, context) for context in (2048, 8192)]
    print(
        json.dumps(
            {"benchmark": "encode", "smoke": args.smoke, "ratio": ratio, "mb_per_cpu_s": found, "packing": packed}
        )
    )


if __name__ == "__main__":
    main()
