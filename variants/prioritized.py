"""Prioritised replay: train on what is new or badly predicted (Curious Replay).

Prioritised experience replay (Schaul et al., 2016) replays in proportion to a priority, there the
error of a value. Curious Replay (Kauvar et al., 2023) takes that over to world models: a step that
was trained on v times, the last time with error L of the model, has the priority

    p = c * beta^v + (|L| + eps)^alpha     (c 1e4, beta 0.7, alpha 0.7, eps 0.01),

and one that never was 1e5. So what is new comes first, then what has few visits; after about 25
visits errors decide.

    python -m variants.prioritized --task pinpad_three

What changes: the replay. A step is drawn in proportion to p, and a chunk starts there, or as much
earlier as it has to in order to fit; if the episode is too short, the next one drawn follows. All
steps of a chunk count as visited and get their errors, the sums of the model's losses, when the
next chunks are drawn. As in Curious Replay, no weights correct the bias, and players start from
the states that are drawn.

What is left out: ranks and the annealed weights of Schaul et al. Checkpoints have no priorities, so
that to a resumed run all is new. While no episode has ended, running ones are replayed as always.
"""

import dataclasses
import sys

import numpy as np
from torch import Tensor

import director

NEW = 1e5  # the priority of what was never trained on


@dataclasses.dataclass
class Config(director.Config):
    priority_c: float = director.flag(1e4, "priority of a step that has no visits", low=0,
                                      group="prioritized")
    priority_beta: float = director.flag(0.7, "share of it that a visit leaves", low=0, high=1)
    priority_alpha: float = director.flag(0.7, "power of errors; 0: they do not count", low=0,
                                            high=3)


class Replay(director.Replay):
    """Draws chunks that show steps of high priority, which the errors of `agent` set."""

    def __init__(self, capacity: int, seed: int = 0):
        super().__init__(capacity, seed)
        self.agent = None  # `Run` tells; without one, all that is here stays new
        self.visits, self.priority, self.total = {}, {}, {}  # name: arrays [length], their sum

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Chunks as in director.py, and `place` [B, T, 2]: an episode's name, the step in it."""
        self.update()
        if not self.episodes:
            return super().sample(batch_size, length)
        names, totals = list(self.total), np.array(list(self.total.values()))
        chunks = {key: [] for key in (*self.episodes[names[0]], "place")}
        for _ in range(batch_size):
            missing = length
            while missing:
                name = names[self.rng.choice(len(names), p=totals / totals.sum())]
                episode, priority = self.episodes[name], self.priority[name]
                step = self.rng.choice(len(priority), p=priority / priority.sum())
                start = max(0, min(step, len(priority) - missing))
                stop = min(start + missing, len(priority))
                for key, value in episode.items():
                    chunks[key].append(value[start:stop].copy())
                chunks["is_first"][-1][0] = True
                chunks["place"].append(np.array([(name, t) for t in range(start, stop)]))
                missing -= stop - start
        return {key: np.concatenate(value).reshape(batch_size, length, *value[0].shape[1:])
                for key, value in chunks.items()}

    def update(self):
        """Take in new episodes, forget old ones, and set priorities where the agent has trained."""
        for name in self.episodes.keys() - self.total.keys():
            length = len(self.episodes[name]["reward"])
            self.visits[name], self.priority[name] = np.zeros(length), np.full(length, NEW)
            self.total[name] = NEW * length
        for name in self.total.keys() - self.episodes.keys():
            del self.visits[name], self.priority[name], self.total[name]
        if not self.agent or not self.agent.seen:
            return
        # Of the step before. Where an action was waited for since then, this waits for nothing.
        place, error = (x.flatten(0, 1).cpu().numpy() for x in self.agent.seen)
        config, self.agent.seen = self.agent.config, None
        for name in set(place[:, 0]) & self.total.keys():
            here = place[:, 0] == name
            step = place[here, 1]
            np.add.at(self.visits[name], step, 1)
            self.priority[name][step] = (
                config.priority_c * config.priority_beta ** self.visits[name][step]
                + (np.abs(error[here]) + 0.01) ** config.priority_alpha)
            self.total[name] = self.priority[name].sum()


class Run(director.Run):
    """A run whose replay hears of the errors of its agent."""

    def __init__(self, *args):
        super().__init__(*args)
        self.replay.agent = self.agent


class Agent(director.Director):
    """Director, or the flat agent, that replays what it knows least."""

    Config, Replay, Run, seen = Config, Replay, Run, None

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if "place" in states:
            self.seen = states["place"], states["error"]
        return super().train_goals(states)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
