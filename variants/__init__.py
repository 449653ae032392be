"""Director's relatives: each file changes one thing of director.py. Here: what several of them use.

Grid-v0 and Corridor-v0 are worlds so small that an agent learns them in a minute on one core:
`python -m variants.feudal --task gym_Grid-v0`, or `gym_variants:Grid-v0` from elsewhere.
"""

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor


def same_episode(is_first: Tensor, k: int) -> Tensor:
    """Which steps t of replay chunks are in one episode with step t + k: bool [B, T] -> [B, T-k].

    A mean over such pairs divides by B (T-k), not by their number: nothing is read back, and it
    averages right over processes. So its value is a little low where many pairs are left out.
    """
    return ~is_first[:, 1:].unfold(1, k, 1).any(-1)


class Grid(gymnasium.Env):
    """Six by six cells, from one corner to the opposite one, whose nine cells pay 1 per step.

    Actions stay, down, up, right, left; at best 55 in 60 steps; random actions get about 7.4.
    """

    observation_space, action_space = spaces.Box(0, 1, (12,), np.float32), spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = np.zeros(2, int), 0
        return np.eye(6, dtype=np.float32)[self.cell].flatten(), {}

    def step(self, action):
        move = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))[action]
        self.cell = (self.cell + move).clip(0, 5)
        self.steps += 1
        obs = np.eye(6, dtype=np.float32)[self.cell].flatten()
        return obs, float((self.cell >= 3).all()), False, self.steps >= 60, {}


class Corridor(gymnasium.Env):
    """Eight cells; actions stay, left, right; 1 per step at the far end; at best 44 in 50 steps."""

    cells, limit = 8, 50
    observation_space, action_space = spaces.Box(0, 1, (8,), np.float32), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = self.steps = 0
        return np.eye(self.cells, dtype=np.float32)[0], {}

    def step(self, action):
        end = self.cells - 1
        self.cell = min(max(self.cell + (0, -1, 1)[action], 0), end)
        self.steps += 1
        obs = np.eye(self.cells, dtype=np.float32)[self.cell]
        return obs, float(self.cell == end), False, self.steps >= self.limit, {}


class LongCorridor(Corridor):
    """24 cells; at best 78 in 100 steps; random actions hardly ever get to the end."""

    cells, limit = 24, 100
    observation_space = spaces.Box(0, 1, (24,), np.float32)


gymnasium.register("Grid-v0", Grid)
gymnasium.register("Corridor-v0", Corridor)
gymnasium.register("LongCorridor-v0", LongCorridor)
