"""Which rank a process is, by what each launcher leaves in the environment."""

import os

import pytest

from components.world import MPI, SLURM, from_launcher, world

OTHER = [*MPI, *MPI.values(), *SLURM.values(), "MASTER_ADDR", "MASTER_PORT"]
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
HEAD = {"MASTER_ADDR": "head"}


@pytest.mark.parametrize(
    ("given", "rank", "local", "port"),
    [
        ({}, (0, 1), None, None),
        (SRUN, (0, 1), None, None),  # an interactive shell on a cluster: no training of several ranks
        (SRUN | HEAD, (5, 8), "1", "29500"),
        (MPIRUN | HEAD | {"MASTER_PORT": "7"}, (2, 3), "0", "7"),
        (SRUN | MPIRUN | HEAD, (2, 3), "0", "29500"),
        (SRUN | HEAD | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2), "1", None),  # torchrun in a job
    ],
)
def test_the_rank(
    given: dict[str, str],
    rank: tuple[int, int],
    local: str | None,
    port: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in OTHER:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards, whatever is set meanwhile
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    from_launcher()
    assert (world(), os.environ.get("LOCAL_RANK"), os.environ.get("MASTER_PORT")) == (rank, local, port)
