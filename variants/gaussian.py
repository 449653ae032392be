"""Gaussian latents: what is random about a state is numbers, not classes.

World Models (Ha and Schmidhuber, 2018), PlaNet (Hafner et al., 2019) and the first Dreamer describe
what cannot be known in advance by normally distributed numbers; DreamerV2 and Director took
categories, of which each is one of several, as places and things are.

    python -m variants.gaussian --task pinpad_three

What changes: `stoch` has as many numbers as Director's one-hot vectors have, `--stoch` times
`--classes`. Prior and posterior give each a mean and a standard deviation, softplus(x) + 0.1 as in
PlaNet. Samples are reparameterised, so that gradients are exact and not straight-through; the KL is
analytic, and balanced as in Director's eq. 2. A mode is a mean.

What is left out: World Models' prior is a mixture, and its latents know nothing of the past; those
of PlaNet are fewer (30) and have free nats, where here, as in Director, the KL is weighted such
that it stays at `--kl_target`.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import director


class RSSM(director.RSSM):
    """Director's, with means and deviations, [..., SC, 2], in place of logits."""

    def __init__(self, embed: int, action: int, config: director.Config):
        super().__init__(embed, action, config)
        for net in (self.prior_net, self.post_net):
            net[-1] = director.glorot(nn.Linear(config.hidden, 2 * self.size))

    def spread(self, out: Tensor) -> Tensor:
        """A network's outputs, [..., 2 SC], to means and deviations, [..., SC, 2]."""
        mean, std = out.float().chunk(2, -1)
        return torch.stack([mean, F.softplus(std) + 0.1], -1)

    def prior(self, deter: Tensor, stoch: Tensor | None = None) -> Tensor:
        return self.spread(self.prior_net(deter))

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        params = self.spread(self.post_net(torch.cat([deter, embed], -1)))
        mean, std = params.unbind(-1)
        return mean + std * torch.randn_like(std), params

    def predict_stoch(self, deter: Tensor, sample: bool = True) -> Tensor:
        mean, std = self.prior(deter).unbind(-1)
        return mean + std * torch.randn_like(std) if sample else mean


class WorldModel(director.WorldModel):
    RSSM = RSSM

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        def normal(params: Tensor) -> Normal:
            return Normal(*params.unbind(-1), validate_args=False)

        post, prior = states["post"], states["prior"]
        forward = kl_divergence(normal(post.detach()), normal(prior))
        backward = kl_divergence(normal(post), normal(prior.detach()))
        kl = (0.8 * forward + 0.2 * backward).sum(-1)  # [B, T]
        loss = self.kl_adapt(kl)
        metrics = {"kl": kl.mean(), "kl_scale": self.kl_adapt.scale}
        for key in ("prior", "post"):
            metrics[f"{key}_std"] = states[key][..., 1].mean()
        return loss, metrics


class Agent(director.Director):
    """Director with normally distributed latents."""

    WorldModel = WorldModel


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
