"""Does the worker reach its goals?

    python experiments/reach.py RUN

From 512 replayed states, 8 imagined steps (a goal's usual time): the mean max-cosine between the
goal and the last state, when the worker acts, when it is given another goal, for random actions,
and for the actions that were taken in the replay; and that between the goal and the state that
really came 8 steps later, and the nearest of 1,024 replayed ones. The goals are that later state
itself, the same after the goal autoencoder, and what the manager chooses.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command

import director


@torch.no_grad()
def main(run: str):
    agent, replay = agent_and_replay(run)
    if not agent.manager:
        raise director.UserError(f"the agent in {run} is a flat one, without goals")
    model, size = agent.world_model, agent.sizes["action"]
    batch = agent.tensors(replay.sample(32, 32))
    states = model.observe(batch)
    deter, stoch = (states[key][:, 8:24].flatten(0, 1) for key in ("deter", "stoch"))
    later = states["deter"][:, 16:].flatten(0, 1)  # what was reached 8 steps later
    actions = [batch["action"][:, 9 + t : 25 + t].flatten(0, 1) for t in range(8)]

    def work(goal: torch.Tensor):
        """A worker that is given this goal: t, deter, stoch -> action."""
        def act(t: int, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
            feat = agent.worker.feat({"deter": deter, "stoch": stoch, "goal": goal})
            return agent.worker.dist(feat).rsample()
        return act

    def at_random(t: int, deter: torch.Tensor, stoch: torch.Tensor) -> torch.Tensor:
        if agent.discrete:
            return torch.eye(size).to(deter)[torch.randint(size, (len(deter),))]
        return 2 * torch.rand(len(deter), size).to(deter) - 1

    start = {"deter": deter, "stoch": stoch}
    goals = {"state 8 steps later": later,
             "the same, autoencoded": agent.goals.decode(
                 agent.goals.encode(later).rsample().flatten(-2)),
             "manager's choice": agent.choose(start, np.zeros(len(deter), int))["goal"]}
    for name, goal in goals.items():
        players = {"worker": work(goal), "given another goal": work(goal.roll(100, 0)),
                   "random": at_random, "replayed": lambda t, deter, stoch: actions[t]}
        near = {}
        for player, act in players.items():
            d, s = deter, stoch
            for t in range(8):
                d, s = model.rssm.img_step(d, s, act(t, d, s))
            near[player] = director.max_cosine(goal, d)
        near["followed"] = director.max_cosine(goal, later)
        near["nearest"] = director.max_cosine(goal[:, None], states["deter"].flatten(0, 1)).amax(1)
        for key, value in near.items():
            print(f"{name} | {key} {value.mean():.2f}")


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__)
