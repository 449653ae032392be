"""Feudal goals: a goal is a direction in state space, not a place.

Feudal reinforcement learning (Dayan and Hinton, 1993) has managers that set tasks for workers; in
FeUdal Networks (FuN; Vezhnevets et al., 2017) these are directions: the worker is paid when the
state of the world moves along the goal, wherever it starts. A direction means the same in many
states, and is never used up by being reached.

    python -m variants.feudal --task pinpad_three [--feudal_reward dot]

What changes: the goal autoencoder learns the unit directions (s[t+K] - s[t]) / |s[t+K] - s[t]| of
replay, s being `deter`, instead of states, and decodes codes to unit directions g. With j the steps
since the goal was set, the worker is paid, after FuN's eq. 8,

    1/j sum over i = 1..j of cos(s[t+1] - s[t+1-i], g),

(the last step alone, i = 1, would pay jitter), or g . (s[t+1] - s[t]), which adds up to the way
made along g (Feudal RL's reward for obeying, as an inner product). The manager's exploration reward
is the autoencoder's error on the direction in which the state has moved while the goal lasted.

What is left out: FuN's transition policy gradient, by which the manager's goals are moved towards
the directions that turned out well (its eq. 7): here, as in Director, the manager chooses among
discrete codes by REINFORCE. FuN's goals are pooled over the last c steps and embedded by a linear
map, and there is one for each of the c moves of eq. 8; ours last for K steps, and the worker sees
them as they are. FuN's recurrent worker remembers where its goal was set, and is paid by the task,
too; ours sees the present state and the goal only, and is not (see `--worker_extr`).
"""

import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import director
from variants import same_episode


class Unit(director.MLP):
    """An MLP whose outputs have length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


class Directions(director.GoalAutoencoder):
    """Compresses unit directions [..., D] into codes."""

    def __init__(self, config: director.Config):
        super().__init__(config)
        self.decode = Unit(math.prod(self.groups), (self.size,), config)


@dataclasses.dataclass
class Config(director.Config):
    feudal_reward: str = director.flag("cosine", "dot: progress along the goal, not its cosine",
                                       ("cosine", "dot"), group="feudal")

    def __post_init__(self):
        super().__post_init__()
        if self.agent == "director" and self.batch_length <= self.goal_duration:
            raise director.UserError("--batch_length: has to be more than --goal_duration")


class Agent(director.Director):
    """Director with directions as goals."""

    Config, Goals = Config, Directions

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.manager:
            return {}
        deter, k = states["deter"], self.config.goal_duration
        move = F.normalize(deter[:, k:] - deter[:, :-k], dim=-1)
        with director.autocast(self.config):
            loss, metrics = self.goals.loss(
                move.flatten(0, 1), same_episode(states["is_first"], k).flatten())
        metrics["goal_grad_norm"] = self.optimizers["goals"].minimize(loss)
        return metrics

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        deter, goal = traj["deter"], traj["goal"][:-1]
        if self.config.feudal_reward == "dot":
            return (goal * (deter[1:] - deter[:-1])).sum(-1)
        rewards = []
        for t in range(len(goal)):
            since = t - t % self.config.goal_duration  # when the goal was set
            moves = deter[t + 1] - deter[since : t + 1]  # [j, N, D]
            rewards.append(F.cosine_similarity(moves, goal[t], dim=-1).mean(0))
        return torch.stack(rewards)  # [H, N]

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        k = self.config.goal_duration
        ends = traj["deter"][::k]  # [H/K+1, N, D]
        novelty = self.goals.novelty(F.normalize(ends[1:] - ends[:-1], dim=-1))
        return novelty.repeat_interleave(k, 0)  # in each step, since the manager gets their mean

    def picture_goal(self, goal: Tensor):
        """A direction looks like nothing."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
