"""Pin Pad Three: after which visits of pads does an agent go the right way, and does it know?

    python experiments/histories.py RUN

32 players are led to some pads, all of them over the same cells; then the agent takes over for 64
steps. For each history: the share of players whose next other pad is the right one, the share that
is rewarded within these steps, the same in imagination, and the mean value of the manager's critic
of the task reward (of the worker's, for a flat agent).
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import command

import director
from variants.pin_pad import PinPad

PLAYERS, STEPS = 32, 64
PADS = {"1": (4, 4), "2": (7, 9), "3": (11, 4)}  # a cell of each


def way(player: tuple, pad: str) -> int | None:
    """The action that leads to a pad past the others; None if the player is there."""
    dx, dy = np.subtract(PADS[pad], player)
    if dy and (pad != "2" or not dx):
        return 1 if dy > 0 else 2
    return (3 if dx > 0 else 4) if dx else None


@torch.no_grad()
def dream(agent: director.Director, state: dict) -> tuple[float, float]:
    """The share of players whose imagined steps are rewarded, and their mean value now."""
    player = agent.manager or agent.worker
    value = director.symexp(player.critics["extr"](player.feat(state)))
    starts = {key: state[key] for key in ("deter", "stoch")}
    traj = agent.imagine({**starts, "is_terminal": torch.zeros_like(value)})
    return (traj["reward_extr"] > 5).any(0).float().mean().item(), value.mean().item()


def main(run: str):
    agent = director.load(run, horizon=STEPS)
    torch.manual_seed(0)
    for history in ("1", "21", "31", "231", "12", "212", "312", "2312"):
        envs, visits = [PinPad("three") for _ in range(PLAYERS)], list(history)
        for seed, env in enumerate(envs):
            env.reset(seed=seed)
            env.player = 7, 6  # on no pad
        images, state = [env.look()["image"] for env in envs], None
        following, rewards, steps = np.zeros(PLAYERS, int), np.zeros(PLAYERS), 0
        while steps < STEPS:
            action, state = agent.policy({"image": np.stack(images)}, state)
            while visits and way(envs[0].player, visits[0]) is None:
                visits.pop(0)
            if visits:  # the players are led, and get a new goal each step
                action = torch.eye(5).to(action)[[way(envs[0].player, visits[0])] * PLAYERS]
                state = {**state, "action": action, "count": 0 * state["count"]}
            elif steps == 0:
                dreamt, value = dream(agent, state)
            steps += not visits
            for i, env in enumerate(envs):
                obs, reward, *_ = env.step(action[i].argmax().item())
                images[i], pad = obs["image"], env.cells[env.player[::-1]]
                if not visits:
                    rewards[i] += reward
                    if not following[i] and pad not in (0, int(history[-1])):
                        following[i] = pad
        right = (following == int(history[-1]) + 1).mean()
        print(f"after {history}: right pad next {right:.2f}, rewarded within {STEPS} steps "
              f"{(rewards > 0).mean():.2f}, in imagination {dreamt:.2f}, value {value:.2f}")


if __name__ == "__main__":
    command(main, __doc__)
