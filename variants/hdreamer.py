"""Hierarchical latents: the stochastic state has a coarse and a fine level.

Papers: ladder variational autoencoders (Sonderby et al., 2016) and NVAE (Vahdat and Kautz, 2020);
for `--free_nats`, inverse autoregressive flow (Kingma et al., 2016) and DreamerV3 (Hafner et al.,
2023).

    python -m variants.hdreamer --task pinpad_three [--free_nats 1]
    python -m variants.hdreamer --logdir RUN ...    resumes a run of director.py, with its flags

Idea: one categorical sample has to represent both the layout of a scene and its details. With two
levels, the coarse one is drawn first, and the fine one adds what is still unknown given the coarse.

What changes:
- `stoch` is [coarse, fine]. The coarse level is Director's: `--stoch` groups of `--classes`. The
  fine level has `--bottom_stoch` groups of `--bottom_classes`.
- The prior of the fine level reads the coarse sample, too. Its posterior has the logits

      logits of the prior + correction(deter, coarse sample, embed)   (NVAE's residual, Section 3.2)

  with gradients through both terms. (NVAE shifts the mean and scales the standard deviation of a
  Gaussian. Here logits are added.)
- Each level has a balanced KL (Director's eq. 2) with an adaptive scale of its own. `--kl_target`
  is divided in proportion to the numbers of groups.
- `--free_nats X` replaces these scales by free bits: the loss of each level and step is max(KL, X),
  with weight 1, so that a KL below X has no gradient. KL is the sum over the groups of a level.
  Clipping the balanced KL is the same as clipping each of its two terms, which DreamerV3 does: both
  terms have the same value and differ in their gradients only. (DreamerV3's weights are 1 and 0.1,
  here 0.8 and 0.2.) Kingma et al. clip per level, too, but the mean over a batch; a clip in each
  step is DreamerV3's.
- Everything that reads `stoch` reads both levels.

From a checkpoint of director.py, the agent at first acts exactly as Director did: the weights by
which other networks read the fine level start at 0, and so does the correction. Adam's moments
start anew.

What is left out: levels that differ in time scale (Clockwork VAE). Both levels change in each step.
"""

import dataclasses
import sys

import torch
from gymnasium import spaces
from torch import Tensor, nn

import director
from variants import refuse


