"""PPO from a reward (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022), in numbered steps.

The policy pi learns; the value model V (it starts as the reward model) judges its prospects; the frozen reference (SFT)
is what a penalty ties the policy to; the judge is the frozen reward model, or a function (verify.py). No model has
dropout, so a text read twice gives the same numbers. Every step is a function of (seed, step) and of the weights before
it, so a killed run goes on to the same bytes. One rollout:

1. answers a_1 .. a_n to prompts, sampled from pi as it is
2. read by all: log pi, log ref and V at each token; the score S of each answer, or `unfinished` where it never ended
3. r_t = -kl_coef kl_t, and S at the last token
4. A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l});  R_t = A_t + V_t;  A whitened over valid tokens
5. policy: mean of -min(rho_t A_t, clip(rho_t, 1 +- clip_ratio) A_t), rho_t = pi(a_t) / pi_sampled(a_t)
6. value: mean of max((V - R)^2, (clip(V, V_sampled +- clip_value) - R)^2) / 2
7. kl_coef *= 1 + 0.1 clip(KL / kl_target - 1, +-0.2)

GRPO (Shao et al. 2024) has `group` answers to each prompt, and in place of 3, 4 and 6:

4. A_t = (S - mean) / deviation, over the scores of the group
5. the same, plus kl_coef kl_t, of pi as it now is

DPO, IPO and KTO (dpo.py) learn from preferences instead, in the same frame.

Steps 1 and 2 are in rollout.py, the equations are functions in rl.py, the alarms are in alarms.py.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from components.artifact import ForjaError, to_json
from components.data.batches import order, pick
from components.data.chat import SEPARATOR, special
from components.data.templates import stop
from components.log import Log, lasting, silent
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.engine import Engine
from components.model.gpt import GPT
from components.model.lora import Lora, adapt, merge
from components.model.optim import schedule
from components.model.ranks import agreed, interrupted, split, stoppable
from components.model.scratch import Saved, Saver
from components.train import dpo, rl, verify, vllm_rollout
from components.train.alarms import new_alarms
from components.train.best import Best
from components.train.loop import Skips, finite
from components.train.questions import Judge, Question, by_model, evaluated, questions, said_of, write_evaluations
from components.train.rollout import Rollout, answer_logprobs, roll_out, trimmed
from components.train.samples import write_samples
from components.world import world

ALARMS = "alarms.json"
logger = logging.getLogger("forja")


Row = dict[str, float]


class Config(dpo.Preferring, frozen=True, extra="forbid"):
    judge: Annotated[
        str, AfterValidator(verify.named)
    ]  # what scores an answer: model, or a function of verify.py's kind
    lora: Lora | None  # train low-rank adapters of the policy alone, merged at the end; None: every weight
    steps: int = Field(ge=0)  # rollouts
    epochs: int = Field(ge=1)
    value_lr: float = Field(gt=0)
    value_first: int = Field(ge=0)  # rollouts from which the value model alone learns
    gamma: float = Field(ge=0, le=1)
    lam: float = Field(ge=0, le=1)
    clip_ratio: float = Field(gt=0)
    clip_value: float = Field(gt=0)
    kl_coef: float = Field(ge=0)
    kl_target: float | None = Field(gt=0)  # nats an answer; None leaves kl_coef as it is
    kl_budget: float | None = Field(gt=0)  # nats an answer, over which training ends
    val_rows: int = Field(ge=1)
    sample_rows: int = Field(ge=0)

    @field_validator("kl_budget")
    @classmethod
    def _keeps_a_step_within_it(cls, budget: float | None, info: ValidationInfo) -> float | None:
        if budget is not None and info.data.get("keep") == "last":
            raise ValueError("the last step is the one that is over it; set keep to best, or kl_budget to null")
        return budget

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if (self.algorithm == "grpo") != (self.group > 1):
            raise ValueError(
                f"{self.algorithm} and group {self.group}: grpo compares 2 answers or more, the others have 1"
            )
        if self.algorithm == "grpo" and self.kl_estimator == "k1":
            raise ValueError("grpo and kl_estimator k1: as a loss its gradient is noise alone; set it to k3")
        if self.batch * self.group < 2:
            raise ValueError("batch 1: a rollout needs 2 answers at least")
        if self.lora is not None and self.matrix_lr is not None:
            raise ValueError("lora needs matrix_lr null: Muon's steps are for whole matrices")
        return self


class Learner(NamedTuple):
    """What a rollout and its update work with."""

    policy: Engine
    value: Engine | None  # none in GRPO
    reference: GPT | None  # none where it is the policy without its adapters
    judge: Judge
    train: list[Question]
    marks: tuple[int, int]  # what pads a text, and what ends an answer
    skips: Skips


def learn(cfg: Config, by: Learner, history: list[Row], step: int) -> Row:
    """One step: a rollout, and unless it is over the budget a better policy, and a value model that knows it."""
    last = history[-1] if history else None
    kl_coef = rl.next_kl_coef(last["kl_coef"], last.get("kl", math.inf), cfg.kl_target) if last else cfg.kl_coef
    # 1, 2. Answers from the policy as it is.
    asking = [by.train[i] for i in pick(cfg.seed, step, cfg.batch, len(by.train))]
    asking.sort(key=lambda question: len(question["ids"]))
    policy, value = by.policy.model.eval(), by.value.model if by.value else None
    rollout, row = roll_out(
        *(policy, by.reference, value, by.judge, asking, by.marks, cfg),
        seed=cfg.seed * 100_003 + step,
        micro=by.policy.micro,
    )
    row["kl_coef"] = kl_coef
    # 3 to 6.
    if not over_budget(cfg, row):
        for trained in (by.policy, by.value) if by.value else (by.policy,):
            trained.set_rate(schedule(cfg, step, cfg.steps))
        row |= update(cfg, by, rollout, kl_coef, step)
        row |= {"skipped": float(by.skips.total)} if by.skips.running else {}
    return row


def update(cfg: Config, by: Learner, r: Rollout, kl_coef: float, step: int) -> Row:
    """Steps 3 to 6 on one rollout: cfg.epochs passes over it in cfg.minibatches pieces.

    In the first cfg.value_first steps the policy stands still: the value model starts as the reward model, which has
    only ever judged whole answers, and advantages from it would push the policy about at random.
    """
    started = time.perf_counter()
    moves = by.value is None or step >= cfg.value_first
    advantages, returns, said = advantages_of(cfg, r, kl_coef)
    if said.get("equal_groups") == 1:  # nothing says what is better, and AdamW would make whole steps of rounding
        return said
    engine = by.value or by.policy  # the one that keeps what is measured
    sums: Row = {}
    first: Row = {}

    n = len(r.ids)
    for epoch in range(cfg.epochs):
        # The first pass takes the rows as they were scored, so that its first ratio is exactly 1.
        r = r if epoch == 0 and by.policy.zero == 0 else r._replace(kept=None)
        rows = torch.arange(n) if epoch == 0 else torch.from_numpy(order(cfg.seed + step, epoch, n))
        for piece in rows.chunk(cfg.minibatches):
            total = float(r.mask[piece].sum())
            for part in split(piece.tolist(), by.policy.micro):
                take_in(cfg, by, r, advantages, returns, part, total, kl_coef, moves)
            first = first or engine.sums
            left_out = engine.skipped or (by.policy.skipped and moves)
            losses = f"the losses are {by.policy.sums.get('loss', 0.0) / total} and {engine.sums['loss'] / total}"
            by.skips.note(left_out, step, losses, cfg.lr)
            if not left_out:
                sums = {name: sums.get(name, 0.0) + number for name, number in engine.sums.items()}
    tokens = sums.pop("tokens", 1.0)
    sums.pop("off", None)
    loss = "value_loss" if by.value else "loss"
    metrics = {loss if name == "loss" else name: number / tokens for name, number in sums.items()}
    return metrics | {
        "first_off": first["off"] / first["tokens"],  # mean |rho - 1| before any step: 0, or something is wrong
        **said,
        "perf/update_s": time.perf_counter() - started,
    }


def advantages_of(cfg: Config, r: Rollout, kl_coef: float) -> tuple[Tensor, Tensor, Row]:
    """Steps 3 and 4: advantages and returns [N, T-1], and what there is to say of them. In GRPO an answer's tokens are
    all as good as it is among its group's, and there are no returns."""
    if cfg.algorithm == "grpo":
        among, alike = rl.group_advantages(r.scores, r.groups)
        return among[:, None] * r.mask, torch.zeros_like(r.values), {"equal_groups": alike}
    kl = rl.kl_estimate(r.logprobs, r.reference, cfg.kl_estimator)
    rewards = rl.token_rewards(r.scores, kl, r.mask, kl_coef)
    advantages = rl.gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)
    returns = advantages + r.values * r.mask
    explained = rl.explained_variance(r.values, returns, r.mask)
    return rl.whiten(advantages, r.mask), returns, {"explained_variance": explained}


