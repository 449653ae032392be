"""Continuous latent goals: the manager points at a place in a small space that is learned for it.

An encoder E maps states s (`deter`) to a few numbers in (-1, 1), so that distances there tell how
far apart in time states are. A goal z is a point in that space: the manager draws it from a
Gaussian, and the worker is paid -|E(s[t+1]) - z|^2. Nothing has to be decoded, and near goals are
near codes, which is not so for Director's. Goal-conditioned hierarchies like HIRO (Nachum et al.,
2018) and HIGL (Kim et al., 2021) point at places in spaces that are given; here it is learned.

    python -m variants.higl --task pinpad_three [--higl_loss contrastive]

What changes: E learns on replay so that s[t+K] can be predicted from E(s[t]), by squared error, or
with `contrastive` as in Contrastive Predictive Coding (InfoNCE, CPC's eq. 4; van den Oord et al.,
2018): of all states s_j[t+K] of the batch, the code of s_i[t] has to be nearest to that of its own
successor. Nearness is sim(a, b) = -|a - b|^2 / temperature, the very distance that is paid. This
finds whatever tells trajectories apart; `deter` remembers, so that it sets two visits to a place
apart, and distances say less about moves (see README.md). The manager's action is z, by REINFORCE.
Its exploration reward is the distance of E(s) to the nearest code of the last 1,024 replayed ones.

What is left out: CPC's recurrent context and its bilinear score, whose scale nothing ties to a
distance. HIGL's landmarks (far-apart and new states, and a graph that plans over them) and its
adjacency network: here, goals may be out of reach within K steps, and the manager's return alone
teaches it which are not. HIRO's off-policy relabelling, which imagination makes unnecessary.
"""

import dataclasses
import sys

import torch
from torch import Tensor, nn

import director
from variants import same_episode


class Codes(nn.Module):
    """States [..., D] to codes [..., d]; a goal is a code."""

    def __init__(self, config: "Config"):
        super().__init__()
        self.groups, self.size, self.config = (config.latent,), config.latent, config
        self.encoder = director.MLP(config.deter, (config.latent,), config)
        if config.higl_loss == "reconstruction":
            self.predictor = director.MLP(config.latent, (config.deter,), config)
        self.register_buffer("memory", torch.zeros(1024, config.latent))

    def encode(self, deter: Tensor) -> Tensor:
        return self.encoder(deter).tanh()

    def decode(self, skill: Tensor) -> Tensor:
        return skill

    @torch.no_grad()
    def novelty(self, deter: Tensor) -> Tensor:
        """Distance of codes to the nearest one in memory, [..., D] -> [...]."""
        code = self.encode(deter)
        return torch.cdist(code.flatten(0, -2), self.memory).amin(-1).view(code.shape[:-1])

    def info_nce(self, now: Tensor, later: Tensor, weight: Tensor) -> tuple[Tensor, dict]:
        """CPC, eq. 4, on pairs of codes [M, d] of these weights [M]: loss, metrics."""
        sim = -(now[:, None] - later).square().sum(-1) / self.config.temperature  # [M, M]
        loss = -(sim.log_softmax(-1).diagonal() * weight).mean()
        nearer = (sim > sim.diagonal()[:, None]).float().mean(-1)  # share of negatives
        return loss, {"goal_loss": loss, "goal_rank": (nearer * weight).mean()}


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no goals", ("director",), fixed=True)
    latent: int = director.flag(4, "size of a goal", group="higl", fixed=True)
    higl_loss: str = director.flag("reconstruction", "how the encoder learns",
                                   ("reconstruction", "contrastive"), fixed=True)
    temperature: float = director.flag(0.5, "of InfoNCE", low=1e-3)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_length <= self.goal_duration:
            raise director.UserError("--batch_length: has to be more than --goal_duration")


class Agent(director.Director):
    """Director with points in a learned space as goals."""

    Config, Goals = Config, Codes

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        deter, k, goals = states["deter"], self.config.goal_duration, self.goals
        weight = same_episode(states["is_first"], k).float()  # [B, T-K]
        with director.autocast(self.config):
            codes = goals.encode(deter)
            if self.config.higl_loss == "reconstruction":
                error = (goals.predictor(codes[:, :-k]) - deter[:, k:]).square().sum(-1)
                loss = (error * weight).mean()
                metrics = {"goal_loss": loss}
        if self.config.higl_loss == "contrastive":
            loss, metrics = goals.info_nce(
                codes[:, :-k].flatten(0, 1), codes[:, k:].flatten(0, 1), weight.flatten())
        metrics["goal_grad_norm"] = self.optimizers["goals"].minimize(loss)
        newest = torch.cat([codes.detach().flatten(0, 1), goals.memory])
        goals.memory.copy_(newest[: len(goals.memory)])
        return metrics

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        return -(self.goals.encode(traj["deter"][1:]) - traj["goal"][:-1]).square().sum(-1)

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        return self.goals.novelty(traj["deter"][1:])

    def picture_goal(self, goal: Tensor):
        """A point of a learned space looks like nothing."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
