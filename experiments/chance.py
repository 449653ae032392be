"""How often does chance pay on Pin Pad, and how often perfect play?

    python experiments/chance.py three four five --episodes 300

A line for each room: how often an episode of 2,000 steps is paid, with the standard error of this
mean, by random actions; if each way leads to another pad, drawn at random; and if it leads to the
next pad of the sequence. Ways are the shortest ones around all other pads.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from variants.pin_pad import MOVES, PADS, PinPad


class Blind(PinPad):
    """Without images, which take most of the time."""

    def look(self):
        return {}


def steps_to(cells: np.ndarray, goal: int, here: int) -> np.ndarray:
    """Steps from each cell [y, x] to pad `goal`, over the floor and the pad `here`."""
    away, before = np.where(cells == goal, 0, np.inf), None
    while not np.array_equal(away, before):
        before = away
        near = np.min([np.roll(away, *way) for way in ((1, 0), (-1, 0), (1, 1), (-1, 1))], 0)
        away = np.where(np.isin(cells, (0, goal, here)), np.minimum(away, near + 1), np.inf)
    return away


class Player:
    """Acts in an environment that it sees in full: `act()` is the next action."""

    def __init__(self, env: Blind, rng: np.random.Generator):
        self.env, self.rng, self.goal = env, rng, None
        self.away = {(goal, here): steps_to(env.cells, goal, here)
                     for goal in env.target for here in (0, *env.target)}

    def act(self) -> int:
        x, y = self.env.player
        here = int(self.env.cells[y, x])
        self.goal = self.aim(here)
        away = self.away[self.goal, here]
        near = [away[y + dy, x + dx] for dx, dy in MOVES]
        return int(self.rng.choice(np.flatnonzero(near == np.min(near))))


class Random(Player):
    def act(self) -> int:
        return int(self.rng.integers(len(MOVES)))


class AnyPad(Player):
    def aim(self, here: int) -> int:
        arrived = self.goal in (None, here)
        return self.rng.choice([x for x in self.env.target if x != here]) if arrived else self.goal


class InOrder(Player):
    def aim(self, here: int) -> int:
        target, history = self.env.target, self.env.history
        done = [n for n in range(len(target)) if history[len(history) - n :] == target[:n]]
        return target[max(done)]


def payments(name: str, kind: type[Player], episodes: int) -> list[int]:
    """Of each episode."""
    env, paid = Blind(name), []
    env.reset(seed=0)
    player = kind(env, env.np_random)
    for _ in range(episodes):
        env.reset()
        ended = False
        paid.append(0)
        while not ended:
            _, reward, _, ended, _ = env.step(player.act())
            paid[-1] += reward > 0
    return paid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="+", choices=PADS, metavar="ROOM", help=", ".join(PADS))
    parser.add_argument("--episodes", type=int, default=300)
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error(f"--episodes {args.episodes}: at least 1")
    for name in args.rooms:
        means = []
        for kind in (Random, AnyPad, InOrder):
            paid = payments(name, kind, args.episodes)
            means.append(f"{np.mean(paid):.3f} ± {np.std(paid) / len(paid) ** 0.5:.3f}")
        print(name, *means, sep="\t", flush=True)