def take_in(
    cfg: Config,
    by: Learner,
    r: Rollout,
    advantages: Tensor,
    returns: Tensor,
    part: Sequence[int],
    total: float,
    kl_coef: float,
    moves: bool,
) -> None:
    """Steps 5 and 6 for one micro-batch, of a minibatch with `total` tokens."""
    ids, mask = trimmed(r.ids[part], r.mask[part])
    old, known, values, advantage, target = (
        x[part, : mask.shape[1]] for x in (r.logprobs, r.reference, r.values, advantages, returns)
    )
    new = r.kept.logprobs if r.kept else answer_logprobs(by.policy.ds, ids, mask, cfg.temperature)
    loss, clipped = rl.policy_loss(new, old, advantage, mask, cfg.clip_ratio)
    drift = (old - new.detach()) * mask
    measured = {"policy_loss": loss, "clip_fraction": clipped, "approx_kl": drift.sum()}
    measured |= {"off": torch.expm1(-drift).abs().sum(), "tokens": mask.sum()}
    if by.value is None:
        penalty = (rl.kl_estimate(new, known, cfg.kl_estimator) * mask).sum()
        by.policy.step(loss + kl_coef * penalty, total, measured)
        return
    if moves:
        by.policy.step(loss, total)
    judged = by.value.ds(ids[:, :-1]) if r.kept is None or r.kept.values is None else r.kept.values
    by.value.step(rl.value_loss(judged, values, target, mask, cfg.clip_value), total, measured)


