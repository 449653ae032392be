"""How well does a world model see, and foresee, each number of the vector that it observes?

    python experiments/vectors.py RUN

For each number of the vector: its standard deviation in the replay, and the share of its variance
that the model explains (1 - mean squared error / variance) at a step that it has just seen, and 1
and 8 steps ahead, imagined with the actions that were taken; below, the same for the reward. From
64 replayed chunks of 64 steps, half of each to get started.
"""

import pathlib
import sys

import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command

import director


@torch.no_grad()
def main(run: str):
    agent, replay = agent_and_replay(run)
    model, start = agent.world_model, range(32, 56, 3)
    if "state" not in model.encoder.keys:
        raise director.UserError(f"the agent in {run} observes no vector")
    batch = agent.tensors(replay.sample(64, 64))
    states, shares = model.observe(batch), {}
    truth = {"state": model.encoder.scaled("state", batch["state"]),
             "reward": batch["reward"][..., None]}
    for ahead in (0, 1, 8):
        deter, stoch = (states[key][:, start].flatten(0, 1) for key in ("deter", "stoch"))
        later = [t + ahead for t in start]
        for step in range(ahead):
            action = batch["action"][:, [t + step + 1 for t in start]].flatten(0, 1)
            deter, stoch = model.rssm.img_step(deter, stoch, action)
        feat = torch.cat([deter, stoch], -1)
        guess = {"state": model.decoder(feat)["state"],
                 "reward": director.symexp(model.reward_head(feat))[..., None]}
        for key, value in truth.items():
            error = (guess[key] - value[:, later].flatten(0, 1)).square().mean(0)
            share = 1 - error / value.flatten(0, 1).var(0).clamp(min=1e-12)
            shares.setdefault(key, []).append(share)
    print("number  deviation   seen  1 ahead  8 ahead")
    for key, name in (("state", "{}"), ("reward", "reward")):
        deviations = batch[key].flatten(0, 1).float().std(0).reshape(-1)
        for i, (deviation, *row) in enumerate(zip(deviations, *shares[key], strict=True)):
            print(f"{name.format(i):6} {deviation:10.3g} " + " ".join(f"{x:8.2f}" for x in row))


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__)
