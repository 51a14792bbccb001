"""A tiny random model with a byte-level tokenizer, as a checkpoint folder."""

from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from components.data.chat import SPECIAL
from components.model import checkpoint
from components.model.gpt import GPT, GPTConfig

GPT_PRESET = Path(__file__).parents[2] / "conf" / "models" / "gpt.yaml"
PROMPTS = {
    "en": {"user": "Instruction: {content}\n", "assistant": "Response:"},
    "es": {"user": "Instrucción: {content}\n", "assistant": "Respuesta:"},
}


def make_tokenizer() -> Tokenizer:
    """The 256 bytes, a few merges and the special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=288,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the answer is the answer, la respuesta es la respuesta"] * 4, trainer)
    return tokenizer


def make_model(tokenizer: Tokenizer, *, seed: int, head: str = "lm", tied: bool = True, context: int = 64) -> GPT:
    torch.manual_seed(seed)
    small = {"context": context, "layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "head_width": 16, "mlp_width": 64}
    shape = yaml.safe_load(GPT_PRESET.read_text()) | small | {"tied": tied}
    config = GPTConfig(**shape, vocab_size=tokenizer.get_vocab_size(), head=head)
    model = GPT(config)
    for p in model.parameters():  # larger than at the start of a training, so that the tokens' probabilities differ
        p.data += 0.15 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="session")
def prompts() -> dict[str, dict[str, str]]:
    return PROMPTS


@pytest.fixture(scope="session")
def random_model(tokenizer: Tokenizer):
    """A function that makes a small random model."""
    return lambda **options: make_model(tokenizer, **options)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def save_checkpoint(tmp_path: Path, tokenizer: Tokenizer):
    """A function that writes a random model as a checkpoint folder and returns the folder."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))

    def save(name: str, *, seed: int, prompts: bool = True, **shape: object) -> Path:
        folder = tmp_path / name
        checkpoint.save(make_model(tokenizer, seed=seed, **shape), folder, path, PROMPTS if prompts else None)
        return folder

    return save