def over_budget(cfg: Config, row: Row) -> bool:
    """Whether the policy is too far away from where it began to go on; every rank says the same."""
    return cfg.kl_budget is not None and bool(agreed(int(row.get("kl", 0.0) > cfg.kl_budget)))


def run(
    cfg: Config,
    validate: Path,
    sft: Path,
    reward: Path,
    out: Path,
    scratch: Path,
    log: Log,
    judge: Path | None = None,
) -> dict[str, float]:
    # The models.
    torch.manual_seed(cfg.seed)
    answers = cfg.batch * cfg.group
    if answers % cfg.minibatches:
        raise ForjaError(f"ppo.minibatches: {cfg.minibatches} does not divide {answers} answers; choose a divisor")
    policy_model, tokenizer, prompts = load(sft, device())
    marks = special(tokenizer, SEPARATOR), stop(tokenizer, prompts)
    reference = None if cfg.lora else load(sft, device()).model
    if cfg.lora is not None:
        if os.environ.get("FORJA_ZERO", "0") != "0":
            raise ForjaError("FORJA_ZERO: adapters are not divided between ranks; leave it out, or set ppo.lora=null")
        adapt(policy_model, cfg.lora)
    at_once = cfg.batch if cfg.algorithm in dpo.KINDS else answers // cfg.minibatches
    policy = Engine(policy_model, cfg, at_once)
    value = None
    if cfg.algorithm == "ppo":
        value_cfg = cfg.model_copy(update={"lr": cfg.value_lr, "ema": None})
        value = Engine(load(reward, device()).model, value_cfg, at_once)

    # The prompts, and who judges the answers.
    function = None if cfg.judge == verify.MODEL else verify.function_of(cfg.judge, judge)
    longest = policy_model.config.context - cfg.max_new_tokens
    wanted = function is not None and verify.needs_truth(function)
    table, dropped = questions(tokenizer, validate / "prompts.jsonl", prompts, longest, wanted)
    train, heldout = table["train"], table["val"][: cfg.val_rows]
    if function is None:
        scored = by_model(load(reward, device()).model, marks[0])
    else:
        scored = verify.by_function(function, cfg.judge, tokenizer)
    pairs = dpo.preferences(cfg, validate / "preferences.jsonl", tokenizer, prompts, policy_model.config.context)

    # Go on where a killed run stood.
    log = log if world()[0] == 0 else silent
    best = Best(policy_model) if cfg.keep == "best" else None

    def measure(model: GPT) -> dict[str, Any]:
        found = evaluated(model, scored, heldout, marks[1], cfg.max_new_tokens, cfg.sample_rows)
        return found if pairs is None else found | dpo.measured(cfg, pairs, reference, model, heldout, marks)

    before = measure(reference or policy_model) | {"step": 0}
    if best is not None:
        best.note(-before["reward"], 0)
    maybe: dict[str, Saved | None] = {"policy": policy, "value": value, "best": best}
    saved = {name: part for name, part in maybe.items() if part is not None}
    with stoppable() as asked, Saver(scratch, saved) as saver, vllm_rollout.ended():
        state = saver.resume() or {"step": 0, "skipped": [0, 0]}
        skips = Skips(*state["skipped"])
        history, evaluations, alarms = (list(state.get(key, ())) for key in ("history", "evaluations", "alarms"))

        step_of: Callable[[int], Row]
        if pairs is None:
            step_of = partial(learn, cfg, Learner(policy, value, reference, scored, train, marks, skips), history)
        else:
            by = dpo.Learner(policy, reference, pairs, marks[0], skips, partial(over_budget, cfg))
            step_of = partial(dpo.learn, cfg, by, history)

        for step in range(state["step"], cfg.steps):
            row = step_of(step) | {"progress": (step + 1) / cfg.steps}
            over = over_budget(cfg, row)

            # How it does on prompts it does not learn from, and whether something goes wrong.
            done = step + 1
            ends = done == cfg.steps or over
            if ends:
                policy_model = policy.finished()
            if not over and (done % cfg.eval_every == 0 or ends):
                evaluations.append(measure(policy_model) | {"step": done})
                row |= said_of(evaluations[-1])
                if best is not None:
                    best.note(-row["val_reward"], done)
            log(row, done)
            history.append(finite(lasting(row)))
            said = new_alarms(history, cfg.kl_target)
            if over:
                text = f"KL of {row['kl']:.2f} nats is over kl_budget {cfg.kl_budget:g}: the training ends"
                said.append({"step": done, "alarm": "budget", "text": text})
            for alarm in said if world()[0] == 0 else ():
                logger.warning("ppo, rollout %d: %s", done, alarm["text"])
            alarms += said
            signal = asked()
            if not ends and (done % cfg.save_every == 0 or signal):
                told = {"history": history, "evaluations": evaluations, "alarms": alarms}
                saver.save(done, told | {"skipped": [skips.total, skips.running]})
            if not ends and signal:
                saver.join()
                raise interrupted(signal, done, cfg.steps)
            if over:
                break

    # The policy is what goes on.
    metrics: dict[str, float] = {key: number for row in history for key, number in row.items()}
    if best is not None:
        best.put_back()
        (kept,) = (e for e in (before, *evaluations) if e["step"] == best.step)
        metrics |= {"best_step": float(best.step)} | said_of(kept)
    if cfg.lora is not None:
        merge(policy_model)
    save(policy_model, out, sft / TOKENIZER, prompts)
    shown = [{key: row[key] for key in ("prompt", "ids")} for row in heldout[: cfg.sample_rows]]
    write_samples(out, policy_model.eval(), tokenizer, shown, marks[1])
    write_evaluations(out, [before, *evaluations], heldout, tokenizer)
    (out / ALARMS).write_text(to_json(alarms), encoding="utf-8")
    counts = {f"dropped.{why}": n for why, n in dropped.items()} | {"dropped": dropped.total()}
    counts |= pairs.counts if pairs is not None else {}
    counts |= {"skipped": skips.total, "alarms": len(alarms), "rollouts": len(history)}
    return metrics | {"val_reward_before": before["reward"], **{k: float(n) for k, n in counts.items()}}
