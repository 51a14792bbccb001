"""What a training will take: numbers counted by hand, a real heap, and a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.model import heap
from components.model.gpt import GPTConfig
from components.model.memory import ledger, peak
from components.model.optim import Optim

ROOT = Path(__file__).parents[2]
WIDTH, INNER, HEADS, CONTEXT, VOCAB = 64, 256, 4, 32, 100
# By hand: two norms, qkv, the projection behind the heads, and the MLP, each with its bias.
BLOCK = 4 * WIDTH + 3 * WIDTH * (WIDTH + 1) + WIDTH * (WIDTH + 1) + INNER * (WIDTH + 1) + WIDTH * (INNER + 1)


def config(layers: int, **more: object) -> GPTConfig:
    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text())
    sizes = {"context": CONTEXT, "layers": layers, "width": WIDTH, "heads": HEADS, "kv_heads": HEADS}
    shape = preset | sizes | {"head_width": WIDTH // HEADS, "mlp_width": INNER} | more
    return GPTConfig(**shape, vocab_size=VOCAB, head="lm")


def optim(**more: object) -> Optim:
    recipe = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())["pretrain"]
    recipe = {k: v for k, v in recipe.items() if k in Optim.model_fields}
    return Optim.model_validate(recipe | {"matrix_lr": None, "precision": "fp32", "ema": None} | more)


def most(layers: int, optimiser: Optim, rows: int, tokens: int, accumulation: int = 1, again: bool = False) -> int:
    before, after = ledger(config(layers), optimiser, rows, tokens, accumulation, again)
    return peak(before + after)


def test_one_token_takes_twenty_bytes_a_parameter() -> None:
    """Weight, two moments, gradient and its flat copy; hardly anything else."""
    total = 2 * BLOCK + (VOCAB + CONTEXT) * WIDTH + 2 * WIDTH
    assert 20 * total <= most(2, optim(), 1, 1) < 20.1 * total
    assert 24 * total <= most(2, optim(ema=0.9), 1, 1) < 24.1 * total


def test_a_layer_adds_what_is_counted_by_hand() -> None:
    """At the end of the way there: 12 bytes a parameter, as gradients are not yet; and of each token, in float32, the
    input and the result of both norms, q, k and v, what the heads say, and the MLP before and after its GELU, and
    beside them the norms' mean and deviation, and each head's sum of exponentials. AdamW counts the steps of each of
    the twelve tensors."""
    kept = 4 * ((2 + 2 + 3 + 1) * WIDTH + 2 * INNER + 2 * 2 + HEADS)
    rows = 64
    added = most(5, optim(), rows, CONTEXT) - most(4, optim(), rows, CONTEXT)
    assert added == 12 * (BLOCK + 4) + rows * CONTEXT * kept


def test_recomputation_keeps_the_state_between_layers() -> None:
    rows = 64
    added = most(5, optim(), rows, CONTEXT, 1, True) - most(4, optim(), rows, CONTEXT, 1, True)
    assert added == pytest.approx(12 * BLOCK + rows * CONTEXT * 4 * WIDTH, rel=0.1)


def test_accumulated_gradients_stand_beside_the_next_micro_batch() -> None:
    total = 4 * BLOCK + (VOCAB + CONTEXT) * WIDTH + 2 * WIDTH
    added = most(4, optim(), 64, CONTEXT, 2) - most(4, optim(), 64, CONTEXT)
    assert added == pytest.approx(4 * total, rel=0.1)


def test_a_save_takes_a_copy_of_weights_and_moments() -> None:
    total = 2 * BLOCK + (VOCAB + CONTEXT) * WIDTH + 2 * WIDTH
    before, after = ledger(config(2), optim(), 1, 1, 1, False, True)
    assert 32 * total <= peak(before + after) < 32.1 * total


def test_muon_keeps_one_moment_of_matrices() -> None:
    before, after = ledger(config(2), optim(matrix_lr=0.02), 1, 1, 1, False)
    standing = sum(n for _, n in before + after)  # after two steps: weights and moments
    matrices = 2 * (4 * WIDTH * WIDTH + 2 * INNER * WIDTH)
    total = 2 * BLOCK + (VOCAB + CONTEXT) * WIDTH + 2 * WIDTH
    assert standing == pytest.approx(8 * matrices + 12 * (total - matrices), rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the heap is glibc's")
@pytest.mark.parametrize("then, expected", [([], 57), ([(100, 1 << 19)], 57), ([(100, 2 << 20), (101, 3 << 20)], 62)])
def test_the_heap_grows_by_what_fits_into_no_hole(then: list[tuple[int, int]], expected: int) -> None:
    """Seven megabytes before; fifty blocks of one, of which every second goes; and what comes then."""
    blocks = [(i, 1 << 20) for i in range(50)]
    text = json.dumps([[[99, 7 << 20]], [*blocks, *((i, -n) for i, n in blocks[:-1:2]), *then]])
    command = [sys.executable, "-S", heap.__file__, "0"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert expected << 20 <= int(done.stdout) < (expected << 20) + (1 << 19)


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read where Linux says it")
def test_a_real_training_takes_what_was_said() -> None:
    command = [sys.executable, "benchmarks/memory.py", "--only", "wide"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout)
    assert 1 / 1.15 < row["ratio"] < 1.15
