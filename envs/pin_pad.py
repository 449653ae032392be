"""Visual Pin Pad (Hafner et al., 2022, Section 3): walk over coloured pads in the right order.

Registers PinPadThree-v0 to PinPadEight-v0 with Gymnasium; `--task pinpad_three` uses them.
Frames and rewards are those of the official environment, pixel for pixel.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

PADS = {  # rectangles: number of the pad, left, top, width, height; (0, 0) is a corner of the wall
    "three": ((1, 1, 1, 4, 4), (3, 11, 1, 4, 4), (2, 6, 9, 4, 4)),
    "four": ((1, 1, 1, 4, 4), (4, 11, 1, 4, 4), (3, 1, 9, 4, 4), (2, 11, 9, 4, 4)),
    "five": ((4, 11, 1, 4, 3), (1, 1, 2, 3, 4), (5, 12, 5, 3, 4), (3, 1, 8, 3, 4),
             (2, 11, 10, 4, 3)),
    "six": ((1, 1, 1, 3, 3), (5, 12, 1, 3, 3), (3, 1, 5, 2, 4), (6, 13, 5, 2, 4),
            (4, 1, 10, 3, 3), (2, 12, 10, 3, 3)),
    "seven": ((1, 1, 1, 3, 2), (1, 1, 3, 2, 1), (4, 12, 1, 3, 2), (4, 13, 3, 2, 1),
              (3, 1, 5, 2, 4), (5, 13, 5, 2, 4), (6, 1, 10, 2, 1), (6, 1, 11, 3, 2),
              (2, 13, 10, 2, 1), (2, 12, 11, 3, 2), (7, 6, 11, 4, 2)),
}
PADS["eight"] = (*PADS["seven"], (8, 6, 1, 4, 2))
MOVES = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # x and y of the actions
COLORS = np.array((  # floor, pads 1 to 8, wall
    (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255),
    (0, 255, 255), (128, 0, 128), (0, 128, 128), (192, 192, 192)))


class PinPad(gymnasium.Env):
    """n coloured pads in a walled room.

    Actions: stay, down, up, right, left. Visiting pads 1..n in order is rewarded with 10; the floor
    is tinted in this and 9 more steps, then the player is put into a random cell, with an empty
    history.
    Episodes are truncated after `length` steps.

    observe: "image", "state", or "both".
    image  [64, 64, 3] uint8: 16 by 14 cells of 4x4 pixels, and below them the last n pads visited
    state  [14 + 12 + n * n + 1] float32, what the image shows: one-hot x, one-hot y, one-hot
           numbers of the last n pads, oldest first, and whether the floor is tinted
    """

    def __init__(self, name: str, length: int = 2000, observe: str = "image"):
        self.length = length
        self.cells = np.full((16, 16), -1)  # [y, x]: number of the pad, 0 floor, -1 wall or margin
        self.cells[1:13, 1:15] = 0
        for pad, x, y, width, height in PADS[name]:
            self.cells[y : y + height, x : x + width] = pad
        self.target = tuple(range(1, self.cells.max() + 1))
        parts = {}
        if observe in ("image", "both"):
            parts["image"] = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        if observe in ("state", "both"):
            parts["state"] = spaces.Box(0, 1, (14 + 12 + len(self.target) ** 2 + 1,), np.float32)
        self.observation_space = spaces.Dict(parts)
        self.action_space = spaces.Discrete(5)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = self.countdown = 0
        self.spawn()
        return self.render_observation(), {}

    def step(self, action):
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                self.spawn()
        dx, dy = MOVES[action]
        x, y = self.player[0] + dx, self.player[1] + dy
        pad = int(self.cells[y, x])
        if pad >= 0:
            self.player = x, y
        if pad > 0 and self.history[-1:] != (pad,):
            self.history = (*self.history, pad)[-len(self.target) :]
        reward = 0.0
        if self.history == self.target and not self.countdown:
            reward, self.countdown = 10.0, 10
        self.steps += 1
        return self.render_observation(), reward, False, self.steps >= self.length, {}

    def spawn(self):
        free = np.argwhere(self.cells.T >= 0)
        self.player = tuple(free[self.np_random.integers(len(free))].tolist())
        self.history = ()

    def render_observation(self) -> dict[str, np.ndarray]:
        draw = {"image": self.draw_image, "state": self.state_vector}
        return {key: draw[key]() for key in self.observation_space}

    def draw_image(self) -> np.ndarray:
        x, y = self.player
        colors = COLORS.copy()
        colors[1:9] = (colors[1:9] + 9 * 255) // 10  # all pads are pale ...
        colors[self.cells[y, x]] = COLORS[self.cells[y, x]]  # ... but the one under the player
        if self.countdown:
            colors[0] = 223, 255, 223
        grid = colors[self.cells]
        grid[y, x] = 0
        grid[14, 1 : 2 * len(self.history) : 2] = COLORS[list(self.history)]
        return grid.astype(np.uint8).repeat(4, 0).repeat(4, 1)

    def state_vector(self) -> np.ndarray:
        state = np.zeros(self.observation_space["state"].shape, np.float32)
        x, y = self.player
        state[x - 1] = 1
        state[14 + y - 1] = 1
        for place, pad in enumerate(self.history):
            state[26 + place * len(self.target) + pad - 1] = 1
        state[-1] = self.countdown > 0
        return state


for name in PADS:
    gymnasium.register(f"PinPad{name.capitalize()}-v0", PinPad, kwargs={"name": name})
