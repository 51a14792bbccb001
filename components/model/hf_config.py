"""config.json of GPT-2, Llama, Mistral, Qwen2 and Qwen3 as a shape of our one GPT, and back.

Nothing is guessed: what our GPT cannot compute exactly is refused, with the key that stands in the way.
"""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from components.artifact import ForjaError
from components.model.gpt import GPTConfig

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
CONFIG = "config.json"
Read = tuple[dict[str, Any], list[str]]  # our shape, and what is wrong


def read_config(folder: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """Our shape of the model in `folder`, and what its config.json says."""
    raw = read_json(folder / CONFIG)
    return to_gpt(raw, folder / CONFIG), raw


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ForjaError where the file is missing or holds something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ForjaError(f"{path}: missing; name a folder as Hugging Face's save_pretrained writes it") from None
    except (ValueError, RecursionError) as e:
        raise ForjaError(f"{path}: not JSON ({str(e).splitlines()[0]}); fetch it again") from None
    if not isinstance(value, dict):
        raise ForjaError(f"{path}: a JSON object is wanted; fetch it again")
    return value


def to_gpt(c: dict[str, Any], path: Path) -> GPTConfig:
    """The shape that a config.json describes. Raises ForjaError for each thing that our GPT does not compute."""
    family = c.get("model_type")
    if family not in FAMILIES:
        raise ForjaError(
            f"{path}: model_type {family!r} is none of {', '.join(FAMILIES)}; forja's GPT has no such shape"
        )
    try:
        shape, wrong = _gpt2_in(c) if family == "gpt2" else _llama_in(c, family)
        shape |= {"vocab_size": c["vocab_size"], "block": "pre", "logit_cap": None, "smear": False, "head": "lm"}
    except KeyError as e:
        raise ForjaError(f"{path}: {e.args[0]}: missing; fetch the file again") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, AttributeError) as e:
        raise ForjaError(f"{path}: its values are not those of a {family} ({e}); fetch the file again") from None
    if c.get("quantization_config"):
        wrong.append("quantization_config: the weights are quantized; take the model that they were made from")
    if wrong:
        raise ForjaError("\n".join(f"{path}: {line}" for line in wrong))
    try:
        return GPTConfig.model_validate(shape | {"residual_init": "scaled"})
    except ValidationError as e:
        lines = [f"{path}: as our {'.'.join(map(str, x['loc'])) or 'shape'}: {x['msg']}" for x in e.errors()]
        raise ForjaError("\n".join(lines)) from None


