"""Two ranks under torchrun: for each ZeRO stage, the training of `training.py` from the start, and the same from the
checkpoint that one rank left. Usage: ranks.py FOLDER adamw|muon."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training import RECIPE, train

from components.model import muon


def main(root: Path, optimiser: str) -> None:
    cfg = RECIPE if optimiser == "muon" else RECIPE.model_copy(update={"matrix_lr": None})
    muon.PRODUCTS = torch.float32
    rank = int(os.environ["RANK"])
    for zero in "0123":
        os.environ["FORJA_ZERO"] = zero
        for name in ("whole", "from-one"):
            rows: list[float] = []
            weights, _ = train(root / f"{name}-{zero}", lambda row, _, to=rows: to.append(row["loss"]), cfg=cfg)  # type: ignore[misc]
            if rank == 0:
                save_file({k: v.contiguous() for k, v in weights.items()}, root / f"{name}-{zero}.safetensors")
                (root / f"{name}-{zero}.json").write_text(json.dumps(rows))
        # What two ranks left after step 10 is what one rank goes on from.
        if rank == 0:
            shutil.copytree(root / f"whole-{zero}", root / f"from-two-{zero}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
