"""What the tests of other people's checkpoints share: small random models of transformers', and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB = 300
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
COMMON |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SHARP = YARN | {"rope_theta": 10.0, "attention_factor": 1.4, "beta_fast": 1.0, "beta_slow": 0.1}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=2),
    "gpt2-free": GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=40, tie_word_embeddings=False
    ),
    "llama": LlamaConfig(**COMMON),
    "llama-tied-wide": LlamaConfig(**COMMON, head_dim=12, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama-attention-biases": LlamaConfig(**COMMON, attention_bias=True),
    "llama-linear": LlamaConfig(**COMMON, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}),
    "llama-dynamic": LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 3.0}
    ),
    "llama3": LlamaConfig(**COMMON, rope_parameters=LLAMA3),
    "llama-yarn": LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama-yarn-sharp": LlamaConfig(**COMMON, rope_parameters=SHARP),
    "llama-yarn-mscale": LlamaConfig(**COMMON, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}),
    "mistral": MistralConfig(**COMMON, sliding_window=7),
    "mistral-whole": MistralConfig(**COMMON | {"hidden_size": 30}, sliding_window=None, head_dim=10),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=0),
    "qwen2-yarn": Qwen2Config(**COMMON, rope_parameters=YARN),
    "qwen3": Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "qwen3-biases": Qwen3Config(**COMMON, head_dim=8, attention_bias=True),
    "qwen3-window": Qwen3Config(
        **COMMON | {"num_key_value_heads": 4},
        head_dim=8,
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=0,
    ),
}


def tokenizer() -> Tokenizer:
    """A byte-level BPE with a start and an end of its own, and nothing of forja's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 5,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox and the lazy dog, again and again"] * 3, trainer)
    return made


def random_model(config: Any) -> PreTrainedModel:
    """A model whose every parameter is random: biases, norms and all, so that none can be forgotten unseen."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 1.0 if "norm" in name or "ln_" in name else 0.0
            p.copy_(spread + 0.15 * torch.randn_like(p))
    return model


def saved(model: PreTrainedModel, folder: Path, **how: Any) -> Path:
    """As the model's makers would publish it, with a tokenizer and what else lies beside."""
    model.save_pretrained(folder, **how)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "odd": "ñ"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "special_tokens_map.json").write_text('{"bos_token":  "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
    )
    return folder
