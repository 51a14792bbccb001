"""Pretraining on windows that hold documents side by side."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent))
from test_resume import CONFIGS, SHAPE, write_tables

from components.data import tokenize
from components.data.packing import pack, packed
from components.log import silent
from components.model.gpt import GPT, GPTConfig
from components.train import pretrain


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    (root / "tokenize").mkdir()
    write_tables(root)
    tokenize.run(
        tokenize.Config(vocab_size=300, min_frequency=1, sample_mb=9, tokenizer=None), root, root / "tokenize", silent
    )
    return root / "tokenize"


def test_the_loss_of_an_epoch_is_that_of_each_document_alone(tokens: Path) -> None:
    model = GPT(GPTConfig(**SHAPE, vocab_size=300, head="lm"))
    plan = pack(tokens / "train.npy", SHAPE["context"])
    loss, _ = pretrain.packed_loss(model, packed(plan, 0, 0, len(plan)))
    shard, wanted = np.load(tokens / "train.npy").astype(np.int64), 0.0
    for document in np.split(shard, np.load(tokens / "train.ends.npy")[:-1]):
        ids = torch.from_numpy(np.concatenate(([shard[-1]], document)))
        for at in range(0, len(document), plan.context):
            part = ids[at : at + plan.context + 1]
            wanted += float(F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum").detach())
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    assert 0 < plan.waste < 0.5 and max(map(len, (w.lengths for w in packed(plan, 0, 0, len(plan))))) > 1


def test_a_recipe_may_pack_by_documents(tokens: Path, tmp_path: Path) -> None:
    losses = {}
    for packing in ("stream", "bestfit"):
        cfg = CONFIGS[pretrain].model_copy(update={"packing": packing, "z_loss": 1e-4})
        (tmp_path / packing).mkdir()
        (tmp_path / f"scratch-{packing}").mkdir()
        metrics = pretrain.run(cfg, tokens, tmp_path / packing, tmp_path / f"scratch-{packing}", silent)
        losses[packing] = metrics["val_loss"]
        assert (metrics["waste"] > 0) == (packing == "bestfit")
    assert losses["stream"] != losses["bestfit"] and max(losses.values()) < np.log(300)
