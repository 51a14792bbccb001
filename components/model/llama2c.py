"""llama2.c's files: a model's legacy .bin, and the tokenizer.bin beside it.

The model: seven int32 (width, MLP width, layers, heads, kv heads, vocabulary, positions; a negative vocabulary says
that the head is not the embedding), then float32 tensors one behind the other. Its rotary positions turn neighbouring
coordinates (0, 1), (2, 3) ...; ours turn the halves, so the rows of q and k are put in another order.

The tokenizer: an int32, then for each token a float32 score, an int32 length and its bytes. A text gets a space in
front, falls into characters (or bytes, token 3 + byte, where a character is no token), and the neighbours whose union
has the best score are joined until none is a token.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.artifact import ForjaError
from components.model.checkpoint import Marks
from components.model.gpt import GPTConfig

HEADER, NEWER = struct.Struct("<7i"), 0x616B3432  # the number that the later versions of the format begin with
UNKNOWN, START, END, BYTES = 0, 1, 2, 3  # the ids of three marks, and of byte 0
AROUND = Marks(START, (END,))
LARGEST = 1 << 24  # no number of the header is beyond that


def read_config(path: Path) -> GPTConfig:
    """The shape that the file's first bytes tell. Raises ForjaError where they and the file's size do not fit."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(HEADER.size)
    if len(head) < HEADER.size:
        raise ForjaError(f"{path}: {size} bytes are too few for a llama2.c model; fetch it again")
    if int.from_bytes(head[:4], "little") == NEWER:
        raise ForjaError(
            f"{path}: a later version of llama2.c's format; export it as version 0 or as a Hugging Face folder"
        )
    width, mlp_width, layers, heads, kv_heads, vocab, context = HEADER.unpack(head)
    numbers = (width, mlp_width, layers, heads, kv_heads, abs(vocab), context)
    sound = all(0 < n < LARGEST for n in numbers) and width % heads == 0 and heads % kv_heads == 0
    if not sound or width // heads % 2:
        raise ForjaError(f"{path}: {list(numbers)} is no header of a llama2.c model; name its .bin")
    config = GPTConfig(
        context=context,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=width // heads,
        mlp_width=mlp_width,
        block="pre",
        norm="rms",
        norm_eps=1e-5,
        positions="rotary",
        rope_theta=10000.0,
        rope_scaling=None,
        activation="swiglu",
        window=None,
        qk_norm=False,
        bias="none",
        tied=vocab > 0,
        logit_cap=None,
        smear=False,
        residual_init="scaled",
        vocab_size=abs(vocab),
        head="lm",
    )
    wanted = _layout(config)[1]
    if size != wanted:
        raise ForjaError(f"{path}: {size} bytes, and its header wants {wanted}; fetch it again")
    return config


def _layout(c: GPTConfig) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """{tensor: (byte it begins at, shape)} in the file's order, and the bytes of the whole file."""
    kv = c.kv_heads * c.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (c.vocab_size, c.width),
        "norm1": (c.layers, c.width),
        "q": (c.layers, c.width, c.width),
        "k": (c.layers, kv, c.width),
        "v": (c.layers, kv, c.width),
        "out": (c.layers, c.width, c.width),
        "norm2": (c.layers, c.width),
        "gate": (c.layers, c.mlp_width, c.width),
        "down": (c.layers, c.width, c.mlp_width),
        "up": (c.layers, c.mlp_width, c.width),
        "norm": (c.width,),
        "angles": (2, c.context, c.head_width // 2),  # cosines and sines: not needed
        **({} if c.tied else {"head": (c.vocab_size, c.width)}),
    }
    found, at = {}, HEADER.size
    for name, shape in shapes.items():
        found[name] = (at, shape)
        at += 4 * int(np.prod(shape, dtype=np.int64))
    return found, at


def tensor_of(path: Path, config: GPTConfig, ours: str) -> Tensor:
    """One tensor by our name, float32, read from the file when it is asked for."""
    layout = _layout(config)[0]

    def read(name: str, layer: int | None = None) -> Tensor:
        at, shape = layout[name]
        whole = np.memmap(path, dtype="<f4", mode="r", offset=at, shape=shape)
        return torch.from_numpy(np.array(whole if layer is None else whole[layer], dtype=np.float32))

    if not ours.startswith("blocks."):
        return read({"wte.weight": "embedding", "norm.weight": "norm", "head.weight": "head"}[ours])
    _, number, rest = ours.split(".", 2)
    layer = int(number)
    match rest.removesuffix(".weight"):
        case "attention.qkv":
            q, k = _halves(read("q", layer), config.heads), _halves(read("k", layer), config.kv_heads)
            return torch.cat((q, k, read("v", layer)))
        case "mlp.up":
            return torch.cat((read("gate", layer), read("up", layer)))
        case name:
            return read(name.removeprefix("attention.").removeprefix("mlp."), layer)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order 0, 2, 4 ... 1, 3, 5: neighbours that turn together stand half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_pieces(path: Path, vocab_size: int) -> tuple[list[str], list[float]]:
    """The tokens' texts and scores. Raises ForjaError where the file is cut off, too long or holds no UTF-8."""
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 <= length <= len(data) - at:
                raise ValueError(f"token {len(pieces)} is {length} bytes long")
            pieces.append(data[at : at + length].decode())
            scores.append(score)
            at += length
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes are left behind token {vocab_size - 1}")
        if len(set(pieces)) < vocab_size:
            raise ValueError(f"{next(p for p in pieces if pieces.count(p) > 1)!r} is there twice")
        if pieces[BYTES : BYTES + 256] != [f"<0x{byte:02X}>" for byte in range(256)]:
            raise ValueError("the tokens 3 to 258 are not the bytes")
        if not np.isfinite(scores).all():
            raise ValueError("a score is not finite")
    except (struct.error, ValueError) as e:
        raise ForjaError(f"{path}: no tokenizer.bin of {vocab_size} tokens ({e}); name the one of this model") from None
    return pieces, scores


def tokenizer_json(pieces: list[str], scores: list[float]) -> str:
    """A tokenizer.json that cuts every text as llama2.c does.

    Joining by score is a byte-pair encoding whose merges are all ways to make a token of two, best score first. The
    marks are made by none of them.
    """
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted(range(BYTES + 256, len(pieces)), key=lambda i: (-scores[i], i)):
        cuts = ((pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i])))
        merges += [[a, b] for a, b in cuts if min(ids.get(a, 0), ids.get(b, 0)) >= BYTES + 256]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    marks = [{"id": i, "content": pieces[i], "special": True, **plain} for i in (UNKNOWN, START, END)]
    start = {"SpecialToken": {"id": pieces[START], "type_id": 0}}
    whole: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": marks,
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {pieces[START]: {"id": pieces[START], "ids": [START], "tokens": [pieces[START]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[UNKNOWN],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
    return json.dumps(whole, ensure_ascii=False, indent=1)
