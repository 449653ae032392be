"""Disagreement: the exploration reward is the disagreement of an ensemble of models.

Papers: Planning to Explore via Self-Supervised World Models (Plan2Explore; Sekar et al., 2020),
after Deep Ensembles (Lakshminarayanan et al., 2017).

    python -m variants.disagreement --task pinpad_three
    python -m variants.disagreement --task pinpad_three --agent dreamer     flat, as in the paper

Idea: several small models with different initial weights learn from replay to predict the next
state from state and action. Where they have seen enough data their means agree, even if outcomes
are noisy; elsewhere the means differ. The variance of the means is the exploration reward. The
error of an autoencoder, which Director uses, stays high for noise, which cannot be learned. With
the means mu_m of M models, the reward is

    r = 1 / (M - 1) sum over m of (mu_m - mean of mu)^2,   averaged over the target's dimensions.

What changes:
- The manager is rewarded for disagreement instead of the autoencoder's error, with the weight
  `--manager_expl`.
- The flat agent is rewarded for the task and for disagreement, with the weight `--worker_expl`. If
  its actions are continuous, gradients flow through the ensemble.
- Each model is a Gaussian with mean and standard deviation as functions of (deter, stoch, action),
  and is trained by maximum likelihood. It predicts what `--disagreement_target` says: `stoch`, the
  next stochastic state (as the official program); `embed`, the next embedded observation (as the
  paper); or `deter`, the next deterministic state, which is a function of these very inputs, so
  that the models only imitate the recurrent network.

What is left out: the models of the paper have a fixed standard deviation. The paper explores
without a task reward and learns a task later; a high `--worker_expl` comes close to that. The
official program uses the standard deviation of the means, not their variance.
"""

import dataclasses
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import director
from variants import refuse, same_episode


class Ensemble(nn.Module):
    """One-step models: [..., F] -> means and standard deviations, [members, ..., size] both."""

    def __init__(self, inputs: int, size: int, config: "Config"):
        super().__init__()
        self.members = nn.ModuleList(
            director.MLP(inputs, (2, size), config) for _ in range(config.members))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = torch.stack([member(x) for member in self.members])  # [members, ..., 2, size]
        mean, std = outs.unbind(-2)
        return mean, F.softplus(std) + 0.1

    def disagreement(self, x: Tensor) -> Tensor:
        """Variance of the means over members, averaged over dimensions: [..., F] -> [...]."""
        means = []
        for member in self.members:  # without standard deviations, which halves the work
            size = len(member.out.weight) // 2
            hidden = member.hidden(x).float()
            with torch.autocast(x.device.type, enabled=False):  # as in director.MLP
                mean = F.linear(hidden, member.out.weight[:size], member.out.bias[:size])
            means.append(mean)
        center = sum(means) / len(means)  # Tensor.var(0) takes five times as long on a CPU
        return sum((mean - center).square().mean(-1) for mean in means) / (len(means) - 1)


@dataclasses.dataclass
class Config(director.Config):
    members: int = director.flag(5, "models in the ensemble", low=2, group="disagreement",
                                 fixed=True)
    disagreement_target: str = director.flag("stoch", "what the models predict",
                                             ("stoch", "embed", "deter"), fixed=True)
    worker_expl: float = director.flag(0.1, "weight of disagreement for the flat agent", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.agent == "director":
            refuse(self, ("worker_expl",), "the manager explores, see --manager_expl")
        else:
            refuse(self, ("manager_expl",), "there is no manager, see --worker_expl")
        if self.batch_length < 2:
            raise director.UserError("--batch_length: has to be more than 1")


class Agent(director.Director):
    """Director, or the flat agent, that explores where its models disagree."""

    Config = Config

    def build(self, action: tuple):
        config = self.config
        super().build(action)
        if not self.manager:
            rewards = {"extr": 1.0, "expl": config.worker_expl}
            self.worker = self.player(("deter", "stoch"), action, self.discrete, rewards)
        sizes = {**self.sizes, "embed": self.world_model.encoder.size}
        inputs = sizes["deter"] + sizes["stoch"] + sizes["action"]
        self.ensemble = Ensemble(inputs, sizes[config.disagreement_target], config)
        self.optimizers["ensemble"] = director.Optimizer(self.ensemble, config)

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().train_goals(states)
        feat = torch.cat([states["deter"], states["stoch"]], -1)[:, :-1]
        action = states["action"][:, 1:]  # the action of row t + 1 led from t to t + 1
        target = states[self.config.disagreement_target][:, 1:].float()
        with director.autocast(self.config):
            mean, std = self.ensemble(torch.cat([feat, action], -1))
        error = 0.5 * ((mean - target) / std) ** 2 + std.log()  # [members, B, T-1, size]
        weight = same_episode(states["is_first"], 1)[..., None]
        loss = (error.mean(-1, keepdim=True) * weight).mean((1, 2, 3)).sum()
        metrics["ensemble_loss"] = loss
        metrics["ensemble_grad_norm"] = self.optimizers["ensemble"].minimize(loss)
        return metrics

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        """Disagreement about states 1..H, [H, N]; only the flat agent needs its gradient."""
        inputs = torch.cat([traj[key][:-1] for key in ("deter", "stoch", "action")], -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.manager):
            return self.ensemble.disagreement(inputs)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
