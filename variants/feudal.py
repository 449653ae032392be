"""Feudal goals: a goal is a direction in state space, not a state.

Papers: FeUdal Networks (FuN; Vezhnevets et al., 2017), after Feudal Reinforcement Learning (Dayan
and Hinton, 1993).

    python -m variants.feudal --task pinpad_three [--feudal_reward dot]

Idea: a manager sets a direction, and the worker is rewarded if the state moves along it, wherever
the worker starts. A direction has the same meaning in many states, and is never finished, while a
state is finished once it is reached.

What changes:
- The goal autoencoder learns unit directions (s[t+K] - s[t]) / |s[t+K] - s[t]| from replay, with
  s = `deter`, instead of states. It decodes a code to a unit direction g.
- FuN's eq. 8 is r[t] = 1/c sum over i = 1..c of cos(s[t] - s[t-i], g[t-i]). Here all moves have the
  present goal g, and those from before it was set are left out. So in the j-th step of a goal,
  j = 1..K, the worker's reward for the action in s[t] is

      1/j sum over i = 1..j of cos(s[t+1] - s[t+1-i], g).

  (With i = 1 alone, the length of a move would not count: many short steps forward and one long
  step back would be rewarded.) With `--feudal_reward dot` it is g . (s[t+1] - s[t]), which adds up
  to the progress along g.
- The manager's exploration reward is the autoencoder's error on the direction in which the state
  moved while the goal lasted.

What is left out:
- FuN's transition policy gradient (eq. 7), which moves goals towards directions that turned out
  well. Here the manager chooses among discrete codes by REINFORCE, as in Director.
- FuN pools the goals of the last c steps and embeds them linearly. Here a goal lasts for K steps,
  and the worker reads it as it is.
- FuN's s is an embedding of its own (eq. 2), which learns with the manager. Here it is the world
  model's `deter`, which gets no gradient from goals.
- FuN's manager is a dilated LSTM, whose memory has several parts, of which one changes in a step.
  Here memory is the world model's, and the manager reads the present state every K steps.
- FuN's levels have separate discounts. Here `--discount` is that of the worker for each step, and
  that of the manager for each decision.
- FuN's worker is recurrent and also receives the task reward. Here it reads only the present state
  and the goal, and receives no task reward (but see `--worker_extr`). The cosine reward also
  depends on the states visited since the goal was set, which the worker does not read. So to actor
  and critic it is partly random.
"""

import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import director
from variants import reward_at_end, same_episode


class UnitMLP(director.MLP):
    """An MLP whose outputs have length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class Directions(director.GoalAutoencoder):
    """Compresses unit directions [..., D] into codes [..., GL]."""

    def __init__(self, config: director.Config):
        super().__init__(config)
        self.decode = UnitMLP(math.prod(self.groups), (self.size,), config)


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no goals", ("director",), fixed=True)
    feudal_reward: str = director.flag("cosine", "dot: progress along the goal, not its cosine",
                                       ("cosine", "dot"), group="feudal")

    def __post_init__(self):
        super().__post_init__()
        if self.batch_length <= self.goal_duration:
            raise director.UserError("--batch_length: has to be more than --goal_duration")


class Agent(director.Director):
    """Director with directions as goals."""

    Config, Goals = Config, Directions

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        k = self.config.goal_duration
        deter = states["deter"]
        direction = F.normalize(deter[:, k:] - deter[:, :-k], dim=-1)  # [B, T-K, D]
        weight = same_episode(states["is_first"], k)  # [B, T-K]
        with director.autocast(self.config):
            loss, metrics = self.goals.loss(direction.flatten(0, 1), weight.flatten())
        metrics["goal_pairs"] = weight.float().mean()
        metrics["goal_grad_norm"] = self.optimizers["goals"].minimize(loss)
        return metrics

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        """Movement along the goal, [H, N]."""
        deter = traj["deter"]
        goal = traj["goal"][:-1]
        if self.config.feudal_reward == "dot":
            return (goal * (deter[1:] - deter[:-1])).sum(-1)
        rewards = []
        for t in range(len(goal)):
            start = t - t % self.config.goal_duration  # when the goal was set
            moves = deter[t + 1] - deter[start : t + 1]  # s[t+1] - s[t+1-i] for i = j..1, [j, N, D]
            rewards.append(F.cosine_similarity(moves, goal[t], dim=-1).mean(0))  # eq. 8
        return torch.stack(rewards)

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        """How new the direction is in which the state moved during a goal, [H, N].

        It is 0 in other steps than a goal's last, and K-fold there, since the manager's reward is
        the mean of K steps.
        """
        k = self.config.goal_duration
        ends = traj["deter"][::k]  # [H/K+1, N, D]
        novelty = self.goals.novelty(F.normalize(ends[1:] - ends[:-1], dim=-1))  # [H/K, N]
        return reward_at_end(novelty, k)

    def picture_goal(self, goal: Tensor) -> None:
        """A direction has no picture."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
