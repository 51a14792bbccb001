"""Who this process is among the ranks of one training.

A launcher (torchrun, accelerate over GPUs, DeepSpeed's with a hostfile) says so by RANK and WORLD_SIZE. Under Slurm's
`srun`, and under Open MPI's `mpirun` that accelerate starts CPU ranks by, their own variables do, where MASTER_ADDR is
set. Without any of these there is one rank.
"""

import os

MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def from_launcher() -> None:
    """Take RANK and its like from MPI or Slurm where MASTER_ADDR says that their processes are one training."""
    if "RANK" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    for names in (MPI, SLURM):  # mpirun within a Slurm job: one task may have started several ranks
        if all(theirs in os.environ for theirs in names.values()):
            os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})
            os.environ.setdefault("MASTER_PORT", "29500")
            return


def world() -> tuple[int, int]:
    """(rank, ranks)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
