import json

import pytest
import torch

from components.artifact import Damaged, ForjaError
from components.log import silent
from components.model import checkpoint
from components.model.generate import generate
from components.release.quantize import (
    Config,
    affine,
    block_matrices,
    load,
    pack_int4,
    quantized,
    run,
    save,
    undo_affine,
    unpack_int4,
)


def test_int4_values_survive_the_packing_two_to_a_byte():
    values = torch.tensor([[-8, 7, 0, -1], [1, 2, -3, 6]], dtype=torch.int8)
    packed = pack_int4(values)
    # -8 + 8 = 0 low, 7 + 8 = 15 high: 0xF0; 0 + 8 = 8 low, -1 + 8 = 7 high: 0x78; and so on.
    assert packed.tolist() == [[0xF0, 0x78], [0xA9, 0xE5]]
    assert torch.equal(unpack_int4(packed), values)
    every = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_int4(pack_int4(every)), every)


def test_the_affine_scheme_by_hand():
    weight = torch.tensor([[0.0, 1.0, 3.0], [-1.0, 0.0, 2.0]])
    q, scale, zero = affine(weight, bits=2, per_channel=True)
    assert scale.flatten().tolist() == [1.0, 1.0]  # (3 - 0) / 3 and (2 - -1) / 3
    assert zero.flatten().tolist() == [0.0, 1.0]
    assert q.tolist() == [[0, 1, 3], [0, 1, 3]]
    assert torch.equal(undo_affine(q, scale, zero), weight)
    q, scale, zero = affine(weight, bits=2, per_channel=False)
    assert (scale.item(), zero.item()) == (pytest.approx(4 / 3), pytest.approx(0.75))
    assert q.tolist() == [[1, 2, 3], [0, 1, 2]]  # round(0.75), round(1.5) to even, round(3); round(0), ...


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5])
@pytest.mark.parametrize("per_channel", [True, False])
def test_constant_weights_come_back_and_divide_by_no_zero(value, per_channel):
    weight = torch.full((3, 8), value)
    assert torch.equal(undo_affine(*affine(weight, 8, per_channel)), weight)


def test_an_outlier_costs_its_row_and_not_the_others():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 1000.0
    error = {c: (undo_affine(*affine(weight, 8, c)) - weight)[1:].abs().max().item() for c in (True, False)}
    assert error[True] < 0.02 < error[False]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_loads_back_to_the_same_logits_bit_for_bit(scheme, tied, save_checkpoint, tmp_path):
    folder = save_checkpoint("ppo", seed=1, tied=tied)
    full = checkpoint.load(folder, device="cpu").model
    small = quantized(full, scheme, 16)
    save(small, tmp_path / scheme, folder, scheme, 16)
    back = load(tmp_path / scheme, device="cpu")
    ids = torch.randint(full.config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(2))
    assert torch.equal(back.model(ids), small(ids))
    assert not torch.equal(back.model(ids), full(ids))
    assert (back.model.head.weight is back.model.wte.weight) == tied
    assert back.prompts["es"]["assistant"] == "Respuesta:"
    prompt = [[5, 6, 7], [8, 9]]
    assert generate(back.model, prompt, max_new_tokens=8, stop=0) == generate(small, prompt, max_new_tokens=8, stop=0)


def test_weights_are_within_half_a_step_of_the_full_ones(save_checkpoint):
    full = checkpoint.load(save_checkpoint("ppo", seed=1), device="cpu").model
    full.blocks[0].mlp.up.weight.data[3] = 0.0  # a row and its groups without any range
    full.blocks[0].mlp.up.weight.data[4] = 0.7
    for scheme in ("int8", "int4"):
        small = quantized(full, scheme, 16)
        for name, matrix in block_matrices(small).items():
            weight = full.get_submodule(name).weight.detach()
            groups = weight.unflatten(1, (-1, weight.shape[1] if scheme == "int8" else 16))
            if scheme == "int8":
                step = groups.abs().amax(-1, keepdim=True) / 127.5
            else:
                step = (groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)) / 15
            error = (matrix.weight.dequantize().view_as(groups) - groups).abs()
            # The rounded bfloat16 scale of int4 costs a little more at the ends of the range.
            assert (error <= (0.501 if scheme == "int8" else 0.55) * step + 1e-6).all()


def test_the_stage_writes_two_small_folders_and_says_how_far_they_are(save_checkpoint, tmp_path):
    ppo = save_checkpoint("ppo", seed=1)
    metrics = run(Config(int4_group=16), ppo, tmp_path / "out", silent)
    full = (ppo / "model.safetensors").stat().st_size
    assert metrics["full.bytes"] == full
    for scheme in ("int8", "int4"):
        size = (tmp_path / "out" / scheme / "model.safetensors").stat().st_size
        assert metrics[f"{scheme}.bytes"] == size
        assert metrics[f"{scheme}.bytes_ratio"] == size / full
        assert metrics[f"{scheme}.weight_error.channel"] < metrics[f"{scheme}.weight_error.tensor"]
    assert metrics["int4.bytes"] < metrics["int8.bytes"] < 0.45 * full  # the header shows in so small a model
    assert 0 < metrics["int8.logit_deviation"] < metrics["int4.logit_deviation"]
    assert metrics["int8.weight_error.torchao"] < 1e-3 < metrics["int4.weight_error.torchao"] < 1e-1
    manifest = json.loads((tmp_path / "out/int4/manifest.json").read_text())
    assert manifest["tensors"]["wte.weight"]["stored"] == "int8_row"
    assert manifest["tensors"]["blocks.1.mlp.down.weight"] == {
        "stored": "int4_group",
        "shape": [32, 64],
        "full_bytes": 8192,
    }


def test_the_stage_is_deterministic(save_checkpoint, tmp_path):
    ppo = save_checkpoint("ppo", seed=1)
    first = run(Config(int4_group=16), ppo, tmp_path / "a", silent)
    assert run(Config(int4_group=16), ppo, tmp_path / "b", silent) == first
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_group_that_does_not_divide_the_columns_is_named(save_checkpoint, tmp_path):
    with pytest.raises(ForjaError, match="int4_group: 24 does not divide the 32 columns of blocks"):
        run(Config(int4_group=24), save_checkpoint("ppo", seed=1), tmp_path / "out", silent)


def test_a_quantized_folder_is_not_trained_on(save_checkpoint, tmp_path):
    run(Config(int4_group=16), save_checkpoint("ppo", seed=1), tmp_path / "out", silent)
    with pytest.raises(ForjaError, match="int4: quantized"):
        checkpoint.load(tmp_path / "out/int4")


def test_a_folder_whose_parts_do_not_fit_is_refused(save_checkpoint, tmp_path):
    run(Config(int4_group=16), save_checkpoint("ppo", seed=1), tmp_path / "out", silent)
    folder = tmp_path / "out/int8"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"]["wte.weight"]["stored"] = "int4_group"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="do not fit"):
        load(folder)
