"""What a model thinks of a text: its tokens, their log-probabilities, and bits a byte of it."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from components.artifact import ForjaError
from pipelines import dvc
from pipelines.console import console, say
from pipelines.promote import champion_folder


def read_text(file: str) -> str:
    """The text of a file, or of standard input for `-`. Raises ForjaError where it is empty or no UTF-8."""
    try:
        text = (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as e:
        raise ForjaError(f"{file}: {e.strerror}; name a file with text, or - for standard input") from None
    except UnicodeDecodeError as e:
        raise ForjaError(f"{file}: byte {e.start} is no UTF-8; convert the file") from None
    if not text:
        raise ForjaError(f"{file}: empty; give some text")
    return text


def score(root: Path, text: str, folder: Path | None, context: int | None) -> dict[str, Any]:
    """The text as `folder`, or the champion, sees it. Each token is scored once, with at least half a window before it
    where the text is longer than a window.

    The first token is scored behind the model's mark for the start of a text; a model that has none leaves it out.
    """
    from components.data.chat import encode_text
    from components.model.checkpoint import marks_of
    from components.model.losses import bits_per_byte, text_logprobs
    from components.release.quantize import load

    if folder is None:
        named = dvc.section(root, "promote")
        folder = champion_folder(root, named["name"], named["alias"])
    model, tokenizer, _ = load(folder)
    if model.config.head != "lm":
        raise ForjaError(f"{folder}: a reward model gives values, not probabilities; name a language model")
    if context is not None and not 2 <= context <= model.config.context:
        raise ForjaError(f"--context {context}: the model sees {model.config.context} tokens; choose 2 up to that")
    start = marks_of(folder, tokenizer).start
    ids = encode_text(tokenizer, text)
    logprobs = text_logprobs(model, ids if start is None else [start, *ids], 0, context).double().tolist()
    rows = [None, *logprobs] if start is None else logprobs
    total = sum(logprobs)
    return {
        "model": str(folder),
        "bytes": len(text.encode()),
        "tokens": len(ids),
        "scored": len(logprobs),
        "conditioned_on": None if start is None else {"id": start, "text": tokenizer.id_to_token(start)},
        "window": context or model.config.context,
        "log_probability": total,
        "bits_per_byte": bits_per_byte(-total, len(text.encode())),
        "token_logprobs": [
            {"id": i, "text": piece, "logprob": lp}
            for i, piece, lp in zip(ids, _pieces(tokenizer, text), rows, strict=True)
        ],
    }


def _pieces(tokenizer: Any, text: str) -> list[str]:
    """What of the text each token stands for; several that share a character show all of it."""
    return [text[a:b] for a, b in tokenizer.encode(text, add_special_tokens=False).offsets]


def show(found: dict[str, Any], as_json: bool, tokens: bool) -> None:
    if not tokens:
        found = {k: v for k, v in found.items() if k != "token_logprobs"}
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if tokens:
        table = Table("id", "text", "log-probability")
        for row in found["token_logprobs"]:
            lp = "not scored" if row["logprob"] is None else f"{row['logprob']:.4f}"
            table.add_row(str(row["id"]), json.dumps(row["text"], ensure_ascii=False).replace("[", r"\["), lp)
        console.print(table)
    start = found["conditioned_on"]
    say(f"{found['tokens']:,} tokens, {found['bytes']:,} bytes")
    say(f"log-probability {found['log_probability']:.4f} nats, {found['bits_per_byte']:.4f} bits a byte")
    if start is None:
        say("The first token stands behind nothing, since the model has no mark for a text's start: it is not counted.")
    else:
        say(f"The first token stands behind {start['text']!r} (token {start['id']}).")
