"""PPO from a learnt reward (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022), in numbered steps.

Four models: the policy that learns, the value model that judges its prospects (it starts as the reward model), the
frozen reference (SFT) that the policy is tied to by a penalty, and the frozen reward model. Every step is a function of
(seed, step) and of the weights before it, so a killed run goes on to the same bytes.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from components.artifact import ForjaError
from components.data.batches import order, pick
from components.data.chat import SEPARATOR, encode_prompt, special
from components.data.templates import stop
from components.data.tokenize import rows
from components.log import Log, lasting, silent
from components.model.checkpoint import TOKENIZER, load, save
from components.model.checkpoint import default_device as device
from components.model.engine import Engine
from components.model.generate import generate
from components.model.gpt import GPT
from components.model.losses import pad_right, picked_logprobs
from components.model.optim import Optim, schedule
from components.model.ranks import interrupted, split, stoppable
from components.model.scratch import Saver
from components.train.loop import Skips, finite
from components.train.reward import score
from components.train.samples import write_samples
from components.world import world


class Config(Optim, frozen=True, extra="forbid"):
    seed: int
    steps: int = Field(ge=0)  # rollouts
    batch: int = Field(ge=2)  # prompts of a rollout
    minibatches: int = Field(ge=1)
    epochs: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(gt=0)
    value_lr: float = Field(gt=0)
    value_first: int = Field(ge=0)  # rollouts from which the value model alone learns
    gamma: float = Field(ge=0, le=1)
    lam: float = Field(ge=0, le=1)
    clip_ratio: float = Field(gt=0)
    clip_value: float = Field(gt=0)
    kl_coef: float = Field(ge=0)
    kl_target: float | None  # nats an answer; None leaves kl_coef as it is
    unfinished: float  # the score of an answer that never ends
    eval_every: int = Field(ge=1)
    save_every: int = Field(ge=1)
    val_rows: int = Field(ge=1)
    sample_rows: int = Field(ge=0)


class Rollout(NamedTuple):
    """N answers and what the models think of them. Position t of [N, T-1] is about the token ids[:, t + 1]."""

    ids: Tensor  # [N, T] prompt and answer, padded behind
    mask: Tensor  # [N, T-1] True where the token is the policy's own
    logprobs: Tensor  # [N, T-1] of the policy as it sampled
    reference: Tensor  # [N, T-1] of the frozen SFT model
    values: Tensor  # [N, T-1] the return the value model expects before the token
    scores: Tensor  # [N] of the reward model
    finished: Tensor  # [N] True where the answer ended by itself


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef (log pi(a_t) - log ref(a_t)), plus the score at the answer's last token. All [N, T], scores [N].

    The estimator log pi - log ref of the divergence is unbiased under the policy's own samples (Ziegler et al. 2019).
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages [N, T]: A_t = d_t + gamma lam A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t (Schulman et al. 2016, eq. 16).

    The answer is the contiguous run of True in `mask`; behind its end there is no value and no advantage.
    """
    advantages = torch.zeros_like(rewards)
    after = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = torch.where(mask[:, t], delta + gamma * lam * after, torch.zeros_like(after))
        next_value = torch.where(mask[:, t], values[:, t], torch.zeros_like(after))
        advantages[:, t] = after
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and deviation 1 over the valid entries, 0 elsewhere. One entry, or all equal, gives zeros."""
    valid = x[mask]
    return (x - valid.mean()) / valid.std(correction=0).clamp(min=1e-8) * mask


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The sum over valid tokens of -min(rho A, clip(rho, 1 +- clip) A), rho = exp(new - old), and the clipped count."""
    ratio = torch.exp((new - old) * mask)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return (loss * mask).sum(), ((ratio != clipped) & mask).sum()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """The sum over valid tokens of max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2."""
    clipped = old + (new - old).clamp(-clip, clip)
    return (0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2) * mask).sum()


def next_kl_coef(coef: float, kl: float, target: float | None) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2: up when the divergence is above target."""
    if target is None:
        return coef
    return coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def trimmed(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """ids [n, T] and mask [n, T-1] without the columns in which every row is padding."""
    width = int(mask.any(0).nonzero().max()) + 1
    return ids[:, : width + 1], mask[:, :width]


def answer_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log p [N, T-1] of the answers' tokens from the logits [n, V] at the n positions of `mask`; 0 elsewhere."""
    out = logits.new_zeros(mask.shape)
    return out.masked_scatter(mask, picked_logprobs(logits, ids[:, 1:][mask]))


