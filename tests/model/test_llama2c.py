"""llama2.c's files, against a plain forward pass and a slow encoder, both written out here from the format alone."""

import json
import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from components.artifact import ForjaError
from components.data.chat import encode_text
from components.model import llama2c
from components.model.checkpoint import load, marks_of
from components.model.generate import generate
from components.model.gpt import KVCache
from components.model.interop import export_model, import_model

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
DREAMS = DATA / "aidreams260K"
needs_dreams = pytest.mark.skipif(not DREAMS.is_dir(), reason="shared/data/aidreams260K is not there")
WIDTH, MLP, LAYERS, HEADS, KV, VOCAB, CONTEXT = 64, 172, 4, 4, 4, 512, 128


class Plain:
    """The forward pass of a llama2.c model, one token at a time, in float32 numpy: pairs turn, nothing is batched."""

    def __init__(self, data: bytes) -> None:
        head = struct.unpack("<7i", data[:28])
        self.width, mlp, self.layers, self.heads, self.kv, vocab, context = head
        self.size = self.width // self.heads
        kv, n, w, vocab_size = self.kv * self.size, self.layers, self.width, abs(vocab)
        floats, at = np.frombuffer(data, dtype="<f4", offset=28), 0

        def take(*shape: int) -> np.ndarray:
            nonlocal at
            at += math.prod(shape)
            return floats[at - math.prod(shape) : at].reshape(shape)

        self.embedding, self.norm1 = take(vocab_size, w), take(n, w)
        self.wq, self.wk, self.wv, self.wo = take(n, w, w), take(n, kv, w), take(n, kv, w), take(n, w, w)
        self.norm2, self.w1, self.w2, self.w3 = take(n, w), take(n, mlp, w), take(n, w, mlp), take(n, mlp, w)
        self.norm = take(w)
        take(2, context, self.size // 2)
        self.head = take(vocab_size, w) if vocab < 0 else self.embedding
        assert at == len(floats)
        self.keys: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.values: list[list[np.ndarray]] = [[] for _ in range(n)]

    @staticmethod
    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * (x / np.sqrt(np.mean(x * x) + np.float32(1e-5)))

    def turned(self, x: np.ndarray, position: int) -> np.ndarray:
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000.0 ** ((i % self.size) / self.size)
            a, b, cos, sin = x[i], x[i + 1], np.float32(math.cos(angle)), np.float32(math.sin(angle))
            x[i], x[i + 1] = a * cos - b * sin, a * sin + b * cos
        return x

    def step(self, token: int, position: int) -> np.ndarray:
        """The logits behind `token`, which stands at `position`."""
        x = self.embedding[token].copy()
        for n in range(self.layers):
            h = self.rms(x, self.norm1[n])
            q = self.turned(self.wq[n] @ h, position)
            self.keys[n].append(self.turned(self.wk[n] @ h, position))
            self.values[n].append(self.wv[n] @ h)
            out = np.zeros_like(q)
            for head in range(self.heads):
                mine = slice(head * self.size, (head + 1) * self.size)
                shared = head // (self.heads // self.kv)
                theirs = slice(shared * self.size, (shared + 1) * self.size)
                scores = np.array([q[mine] @ k[theirs] for k in self.keys[n]]) / np.float32(math.sqrt(self.size))
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                for weight, v in zip(weights, self.values[n], strict=True):
                    out[mine] += weight * v[theirs]
            x += self.wo[n] @ out
            h = self.rms(x, self.norm2[n])
            gate = self.w1[n] @ h
            x += self.w2[n] @ (gate / (1 + np.exp(-gate)) * (self.w3[n] @ h))
        logits: np.ndarray = self.head @ self.rms(x, self.norm)
        return logits


def slow_encode(pieces: list[str], scores: list[float], text: str) -> list[int]:
    """llama2.c's encoder as its format tells it: a space, characters or bytes, the best join again and again."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokens = [ids[" "]] if text else []
    for character in text:
        tokens += [ids[character]] if character in ids else [3 + byte for byte in character.encode()]
    while True:
        best, at, joined = -1e10, -1, -1
        for i in range(len(tokens) - 1):
            found = ids.get(pieces[tokens[i]] + pieces[tokens[i + 1]])
            if found is not None and scores[found] > best:
                best, at, joined = scores[found], i, found
        if at < 0:
            return tokens
        tokens[at : at + 2] = [joined]


def write_model(path: Path, *, kv: int = 2, shared: bool = True, seed: int = 0) -> bytes:
    """A small random model in the format."""
    rng = np.random.default_rng(seed)
    width, mlp, layers, heads, vocab, context = 16, 24, 2, 4, 300, 32
    size = width // heads
    shapes = [(vocab, width), (layers, width), (layers, width, width), (layers, kv * size, width)]
    shapes += [(layers, kv * size, width), (layers, width, width), (layers, width), (layers, mlp, width)]
    shapes += [(layers, width, mlp), (layers, mlp, width), (width,), (2, context, size // 2)]
    shapes += [] if shared else [(vocab, width)]
    data = struct.pack("<7i", width, mlp, layers, heads, kv, vocab if shared else -vocab, context)
    data += b"".join((rng.standard_normal(s) * 0.4).astype("<f4").tobytes() for s in shapes)
    path.write_bytes(data)
    return data


def write_tokenizer(path: Path, learnt: dict[str, float]) -> bytes:
    """A tokenizer.bin of the three marks, the bytes and `learnt`, filled up to 300 tokens."""
    pieces = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]
    pieces += learnt.items()
    pieces += [(chr(0x4E00 + i), -1000.0 - i) for i in range(300 - len(pieces))]
    encoded = [(score, text.encode()) for text, score in pieces]
    data = struct.pack("<i", max(len(text) for _, text in encoded))
    data += b"".join(struct.pack("<fi", score, len(text)) + text for score, text in encoded)
    path.write_bytes(data)
    return data


LEARNT = {"ab": -1.0, " a": -2.0, "abc": -3.0, "bc": -4.0, "  ": -5.0, "    ": -6.0, "é": -20.0, "ca": -7.0}
LEARNT |= {c: -100.0 - i for i, c in enumerate(" abc<s>x0")}


@pytest.mark.parametrize(("kv", "shared"), [(4, True), (2, False), (1, True)])
def test_a_random_model_of_each_kind(kv: int, shared: bool, tmp_path: Path) -> None:
    data = write_model(tmp_path / "m.bin", kv=kv, shared=shared)
    write_tokenizer(tmp_path / "t.bin", LEARNT)
    import_model(tmp_path / "m.bin", tmp_path / "ours", tmp_path / "t.bin")
    model, tokenizer, _ = load(tmp_path / "ours", "cpu")
    assert marks_of(tmp_path / "ours", tokenizer) == (1, (2,)) and model.config.tied is shared
    plain, ids = Plain(data), torch.randint(0, 300, (1, 32))
    want = np.stack([plain.step(token, position) for position, token in enumerate(ids[0].tolist())])
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], torch.from_numpy(want), atol=1e-4, rtol=1e-4)
    assert want.std() > 0.5


@needs_dreams
def test_aidreams_continues_as_the_plain_pass_does(tmp_path: Path) -> None:
    import_model(DREAMS / "aidreams260K.bin", tmp_path / "ours", DREAMS / "tok512.bin")
    model, tokenizer, _ = load(tmp_path / "ours", "cpu")
    pieces, scores = llama2c.read_pieces(DREAMS / "tok512.bin", 512)
    for prompt in ("", "I was walking", "The sky turned"):
        tokens = [1, *slow_encode(pieces, scores, prompt)]
        assert tokens[1:] == encode_text(tokenizer, prompt)
        plain = Plain((DREAMS / "aidreams260K.bin").read_bytes())
        logits = [plain.step(token, position) for position, token in enumerate(tokens)]
        whole = list(tokens)
        while len(whole) < CONTEXT:
            whole.append(int(logits[-1].argmax()))
            logits.append(plain.step(whole[-1], len(whole) - 1))
        with torch.no_grad():
            ours = model(torch.tensor([whole]))[0]
            cache = KVCache(model.config, 1, CONTEXT, model.wte.weight)
            stepped = torch.cat([model(torch.tensor([[t]]), cache=cache)[0] for t in whole])
        want = torch.from_numpy(np.stack(logits))
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=0)
        torch.testing.assert_close(stepped, want, atol=1e-4, rtol=0)
        said = generate(model, [tokens], max_new_tokens=CONTEXT - len(tokens), stop=512)[0]
        assert said == whole[len(tokens) :] and len(said) > 110
    assert len(tokenizer.decode(said)) > 200


def texts() -> list[str]:
    """Prose, code, other alphabets, runs of spaces, and what a user may type to break things."""
    rng = random.Random(3)
    found = [
        "",
        " ",
        "  ",
        "a",
        "\n",
        "\n<s>\n",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "é ñ 🦙 中文",
        "\x00\x7f\u2028",
        "▁the",
    ]
    found += [" " * n for n in range(3, 40)] + [" " * n + "the" + " " * n for n in range(12)]
    found += ["a" * n for n in range(30)] + ["ab" * n for n in range(20)] + ["in the dream I was " * n for n in (1, 7)]
    letters = "etaoin shrdlu   .,'IT\n°"
    found += ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 60))) for _ in range(1500)]
    return found


@needs_dreams
def test_the_tokenizer_cuts_as_llama2c_does() -> None:
    pieces, scores = llama2c.read_pieces(DREAMS / "tok512.bin", 512)
    tokenizer = Tokenizer.from_str(llama2c.tokenizer_json(pieces, scores))
    prose = DATA / "tinyshakespeare" / "input.txt"
    lines = prose.read_text().split("\n")[:1500] if prose.is_file() else []
    strings = DATA / "naughty_strings" / "blns.json"
    odd = json.loads(strings.read_text()) if strings.is_file() else []
    rng = random.Random(5)
    joined = ["".join(rng.choice(pieces[259:]) for _ in range(rng.randrange(1, 12))) for _ in range(3000)]
    for text in [*texts(), *lines, *odd, *joined]:
        ids = encode_text(tokenizer, text)
        assert ids == slow_encode(pieces, scores, text), repr(text)
        assert tokenizer.decode(ids) == text
        assert min(ids, default=3) >= 3  # none of the marks, whatever the text says
    assert tokenizer.encode("a dream").ids == [1, *encode_text(tokenizer, "a dream")]


def test_ties_and_chains(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t.bin", LEARNT)
    pieces, scores = llama2c.read_pieces(tmp_path / "t.bin", 300)
    tokenizer = Tokenizer.from_str(llama2c.tokenizer_json(pieces, scores))
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choice("abc  x<s>é") for _ in range(rng.randrange(0, 24)))
        assert encode_text(tokenizer, text) == slow_encode(pieces, scores, text), repr(text)


def test_an_import_goes_on_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = write_model(tmp_path / "m.bin", shared=False)
    write_tokenizer(tmp_path / "t.bin", LEARNT)
    import_model(tmp_path / "m.bin", tmp_path / "ours", tmp_path / "t.bin")
    assert export_model(tmp_path / "ours", tmp_path / "theirs") == "llama"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    opened = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ids = opened("abc  ca é")["input_ids"]
    assert ids == [1, *slow_encode(*llama2c.read_pieces(tmp_path / "t.bin", 300), "abc  ca é")]
    assert opened.decode(ids, skip_special_tokens=True) == "abc  ca é"
    plain = Plain(data)
    want = np.stack([plain.step(token, position) for position, token in enumerate(ids)])
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, torch.from_numpy(want), atol=1e-4, rtol=1e-4)


def test_broken_files_are_said(tmp_path: Path) -> None:
    model, tokens = tmp_path / "m.bin", tmp_path / "t.bin"
    data, pieces = write_model(model), write_tokenizer(tokens, LEARNT)

    def error(tokenizer: Path | None = tokens) -> str:
        with pytest.raises(ForjaError) as e:
            import_model(model, tmp_path / "ours", tokenizer)
        assert not (tmp_path / "ours").exists()
        return str(e.value)

    assert "give --tokenizer FILE" in error(None)
    for broken, said in [
        (data[:20], "20 bytes are too few"),
        (data[:-4], f"{len(data) - 4} bytes, and its header wants {len(data)}"),
        (data + b"\0\0\0\0", f"{len(data) + 4} bytes, and its header wants"),
        (struct.pack("<I", 0x616B3432) + data, "a later version of llama2.c's format"),
        (struct.pack("<7i", 16, 24, 2, 3, 2, 300, 32) + data[28:], "is no header"),
        (struct.pack("<7i", 16, 24, 2, 4, 3, 300, 32) + data[28:], "is no header"),
        (struct.pack("<7i", 16, 24, 2, 4, 2, 0, 32) + data[28:], "is no header"),
        (struct.pack("<7i", 16, -24, 2, 4, 2, 300, 32) + data[28:], "is no header"),
        (struct.pack("<7i", *[1 << 30] * 7) + data[28:], "is no header"),
        (b"PK\x03\x04" + data[4:], "is no header"),
        (data[:40] + struct.pack("<f", float("nan")) + data[44:], "holds NaN"),
    ]:
        model.write_bytes(broken)
        assert said in error(), said
    model.write_bytes(data)
    for broken, said in [
        (pieces[:-3], "token 299 is 3 bytes long"),
        (pieces[:-9], "unpack_from requires"),
        (pieces + b"x", "1 bytes are left behind token 299"),
        (b"", "unpack_from requires"),
        (pieces[:8] + struct.pack("<i", -5) + pieces[12:], "token 0 is -5 bytes long"),
        (pieces[:12] + b"\xff\xfe" + pieces[14:], "can't decode"),
        (pieces[:4] + struct.pack("<f", float("nan")) + pieces[8:], "a score is not finite"),
        (pieces.replace(b"<0x41>", b"<0x42>"), "'<0x42>' is there twice"),
        (pieces.replace(b"<0x41>", b"<0xZZ>"), "the tokens 3 to 258 are not the bytes"),
    ]:
        tokens.write_bytes(broken)
        assert said in error() and "no tokenizer.bin of 300 tokens" in error(), said
