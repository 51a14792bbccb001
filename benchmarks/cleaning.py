"""From rows to packed windows, forja's stages beside datatrove's blocks: the two halves of the benchmark data.py.

Both read the same JSONL, filter it in the manner of Gopher, C4 and FineWeb, drop exact duplicates and what holds 13
words of a test set, encode with the same tokenizer and write shards, each in its own folder. Gopher's rule of words
with a letter is left out on both sides: punctuation is a word in datatrove, and most of the documents would go.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

NGRAM = 13
CONTEXT = 1024
FILTERS = {"gopher": {"min_alphabetic": None}, "c4": {}, "fineweb": {}}


def write_tables(folder: Path, corpus: list[str], asked: list[str]) -> None:
    """data/ as ingest leaves it."""
    common = {"source": "python", "licence": "PSF-2.0", "provenance": "made here", "lang": "en"}
    splits = ["test"] * 20 + ["val"] * 20  # of the first rows; the others are trained on
    turn, answer = {"role": "user", "content": "What is that?"}, {"role": "assistant", "content": "A document."}
    tables: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"text": text, "split": splits[i] if i < len(splits) else "train"} for i, text in enumerate(corpus)],
        "instructions": [{"messages": [turn, answer], "split": "train"}],
        "preferences": [
            {"messages": [turn], "chosen": answer, "rejected": turn | {"role": "assistant"}, "kind": "cut"}
            | {"split": "train"}
        ],
        "prompts": [{"messages": [turn], "split": "train"}],
        "eval": [{"question": text, "choices": ["yes", "no"], "answer": 0, "split": "test"} for text in asked],
    }
    for table, rows in tables.items():
        (folder / table).mkdir(parents=True)
        with (folder / table / "rows.jsonl").open("w", encoding="utf-8") as f:
            for i, row in enumerate(rows):
                f.write(json.dumps(common | {"id": f"{table}-{i}", "object": f"{table}-{i}"} | row) + "\n")


def kept_by_forja(folder: Path) -> set[str]:
    return {json.loads(line)["id"] for line in (folder / "validate" / "corpus.jsonl").read_text().splitlines()}


def forja(data: Path, folder: Path, tokenizer: Path) -> dict[str, float]:
    """CPU seconds of the stages validate and tokenize, and of best-fit packing."""
    from components.data import packing, tokenize, validate
    from components.log import silent

    limits = {
        "min_chars": 1,
        "max_chars": 1_000_000,
        "max_rejected_share": 1.0,
        "max_duplicate_share": 1.0,
        "max_class_share": None,
    }
    asked = {"ngram": NGRAM, "whole": 8, "decontaminate": [], "near_duplicates": None, "languages": None}
    asked |= {"quality": FILTERS, "pii": "off", "poison": "off"}
    tables = dict.fromkeys(("corpus", "instructions", "preferences", "prompts", "eval"), limits)
    shutil.rmtree(folder, ignore_errors=True)
    for stage in ("validate", "tokenize"):
        (folder / stage).mkdir(parents=True)
    cfg = validate.Config.model_validate(asked | {"tables": tables})
    words = tokenize.Config(vocab_size=None, min_frequency=None, sample_mb=1, tokenizer=str(tokenizer))

    def pack() -> None:
        packing.pack(folder / "tokenize" / "train.npy", CONTEXT)

    return _timed(
        {
            "clean": lambda: validate.run(cfg, data, folder / "validate", silent),
            "encode": lambda: tokenize.run(words, folder / "validate", folder / "tokenize", silent, tokenizer),
            "pack": pack,
        }
    )


def datatrove(data: Path, folder: Path, tokenizer: Path, asked: list[str]) -> dict[str, float]:
    """CPU seconds of datatrove's blocks, chained without an executor. Its index of the test set is there beforehand."""
    import numpy as np
    from datatrove.data import Document
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
    from datatrove.pipeline.dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.text import ngrams, simplify_text
    from loguru import logger

    logger.remove()
    shutil.rmtree(folder, ignore_errors=True)
    config = NGramsDecontConfig(n_grams=NGRAM)
    (folder / "index").mkdir(parents=True)
    decontaminate = NGramsDecontFilter(str(folder / "index"), config=config)
    words = [decontaminate.tokenizer.word_tokenize(simplify_text(text, config.norm_config)) for text in asked]
    hashes = {decontaminate.hash_func(" ".join(gram)) for of_text in words for gram in ngrams(of_text, NGRAM)}
    np.array(list(hashes), config.hash_config.np_descr).tofile(folder / "index" / "asked.index.hashes")

    def content(document: Document) -> str:
        return document.text

    exact = ExactDedupConfig(content_getter=content)
    filtered = [str(folder / "filtered"), str(folder / "signatures"), str(folder / "duplicates")]
    quality = [
        GopherRepetitionFilter(),
        GopherQualityFilter(max_non_alpha_words_ratio=None),
        C4QualityFilter(),
        FineWebQualityFilter(),
    ]
    tokens = DocumentTokenizer(
        str(folder / "tokens"), str(tokenizer), save_filename="corpus", shuffle_documents=False, seed=0
    )

    def clean() -> None:
        _chain(JsonlReader(str(data / "corpus")), *quality, JsonlWriter(filtered[0], compression=None))
        _chain(JsonlReader(filtered[0]), ExactDedupSignature(filtered[1], exact))
        _chain(ExactFindDedups(filtered[1], filtered[2], exact))
        kept = [ExactDedupFilter(filtered[2], exact), decontaminate]
        _chain(JsonlReader(filtered[0]), *kept, JsonlWriter(str(folder / "kept"), compression=None))

    return _timed({"clean": clean, "encode": lambda: _chain(JsonlReader(str(folder / "kept")), tokens)})


def kept_by_datatrove(folder: Path) -> set[str]:
    return {json.loads(row)["id"] for p in (folder / "kept").glob("*.jsonl") for row in p.read_text().splitlines()}


def _chain(*blocks: Any) -> None:
    data = None
    for block in blocks:
        data = block(data, 0, 1)
    for _ in data or ():
        pass


def _timed(parts: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Processor seconds, those of child processes included."""
    seconds = {}
    for name, part in parts.items():
        before = sum(_times())
        part()
        seconds[name] = sum(_times()) - before
    return seconds


def _times() -> tuple[float, ...]:
    return os.times()[:4]
