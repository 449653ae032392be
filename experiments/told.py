"""Pin Pad without images: the same task at three times the speed, gym_PinPadTold-v0."""

import pathlib
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from variants.pin_pad import PinPad


class Told(PinPad):
    """Pin Pad that tells what its image shows: x, y, the last pads visited, whether it was paid."""

    def __init__(self, name: str = "three", length: int = 2000):
        super().__init__(name, length)
        self.size = 14 + 12 + len(self.target) ** 2 + 1
        self.observation_space = spaces.Dict(
            {"state": spaces.Box(0, 1, (self.size,), np.float32)})

    def look(self) -> dict[str, np.ndarray]:
        state, (x, y) = np.zeros(self.size, np.float32), self.player
        state[[x - 1, 14 + y - 1]] = 1
        for place, pad in enumerate(self.history):
            state[26 + place * len(self.target) + pad - 1] = 1
        state[-1] = self.countdown > 0
        return {"state": state}


gymnasium.register("PinPadTold-v0", Told)
