"""Pin Pad: what has a world model learned, the player's place, its motion, the reward ahead?

    python experiments/foresee.py RUN
    python experiments/foresee.py RUN --random

On the replay of a run: how often the place of the player in the decoded image is right after 0, 1
and 8 imagined steps; rewards that are seen where there was none; how many of those that were paid
are seen where they were, and foreseen 1 and 8 steps before. Then what the agent does in its last
episodes. Steps are imagined with the actions that were taken. Of a run without images (falls.py):
the rewards alone. With --random, the same on four new episodes of random actions, which go
everywhere, where a replay may show one corner, and of which the model has learned nothing.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command
from cover import play

import director


def place(image: torch.Tensor) -> torch.Tensor:
    """The darkest of the 12x14 inner cells, by its index, [..., 64, 64, 3] -> [...]."""
    cells = image.sum(-1).unflatten(-2, (16, 4)).unflatten(-1, (16, 4)).mean((-3, -1))
    return cells[..., 1:13, 1:15].flatten(-2).argmin(-1)


@torch.no_grad()
def main(run: str, random: bool = False):
    agent, replay = agent_and_replay(run)
    if random:
        with director.vector_envs(agent.config, 4) as envs:
            replay.episodes = dict(enumerate(play(agent, envs, random=True)))
    model, episodes = agent.world_model, list(replay.episodes.values())

    def ahead(batch: dict, states: dict, steps: int, at: int) -> torch.Tensor:
        """Features [B, F] of state `at`, after so many imagined steps."""
        deter, stoch = (states[key][:, at - steps] for key in ("deter", "stoch"))
        for t in range(at - steps + 1, at + 1):
            deter, stoch = model.rssm.img_step(deter, stoch, batch["action"][:, t])
        return torch.cat([deter, stoch], -1)

    def reward(feat: torch.Tensor) -> torch.Tensor:
        return director.symexp(model.reward_head(feat))

    batch = agent.tensors(replay.sample(64, 32))
    states, seeing = model.observe(batch), "image" in batch
    truth = place(batch["image"].float() / 255) if seeing else None
    for steps in (0, 1, 8) if seeing else ():
        image = model.decoder(ahead(batch, states, steps, 16 + steps))["image"]
        right = (place(image) == truth[:, 16 + steps]).float().mean()
        print(f"place right after {steps} imagined steps: {right:.2f}")
    seen = reward(torch.cat([states["deter"], states["stoch"]], -1)) > 5
    alarms = seen & (batch["reward"] == 0)
    print(f"rewards seen where there was none: {alarms.sum()} in {alarms.numel()} steps")
    paid = [(x, t) for x in episodes for t in np.flatnonzero(x["reward"]) if t >= 24]
    print(f"{len(paid)} paying steps")
    if paid:
        chunks = {key: np.stack([x[key][t - 24 : t + 1] for x, t in paid]) for key in episodes[0]}
        batch = agent.tensors(chunks)
        states = model.observe(batch)
        for steps in (0, 1, 8):
            share = (reward(ahead(batch, states, steps, 24)) > 5).float().mean()
            print(f"of them foreseen {steps} steps before: {share:.2f}")
    # Its moves, and its visits of another pad, which are dots in the margin.
    for x in episodes[-8:] if seeing else ():
        cells = x["image"][:, ::4, ::4].astype(int)
        player = cells.sum(-1).reshape(len(cells), -1).argmin(-1)
        pads = np.abs(np.diff(cells[:, 14, 1:8:2], axis=0)).sum((1, 2)) > 0
        print(f"an episode moves in {(np.diff(player) != 0).mean():.2f} of its steps, changes pads "
              f"in {pads.sum()}, return {x['reward'].sum():.0f}")


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__, **{"--random": {"action": "store_true", "help": "on random actions"}})
