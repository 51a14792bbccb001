"""Answers by vLLM, where a recipe says `sampler: vllm`, in place of our own generator.

vLLM's releases want other versions of libraries than forja's do, so it has an environment of its own: FORJA_VLLM names
the Python there, and vllm_worker.py runs in it beside the training. The policy's weights go there at each rollout, as
the Hugging Face file that our shape is exported to; token ids come back. What else is known of an answer, its
log-probabilities among it, the policy itself says (rollout.py), so nothing in the update depends on who sampled.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch import Tensor

from components.artifact import ForjaError, to_json
from components.model import hf, hf_config
from components.model.checkpoint import WEIGHTS, write_weights
from components.model.gpt import GPT, GPTConfig
from components.model.parallel import divided
from components.world import world

WORKER = Path(__file__).with_name("vllm_worker.py")
PRESETS = "gpt, gpt2, gpt3, llama3 or qwen3"
# Of a launcher of ours, which vLLM would take for its own.
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process beside the worker
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Vllm(NamedTuple):
    """A worker that runs: it ends, and deletes its folder, when nobody writes to it any more."""

    process: Any  # a Popen, whose stdin and stdout are pipes
    folder: Path  # the model as it reads it
    said: IO[str]  # what it logs


_running: dict[tuple[GPTConfig, str], Vllm] = {}


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: int,
    temperature: float,
    seed: int,
    precision: str,
) -> list[list[int]]:
    """The new tokens of each prompt's continuation, the stop among them where there is one, as generate.py gives them.

    Prompt i draws from the stream of (seed, i). They are other random numbers than our own generator's.
    """
    if world()[1] > 1 or divided(model) or os.environ.get("FORJA_ZERO") == "3":
        raise ForjaError("ppo.sampler: vllm reads whole weights of one rank on one device; set it to forja for others")
    dtype = "bfloat16" if precision == "bf16" else "float32"
    vllm = _running.get((model.config, dtype))
    if vllm is None:
        longest = max(map(len, prompts)) + max_new_tokens
        vllm = _running[model.config, dtype] = start(model, dtype, len(prompts), longest)
    else:
        write(model, vllm.folder)
    asked = {"prompts": [list(p) for p in prompts], "seeds": [seed * 1_000_003 + i for i in range(len(prompts))]}
    asked |= {"max_new_tokens": max_new_tokens, "stop": stop, "temperature": temperature}
    answers: list[list[int]] = ask(vllm, asked)["answers"]
    return answers


@contextmanager
def ended() -> Iterator[None]:
    """Behind it no worker runs any more."""
    try:
        yield
    finally:
        while _running:
            end(_running.popitem()[1])


def start(model: GPT, dtype: str, rows: int, longest: int) -> Vllm:
    """A worker that has read the model. Its cache is as large as `rows` texts of `longest` tokens need."""
    python = os.environ.get("FORJA_VLLM")
    if not python:
        raise ForjaError(
            "ppo.sampler: vllm, and FORJA_VLLM is not set; name the Python of an environment with vLLM, or set "
            "ppo.sampler=forja"
        )
    try:
        _, config = hf_config.from_gpt(untied(model.config), Path("ppo.sampler: vllm"))
    except ForjaError as e:
        raise ForjaError(f"{e}; set ppo.sampler=forja, or start from a {PRESETS} preset") from None
    folder = Path(tempfile.mkdtemp(prefix="forja-vllm-"))
    config |= {"bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32"}
    (folder / hf_config.CONFIG).write_text(to_json(config), encoding="utf-8")
    write(model, folder)
    vllm = launched(python, folder)
    c = model.config
    bytes_a_token = 2 * c.layers * c.kv_heads * c.head_width * (2 if dtype == "bfloat16" else 4)
    tokens = max(rows * (-(-longest // 128) + 1) * 128, c.context + 256)  # in its blocks, of 128 at most
    first = {"folder": str(folder), "dtype": dtype, "context": c.context, "rows": rows}
    ask(vllm, first | {"cache": tokens * bytes_a_token})
    return vllm


def launched(python: str, folder: Path) -> Vllm:
    environment = {k: v for k, v in os.environ.items() if k not in RANKS} | SETTINGS
    said = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # open as long as the worker runs
    try:
        process = subprocess.Popen(  # noqa: S603  # what the user named
            [python, "-I", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is the training's: it saves first
        )
    except OSError as e:
        said.close()
        shutil.rmtree(folder)
        raise ForjaError(f"FORJA_VLLM={python}: cannot be run ({e.strerror}); name the Python beside vLLM") from None
    return Vllm(process, folder, said)


def untied(config: GPTConfig) -> GPTConfig:
    """The same with a head of its own: vLLM 0.32 leaves a tied one as it was where it reads weights anew."""
    return config.model_copy(update={"tied": False})


def write(model: GPT, folder: Path) -> None:
    """The policy's weights as they are, adapters merged. The old file stays whole for whoever has it open."""
    family, _ = hf_config.from_gpt(untied(model.config), folder)
    parts = hf.parts_of(untied(model.config), family)

    def tensor(name: str) -> Tensor:
        part = parts[name]
        module, _, leaf = part.ours.rpartition(".")
        rows: Tensor = getattr(model.get_submodule(module), leaf).detach()[part.start : part.stop]
        return rows.T if part.transposed else rows

    new = folder / "new"
    write_weights(new, {name: part.shape for name, part in parts.items()}, tensor)
    new.replace(folder / WEIGHTS)


def ask(vllm: Vllm, request: dict[str, Any]) -> Any:
    """What the worker answers. Raises ForjaError with the last it logged where it has ended instead."""
    try:
        vllm.process.stdin.write(json.dumps(request) + "\n")
        vllm.process.stdin.flush()
        line = vllm.process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line.endswith("\n"):
        code = vllm.process.wait()
        vllm.said.seek(0)
        lines = [text.strip() for text in vllm.said.read().splitlines() if text.strip()] or ["it logged nothing"]
        last = next((text for text in reversed(lines) if "Error: " in text), lines[-1])
        raise ForjaError(f"ppo.sampler: vLLM ended with code {code}: {last}; mend that, or set it to forja")
    return json.loads(line)


def end(vllm: Vllm) -> None:
    """Close the worker's input, upon which it ends."""
    try:
        vllm.process.stdin.close()
        vllm.process.wait(timeout=60)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        vllm.process.kill()
        vllm.process.wait()
    vllm.process.stdout.close()
    vllm.said.close()
    shutil.rmtree(vllm.folder, ignore_errors=True)
