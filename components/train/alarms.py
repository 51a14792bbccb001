"""What goes wrong in a training from a reward, seen in its own curves: a cause in plain words, and a mend.

Each alarm is a question asked of the rows so far, one a step, and nothing else, so a resumed run rings as the
undisturbed one. An alarm is said once, at the step where its question turns true.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, float]
History = Sequence[Row]

FALLEN = 3.0  # nats by which chosen answers may become less likely
CLOSED, REPEATED = 0.2, 0.2  # entropy as a share of the first, and repetition above the first, that are alarming


def last(history: History, key: str, n: int, test: Callable[[float], bool]) -> bool:
    """Whether each of the last n rows has `key`, and it passes the test."""
    rows = history[-n:]
    return len(rows) == n and all(key in row and test(row[key]) for row in rows)


def ringing(history: History, kl_target: float | None) -> dict[str, str]:
    """{alarm: what is wrong and what to do} as it stands at the last row."""
    first, found = history[0], {}
    if kl_target is not None and last(history, "kl", 5, lambda x: x > 3 * kl_target):
        found["kl"] = (
            f"KL 3 times its target of {kl_target:g} nats for 5 rollouts: the policy leaves the SFT model faster than "
            "the penalty pulls it back; lower lr, or raise kl_coef"
        )
    if last(history, "entropy", 5, lambda x: x < CLOSED * first["entropy"]):
        found["entropy"] = (
            f"entropy under {CLOSED:.0%} of where it began for 5 rollouts: the policy says nearly one answer only and "
            "finds no better ones; raise kl_coef, lower lr, or take fewer epochs"
        )
    if last(history, "unfinished", 3, lambda x: x == 1):
        found["unfinished"] = (
            "no answer ended by itself in 3 rollouts, so every score is that of `unfinished`: there is nothing to "
            "learn; raise max_new_tokens, or train SFT for longer, until it ends its answers"
        )
    elif last(history, "reward_deviation", 3, lambda x: x == 0) or last(history, "equal_groups", 3, lambda x: x == 1):
        found["equal"] = (
            "every answer to a prompt had the same reward in 3 rollouts: there is nothing to learn but noise; if all "
            "are good, stop; else look at the judge, and raise temperature if all answers are alike"
        )
    if last(history, "clip_fraction", 3, lambda x: x > 0.4):
        found["clip"] = (
            "over 40 % of the tokens clipped for 3 rollouts: steps are too large for what was sampled; lower lr, or "
            "take fewer epochs or minibatches"
        )
    if last(history, "explained_variance", 10, lambda x: x < 0):
        found["value"] = (
            "the value model was worse than a constant for 10 rollouts, so advantages are noise; raise value_first, or "
            "change value_lr (lower it where value_loss rises)"
        )
    if last(history, "repetition", 5, lambda x: x > first["repetition"] + REPEATED):
        found["repetition"] = (
            f"{REPEATED:.0%} more of the answers' 3-grams repeat themselves than at first, for 5 rollouts: "
            "the reward model likes it; show it such answers as rejected ones, raise kl_coef, or stop earlier"
        )
    if _parted(history, "reward"):
        found["heldout"] = (
            "reward rose and held-out reward fell over 3 evaluations: the policy learns its prompts by heart; add "
            "prompts, stop earlier, or set keep to best"
        )
    if _parted(history, "margin"):
        found["heldout"] = (
            "the margin between chosen and rejected answers rose and held-out reward fell over 3 evaluations: the "
            "policy tells the pairs apart better and answers worse; raise beta, lower lr, or set keep to best"
        )
    if last(history, "chosen_drift", 5, lambda x: x < -FALLEN) and last(history, "rejected_drift", 5, lambda x: x < 0):
        found["falling"] = (
            f"chosen answers are {FALLEN:g} nats less likely than at first, with the rejected ones, for 5 steps: what "
            "is taken from both goes to answers that nobody judged; raise beta, lower lr, or train SFT on chosen ones"
        )
    if last(history, "first_off", 1, lambda x: x > 1e-3):
        found["first"] = (
            f"the ratio was off 1 by {history[-1]['first_off']:.1e} before the first step: what scores the answers is "
            "not what learns; use precision fp32, and tell the authors if it stays"
        )
    return found


def _parted(history: History, learnt: str) -> bool:
    """Whether, over the last three evaluations, the mean of `learnt` in the rows up to each rose as val_reward fell."""
    at = [-1, *(i for i, row in enumerate(history) if "val_reward" in row)][-4:]
    parts = [[row[learnt] for row in history[i + 1 : j + 1] if learnt in row] for i, j in pairwise(at)]
    if len(parts) < 3 or not all(parts):
        return False
    a, b, c = (sum(part) / len(part) for part in parts)
    x, y, z = (history[i]["val_reward"] for i in at[1:])
    return a < b < c and x > y > z


def new_alarms(history: History, kl_target: float | None) -> list[dict[str, Any]]:
    """The alarms that ring at the last row and did not at the one before it."""
    before = ringing(history[:-1], kl_target) if len(history) > 1 else {}
    now = ringing(history, kl_target)
    return [{"step": len(history), "alarm": name, "text": text} for name, text in now.items() if name not in before]
