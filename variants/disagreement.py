"""Disagreement: new is what an ensemble of models cannot agree upon (Plan2Explore).

Sekar et al., 2020, after deep ensembles (Lakshminarayanan et al., 2017). Several small models, with
different initial weights, learn on replay to predict the next state from state and action. Where
they have seen enough they agree, be the outcome noisy or not; where they have not, their means
differ, and the variance of these means is the exploration reward. An autoencoder's
error, as in Director, shows what is new only until it is learned, and noise is new to it for ever.

    python -m variants.disagreement --task pinpad_three
    python -m variants.disagreement --task pinpad_three --agent dreamer      the paper's baseline

What changes: the manager is rewarded for disagreement in place of the autoencoder's error
(`--manager_expl` is its weight). The flat agent gets it beside the task (`--worker_expl`); its
continuous actions learn by back-propagation through the ensemble. Every model is a Gaussian of
(deter, stoch, action) with mean and standard deviation, trained by likelihood on
`--disagreement_target`: `stoch`, the next stochastic state (the official program's), `embed`, the
next embedded observation (the paper's), `deter`, which the recurrent network computes from the very
inputs, so that the ensemble imitates it.

What differs: the paper's models have a fixed deviation, and the paper explores without any task
reward and learns one for the task later; set `--worker_expl` high for that. The official program
takes the deviation, not the variance, of modes.
"""

import dataclasses
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import director
from variants import same_episode


class Ensemble(nn.Module):
    """One-step models: [..., F] -> means and deviations, [members, ..., size] both."""

    def __init__(self, inputs: int, size: int, config: "Config"):
        super().__init__()
        self.members = nn.ModuleList(
            director.MLP(inputs, (2, size), config) for _ in range(config.members))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = torch.stack([member(x) for member in self.members]).unbind(-2)
        return mean, F.softplus(std) + 0.1

    def disagreement(self, x: Tensor) -> Tensor:
        """Variance of the means over members, mean over dimensions: [..., F] -> [...]."""
        means = []
        for member in self.members:  # without their deviations, half of the work
            size = len(member.out.weight) // 2
            mean = F.linear(member.hidden(x), member.out.weight[:size], member.out.bias[:size])
            means.append(mean.float())
        mean = sum(means) / len(means)  # Tensor.var(0) takes five times as long on a CPU
        return sum((each - mean).square().mean(-1) for each in means) / (len(means) - 1)


@dataclasses.dataclass
class Config(director.Config):
    members: int = director.flag(5, "models in the ensemble", low=2, group="disagreement",
                                 fixed=True)
    disagreement_target: str = director.flag("stoch", "what they predict",
                                             ("stoch", "embed", "deter"), fixed=True)
    worker_expl: float = director.flag(0.1, "weight of it for the flat agent", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_length < 2:
            raise director.UserError("--batch_length: has to be more than 1")


class Agent(director.Director):
    """Director, or the flat agent, curious about what its models disagree on."""

    Config = Config

    def build(self, action: tuple):
        config, parts = self.config, ("deter", "stoch")
        super().build(action)
        if not self.manager:
            rewards = {"extr": 1.0, "expl": config.worker_expl}
            self.worker = self.player(parts, action, self.discrete, rewards)
        sizes = {**self.sizes, "embed": self.world_model.encoder.size}
        self.ensemble = Ensemble(sum(sizes[key] for key in (*parts, "action")),
                                 sizes[config.disagreement_target], config)
        self.optimizers["ensemble"] = director.Optimizer(self.ensemble, config)

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().train_goals(states)
        known = torch.cat([states["deter"], states["stoch"]], -1)[:, :-1]
        target = states[self.config.disagreement_target][:, 1:].float()
        weight = same_episode(states["is_first"], 1)[..., None]  # the next row's action led to it
        with director.autocast(self.config):
            mean, std = self.ensemble(torch.cat([known, states["action"][:, 1:]], -1))
        error = 0.5 * ((mean - target) / std) ** 2 + std.log()
        loss = (error.mean(-1, keepdim=True) * weight).mean((1, 2, 3)).sum()
        metrics["ensemble_loss"] = loss
        metrics["ensemble_grad_norm"] = self.optimizers["ensemble"].minimize(loss)
        return metrics

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        parts = [traj[key][:-1] for key in ("deter", "stoch", "action")]
        with torch.set_grad_enabled(not self.manager and torch.is_grad_enabled()):
            return self.ensemble.disagreement(torch.cat(parts, -1))


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
