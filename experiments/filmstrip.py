"""An episode at a glance: a frame of it every 25 steps, above the decoded goal then.

    python experiments/filmstrip.py RUN [--steps 500] [--out filmstrip.png]

For an agent that sees pixels; the worker takes its most likely actions. By default the whole
episode, to RUN/pictures/filmstrip.png.
"""

import pathlib
import sys

import imageio.v2 as imageio
import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import command

import director


@torch.no_grad()
def main(run: str, steps: int | None = None, out: str | None = None) -> pathlib.Path:
    agent, state = director.load(run), None
    torch.manual_seed(agent.config.seed)
    with director.vector_envs(agent.config, 1) as envs:
        driver = director.Driver(envs, agent.config.seed)
        if "image" not in driver.rows:
            raise director.UserError(f"the agent in {run} sees no pixels")
        while not driver.rows["is_last"][0] and len(driver.film) < (steps or np.inf):
            action, state = agent.policy(driver.rows, state, mode="eval")
            driver.step(action.cpu().numpy(), state)
    images, goals = zip(*driver.film[::25], strict=True)
    rows = [np.concatenate(images, 1)]  # [64, 64 * frames, 3]
    if agent.manager:
        pictures = agent.picture_goal(torch.stack(goals)) * 255
        rows.append(np.concatenate(pictures.byte().cpu().numpy(), 1))
    path = pathlib.Path(out or f"{run}/pictures/filmstrip.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.imwrite(path, np.concatenate(rows))
    print(f"{path}: {len(images)} frames of an episode with a return of {driver.score[0]:.1f} in "
          f"{driver.length[0]} steps")
    return path


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__, **{"--steps": {"type": int, "help": "end there"},
                              "--out": {"help": "the picture to write"}})
