"""Other people's checkpoints in, ours out: Hugging Face folders and llama2.c's files.

No code comes with a model and nothing is unpickled. A model passes through tensor by tensor: one at a time is in
memory, however large it is.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor

from components.artifact import ForjaError, building, to_json, write_record
from components.data.chat import with_special
from components.data.hub import GENERATION, KEPT, SETTINGS
from components.data.templates import ANSWER, TOOL, stop
from components.model import checkpoint, hf, hf_config, llama2c
from components.model.checkpoint import MARKS, PROMPTS, SHAPE, TOKENIZER, WEIGHTS, Marks
from components.model.gpt import GPT, GPTConfig

TEMPLATE = "template.json"  # beside a model that pretraining started from: the chat template that came with it


class Foreign(NamedTuple):
    """A model that is not in our format: its shape, its tensors by our names, its tokenizer and the marks of a text."""

    config: GPTConfig
    tensor: Callable[[str], Tensor]
    tokenizer: bytes
    marks: Marks


def read(source: Path, tokenizer: Path | None = None) -> Foreign:
    """A Hugging Face folder, or a llama2.c .bin with its tokenizer.bin. Raises ForjaError where it is neither."""
    if source.is_dir():
        if tokenizer is not None:
            raise ForjaError(f"--tokenizer {tokenizer}: is for a llama2.c .bin; {source} has its own tokenizer")
        found = _read_hf(source)
    else:
        if tokenizer is None or not tokenizer.is_file():
            raise ForjaError(f"{source}: a llama2.c model needs its tokenizer.bin; give --tokenizer FILE")
        config = llama2c.read_config(source)
        text = llama2c.tokenizer_json(*llama2c.read_pieces(tokenizer, config.vocab_size)).encode()
        found = Foreign(config, lambda name: llama2c.tensor_of(source, config, name), text, llama2c.AROUND)
    last = max(Tokenizer.from_str(found.tokenizer.decode()).get_vocab().values(), default=-1)
    if last >= found.config.vocab_size:
        raise ForjaError(
            f"{source}: its tokenizer has a token {last}, and its embedding {found.config.vocab_size} rows"
        )
    return found


def _read_hf(folder: Path) -> Foreign:
    config, said = hf_config.read_config(folder)
    tensor = hf.open_tensors(folder, config, said["model_type"])
    path = folder / TOKENIZER
    if not path.is_file():
        raise ForjaError(
            f"{path}: missing; write it by transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # noqa: BLE001  # the library raises nothing narrower
        raise ForjaError(f"{path}: no tokenizers file ({str(e).splitlines()[0]}); fetch it again") from None
    return Foreign(config, tensor, path.read_bytes(), _marks(folder, said, tokenizer))


def _marks(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> Marks:
    """What stands before a text and behind it, as the model's files say: of several, the first that says so.

    A model whose files name no start saw its texts one behind the other, so the end of one stood before the next.
    """
    settings, generation = (
        hf_config.read_json(folder / name) if (folder / name).is_file() else {} for name in (SETTINGS, GENERATION)
    )

    def ids(kind: str) -> list[int]:
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        named = tokenizer.token_to_id(token) if isinstance(token, str) else None
        said = [generation.get(f"{kind}_token_id"), config.get(f"{kind}_token_id"), named]
        value: Any = next((v for v in ([named, *said] if kind == "bos" else said) if v is not None), [])
        values = value if isinstance(value, list) else [value]
        return [v for v in values if isinstance(v, int) and tokenizer.id_to_token(v) is not None]

    start, ends = ids("bos"), ids("eos")
    return Marks(start[0] if start else ends[0] if ends else None, tuple(ends))


def import_model(source: Path, out: Path, tokenizer: Path | None = None) -> GPTConfig:
    """Make the sealed checkpoint folder `out` of someone else's model. Raises ForjaError where `out` holds files."""
    _must_be_new(out)
    if source.is_dir() and (source / SHAPE).is_file():
        raise ForjaError(f"{source}: is a checkpoint of forja's already; use it as it is")
    model = read(source, tokenizer)
    with building(out) as folder:
        checkpoint.write_weights(folder / WEIGHTS, checkpoint.shapes_of(model.config), model.tensor)
        (folder / SHAPE).write_text(to_json(model.config.model_dump()), encoding="utf-8")
        (folder / TOKENIZER).write_bytes(model.tokenizer)
        (folder / MARKS).write_text(to_json(model.marks._asdict()), encoding="utf-8")
        for name in KEPT if source.is_dir() else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        write_record(folder, "import")
    return model.config


