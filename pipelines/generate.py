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
    from components.model.generate import generate
    from components.release.quantize import load

    if not prompt:
        raise ForjaError("PROMPT: empty; give some text")
    if folder is None:
        named = dvc.section(root, "promote")
        folder = champion_folder(root, named["name"], named["alias"])
    model, tokenizer, prompts = load(folder)
    if raw or not prompts:  # a base model has no templates
        ids = chat.encode_text(tokenizer, prompt)
    elif lang in prompts:
        ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": prompt}], prompts[lang])
    else:
        raise ForjaError(f"--lang {lang}: {folder} has no such template; one of {', '.join(sorted(prompts))}")
    stop = chat.special(tokenizer, chat.SEPARATOR if raw or not prompts else chat.END)
    new = generate(model, [ids], max_new_tokens=max_tokens, stop=stop, temperature=temperature, seed=seed)[0]
    if raw or not prompts:
        return str(tokenizer.decode([i for i in new if i != stop]))
    return chat.answer_text(tokenizer, new)
