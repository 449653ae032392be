"""Worlds so small that an agent learns them in a minute on one core: Grid, Corridor, LongCorridor.

`python director.py --task gym_envs.grid:Grid-v0`.
"""

import gymnasium
import numpy as np
from gymnasium import spaces


class Grid(gymnasium.Env):
    """Six by six cells; the player starts in a corner, the nine cells of the opposite one reward 1.

    Observation [12]: one-hot x and y. Actions: stay, down, up, right, left. An episode has 60
    steps; the best return is 55, random actions get about 7.4.
    """

    observation_space, action_space = spaces.Box(0, 1, (12,), np.float32), spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell, self.steps = np.zeros(2, int), 0
        return self.observe(), {}

    def step(self, action):
        move = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))[action]
        self.cell = (self.cell + move).clip(0, 5)
        self.steps += 1
        return self.observe(), float((self.cell >= 3).all()), False, self.steps >= 60, {}

    def observe(self):
        return np.eye(6, dtype=np.float32)[self.cell].flatten()


class Corridor(gymnasium.Env):
    """Eight cells; the last one rewards 1 per step.

    Observation [8]: one-hot. Actions: stay, left, right. An episode has 50 steps; the best return
    is 44.
    """

    cells, limit = 8, 50
    observation_space, action_space = spaces.Box(0, 1, (8,), np.float32), spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = self.steps = 0
        return self.observe(), {}

    def step(self, action):
        end = self.cells - 1
        self.cell = min(max(self.cell + (0, -1, 1)[action], 0), end)
        self.steps += 1
        return self.observe(), float(self.cell == end), False, self.steps >= self.limit, {}

    def observe(self):
        return np.eye(self.cells, dtype=np.float32)[self.cell]


class LongCorridor(Corridor):
    """24 cells, 100 steps; the best return is 78; random actions hardly ever reach the end."""

    cells, limit = 24, 100
    observation_space = spaces.Box(0, 1, (24,), np.float32)


gymnasium.register("Grid-v0", Grid)
gymnasium.register("Corridor-v0", Corridor)
gymnasium.register("LongCorridor-v0", LongCorridor)