def export_model(folder: Path, out: Path) -> str:
    """Write the checkpoint `folder` as a Hugging Face folder `out`, and return the family that its shape is of.

    Raises ForjaError where no family has this shape: it names the options that stand in the way.
    """
    _must_be_new(out)
    shape = checkpoint.shape_of(folder)
    if "quantization" in shape:
        raise ForjaError(f"{folder}: quantized; export the folder that it was made from")
    config = GPTConfig.model_validate(shape)
    family, said = hf_config.from_gpt(config, folder)
    parts = hf.parts_of(config, family)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    marks = checkpoint.marks_of(folder, tokenizer)
    prompts = json.loads((folder / PROMPTS).read_bytes()) if (folder / PROMPTS).is_file() else {}
    ends = [stop(tokenizer, prompts), *marks.ends] if prompts else list(marks.ends)
    ends = list(dict.fromkeys(ends))
    said |= {"bos_token_id": marks.start, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}

    def tensor(name: str) -> Tensor:
        part = parts[name]
        with safe_open(folder / WEIGHTS, framework="pt") as f:  # opened each time: what was read of it is let go again
            rows: Tensor = f.get_slice(part.ours)[part.start : part.stop]
        return rows.T if part.transposed else rows

    with building(out) as new:
        checkpoint.write_weights(new / WEIGHTS, {name: part.shape for name, part in parts.items()}, tensor)
        (new / hf_config.CONFIG).write_text(to_json({**said, "torch_dtype": "float32"}), encoding="utf-8")
        shutil.copyfile(folder / TOKENIZER, new / TOKENIZER)
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, new / name)
        if not (folder / SETTINGS).is_file():
            settings = _settings(tokenizer, marks.start, ends, config.context, prompts)
            (new / SETTINGS).write_text(to_json(settings), encoding="utf-8")
        if not (folder / GENERATION).is_file():
            tokens = {k: said[k] for k in ("bos_token_id", "eos_token_id")}
            (new / GENERATION).write_text(to_json(tokens), encoding="utf-8")
    return family


def _must_be_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ForjaError(f"{out}: is there already; name another place or delete it")


def _settings(
    tokenizer: Tokenizer, start: int | None, ends: list[int], context: int, prompts: dict[str, Any]
) -> dict[str, Any]:
    """tokenizer_config.json for a tokenizer that came without: its marks, and our templates as a chat template."""
    said: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if start is not None:
        said["bos_token"] = tokenizer.id_to_token(start)
    if ends:
        said["eos_token"] = tokenizer.id_to_token(ends[0])
    if prompts:
        said["chat_template"] = chat_template(prompts["en"] if "en" in prompts else next(iter(prompts.values())))
    return said


def chat_template(prompts: dict[str, str]) -> str:
    """A Jinja template that writes a conversation as components/data/chat.py encodes it."""
    if "jinja" in prompts:
        return prompts["jinja"]
    text = lambda t: json.dumps(t, ensure_ascii=False)  # noqa: E731

    def around(template: str, first: str = "") -> str:
        before, _, behind = template.partition("{content}")
        return f"{{{{- {text(first + before)} + message['content'] + {text(behind)} }}}}"

    return (
        "{%- for message in messages %}{%- if message['role'] == 'user' %}"
        f"{around(prompts['user'])}"
        "{%- elif message['role'] == 'tool' %}"
        f"{around(prompts.get('tool', TOOL))}"
        "{%- elif message['role'] == 'assistant' and not message.get('tool_calls') %}"
        f"{around(prompts.get('answer', ANSWER), prompts['assistant'])}"
        "{%- else %}{{- raise_exception('this template writes turns of user, assistant and tool, and no calls') }}"
        "{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {text(prompts['assistant'])} }}}}{{%- endif %}}"
    )


def own_template(source: Path) -> dict[str, str] | None:
    """The chat template that lies in a model's folder, with its marks' names; None where there is none."""
    settings = hf_config.read_json(source / SETTINGS) if (source / SETTINGS).is_file() else {}
    apart = source / "chat_template.jinja"
    text = apart.read_text(encoding="utf-8") if apart.is_file() else settings.get("chat_template")
    if isinstance(text, list):  # several by name
        text = next((t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(text, str):
        return None
    named = {key: settings.get(key) for key in ("bos_token", "eos_token")}
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {"jinja": text, **{key: value for key, value in named.items() if isinstance(value, str)}}


def initial(source: Path, tokenizer: Path) -> GPT:
    """The model in `source`, a checkpoint of forja's or a Hugging Face folder, for the corpus that `tokenizer` cut.

    Raises ForjaError where that is not the model's own tokenizer with forja's special tokens.
    """
    if (source / SHAPE).is_file():
        state, own = checkpoint.load(source, "cpu").model.state_dict(), source / TOKENIZER
        config = GPTConfig.model_validate(checkpoint.shape_of(source))
        text = own.read_bytes()
    else:
        config, tensor, text, _ = read(source)
        state = {name: tensor(name) for name in checkpoint.shapes_of(config)}
    if config.head != "lm":
        raise ForjaError(f"{source}: has a head of one value, not of tokens; name a language model")
    old = Tokenizer.from_str(text.decode())
    known = set(old.get_vocab().values())
    new = Tokenizer.from_file(str(tokenizer))
    if with_special(old).to_str() != new.to_str():
        raise ForjaError(
            f"{source}: its tokenizer is not the one that cut the corpus ({tokenizer}); give tokenize.tokenizer the "
            "source that pretrain.init has"
        )
    added = sorted(set(new.get_vocab().values()) - known)
    return grown(config, state, sorted(known), added)


def grown(config: GPTConfig, state: dict[str, Tensor], known: list[int], added: list[int]) -> GPT:
    """A model with rows for the tokens `added`, in the embedding and in a free head: the mean of the `known` rows.

    With the mean, a new token is about as likely as an average one, and the others keep their order and nearly their
    probabilities; random rows may get more than all others together (Hewitt 2021, "Initializing new word embeddings").
    """
    size = max([config.vocab_size, *(i + 1 for i in added)])
    for name in ["wte.weight"] if config.tied else ["wte.weight", "head.weight"]:
        rows = state[name]
        mean = rows[known].mean(0)
        wider = torch.cat((rows, mean.expand(size - len(rows), -1)))
        wider[added] = mean  # a vocabulary padded to a round number has rows for them already, which nothing taught
        state[name] = wider
    if config.tied:
        state.pop("head.weight", None)
    return checkpoint.filled(config.model_copy(update={"vocab_size": size}), state)
