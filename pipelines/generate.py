"""Text from a checkpoint folder, or from the champion, as it comes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.artifact import ForjaError
from pipelines import dvc
from pipelines.promote import champion_folder


def speak(root: Path, prompt: str, folder: Path | None, lang: str, raw: bool, **options: Any) -> Iterator[str]:
    """What the model says to `prompt`, as one turn of a user, piece by piece; with `raw`, how it continues the text.

    `options` are those of components/model/generate.py. Raises ForjaError before the first piece for a user's mistake.
    """
    from components.data import chat, templates
    from components.model.checkpoint import marks_of
    from components.model.generate import stream
    from components.release.quantize import load

    if not prompt:
        raise ForjaError("PROMPT: empty; give some text")
    if folder is None:
        named = dvc.section(root, "promote")
        folder = champion_folder(root, named["name"], named["alias"])
    model, tokenizer, prompts = load(folder)
    raw = raw or not prompts  # a base model has no templates
    if raw:
        start, ends = marks_of(folder, tokenizer)
        ids = [*([] if start is None else [start]), *chat.encode_text(tokenizer, prompt)]
        stop = ends[0] if ends else model.config.vocab_size  # a model without an end is stopped by nothing
    elif lang in prompts:
        ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}], prompts[lang])
        stop = templates.stop(tokenizer, prompts)
    else:
        raise ForjaError(f"--lang {lang}: {folder} has no such template; one of {', '.join(sorted(prompts))}")
    # A tool call shows as `<|call|>{...}`; the other marks do not show.
    hidden = {tokenizer.token_to_id(name) for name in chat.SPECIAL if raw or name != chat.CALL}
    before = ids if raw else []  # some tokenizers drop a space that a text begins with: here it is in the middle of one
    known = len(tokenizer.decode(before))

    def decode(tokens: list[int]) -> str:
        shown = [*before, *(i for i in tokens if i not in hidden)]
        return str(tokenizer.decode(shown, skip_special_tokens=raw))[known:]

    pieces = (t.text for t in stream(model, [ids], stop=stop, decode=decode, alone=True, **options))
    yield from pieces if raw else stripped(pieces)


def stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a text without the blanks at its beginning and end."""
    begun, blanks = False, ""
    for piece in pieces:
        text = blanks + piece if begun else piece.lstrip()
        begun = begun or bool(text)
        blanks = text[len(text.rstrip()) :]
        if text.rstrip():
            yield text.rstrip()
