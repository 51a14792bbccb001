"""Hugging Face folders in and out, against transformers itself: the same logits, both ways."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import CONFIGS, VOCAB, random_model, saved, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from components.artifact import ForjaError, read_record
from components.data.chat import encode_prompt
from components.data.tokenize import train_bpe
from components.model.checkpoint import load, marks_of, save
from components.model.gpt import GPT, GPTConfig, KVCache
from components.model.interop import export_model, import_model

KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
KEPT += ("chat_template.jinja",)


@torch.no_grad()
def agree(ours: GPT, theirs: PreTrainedModel) -> None:
    """The same logits: of a batch, of rows of several lengths that they pad left and we right, and step by step."""
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # noqa: E731
    ids = torch.randint(0, VOCAB, (3, 40))
    whole = theirs(ids).logits
    assert whole.std() > 0.05  # otherwise 1e-4 would say little
    close(ours(ids), whole)

    lengths = (40, 23, 9)
    pairs = list(zip(ids, lengths, strict=True))
    left = torch.stack([torch.cat((torch.zeros(40 - n, dtype=torch.long), row[:n])) for row, n in pairs])
    seen = torch.stack([torch.arange(40) >= 40 - n for n in lengths]).long()
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    padded = theirs(left, attention_mask=seen, position_ids=positions).logits
    right = torch.stack([torch.cat((row[:n], torch.zeros(40 - n, dtype=torch.long))) for row, n in pairs])
    for row, n in enumerate(lengths):
        close(ours(right)[row, :n], padded[row, 40 - n :])
        close(ours(ids[row : row + 1, :n])[0], padded[row, 40 - n :])

    cache = KVCache(ours.config, 3, 40, ours.wte.weight)
    parts = [ours(ids[:, :17], cache=cache)] + [ours(ids[:, t : t + 1], cache=cache) for t in range(17, 40)]
    close(torch.cat(parts, dim=1), whole)
    first = theirs(ids[:, :17], use_cache=True)
    then = theirs(ids[:, 17:18], past_key_values=first.past_key_values)
    close(parts[1][:, 0], then.logits[:, 0])


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name])
    source = saved(theirs, tmp_path / "theirs")
    import_model(source, tmp_path / "ours")
    ours = load(tmp_path / "ours", "cpu").model
    agree(ours, theirs)

    export_model(tmp_path / "ours", tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    agree(ours, again)
    for file in KEPT:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    import_model(tmp_path / "back", tmp_path / "twice")
    for file in ("model.safetensors", "model.json", "marks.json"):
        assert (tmp_path / "twice" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def cut(source: Path, change: dict[str, Any]) -> None:
    """Change keys of config.json; None takes one away."""
    path = source / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_the_checkpoint_is_sealed_and_knows_its_marks(tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    import_model(source, tmp_path / "ours")
    read_record(tmp_path / "ours")
    assert marks_of(tmp_path / "ours", tokenizer()) == (1, (2,))
    with pytest.raises(ForjaError, match=r"ours: is there already"):
        import_model(source, tmp_path / "ours")
    with pytest.raises(ForjaError, match=r"ours: is a checkpoint of forja's already"):
        import_model(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ForjaError, match="make one of it by `forja import"):
        load(source)


@pytest.mark.parametrize(
    ("files", "marks"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 5], "bos_token_id": 4}}, (4, (2, 5))),
        ({"config.json": {"eos_token_id": 7, "bos_token_id": None}}, (7, (7,))),  # one text's end before the next
        ({"tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}}, (1, (2,))),
        ({}, (None, ())),
    ],
)
def test_marks_come_from_the_first_file_that_names_them(files: dict, marks: tuple, tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    for name in ("generation_config.json", "tokenizer_config.json"):
        (source / name).unlink()
    cut(source, {"bos_token_id": None, "eos_token_id": None})
    for name, said in files.items():
        if name == "config.json":
            cut(source, said)
        else:
            (source / name).write_text(json.dumps(said))
    import_model(source, tmp_path / "ours")
    assert marks_of(tmp_path / "ours", tokenizer()) == marks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_kept_in_full(dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["qwen3"]).to(dtype), tmp_path / "theirs")
    import_model(source, tmp_path / "ours")
    ours = load(tmp_path / "ours", "cpu").model
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    agree(ours, AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval())


def test_shards(tmp_path: Path) -> None:
    theirs = random_model(CONFIGS["llama"])
    source = saved(theirs, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3 and not (source / "model.safetensors").exists()
    import_model(source, tmp_path / "ours")
    agree(load(tmp_path / "ours", "cpu").model, theirs)


def test_older_files(tmp_path: Path) -> None:
    """transformers 4's names of the rotary keys, a GPT-2 without its prefix and with its masks, and a repeated head."""
    theirs = random_model(CONFIGS["llama3"])
    source = saved(theirs, tmp_path / "llama")
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    cut(source, {"rope_parameters": None, "rope_theta": theta, "rope_scaling": rope, "num_key_value_heads": 2})
    import_model(source, tmp_path / "ours-llama")
    agree(load(tmp_path / "ours-llama", "cpu").model, theirs)

    old = {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0}  # transformers 4.40's words
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "linear")
    for n, new in enumerate((None, {"rope_type": "default", "rope_theta": 7.0})):  # alone, and beside the newer key
        cut(source, old | {"rope_parameters": new})
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        import_model(source, tmp_path / f"ours-{n}")
        agree(load(tmp_path / f"ours-{n}", "cpu").model, theirs)

    theirs = random_model(CONFIGS["gpt2"])
    source = saved(theirs, tmp_path / "gpt2")
    state = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": state["wte.weight"].clone()}
    save_file(state, source / "model.safetensors")
    import_model(source, tmp_path / "ours-gpt2")
    agree(load(tmp_path / "ours-gpt2", "cpu").model, theirs)
    state["lm_head.weight"][3, 3] += 1
    save_file(state, source / "model.safetensors")
    with pytest.raises(ForjaError, match=r"lm_head\.weight is not the embedding"):
        import_model(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba' is none of gpt2, llama"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias: our GPT"),
        ("llama", {"attention_bias": True}, "model.layers.0.self_attn.o_proj.bias: missing"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type: 'longrope' is none of"),
        ("llama", {"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "factor: missing"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate: False"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set for each kind of layer"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantized"),
        ("qwen2-window", {"max_window_layers": 1, "layer_types": None}, "max_window_layers: some layers have a window"),
        ("qwen3-window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: some layers"),
        ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "layer_types: 'linear_attention'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        ("llama", {"hidden_size": "wide", "head_dim": None}, "its values are not those of a llama"),
        ("llama", {"num_attention_heads": 0}, "as our heads: Input should be greater"),
        ("llama", {"num_key_value_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ("llama", {"vocab_size": 299}, "embed_tokens.weight: has the shape [300, 32], and config.json wants [299, 32]"),
        ("llama", {"num_hidden_layers": 3}, "model.layers.2.mlp.down_proj.weight: missing"),
        ("llama", {"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj.weight: no tensor of a llama"),
    ],
)
def test_what_our_gpt_does_not_compute_is_refused(name: str, change: dict, said: str, tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS[name]), tmp_path / "theirs")
    cut(source, change)
    with pytest.raises(ForjaError) as e:
        import_model(source, tmp_path / "ours")
    assert said in str(e.value) and all(line.startswith(str(source)) for line in str(e.value).splitlines())
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".ours*"))


def test_folders_that_cannot_be_trusted_or_read(tmp_path: Path) -> None:
    theirs = random_model(CONFIGS["llama"])
    source = saved(theirs, tmp_path / "theirs", max_shard_size="20KB")
    index = source / "model.safetensors.index.json"
    said = json.loads(index.read_text())

    def error() -> str:
        with pytest.raises(ForjaError) as e:
            import_model(source, tmp_path / "ours")
        return str(e.value)

    outside = tmp_path / "outside.safetensors"
    shutil.copy(next(source.glob("model-*")), outside)
    for shard in ("../outside.safetensors", str(outside), "pickle.bin", "..", ""):
        index.write_text(json.dumps({"weight_map": {**said["weight_map"], "model.norm.weight": shard}}))
        assert "is not the name of a .safetensors beside it" in error()
    index.write_text(json.dumps({"weight_map": {**said["weight_map"], "model.norm.weight": "gone.safetensors"}}))
    assert "gone.safetensors: missing" in error()
    first, other = sorted(set(said["weight_map"].values()))[:2]
    moved = {k: other if v == first else v for k, v in said["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": moved}))
    assert f"is not in {other}" in error()
    index.write_text("[")
    assert "not JSON" in error()
    index.write_text("{}")
    assert "no weight_map" in error()
    index.unlink()
    assert "neither model.safetensors nor" in error()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin is a pickle, which forja does not open" in error() and "save_pretrained" in error()

    theirs.save_pretrained(source)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    assert "no whole safetensors file" in error()
    state = load_file(saved(theirs, tmp_path / "copy") / "model.safetensors")
    save_file(state | {"model.norm.weight": state["model.norm.weight"] * float("nan")}, source / "model.safetensors")
    assert "norm.weight: holds NaN" in error()
    save_file(state | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, source / "model.safetensors")
    assert "model.norm.weight: is of I8" in error()
    save_file(state, source / "model.safetensors")
    (source / "tokenizer.json").write_text("{}")
    assert "no tokenizers file" in error()
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json: missing; write it by transformers" in error()
    (source / "config.json").unlink()
    assert "config.json: missing" in error()
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    source = saved(random_model(CONFIGS["llama"]), tmp_path / "theirs")
    larger = tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(50)])
    last = larger.get_vocab_size() - 1
    larger.save(str(source / "tokenizer.json"))
    with pytest.raises(ForjaError, match=rf"its tokenizer has a token {last}, and its embedding 300 rows"):
        import_model(source, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"smear": True}, "smear True, wants False"),
        ({"activation": "relu2"}, "activation relu2, wants gelu"),
        ({"block": "post"}, "block post, wants pre"),
        ({"logit_cap": 30.0}, "logit_cap 30.0, wants None"),
        ({"kv_heads": 1}, "kv_heads 1, wants 2"),
        ({"positions": "rotary"}, "norm layer, wants rms; activation gelu, wants swiglu"),
        ({"head": "scalar"}, "head scalar, wants lm"),
    ],
)
def test_a_shape_of_no_family_is_said(tiny: GPTConfig, change: dict, said: str, tmp_path: Path) -> None:
    train_bpe(["text"], 260, 1).save(str(tmp_path / "t.json"))
    save(GPT(tiny.model_copy(update=change)), tmp_path / "ours", tmp_path / "t.json")
    with pytest.raises(ForjaError) as e:
        export_model(tmp_path / "ours", tmp_path / "theirs")
    assert said in str(e.value)


