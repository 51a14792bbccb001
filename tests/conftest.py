import os
from collections.abc import Iterator

import pytest

# Before torch is loaded: its threads sleep while they wait, so that tests beside other work do not crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces torch's `linear` for the rest of a process, a stage's; tests share theirs."""
    own = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = own
