"""One PPO of small.py on each rank under torchrun; rank 0's rows as rows.json. Usage: ranks_ppo.py MADE OUT."""

import json
import sys
from pathlib import Path

from small import train

from components.world import world


def main(made: Path, out: Path) -> None:
    rows: list[dict] = []
    rank = world()[0]
    root = out / f"rank-{rank}"
    names = ("validate", "sft", "reward")
    # One scratch for all: they save one checkpoint together.
    (out / "scratch").mkdir(exist_ok=True)
    root.mkdir()
    (root / "scratch").symlink_to(out / "scratch")
    train({name: made / name for name in names}, root, lambda row, _: rows.append(dict(row)))
    if rank == 0:
        (out / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
