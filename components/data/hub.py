"""Where a `source` lies: a path, or a repository of Hugging Face's hub, which is fetched when it is named."""

from pathlib import Path

from components.artifact import ForjaError

# What lies beside a model's weights in a Hugging Face folder and is kept byte for byte, in and out.
GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
KEPT = (SETTINGS, "special_tokens_map.json", GENERATION, "chat_template.jinja", "chat_template.json")
# No pickle and no code.
FETCHED = ("model*.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", *KEPT)


def fetch(source: str, base: Path = Path()) -> Path:
    """The folder or file that `source` names, a path seen from `base`.

    `hf:org/name` and `hf:org/name@revision` are downloaded. Raises ForjaError where there is none.
    """
    if not source.startswith("hf:"):
        path = base / Path(source).expanduser()
        if not path.exists():
            raise ForjaError(f"{source}: there is no such folder or file; mend the path, or write hf:org/name")
        return path
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(FETCHED)))
    except (OSError, ValueError) as e:  # the hub's own errors are either
        why = " ".join(str(e).split())[:200]
        raise ForjaError(f"{source}: not fetched ({why}); mend the name, or fetch the folder by hand") from None
