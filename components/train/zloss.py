"""The z-loss: it keeps logits from drifting where softmax does not care (Chowdhery et al. 2022, section 5)."""

from torch import Tensor

from components.model.losses import picked_logprobs


def nats_and_z(logits: Tensor, targets: Tensor, coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over `targets` [...] of -log p + coefficient * log^2 Z, from logits [..., V], and its two parts."""
    nats = -picked_logprobs(logits, targets).sum()
    z = logits.logsumexp(-1).square().sum() * coefficient
    return nats + z, {"nats": nats, "z_loss": z}