def roll_out(
    policy: GPT,
    reference: GPT,
    value: GPT,
    reward: GPT,
    prompts: Sequence[list[int]],
    marks: tuple[int, int],
    cfg: Config,
    seed: int,
) -> tuple[Rollout, dict[str, float]]:
    """Sample an answer to each prompt and let every model read it, in minibatches of the update's own shape."""
    pad, end = marks
    started = time.perf_counter()
    answers = generate(
        policy, prompts, max_new_tokens=cfg.max_new_tokens, stop=end, temperature=cfg.temperature, seed=seed
    )
    sampled = time.perf_counter()
    # In the order of length, so that a minibatch holds like lengths and little padding.
    both = sorted(zip(prompts, answers, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
    sequences = [p + a for p, a in both]
    ids = pad_right(sequences, pad, device())
    position = torch.arange(1, ids.shape[1], device=ids.device)
    first = torch.tensor([len(p) for p, _ in both], device=ids.device)[:, None]
    last = torch.tensor([len(s) for s in sequences], device=ids.device)[:, None]
    mask = (position >= first) & (position < last)

    logprobs, ref, values = (torch.zeros(mask.shape, device=ids.device) for _ in range(3))
    entropy = 0.0
    with torch.no_grad():
        for rows in torch.arange(len(ids)).chunk(cfg.minibatches):
            chunk, own = trimmed(ids[rows], mask[rows])
            width = own.shape[1]
            logits = policy(chunk[:, :-1], at=own)
            spread = torch.log_softmax(logits, dim=-1)
            entropy -= float((spread.exp() * spread).sum())
            logprobs[rows, :width] = answer_logprobs(logits, chunk, own)
            ref[rows, :width] = answer_logprobs(reference(chunk[:, :-1], at=own), chunk, own)
            values[rows, :width] = value(chunk[:, :-1])
    finished = torch.tensor([a[-1] == end for _, a in both], device=ids.device)
    scores = score(reward, sequences, pad).to(ids.device)
    if not torch.isfinite(scores).all():
        raise ForjaError("artifacts/reward: the reward of an answer is NaN or infinite; train the reward model again")
    scores = torch.where(finished, scores, torch.full_like(scores, cfg.unfinished))
    metrics = {
        "reward": float(scores.mean()),
        "kl": float(((logprobs - ref) * mask).sum(1).mean()),
        "entropy": entropy / float(mask.sum()),
        "length": float(mask.sum(1).float().mean()),
        "unfinished": float((~finished).float().mean()),
        "perf/rollout_s": sampled - started,
        "perf/scoring_s": time.perf_counter() - sampled,
    }
    return Rollout(ids, mask, logprobs, ref, values, scores, finished), metrics


def update(
    policy: Engine, value: Engine, rollout: Rollout, kl_coef: float, cfg: Config, step: int, skips: Skips
) -> dict[str, float]:
    """Improve policy and value on one rollout: cfg.epochs passes over it in cfg.minibatches pieces.

    In the first cfg.value_first steps the policy stands still: the value model starts as the reward model, which has
    only ever judged whole answers, and advantages from it would push the policy about at random.
    """
    started = time.perf_counter()
    r = rollout
    rewards = token_rewards(r.scores, r.logprobs, r.reference, r.mask, kl_coef)
    advantages = gae(rewards, r.values, r.mask, cfg.gamma, cfg.lam)
    returns = advantages + r.values * r.mask
    advantages = whiten(advantages, r.mask)
    sums: dict[str, float] = {}

    n = len(r.ids)
    for epoch in range(cfg.epochs):
        # The first pass takes the rows as they were scored, so that its first ratio is exactly 1.
        rows = torch.arange(n) if epoch == 0 else torch.from_numpy(order(cfg.seed + step, epoch, n))
        for piece in rows.chunk(cfg.minibatches):
            total = float(r.mask[piece].sum())
            for part in split(piece.tolist(), policy.micro):
                ids, mask = trimmed(r.ids[part], r.mask[part])
                old, values, advantage, target = (
                    x[part, : mask.shape[1]] for x in (r.logprobs, r.values, advantages, returns)
                )
                new = answer_logprobs(policy.ds(ids[:, :-1], at=mask), ids, mask)
                loss, clipped = policy_loss(new, old, advantage, mask, cfg.clip_ratio)
                if step >= cfg.value_first:
                    policy.step(loss, total)
                judged = value.ds(ids[:, :-1])
                v_loss = value_loss(judged, values, target, mask, cfg.clip_value)
                drift = ((old - new.detach()) * mask).sum()
                measured = {"policy_loss": loss, "clip_fraction": clipped, "approx_kl": drift, "tokens": mask.sum()}
                value.step(v_loss, total, measured)
            left_out = value.skipped or (policy.skipped and step >= cfg.value_first)
            said = f"the losses are {policy.sums.get('loss', 0.0) / total} and {value.sums['loss'] / total}"
            skips.note(left_out, step, said, cfg.lr)
            if not left_out:
                sums = {name: sums.get(name, 0.0) + number for name, number in value.sums.items()}
    tokens = sums.pop("tokens", 1.0)
    metrics = {"value_loss" if name == "loss" else name: number / tokens for name, number in sums.items()}
    variance = returns[r.mask].var(correction=0).clamp(min=1e-8)
    error = (returns - r.values)[r.mask].var(correction=0)
    return metrics | {
        "explained_variance": float(1 - error / variance),
        "perf/update_s": time.perf_counter() - started,
    }


def questions(tokenizer: Tokenizer, path: Path, prompts: dict, longest: int) -> dict[str, list[dict[str, Any]]]:
    """The prompts of each split as {"prompt", "ids"}, without those longer than `longest` tokens."""
    out: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
    for row in rows(path):
        ids = encode_prompt(tokenizer, row["messages"], prompts[row["lang"]])
        if len(ids) <= longest:
            out[row["split"]].append({"prompt": row["messages"][-1]["content"], "ids": ids})
    return out


def run(cfg: Config, validate: Path, sft: Path, reward: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
    # 1. The four models.
    torch.manual_seed(cfg.seed)
    policy_model, tokenizer, prompts = load(sft, device())
    reference, reward_model = load(sft, device()).model, load(reward, device()).model
    value_model = load(reward, device()).model
    if cfg.batch % cfg.minibatches:
        raise ForjaError(f"ppo.minibatches: {cfg.minibatches} does not divide ppo.batch {cfg.batch}; choose a divisor")
    minibatch = cfg.batch // cfg.minibatches
    policy = Engine(policy_model, cfg, minibatch)
    value = Engine(value_model, cfg.model_copy(update={"lr": cfg.value_lr, "ema": None}), minibatch)
    marks = special(tokenizer, SEPARATOR), stop(tokenizer, prompts)

    # 2. The prompts.
    table = questions(tokenizer, validate / "prompts.jsonl", prompts, reference.config.context - cfg.max_new_tokens)
    train, heldout = table["train"], table["val"][: cfg.val_rows]
    if not train or not heldout:
        raise ForjaError(f"{validate}/prompts.jsonl: {len(train)} training and {len(heldout)} held-out prompts fit")

    def heldout_reward(model: GPT) -> float:
        asked = [row["ids"] for row in heldout]
        answers = generate(model, asked, max_new_tokens=cfg.max_new_tokens, stop=marks[1])
        return float(score(reward_model, [p + a for p, a in zip(asked, answers, strict=True)], marks[0]).mean())

    # 3. Go on where a killed run stood.
    log = log if world()[0] == 0 else silent
    before = heldout_reward(reference)
    with stoppable() as asked, Saver(scratch, {"policy": policy, "value": value}) as saver:
        state = saver.resume() or {"step": 0, "kl_coef": cfg.kl_coef, "skipped": [0, 0], "metrics": {}}
        kl_coef, metrics, skips = float(state["kl_coef"]), state["metrics"], Skips(*state["skipped"])

        for step in range(state["step"], cfg.steps):
            # 4. Answers from the policy as it is.
            asking = [train[i]["ids"] for i in pick(cfg.seed, step, cfg.batch, len(train))]
            asking.sort(key=len)
            policy_model.eval()
            rollout, row = roll_out(
                policy_model, reference, value_model, reward_model, asking, marks, cfg, cfg.seed * 100_003 + step
            )

            # 5. A better policy, and a value model that knows it.
            for trained in (policy, value):
                trained.set_rate(schedule(cfg, step, cfg.steps))
            row |= update(policy, value, rollout, kl_coef, cfg, step, skips)
            row |= {"kl_coef": kl_coef, "progress": (step + 1) / cfg.steps}
            row |= {"skipped": float(skips.total)} if skips.running else {}
            kl_coef = next_kl_coef(kl_coef, row["kl"], cfg.kl_target)

            # 6. How it does on prompts it does not learn from.
            done = step + 1
            if done == cfg.steps:
                policy_model = policy.finished()
            if done % cfg.eval_every == 0 or done == cfg.steps:
                row["val_reward"] = heldout_reward(policy_model)
            log(row, done)
            metrics = {**metrics, **finite(lasting(row))}
            signal = asked()
            if done < cfg.steps and (done % cfg.save_every == 0 or signal):
                more = {"kl_coef": kl_coef, "skipped": [skips.total, skips.running], "metrics": metrics}
                saver.save(done, more)
            if done < cfg.steps and signal:
                saver.join()
                raise interrupted(signal, done, cfg.steps)

    # 7. The policy is what goes on.
    save(policy_model, out, sft / TOKENIZER, prompts)
    write_samples(out, policy_model.eval(), tokenizer, heldout[: cfg.sample_rows], marks[1])
    return metrics | {"val_reward_before": before, "skipped": float(skips.total)}
