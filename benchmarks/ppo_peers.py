"""What ppo.py is compared with: TRL's PPOTrainer, and transformers' `generate` with PPO in a plain loop.

Each takes one turn a PPO batch: an answer to every prompt, scores, and the epochs of learning. Nothing of forja is
imported but the turns, so that it runs in TRL's own environment.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rounds import Turns

VOCAB, EPOCHS, PAD, END = 4096, 4, 0, 1
SHAPE = {"context": 256, "layers": 6, "width": 384, "heads": 6, "batch": 32, "prompt": 32, "answer": 64}
SMOKE = {"context": 32, "layers": 1, "width": 16, "heads": 2, "batch": 4, "prompt": 6, "answer": 8}
GAMMA, LAM, CLIP, KL = 1.0, 0.95, 0.2, 0.05  # TRL's defaults


def prompts(s: dict[str, int], step: int) -> Any:
    """[batch, prompt] random tokens, none of them PAD or END; the same for all."""
    import torch

    return torch.randint(2, VOCAB, (s["batch"], s["prompt"]), generator=torch.Generator().manual_seed(step))


def models(s: dict[str, int]) -> list[Any]:
    """Policy, reference, value and reward model, of random weights and without dropout."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    names = {"n_positions": s["context"], "n_embd": s["width"], "n_layer": s["layers"], "n_head": s["heads"]}
    off = {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
    marks = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=VOCAB, num_labels=1, **names, **off, **marks)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    value, reward = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    reference.load_state_dict(policy.state_dict())
    value.load_state_dict(reward.state_dict())
    return [policy, reference, value, reward]


def trl(s: dict[str, int], bf16: bool) -> None:
    """A turn lasts from one end of a step to the next; the first step warms up, and is nobody's.

    `bf16` is PPOConfig's own setting, which does nothing on a CPU unless its Accelerator is told too.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = {f"w{i}": i for i in range(VOCAB)}
    marks = {"unk_token": "w2", "pad_token": f"w{PAD}", "eos_token": f"w{END}", "padding_side": "left"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w2")), **marks)  # noqa: S106
    rows = [row for step in range(16) for row in prompts(s, step).tolist()]
    policy, reference, value, reward = models(s)

    class Turn(TrainerCallback):
        turns: Turns | None = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.turns is None:
                self.turns = Turns()
            else:
                self.turns.end()
            if not self.turns.begin():
                raise SystemExit

    # It prints before there is a turn, and standard output is kept for the answers.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        args = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=s["batch"],
            gradient_accumulation_steps=1,
            num_ppo_epochs=EPOCHS,
            response_length=s["answer"],
            total_episodes=s["batch"] << 16,
            num_sample_generations=0,
            temperature=1.0,
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        )
        data = Dataset.from_dict({"input_ids": rows})
        PPOTrainer(args, tokenizer, policy, reference, reward, data, value, callbacks=[Turn()]).train()


def plain(s: dict[str, int], bf16: bool) -> None:
    """As somebody careful writes it: no padding, heads at the answers alone, one optimiser a model."""
    import torch

    policy, reference, value, reward = models(s)
    optimisers = [torch.optim.AdamW(m.parameters(), lr=3e-6, fused=True) for m in (policy, value)]
    asked = s["prompt"]

    def logprobs(model: Any, ids: Any) -> Any:
        hidden = model.transformer(ids[:, :-1]).last_hidden_state[:, asked - 1 :]
        picked = model.lm_head(hidden).float().log_softmax(-1)
        return picked.gather(2, ids[:, asked:, None]).squeeze(2)

    def values(model: Any, ids: Any) -> Any:
        return model.score(model.transformer(ids).last_hidden_state).float().squeeze(2)

    def gae(rewards: Any, seen: Any) -> Any:
        out, after, following = [], torch.zeros(len(seen)), torch.zeros(len(seen))
        for t in reversed(range(seen.shape[1])):
            after = rewards[:, t] + GAMMA * following - seen[:, t] + GAMMA * LAM * after
            following = seen[:, t]
            out.append(after)
        return torch.stack(out[::-1], 1)

    def learn(loss: Any, model: Any, optimiser: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    def step(n: int) -> None:
        context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
        with context:
            with torch.no_grad():
                ids = prompts(s, n)
                ask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": s["answer"], "do_sample": True}
                ids = policy.generate(ids, **ask, top_k=0, top_p=1.0)
                old, known = logprobs(policy, ids), logprobs(reference, ids)
                seen = values(value, ids[:, :-1])[:, asked - 1 :]
                rewards = KL * (known - old)
                rewards[:, -1] += values(reward, ids)[:, -1]
                advantages = gae(rewards, seen)
                returns = advantages + seen
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            for _ in range(EPOCHS):
                ratio = (logprobs(policy, ids) - old).exp()
                loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
                judged = values(value, ids[:, :-1])[:, asked - 1 :]
                clipped = seen + (judged - seen).clamp(-CLIP, CLIP)
                v_loss = 0.5 * torch.maximum((judged - returns) ** 2, (clipped - returns) ** 2).mean()
                with torch.autocast("cpu", enabled=False):
                    learn(loss, policy, optimisers[0])
                    learn(v_loss, value, optimisers[1])
                loss.item(), v_loss.item()

    step(0)
    turns, n = Turns(), 0
    while turns.begin():
        step(n := n + 1)
        turns.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["trl", "plain"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    {"trl": trl, "plain": plain}[asked.peer](SMOKE if asked.smoke else SHAPE, asked.bf16)
