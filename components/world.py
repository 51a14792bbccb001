"""Who this process is among the ranks of one training.

A launcher (torchrun, accelerate, DeepSpeed's with a hostfile) says so by RANK and WORLD_SIZE; under Slurm's `srun` with
MASTER_ADDR set, Slurm's own variables do. Without either there is one rank.
"""

import os

SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def from_slurm() -> None:
    """Take RANK and its like from Slurm where MASTER_ADDR says that the tasks are one training."""
    if "RANK" not in os.environ and "MASTER_ADDR" in os.environ and SLURM["RANK"] in os.environ:
        os.environ.update({ours: os.environ[slurms] for ours, slurms in SLURM.items()})
        os.environ.setdefault("MASTER_PORT", "29500")


def world() -> tuple[int, int]:
    """(rank, ranks)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
