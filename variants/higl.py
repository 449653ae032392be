"""Continuous latent goals: a goal is a point in a learned space of few dimensions.

Papers: goal-conditioned hierarchies such as HIRO (Nachum et al., 2018) and HIGL (Kim et al., 2021),
whose goals are points in given spaces; Contrastive Predictive Coding (CPC; van den Oord et al.,
2018) for the contrastive loss.

    python -m variants.higl --task pinpad_three [--higl_loss contrastive]

Idea: an encoder E maps states s (`deter`) to codes of a few numbers in (-1, 1), such that the code
of s[t] determines s[t+K]. A goal z is a point in that space, and the worker's reward is
-|E(s[t+1]) - z|^2. Goals need no decoder, and states that are close have goals that are close,
which is not so for Director's discrete codes.

This is HIGL's setting, not HIGL itself, whose two ideas are left out (below).

What changes:
- E learns from replay to predict s[t+K] from E(s[t]), by squared error (`--higl_loss prediction`,
  the default).
- With `--higl_loss contrastive` it learns by InfoNCE (CPC, eq. 4) instead: among the codes of all
  states s_j[t+K] of the batch, the code of s_i[t] has to be most similar to that of its own
  successor s_i[t+K], where sim(a, b) = -|a - b|^2 / temperature is the distance of the reward.
  InfoNCE learns every feature that tells trajectories apart, also those that do not matter for
  reaching a state. Since `deter` remembers the past, two visits to one place get distant codes, and
  distances tell less about time (see README.md).
- The manager's action is a sample of a Gaussian, trained by REINFORCE, and z is this sample clipped
  to [-1, 1], since no code can be elsewhere. The mean is in (-1, 1), so that it can be any code.
  The manager's exploration reward is the distance of E(s) to the nearest code of the last 1,024
  replayed states.

What is left out: CPC's recurrent context, and its bilinear score, whose scale is not tied to a
distance. HIGL's landmarks (states that are far apart or new, and a graph for planning over them)
and its adjacency network: here a goal may be out of reach within K steps, and only the manager's
return teaches it which goals are. HIRO's goals are relative to the state, and its reward is the
distance, not its square; its off-policy correction is unnecessary in imagination. HIRO and HIGL
learn both levels by TD3. Codes in the memory are those of the encoder at their time.
"""

import dataclasses
import sys

import torch
from torch import Tensor, nn

import director
from variants import refuse, same_episode


class Codes(nn.Module):
    """States [..., D] to codes [..., d]; a goal is a code."""

    discrete = False

    def __init__(self, config: "Config"):
        super().__init__()
        self.config = config
        self.groups = (config.latent,)
        self.size = config.latent  # of a goal
        self.encoder = director.MLP(config.deter, (config.latent,), config)
        if config.higl_loss == "prediction":
            self.predictor = director.MLP(config.latent, (config.deter,), config)
        self.register_buffer("memory", torch.zeros(1024, config.latent))  # newest first

    def encode(self, deter: Tensor) -> Tensor:
        return self.encoder(deter).tanh()

    def decode(self, skill: Tensor) -> Tensor:
        """The manager's sample to a goal. REINFORCE needs the sample as it was, not clipped."""
        return skill.clamp(-1, 1)

    @torch.no_grad()
    def novelty(self, deter: Tensor) -> Tensor:
        """Distance of codes to the nearest one in memory, [..., D] -> [...]."""
        code = self.encode(deter)
        return torch.cdist(code.flatten(0, -2), self.memory).amin(-1).view(code.shape[:-1])

    def info_nce(self, now: Tensor, later: Tensor, weight: Tensor) -> tuple[Tensor, dict]:
        """CPC, eq. 4, on pairs of codes [M, d] with weights [M]: loss, metrics."""
        # [M, M]; rows: now, columns: later
        sim = -(now[:, None] - later).square().sum(-1) / self.config.temperature
        loss = -(sim.log_softmax(-1).diagonal() * weight).mean()
        # The fraction of all codes that are nearer than the successor.
        rank = (sim > sim.diagonal()[:, None]).float().mean(-1)
        return loss, {"goal_loss": loss, "goal_rank": (rank * weight).mean()}


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no goals", ("director",), fixed=True)
    latent: int = director.flag(4, "size of a goal", group="higl", fixed=True)
    higl_loss: str = director.flag("prediction", "how the encoder learns",
                                   ("prediction", "contrastive"), fixed=True)
    temperature: float = director.flag(0.5, "of InfoNCE", low=1e-3)

    def __post_init__(self):
        super().__post_init__()
        refuse(self, ("skill_groups", "skill_classes"), "--latent is the size of a goal")
        if self.higl_loss != "contrastive":
            refuse(self, ("temperature",), "only --higl_loss contrastive reads it")
        if self.batch_length <= self.goal_duration:
            raise director.UserError("--batch_length: has to be more than --goal_duration")


class Agent(director.Director):
    """Director with points in a learned space as goals."""

    Config, Goals = Config, Codes

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        k = self.config.goal_duration
        goals = self.goals
        deter = states["deter"]
        weight = same_episode(states["is_first"], k).float()  # [B, T-K]
        with director.autocast(self.config):
            codes = goals.encode(deter)  # [B, T, d]
            if self.config.higl_loss == "prediction":
                error = (goals.predictor(codes[:, :-k]) - deter[:, k:]).square().sum(-1)
                loss = (error * weight).mean()
                metrics = {"goal_loss": loss}
        if self.config.higl_loss == "contrastive":  # in float32, for small differences of distances
            now = codes[:, :-k].flatten(0, 1)
            later = codes[:, k:].flatten(0, 1)
            loss, metrics = goals.info_nce(now, later, weight.flatten())
        metrics["goal_pairs"] = weight.mean()
        metrics["goal_grad_norm"] = self.optimizers["goals"].minimize(loss)
        newest = torch.cat([codes.detach().flatten(0, 1), goals.memory])
        goals.memory.copy_(newest[: len(goals.memory)])
        return metrics

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        """Minus the squared distance to the goal, [H, N]."""
        return -(self.goals.encode(traj["deter"][1:]) - traj["goal"][:-1]).square().sum(-1)

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        return self.goals.novelty(traj["deter"][1:])

    def picture_goal(self, goal: Tensor) -> None:
        """A point of the learned space has no picture."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
