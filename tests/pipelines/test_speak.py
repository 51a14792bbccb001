"""`forja generate`: the text as it comes, with its settings."""

from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from components.artifact import ForjaError
from components.data import chat
from components.model.checkpoint import load, save
from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig
from pipelines.cli import app
from pipelines.generate import speak, stripped

ROOT = Path(__file__).parents[2]
PROMPTS = {"en": {"user": "Q: {content}\n", "assistant": "A:"}}
ASKED = {"max_new_tokens": 40, "temperature": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over bytes: what it says is mostly broken characters, which makes the hardest stream."""
    made = tmp_path_factory.mktemp("model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(chat.SPECIAL)
    tokenizer.save(str(made / "bytes.json"))
    shape = yaml.safe_load((ROOT / "conf" / "models" / "gpt.yaml").read_text())
    small = {"context": 96, "layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "head_width": 16, "mlp_width": 64}
    torch.manual_seed(1)
    model = GPT(GPTConfig(**shape | small, vocab_size=tokenizer.get_vocab_size(), head="lm"))
    save(model, made / "sft", made / "bytes.json", PROMPTS)
    return made / "sft"


def test_the_pieces_are_the_text(folder: Path) -> None:
    model, tokenizer, prompts = load(folder, "cpu")
    ids = chat.encode_prompt(tokenizer, [{"role": "user", "content": "¿qué?"}], prompts["en"])
    end, call = chat.special(tokenizer, chat.END), chat.special(tokenizer, chat.CALL)
    for seed in range(6):
        tokens = generate(model, [ids], stop=end, seed=seed, alone=True, **ASKED)[0]
        pieces = list(speak(ROOT, "¿qué?", folder, "en", False, seed=seed, **ASKED))
        if tokens.count(call) < 2:
            assert "".join(pieces) == chat.answer_text(tokenizer, tokens)
        assert len(pieces) > 5


def test_blanks_at_both_ends_go() -> None:
    assert list(stripped(iter([" ", "", "\n a", " ", " b", " ", ""]))) == ["a", "  b"]
    assert list(stripped(iter(["  "]))) == []


def test_a_stop_string_ends_the_text(folder: Path) -> None:
    free = "".join(speak(ROOT, "x", folder, "en", True, seed=3, **ASKED))
    stop = free[4:6]
    asked = ["generate", "x", "--model", str(folder), "--raw", "--seed", "3", "--temperature", "1.5"]
    said = CliRunner().invoke(app, [*asked, "--max-tokens", "40", "--stop", stop])
    assert said.exit_code == 0
    assert said.stdout == free[: free.find(stop)] + "\n"


def test_the_settings_reach_the_model(folder: Path) -> None:
    asked = ["generate", "x", "--model", str(folder), "--raw", "--max-tokens", "12", "--seed", "1"]

    def say(*more: str) -> str:
        return CliRunner().invoke(app, [*asked, *more]).stdout

    greedy, free = say(), say("--temperature", "1.5")
    assert greedy != free
    for narrow in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert say("--temperature", "1.5", *narrow) == greedy
    assert say("--repetition-penalty", "1000") != greedy


def test_mistakes(folder: Path) -> None:
    with pytest.raises(ForjaError, match="PROMPT"):
        next(speak(ROOT, "", folder, "en", False, **ASKED))
    with pytest.raises(ForjaError, match="--lang xx"):
        next(speak(ROOT, "a", folder, "xx", False, **ASKED))
