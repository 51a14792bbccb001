"""Text from a checkpoint folder, or from the champion."""

from pathlib import Path

from components.artifact import ForjaError
from pipelines import dvc
from pipelines.promote import champion_folder


def speak(
    root: Path, prompt: str, folder: Path | None, max_tokens: int, temperature: float, seed: int, lang: str, raw: bool
) -> str:
    """What the model says to `prompt`, as one turn of a user; with `raw`, how it continues the text."""
    from components.data import chat
    from components.model.checkpoint import marks_of
    from components.model.generate import generate
    from components.release.quantize import load

    if not prompt:
        raise ForjaError("PROMPT: empty; give some text")
    if folder is None:
        named = dvc.section(root, "promote")
        folder = champion_folder(root, named["name"], named["alias"])
    model, tokenizer, prompts = load(folder)
    if raw or not prompts:  # a base model has no templates
        start, ends = marks_of(folder, tokenizer)
        ids = [*([] if start is None else [start]), *chat.encode_text(tokenizer, prompt)]
        stop = ends[0] if ends else model.config.vocab_size  # a model without an end is stopped by nothing
    elif lang in prompts:
        ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}], prompts[lang])
        stop = chat.special(tokenizer, chat.END)
    else:
        raise ForjaError(f"--lang {lang}: {folder} has no such template; one of {', '.join(sorted(prompts))}")
    new = generate(model, [ids], max_new_tokens=max_tokens, stop=stop, temperature=temperature, seed=seed)[0]
    if raw or not prompts:  # some tokenizers drop a space that a text begins with: here it is in the middle of one
        whole = tokenizer.decode([*ids, *(i for i in new if i != stop)])
        return str(whole[len(tokenizer.decode(ids)) :])
    return chat.answer_text(tokenizer, new)