@pytest.mark.parametrize("chat", [False, True])
def test_our_own_models_open_in_transformers(tiny: GPTConfig, chat: bool, tmp_path: Path) -> None:
    """Weights, tokens, marks, and a chat template that writes what we encode."""
    ours_tokenizer = train_bpe(["Instruction: what is it?\nResponse: it is a thing 123 ñ"] * 3, 300, 1)
    ours_tokenizer.save(str(tmp_path / "t.json"))
    model = GPT(tiny.model_copy(update={"vocab_size": ours_tokenizer.get_vocab_size()})).eval()
    prompts = {"en": {"user": 'Instruction: {content} "x"\n', "assistant": "Response:"}}
    save(model, tmp_path / "ours", tmp_path / "t.json", prompts if chat else None)
    assert export_model(tmp_path / "ours", tmp_path / "theirs") == "gpt2"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    opened = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert opened("it is año 12")["input_ids"] == ours_tokenizer.encode("it is año 12").ids
    assert (opened.bos_token_id, opened.eos_token_id) == (0, 1 if chat else 0)
    assert theirs.generation_config.eos_token_id == ([1, 0] if chat else 0)
    if chat:
        asked = [{"role": "user", "content": "what's 1?"}, {"role": "assistant", "content": "it is"}]
        asked.append({"role": "user", "content": "12"})
        written = opened.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        assert written == encode_prompt(ours_tokenizer, asked, prompts["en"])
