"""Gaussian latents: the stochastic state is normally distributed instead of categorical.

Papers: World Models (Ha and Schmidhuber, 2018), PlaNet (Hafner et al., 2019) and the first Dreamer
have Gaussian latents; DreamerV2 and Director have categorical ones.

    python -m variants.gaussian --task pinpad_three

What changes: `stoch` is a vector of `--stoch` times `--classes` numbers, as many as Director's
one-hot vectors have. Prior and posterior are diagonal Gaussians with standard deviation
softplus(x) + 0.1, as in PlaNet. Samples are reparameterised, so that gradients are unbiased, unlike
straight-through ones. The KL is analytic, and balanced as in Director's eq. 2. The mode is the
mean.

What is left out: the prior of World Models is a mixture of Gaussians, and its posterior reads the
present image alone. PlaNet has fewer latents (30), an unbalanced KL and free nats; here, as in
Director, the KL is weighted such that it stays near `--kl_target`.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import director


class RSSM(director.RSSM):
    """Director's, with means and standard deviations [..., SC, 2] instead of logits."""

    def __init__(self, embed: int, action: int, config: director.Config):
        super().__init__(embed, action, config)
        for net in (self.prior_net, self.post_net):
            net[-1] = director.glorot(nn.Linear(config.hidden, 2 * self.size))

    def mean_and_std(self, out: Tensor) -> Tensor:
        """Outputs of a network, [..., 2 SC], to means and standard deviations, [..., SC, 2]."""
        mean, std = out.float().chunk(2, -1)
        return torch.stack([mean, F.softplus(std) + 0.1], -1)

    def prior(self, deter: Tensor, stoch: Tensor | None = None) -> Tensor:
        return self.mean_and_std(self.prior_net(deter))

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        params = self.mean_and_std(self.post_net(torch.cat([deter, embed], -1)))
        mean, std = params.unbind(-1)
        return mean + std * torch.randn_like(std), params

    def predict_stoch(self, deter: Tensor, sample: bool = True) -> Tensor:
        mean, std = self.prior(deter).unbind(-1)
        return mean + std * torch.randn_like(std) if sample else mean


def normal(params: Tensor) -> Normal:
    """[..., SC, 2] to distributions [..., SC]."""
    mean, std = params.unbind(-1)
    return Normal(mean, std, validate_args=False)


class WorldModel(director.WorldModel):
    RSSM = RSSM

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        post = states["post"]
        prior = states["prior"]
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
