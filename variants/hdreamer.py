"""Hierarchical latents: what is random about a state comes on two levels, coarse and fine.

One categorical sample has to hold the layout of a scene and its details alike. With two levels, as
in ladder VAEs (Sonderby et al., 2016) and NVAE (Vahdat and Kautz, 2020), the coarse one is drawn
first, and the fine one adds what that leaves open.

    python -m variants.hdreamer --task pinpad_three
    python -m variants.hdreamer --logdir RUN ...    goes on with a run of director.py, by its flags

What changes: `stoch` is [coarse, fine]. The coarse level is Director's, `--stoch` groups of
`--classes`. The fine one, `--bottom_stoch` of `--bottom_classes`, has a prior that sees the coarse
sample, too, and a posterior with the logits

    prior's logits + correction(deter, coarse sample, embed)     (NVAE's residual, Section 3.2),

with gradients through both terms. Each level has its balanced KL (Director's eq. 2) and a scale of
its own; `--kl_target` is split by numbers of groups. Whatever sees `stoch` sees both levels.

With a checkpoint of director.py the agent first acts as it did: weights for the fine level start at
0, and so does the correction; Adam's moments start anew. Both levels are of the same moment; one
that is slower in time is another idea (Clockwork VAE), and left out.
"""

import dataclasses
import sys

import torch
from torch import Tensor, nn

import director


@dataclasses.dataclass
class Config(director.Config):
    sizes = {
        "paper": {**director.SIZES["paper"], "bottom_stoch": 32, "bottom_classes": 32},
        "s": {**director.SIZES["s"], "bottom_stoch": 16, "bottom_classes": 16},
        "xs": {**director.SIZES["xs"], "bottom_stoch": 16, "bottom_classes": 16}}

    bottom_stoch: int = director.flag(None, "groups of the fine level", group="hdreamer",
                                      fixed=True)
    bottom_classes: int = director.flag(None, "classes in each of these groups", fixed=True)


class RSSM(director.RSSM):
    """Director's, with `stoch` and logits, [..., SC], of two levels, one after the other."""

    def __init__(self, embed: int, action: int, config: Config):
        super().__init__(embed, action, config)
        self.levels = self.groups, (config.bottom_stoch, config.bottom_classes)
        coarse, fine = (stoch * classes for stoch, classes in self.levels)
        self.parts = [coarse, fine]
        self.size = coarse + fine  # of stoch
        deter, hidden = config.deter, config.hidden
        self.inputs = nn.Sequential(*director.dense(self.size + action, hidden))
        self.fine_net, self.correction = (
            nn.Sequential(*director.dense(size, hidden), director.glorot(nn.Linear(hidden, fine)))
            for size in (deter + coarse, deter + coarse + embed))
        nn.init.zeros_(self.correction[-1].weight)

    def split(self, logits: Tensor) -> list[Tensor]:
        """Those of both levels, [..., SC], to those of each, [..., S, C]."""
        parts = zip(logits.split(self.parts, -1), self.levels, strict=True)
        return [part.unflatten(-1, groups) for part, groups in parts]

    def prior(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """Logits [..., SC] before the observation, those of the fine level given coarse `stoch`."""
        fine = self.fine_net(torch.cat([deter, stoch[..., : self.parts[0]]], -1)).float()
        return torch.cat([super().prior(deter).flatten(-2), fine], -1)

    def posterior(self, deter: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        coarse, logit = super().posterior(deter, embed)
        seen = torch.cat([deter, coarse], -1)
        fine = self.fine_net(seen).float() + self.correction(torch.cat([seen, embed], -1)).float()
        sample = director.OneHot(fine.unflatten(-1, self.levels[1])).rsample().flatten(-2)
        return torch.cat([coarse, sample], -1), torch.cat([logit.flatten(-2), fine], -1)

    def predict_stoch(self, deter: Tensor, sample: bool = True) -> Tensor:
        seen = deter
        for net, groups in zip((self.prior_net, self.fine_net), self.levels, strict=True):
            dist = director.OneHot(net(seen).float().unflatten(-1, groups))
            seen = torch.cat([seen, (dist.rsample() if sample else dist.mode).flatten(-2)], -1)
        return seen[..., deter.shape[-1] :]


class WorldModel(director.WorldModel):
    RSSM = RSSM

    def __init__(self, *args):
        super().__init__(*args)
        groups = torch.tensor([float(stoch) for stoch, _ in self.rssm.levels])
        targets = self.kl_adapt.target * groups / groups.sum()
        self.kl_adapt = director.AutoAdapt((2,), targets, low=1e-5, high=1.0)

    def kl_loss(self, states: dict[str, Tensor]) -> tuple[Tensor, dict]:
        levels, metrics = [self.rssm.split(states[key]) for key in ("post", "prior")], {}
        kls = [director.balanced_kl(post, prior, 0.8) for post, prior in zip(*levels, strict=True)]
        for i, level in enumerate(("coarse", "fine")):
            ents = [director.OneHot(logits[i]).entropy().sum(-1).mean() for logits in levels]
            metrics |= {f"{level}_kl": kls[i].mean(), f"{level}_kl_scale": self.kl_adapt.scale[i],
                        f"{level}_post_ent": ents[0], f"{level}_prior_ent": ents[1]}
        return self.kl_adapt(torch.stack(kls, -1)).sum(-1), metrics


class Agent(director.Director):
    """Director with coarse and fine latents."""

    Config, WorldModel = Config, WorldModel
    compatible_variants = ("director",)

    def restore(self, state: dict):
        if state["variant"] not in self.compatible_variants:
            return super().restore(state)
        (coarse, fine), weights = self.world_model.rssm.parts, self.state_dict()
        for key, flat in state["agent"].items():
            own = weights[key]
            if own.shape != flat.shape and flat.ndim:
                dim = int(len(own) == len(flat))  # of a convolution, inputs are the first one
                start = coarse if "rssm.inputs" in key else self.config.deter + coarse
                before, after = flat.tensor_split([start], dim)
                flat = torch.cat([before, 0 * own.narrow(dim, start, fine).cpu(), after], dim)
            weights[key] = flat.expand_as(own)  # one scale of the KL becomes that of each level
        self.load_state_dict(weights)
        self.grad_steps = int(state["grad_steps"])


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
