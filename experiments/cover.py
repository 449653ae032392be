"""Where does an agent of Pin Pad go? Whoever stays in a corner finds no sequence of pads.

    python experiments/cover.py RUN             in training, from its replay
    python experiments/cover.py RUN --goals     now, with its own goals and with others

A line for four episodes: over how many cells of the room (168 in Pin Pad Three) they spread, as the
exponential of the entropy of positions; the share of steps without a move, against walls mostly;
how often an episode changes from one pad to another, and how often it is paid. With --goals, four
episodes each, actions sampled: with the manager's goals, those of random codes, and states drawn
from the replay; and random actions. If these others cover no more, the worker is why.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command

import director
from variants.pin_pad import PinPad


def places(episode: dict[str, np.ndarray]) -> np.ndarray:
    """x and y of the player, [T, 2], from observations [T, ...] with or without images."""
    if "image" in episode:  # the player is black, and nothing else is, in cells of 4x4 pixels
        return np.argwhere(~episode["image"][:, 2:56:4, 2::4].any(-1))[:, :0:-1]
    return np.stack([x.argmax(-1) + 1 for x in np.split(episode["state"][:, :26], [14], -1)], -1)


def cover(cells: np.ndarray, episodes: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Numbers for episodes {key: [T, ...]} in a room with these cells, [y, x]."""
    players = [places(episode) for episode in episodes]
    count = np.unique(np.concatenate(players), axis=0, return_counts=True)[1]
    share, still, changes = count / count.sum(), [], 0
    for at in players:
        still.append((at[1:] == at[:-1]).all(-1).mean())
        pads = cells[at[:, 1], at[:, 0]]
        pads = pads[pads > 0]
        changes += (pads[1:] != pads[:-1]).sum()
    paid = sum((episode["reward"] > 0).sum() for episode in episodes)
    return {"cells": float(np.exp(-(share * np.log(share)).sum())), "still": float(np.mean(still)),
            "changes": float(changes / len(episodes)), "paid": float(paid / len(episodes))}


@torch.no_grad()
def play(agent: director.Director, envs, random: bool = False) -> list[dict[str, np.ndarray]]:
    """An episode of each environment."""
    torch.manual_seed(agent.config.seed)
    driver, state = director.Driver(envs, agent.config.seed), None
    replay = director.Replay(10**9)
    replay.add(driver.rows)
    while len(replay.episodes) < envs.num_envs:
        if random:
            driver.step(driver.random())
        else:
            action, state = agent.policy(driver.rows, state)
            driver.step(action.cpu().numpy(), state)
        replay.add(driver.rows)
    return list(replay.episodes.values())


@torch.no_grad()
def main(run: str, goals: bool = False) -> dict[str, dict[str, float]]:
    """Print lines; returns their numbers by their titles."""
    (agent, replay), results = agent_and_replay(run), {}
    room = director.make_env(agent.config.task, agent.config).unwrapped
    if not isinstance(room, PinPad):
        raise director.UserError(f"{run}: --task {agent.config.task} is not Pin Pad")

    def tell(title: str, episodes: list[dict[str, np.ndarray]]):
        numbers = results[title] = cover(room.cells, episodes)
        print(f"{title:27}{numbers['cells']:4.0f} cells, {numbers['still']:.2f} still, "
              f"{numbers['changes']:5.1f} changes, {numbers['paid']:4.1f} paid", flush=True)

    episodes = [x for x in replay.episodes.values() if x["is_last"][-1]]
    for start in range(0, len(episodes) - 3, 4):
        steps = sum(len(x["reward"]) for x in episodes[: start + 4])
        tell(f"until step {steps}", episodes[start : start + 4])
    if not goals:
        return results
    if not agent.manager:
        raise director.UserError(f"the agent in {run} is a flat one, without goals")
    batch = agent.tensors(replay.sample(64, 32))
    states = agent.world_model.observe(batch)["deter"][:, 16:].flatten(0, 1)

    def random_code(state: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.zeros(len(state["deter"]), *agent.goals.groups).to(states)
        return director.OneHot(logits).rsample().flatten(1)

    def any_state(skill: torch.Tensor) -> torch.Tensor:
        return states[torch.randint(len(states), (len(skill),))]

    with director.vector_envs(agent.config, 4) as envs:
        tell("random actions", play(agent, envs, random=True))
        tell("the manager's goals", play(agent, envs))
        agent.pick = random_code
        tell("goals of random codes", play(agent, envs))
        agent.goals.decode.forward = any_state
        tell("replayed states as goals", play(agent, envs))
    return results


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__, **{"--goals": {"action": "store_true", "help": "and with other goals"}})
