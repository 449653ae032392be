"""Prioritised replay: train on steps that are new or badly predicted.

Papers: Curious Replay (Kauvar et al., 2023), after prioritised experience replay (Schaul et al.,
2016).

    python -m variants.prioritized --task pinpad_three

Idea: prioritised experience replay draws steps in proportion to a power of their TD error. Curious
Replay does this for world models. A step that was trained on v times, the last time with error L of
the model, has the priority

    p = c * beta^v + (|L| + eps)^alpha     (c = 1e4, beta = 0.7, alpha = 0.7, eps = 0.01),

and a step that was never trained on has 1e5. So new steps come first, then those with few visits;
after about 25 visits the error decides.

What changes: the replay. A step is drawn in proportion to p. The chunk starts one step before it,
or earlier if it would not fit into the episode; if the episode is too short, the next one drawn
follows. The first step of a chunk has no memory, so that its error says little about the model. It
does not count as visited, and its error is not used. The first step of an episode, which is always
such a step, has priority 0. All other steps of a chunk count as visited. Their errors, the sums of
the model's losses, are known when the next chunks are drawn. As in Curious Replay, no weights
correct the bias, and imagination starts from the states that are drawn.

What is left out: ranks and annealed importance weights (Schaul et al.). The authors' program for
DreamerV2 also subtracts the least error so far, which the paper's formula does not. Checkpoints
contain no priorities, so all steps are new to a resumed run. While the episodes that have ended do
not fill a batch and others are running, all are replayed uniformly, as in director.py, which does
not count as visits. Later, steps are drawn once their episode has ended; Curious Replay adds each
step at once.
"""

import dataclasses
import sys

import numpy as np
from torch import Tensor

import director

NEW = 1e5  # priority of a step that was never trained on


@dataclasses.dataclass
class Config(director.Config):
    priority_c: float = director.flag(1e4, "weight c of the term that shrinks with visits", low=0,
                                      group="prioritized")
    priority_beta: float = director.flag(0.7, "its factor for each visit", low=0, high=1)
    priority_alpha: float = director.flag(0.7, "power of errors; 0: they do not count", low=0,
                                          high=3)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_length < 2:
            raise director.UserError("--batch_length: has to be more than 1")


class Replay(director.Replay):
    """Draws chunks at steps of high priority.

    agent: the agent whose errors set the priorities; without one all steps remain new. visits,
    priority: {name of an episode: array [length]}. total: {name: sum of its priorities}.
    """

    def __init__(self, capacity: int, seed: int = 0):
        super().__init__(capacity, seed)
        self.agent = None
        self.visits = {}
        self.priority = {}
        self.total = {}

    def sample(self, batch_size: int, length: int) -> dict[str, np.ndarray]:
        """Chunks as in director.py, and place [B, T, 2]: name of the episode, step in it."""
        self.update()
        names = [name for name, total in self.total.items() if total > 0]
        steps = sum(len(self.priority[name]) for name in names)
        if not names or (self.running and steps < batch_size * length):
            return super().sample(batch_size, length)
        totals = np.array([self.total[name] for name in names])
        pieces = []
        for _ in range(batch_size):
            missing = length
            while missing:
                name = names[self.rng.choice(len(names), p=totals / totals.sum())]
                priority = self.priority[name]
                step = self.rng.choice(len(priority), p=priority / priority.sum())
                start = max(0, min(step - 1, len(priority) - missing))
                stop = min(start + missing, len(priority))
                episode = self.episodes[name]
                piece = {key: np.array(value[start:stop]) for key, value in episode.items()}
                piece["is_first"][0] = True
                piece["place"] = np.array([(name, t) for t in range(start, stop)])
                pieces.append(piece)
                missing -= stop - start
        rows = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
        return {key: x.reshape(batch_size, length, *x.shape[1:]) for key, x in rows.items()}

    def update(self):
        """Add new episodes, remove old ones, and set priorities of what was trained on last."""
        for name in self.episodes.keys() - self.total.keys():
            length = len(self.episodes[name]["reward"])
            self.visits[name] = np.zeros(length)
            self.priority[name] = np.full(length, NEW)
            self.priority[name][0] = 0
            self.total[name] = NEW * (length - 1)
        for name in self.total.keys() - self.episodes.keys():
            del self.visits[name], self.priority[name], self.total[name]
        if not self.agent or not self.agent.trained_on:
            return
        # Set aside by the last train step, whose results a GPU has by now.
        place, error, is_first = (x.flatten(0, 1).cpu().numpy() for x in self.agent.trained_on)
        self.agent.trained_on = None
        place, error = place[~is_first], error[~is_first]
        config = self.agent.config
        for name in set(place[:, 0]) & self.total.keys():
            here = place[:, 0] == name
            step = place[here, 1]
            np.add.at(self.visits[name], step, 1)  # a step may be several times in a batch
            self.priority[name][step] = (
                config.priority_c * config.priority_beta ** self.visits[name][step]
                + (np.abs(error[here]) + 0.01) ** config.priority_alpha)
            self.total[name] = self.priority[name].sum()


class Run(director.Run):
    """A run whose replay reads the errors of its agent."""

    def __init__(self, *args):
        super().__init__(*args)
        self.replay.agent = self.agent


class Agent(director.Director):
    """Director, or the flat agent, with prioritised replay.

    trained_on: place [B, T, 2], error [B, T] and is_first [B, T] of the last train step, until the
    replay reads them.
    """

    Config, Replay, Run = Config, Replay, Run
    trained_on = None

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        if "place" in states:
            self.trained_on = states["place"], states["loss"], states["is_first"]
        return super().train_goals(states)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