@dataclasses.dataclass
class Config(director.Config):
    sizes = {
        "paper": {**director.SIZES["paper"], "bottom_stoch": 32, "bottom_classes": 32},
        "s": {**director.SIZES["s"], "bottom_stoch": 16, "bottom_classes": 16},
        "xs": {**director.SIZES["xs"], "bottom_stoch": 16, "bottom_classes": 16}}

    bottom_stoch: int = director.flag(None, "groups of the fine level", group="hdreamer",
                                      fixed=True)
    bottom_classes: int = director.flag(None, "classes in each of these groups", fixed=True)
    free_nats: float = director.flag(
        0.0, "the KL of a level below this costs nothing; 0: adaptive scales", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.free_nats:
            refuse(self, ("kl_target",), "with --free_nats, the KL has no target")


class RSSM(director.RSSM):
    """Director's; `stoch` and logits, both [..., SC], are those of the coarse, then the fine level.

    levels: (groups, classes) of both. parts: their sizes in `stoch`.
    """

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__(embed, action, config)
        deter, hidden = config.deter, config.hidden
        coarse = config.stoch * config.classes
        fine = config.bottom_stoch * config.bottom_classes
        self.levels = [self.groups, (config.bottom_stoch, config.bottom_classes)]
        self.parts = [coarse, fine]
        self.size = coarse + fine
        self.inputs = nn.Sequential(*director.dense(self.size + action, hidden))
        self.fine_net = nn.Sequential(
            *director.dense(deter + coarse, hidden), director.glorot(nn.Linear(hidden, fine)))
        self.correction = nn.Sequential(
            *director.dense(deter + coarse + embed, hidden),
            director.glorot(nn.Linear(hidden, fine)))
        nn.init.zeros_(self.correction[-1].weight)

    def split(self, logits: Tensor) -> list[Tensor]:
        """Logits of both levels, [..., SC], to those of each level, [..., S, C]."""
        coarse, fine = logits.split(self.parts, -1)
        return [coarse.unflatten(-1, self.levels[0]), fine.unflatten(-1, self.levels[1])]

    def prior(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """Logits [..., SC] without the observation; those of the fine level, given coarse stoch."""
        coarse_stoch = stoch[..., : self.parts[0]]
        fine = self.fine_net(torch.cat([deter, coarse_stoch], -1)).float()
        coarse = super().prior(deter).flatten(-2)
        return torch.cat([coarse, fine], -1)

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        coarse_stoch, coarse = super().posterior(deter, embed)
        known = torch.cat([deter, coarse_stoch], -1)
        prior = self.fine_net(known).float()
        fine = prior + self.correction(torch.cat([known, embed], -1)).float()
        dist = director.OneHot(fine.unflatten(-1, self.levels[1]))
        stoch = torch.cat([coarse_stoch, dist.rsample().flatten(-2)], -1)
        return stoch, torch.cat([coarse.flatten(-2), fine], -1)

    def predict_stoch(self, deter: Tensor, sample: bool = True) -> Tensor:
        """Draw the coarse level, then the fine level given that (or take their modes)."""
        dist = director.OneHot(super().prior(deter))
        coarse = (dist.rsample() if sample else dist.mode).flatten(-2)
        logits = self.fine_net(torch.cat([deter, coarse], -1)).float()
        dist = director.OneHot(logits.unflatten(-1, self.levels[1]))
        fine = (dist.rsample() if sample else dist.mode).flatten(-2)
        return torch.cat([coarse, fine], -1)


class WorldModel(director.WorldModel):
    RSSM = RSSM

    def __init__(self, obs_space: spaces.Dict, action: int, config: Config):
        super().__init__(obs_space, action, config)
        self.free_nats = config.free_nats
        groups = torch.tensor([float(groups) for groups, _ in self.rssm.levels])
        targets = self.kl_adapt.target * groups / groups.sum()
        self.kl_adapt = director.AutoAdapt((2,), targets, low=1e-5, high=1.0)

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The sum of the weighted or clipped KLs of both levels, [B, T], and metrics."""
        posts = self.rssm.split(states["post"])
        priors = self.rssm.split(states["prior"])
        kls = []
        metrics = {}
        for i, level in enumerate(["coarse", "fine"]):
            kl = director.balanced_kl(posts[i], priors[i], 0.8)
            kls.append(kl)
            metrics[f"{level}_kl"] = kl.mean()
            if self.free_nats:
                metrics[f"{level}_kl_free"] = (kl < self.free_nats).float().mean()
            else:
                metrics[f"{level}_kl_scale"] = self.kl_adapt.scale[i]
            metrics[f"{level}_post_ent"] = director.OneHot(posts[i]).entropy().sum(-1).mean()
            metrics[f"{level}_prior_ent"] = director.OneHot(priors[i]).entropy().sum(-1).mean()
        kls = torch.stack(kls, -1)  # [B, T, 2]
        if self.free_nats:
            return kls.clamp(min=self.free_nats).sum(-1), metrics
        return self.kl_adapt(kls).sum(-1), metrics


class Agent(director.Director):
    """Director with coarse and fine latents."""

    Config, WorldModel = Config, WorldModel
    compatible_variants = ("director",)

    def restore(self, state: dict):
        if state["variant"] not in self.compatible_variants:
            super().restore(state)
            return
        # A checkpoint of director.py, whose optimizers do not fit.
        weights = self.state_dict()
        for key, value in state["agent"].items():
            weights[key] = self.widen(key, value, weights[key])
        self.load_state_dict(weights)
        self.grad_steps = int(state["grad_steps"])

    def widen(self, key: str, value: Tensor, own: Tensor) -> Tensor:
        """Director's weights as those of this agent, `own`: with inputs for the fine level, of 0.

        In what reads `stoch`, the fine level comes after the coarse one. In a linear layer, inputs
        are dimension 1, in a transposed convolution dimension 0.
        """
        if value.ndim == 0 or value.shape == own.shape:
            return value.expand_as(own)  # the scale of Director's KL becomes that of both levels
        coarse, fine = self.world_model.rssm.parts
        start = coarse if "rssm.inputs" in key else self.config.deter + coarse
        dim = 1 if len(own) == len(value) else 0
        before, after = value.tensor_split([start], dim)
        zeros = torch.zeros_like(own.narrow(dim, start, fine), device=value.device)
        return torch.cat([before, zeros, after], dim)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
