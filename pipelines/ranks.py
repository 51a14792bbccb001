"""A training stage on several ranks: `FORJA_RANKS=N forja stage NAME` starts itself N times under torchrun.

The command that was given stays: it keeps the diary, shows what rank 0 says, and passes on why a rank failed. Under a
launcher of the user's own (torchrun, accelerate, srun) rank 0 does that too. The other ranks take part in the training
and write nothing but their shards of a checkpoint.
"""

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.artifact import ForjaError, to_json
from components.log import silent
from components.world import from_launcher, world
from pipelines.child import stream

LAUNCHED = "FORJA_LAUNCHED"
FAILURE = "failure.json"


class RankFailed(ForjaError):
    """A rank ended badly; the reason is its own."""

    exit_code = 1


def wanted() -> int:
    """FORJA_RANKS, 1 where a launcher has already made ranks of this process and its like."""
    from_launcher()
    text = os.environ.get("FORJA_RANKS") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ForjaError(f"FORJA_RANKS={text}: is no number of processes; set it to 1 or more")
    return 1 if "RANK" in os.environ else int(text)


def say_what_is_not_cut(name: str) -> None:
    """Only pretraining can be cut by depth. Where a whole run has FORJA_PIPELINE set, the other trainings go on."""
    stages = os.environ.get("FORJA_PIPELINE") or "1"
    if name != "pretrain" and stages != "1":
        print(
            f"{name}: FORJA_PIPELINE={stages} cuts pretraining alone; here each rank has the whole model and takes rows"
        )


def is_launched() -> bool:
    return LAUNCHED in os.environ


def is_helper() -> bool:
    from_launcher()
    return world()[0] > 0


def help_along(run: Callable[..., Any], cfg: Any, arguments: dict[str, Path]) -> None:
    """What a rank other than 0 does: the same work, and what it writes is thrown away."""
    with tempfile.TemporaryDirectory() as nowhere:
        run(cfg, **arguments, out=Path(nowhere), log=silent)


def leave() -> None:
    """Leave the ranks' group, where there is one: a rank that ends inside it may abort after all its work is done."""
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def failure_noted(diary: Path) -> Iterator[None]:
    """Leave the first rank's reason to fail where the launching process finds it, and say it only there."""
    if not is_launched():
        yield
        return
    try:
        yield
    except BaseException as e:
        reason = str(e) if isinstance(e, ForjaError) else f"{type(e).__name__}: {e}"
        said = {"reason": reason, "exit_code": getattr(e, "exit_code", 1), "rank": world()[0]}
        with suppress(FileExistsError), (diary / FAILURE).open("x", encoding="utf-8") as f:
            f.write(to_json(said))
        if isinstance(e, ForjaError):
            raise SystemExit(e.exit_code) from None
        raise


def launch(root: Path, name: str, diary: Path) -> None:
    """Run a stage on FORJA_RANKS ranks. Raises RankFailed, with the exit code of the rank that failed first."""
    (diary / FAILURE).unlink(missing_ok=True)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(wanted())]
    killed: list[str] = []

    def line(text: str) -> None:
        print(text, flush=True)
        if found := re.search(r"exitcode\s*: -(\d+)", text):
            killed.append(found[1])

    signal.signal(signal.SIGTERM, _end)  # `stream` then ends the ranks, which save where they are
    status, ended = 1, None
    try:
        command = [sys.executable, *command, "-m", "pipelines.cli", "stage", name]
        status = stream(command, root, {LAUNCHED: "1"}, line)
    except (SystemExit, KeyboardInterrupt) as e:
        ended = e
    if status == 0:
        return
    said = json.loads((diary / FAILURE).read_bytes()) if (diary / FAILURE).exists() else {}
    hard = [number for number in killed if int(number) != signal.SIGTERM]
    if hard and not ended:
        raise RankFailed(f"a rank was killed by signal {hard[0]} (9 is often a lack of memory)")
    if said:
        error = RankFailed(said["reason"])
        error.exit_code = said["exit_code"]
        raise error
    if ended:
        raise ended
    raise RankFailed(f"the ranks ended with status {status} and without a word")


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)
