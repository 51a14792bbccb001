"""The referee: a second reward model, of rows that the first one never saw.

A policy that found a weakness of the reward model it learns from gets more reward and is no better (Gao et al. 2022). A
model of other rows has other weaknesses, so it does not see that gain: `evaluate` asks both. PPO never does. What both
learnt from SFT, or from the same sort of wrong answers, they can still be wrong about together.
"""

from pathlib import Path

from components.log import Log
from components.train import reward


class Config(reward.Config, frozen=True, extra="forbid"):
    """The reward model's keys, with values of its own. The recipe refuses shares that overlap."""


def run(cfg: Config, validate: Path, sft: Path, out: Path, scratch: Path, log: Log) -> dict[str, float]:
    return reward.learn(cfg, lambda row: reward.place(row) >= 1 - cfg.share, validate, sft, out, scratch, log)
