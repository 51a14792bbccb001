"""`forja import`, `export`, `score` and `generate --raw` on models whose tokenizers are not forja's."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy import ROOT
from typer.testing import CliRunner

sys.path.append(str(ROOT / "tests" / "model"))
from foreign import CONFIGS, random_model, saved

from components.artifact import ForjaError
from components.data.chat import encode_text
from components.data.tokenize import train_bpe
from components.model.checkpoint import MARKS, load, save
from components.model.gpt import GPT, GPTConfig
from components.model.interop import import_model
from components.release import quantize
from pipelines import cli
from pipelines.generate import speak
from pipelines.score import read_text, score

TEXT = "the quick brown fox [and] año 🦙\n" * 12  # longer than the context of 64
SMALL = {"context": 48, "layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "mlp_width": 64}


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    import_model(saved(random_model(CONFIGS["llama"]), tmp_path / "theirs"), tmp_path / "ours")
    return tmp_path / "ours"


def slowly(folder: Path, start: int | None, context: int) -> list[float]:
    """One forward pass a token, each behind what its window shows of the text before it."""
    model, tokenizer, _ = quantize.load(folder, "cpu")
    tokens = [*([] if start is None else [start]), *encode_text(tokenizer, TEXT)]
    found, begin = [], 0
    for i in range(1, len(tokens)):
        if i - begin == context:  # the window is full: the next one begins half a context before
            begin = i - context // 2
        with torch.no_grad():
            logits = model(torch.tensor([tokens[begin:i]]))[0, -1].double()
        found.append(torch.log_softmax(logits, -1)[tokens[i]].item())
    return found


@pytest.mark.parametrize("context", [None, 20])
def test_each_token_is_scored_once(imported: Path, context: int | None) -> None:
    found = score(ROOT, TEXT, imported, context)
    want = slowly(imported, 1, context or 64)
    assert [row["logprob"] for row in found["token_logprobs"]] == pytest.approx(want, abs=1e-4)
    assert found["tokens"] == found["scored"] == len(want) > 100
    assert found["log_probability"] == pytest.approx(sum(want), abs=1e-2)
    assert found["bits_per_byte"] == pytest.approx(-sum(want) / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert found["conditioned_on"] == {"id": 1, "text": "<s>"}
    assert {"the", "[", "🦙"} <= {row["text"] for row in found["token_logprobs"]}


def test_a_model_without_a_start_leaves_the_first_token_out(imported: Path) -> None:
    (imported / MARKS).write_text('{"start": null, "ends": []}')
    found = score(ROOT, TEXT, imported, None)
    assert found["conditioned_on"] is None and found["scored"] == found["tokens"] - 1
    assert found["token_logprobs"][0]["logprob"] is None
    want = slowly(imported, None, 64)
    assert [row["logprob"] for row in found["token_logprobs"][1:]] == pytest.approx(want, abs=1e-4)
    assert "".join(speak(ROOT, "the fox", imported, "en", raw=True, max_new_tokens=10))


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A model of forja's own, as pretraining leaves it."""
    torch.manual_seed(3)
    tokenizer = train_bpe([TEXT], 300, 1)
    tokenizer.save(str(tmp_path / "t.json"))
    preset = yaml.safe_load((ROOT / "conf" / "models" / "demo.yaml").read_text())
    model = GPT(GPTConfig(**{**preset, **SMALL}, vocab_size=tokenizer.get_vocab_size(), head="lm"))
    save(model, tmp_path / "own", tmp_path / "t.json")
    return tmp_path / "own"


def test_our_own_and_quantized_checkpoints(ours: Path, tmp_path: Path) -> None:
    small = quantize.quantized(load(ours, "cpu").model, "int8", 16)
    quantize.save(small, tmp_path / "int8", ours, "int8", 16)
    for folder in (ours, tmp_path / "int8"):
        found = score(ROOT, TEXT, folder, None)
        want = slowly(folder, 0, 48)
        assert [row["logprob"] for row in found["token_logprobs"]] == pytest.approx(want, abs=1e-4)
        assert found["conditioned_on"] == {"id": 0, "text": "<|endoftext|>"}


def run(*arguments: str, text: str | None = None) -> str:
    done = CliRunner().invoke(cli.app, list(arguments), input=text)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = saved(random_model(CONFIGS["qwen3"]), tmp_path / "theirs")
    assert "2 layers, 32 wide, 300 tokens" in run("import", str(source), str(tmp_path / "ours"))
    assert "a qwen3 of Hugging Face's" in run("export", str(tmp_path / "ours"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    (tmp_path / "t.txt").write_text(TEXT)
    said = json.loads(run("score", str(tmp_path / "t.txt"), "--model", str(tmp_path / "ours"), "--json"))
    assert said["bytes"] == len(TEXT.encode()) and "token_logprobs" not in said
    whole = run("score", "-", "--model", str(tmp_path / "ours"), "--json", "--tokens", text=TEXT)
    assert json.loads(whole) == said | {"token_logprobs": json.loads(whole)["token_logprobs"]}
    shown = run("score", "-", "--model", str(tmp_path / "ours"), "--tokens", text=TEXT)
    assert "bits a byte" in shown and '"the"' in shown and '"["' in shown and "<s>" in shown
    assert run("generate", "the fox", "--model", str(tmp_path / "ours"), "--max-tokens", "5")
    with pytest.raises(ForjaError, match="ours: is there already"):
        run("import", str(source), str(tmp_path / "ours"))
    with pytest.raises(ForjaError, match="there is no such folder or file"):
        run("import", str(tmp_path / "nowhere"), str(tmp_path / "new"))


def test_what_cannot_be_scored_is_said(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.txt").write_bytes(b"a\xffb")
    (tmp_path / "empty.txt").write_bytes(b"")
    for file, said in (("bad.txt", "byte 1 is no UTF-8"), ("empty.txt", "empty"), ("none.txt", "name a file")):
        with pytest.raises(ForjaError, match=said):
            read_text(str(tmp_path / file))
    with pytest.raises(ForjaError, match="--context 65: the model sees 64 tokens"):
        score(ROOT, TEXT, imported, 65)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    assert read_text("-") == "hello"