def _gpt2_in(c: dict[str, Any]) -> Read:
    width, heads = c["n_embd"], c["n_head"]
    wrong = _unless(c, "activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    wrong += _unless(c, "scale_attn_weights", True, default=True)
    wrong += _unless(c, "scale_attn_by_inverse_layer_idx", False, default=False)
    wrong += _unless(c, "add_cross_attention", False, default=False)
    return {
        "context": c["n_positions"] if "n_positions" in c else c["n_ctx"],
        "layers": c["n_layer"],
        "width": width,
        "heads": heads,
        "kv_heads": heads,
        "head_width": width // heads,
        "mlp_width": c.get("n_inner") or 4 * width,
        "norm": "layer",
        "norm_eps": c.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "activation": "gelu",
        "window": None,
        "qk_norm": False,
        "bias": "all",
        "tied": c.get("tie_word_embeddings", True),
    }, wrong


def _llama_in(c: dict[str, Any], family: str) -> Read:
    width, heads, layers = c["hidden_size"], c["num_attention_heads"], c["num_hidden_layers"]
    wrong = _unless(c, "hidden_act", "silu", "swish", default="silu")
    scaling, theta, more = _rope_in(c)
    window, others = _window_in(c, family, layers)
    bias, biased = _bias_in(c, family)
    kv_heads = c.get("num_key_value_heads", {"mistral": 8, "llama": heads}.get(family, 32))
    return {
        "context": c["max_position_embeddings"],
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_width": c.get("head_dim") or (128 if family == "qwen3" else width // heads),
        "mlp_width": c["intermediate_size"],
        "norm": "rms",
        "norm_eps": c.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "activation": "swiglu",
        "window": window,
        "qk_norm": family == "qwen3",
        "bias": bias,
        "tied": c.get("tie_word_embeddings", False),
    }, wrong + more + others + biased


def _unless(c: dict[str, Any], key: str, *allowed: Any, default: Any) -> list[str]:
    value = c.get(key, default)
    return (
        [] if value in allowed else [f"{key}: {value!r}, and our GPT computes {' or '.join(map(repr, allowed))} only"]
    )


def _bias_in(c: dict[str, Any], family: str) -> tuple[str, list[str]]:
    """Qwen2 has biases at queries, keys and values always, Mistral none."""
    if family == "qwen2":
        return "qkv", []
    attention = family in ("llama", "qwen3") and bool(c.get("attention_bias", False))
    mlp = family == "llama" and bool(c.get("mlp_bias", False))
    if attention:
        return "all" if mlp else "attention", []
    return "none", ["mlp_bias: our GPT has biases at the MLP only where it has them at attention too"] if mlp else []


def _window_in(c: dict[str, Any], family: str, layers: int) -> tuple[int | None, list[str]]:
    """The window that all layers share, or None."""
    if family == "llama":
        return None, []
    if family == "mistral":
        window, default = c.get("sliding_window", 4096), "sliding_attention"
    else:
        window, default = (c.get("sliding_window", 4096) if c.get("use_sliding_window", False) else None), "by layer"
    kinds = c.get("layer_types")
    if kinds is None:
        first = c.get("max_window_layers", 28) if default == "by layer" else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if window is None or set(kinds) == {"full_attention"}:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        return None, [f"layer_types: {unknown[0]!r} is no attention of our GPT's"] if unknown else []
    if set(kinds) != {"sliding_attention"}:
        key = "layer_types" if c.get("layer_types") else "max_window_layers"
        return window, [f"{key}: some layers have a window and some have none; our GPT has one for all or none"]
    return window, []


def _rope_in(c: dict[str, Any]) -> tuple[dict[str, Any] | None, float, list[str]]:
    """(scaling, theta, what is wrong), as transformers 5 writes them (`rope_parameters`) or as 4 did: where a file has
    both, transformers reads the older.

    `dynamic` scaling begins behind `max_position_embeddings`, which is our context: up to there it is none."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    wrong = _unless({**c, **rope}, "partial_rotary_factor", 1, None, default=1)
    original = (
        c.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or c["max_position_embeddings"]
    )
    if any(isinstance(value, dict) for value in rope.values()):
        return None, theta, ["rope_parameters: one set for each kind of layer; our GPT has one for all"]
    if kind == "linear":
        return {"kind": kind, "factor": rope["factor"]}, theta, wrong
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": kind, **{k: rope[k] for k in keys}, "original_context": original}, theta, wrong
    if kind == "yarn":
        wrong += _unless(rope, "truncate", True, default=True)
        factor = rope["factor"] or c["max_position_embeddings"] / original
        sharpened = rope.get("attention_factor")
        if sharpened is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            mscale = [0.1 * rope[k] * math.log(factor) + 1 if factor > 1 else 1.0 for k in ("mscale", "mscale_all_dim")]
            sharpened = mscale[0] / mscale[1]
        betas = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
        scaling = {"kind": kind, "factor": factor, "original_context": original, "attention_factor": sharpened, **betas}
        return scaling, theta, wrong
    if kind not in ROPES:
        wrong.append(f"rope_type: {kind!r} is none of {', '.join(ROPES)}")
    return None, theta, wrong


def from_gpt(config: GPTConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    """(family, config.json) of the family that computes this shape. Raises ForjaError naming the options in the way."""
    learned = config.positions == "learned"
    wanted: dict[str, Any] = {"head": "lm", "block": "pre", "smear": False, "logit_cap": None}
    wanted |= {"norm": "layer" if learned else "rms", "activation": "gelu" if learned else "swiglu"}
    if learned:
        family = "gpt2"
        wanted |= {"bias": "all", "qk_norm": False, "window": None, "kv_heads": config.heads}
        wanted |= {"head_width": config.width // config.heads}
    elif config.qk_norm:
        family, wanted["bias"] = "qwen3", "attention" if config.bias == "attention" else "none"
    elif config.bias == "qkv":
        family = "qwen2"
    elif config.bias in ("all", "attention"):
        family, wanted["window"] = "llama", None
    else:
        family = "mistral" if config.window or config.width % config.heads else "llama"
    way = [f"{k} {getattr(config, k)}, wants {v}" for k, v in wanted.items() if getattr(config, k) != v]
    if way:
        among = "gpt2" if learned else "llama, mistral, qwen2 and qwen3"
        raise ForjaError(f"{folder}: no family of Hugging Face's ({among}) has this shape: {'; '.join(way)}")
    if not learned:
        return family, _llama_out(config, family)
    return family, {
        "model_type": family,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def _llama_out(config: GPTConfig, family: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` by the names that transformers 4 and 5 and the other runtimes all read."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    out: dict[str, Any] = {
        "model_type": family,
        "architectures": [f"{names[family]}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
    }
    if family == "llama":
        out |= {"attention_bias": config.bias != "none", "mlp_bias": config.bias == "all"}
    else:
        out["sliding_window"] = config.window
    if family == "qwen3":
        out["attention_bias"] = config.bias == "attention"
    if family.startswith("qwen"):
        out |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    if config.rope_scaling is not None:
        scaling = {k: v for k, v in config.rope_scaling.model_dump().items() if v is not None}
        kind, original = scaling.pop("kind"), scaling.pop("original_context", None)
        out["rope_scaling"] = {"rope_type": kind, **scaling}
        if original is not None:
            out["rope_scaling"]["original_max_position_embeddings"] = original
    return out
