"""Planning: a trained agent acts by searching in its world model.

Papers: PETS (Chua et al., 2018) and PlaNet (Hafner et al., 2019) for the cross-entropy method,
MuZero (Schrittwieser et al., 2020) and Sampled MuZero (Hubert et al., 2021) for the tree search.

    python -m variants.planner --logdir RUN --eval 10 --planner mcts      RUN may be director.py's

What changes: how actions are chosen outside imagination, also during training. Networks and
learning are Director's, whose checkpoints can be loaded. A *move* is a primitive action, or a code
of the manager, which the worker follows for K steps.
- `--planner actions` searches for a sequence of `--plan_length` primitive actions by the
  cross-entropy method (CEM); `--rounds 1` is random shooting.
- `--planner codes` searches for a sequence of H / K codes in the same way (H is `--horizon`, K is
  `--goal_duration`).
- `--planner mcts` is MuZero's tree search, over codes, or over primitive actions with `--agent
  dreamer`. If moves are too many to enumerate (several code groups, or continuous actions), a node
  tries some samples of the actor, as in Sampled MuZero.

A sequence of L moves is scored by its predicted rewards r, continuations and the critic's value V:

    score = sum over i of (d_1 ... d_{i-1}) r_i + (d_1 ... d_L) V(s_L),   d_i = discount * cont_i

(PETS and PlaNet have neither discount, continuation nor V). The agent makes the first move of the
best sequence (PETS and PlaNet: of the mean sequence) and then searches again. The manager's critic
values rewards that are averaged over K steps and discounted once per K steps. So one step is
discounted by the K-th root of the discount, and the value is multiplied by K.

What is left out: PETS's ensemble of models, which `pets.py` adds (here there is one model, and one
sample of each sequence); chance nodes (a child is one sample), merging of equal samples (Sampled
MuZero), noise at the root and moves drawn by visits during training (here the most visited one is
made), noise on actions during training (PlaNet adds it), a start from the last step's solution and
smoothed, bounded variances (PETS), and learning from the results of the search. Sequences of codes
are scored with sampled actions of the worker, also in evaluation, where it then takes its most
likely ones.
"""

import dataclasses
import functools
import math
import sys

import numpy as np
import torch
from torch import Tensor

import director
from variants import refuse
from variants.search import cross_entropy, tree_search


@dataclasses.dataclass
class Config(director.Config):
    planner: str = director.flag("actions", "how to act", ("none", "actions", "codes", "mcts"),
                                 group="planner")
    plan_length: int = director.flag(10, "primitive actions in a sequence")
    candidates: int = director.flag(100, "sequences in each round; a tenth are elites", low=20)
    rounds: int = director.flag(5, "rounds of CEM; 1: random shooting")
    simulations: int = director.flag(50, "simulations of the tree search")
    tried: int = director.flag(8, "moves that a node of the tree tries", low=2)

    def __post_init__(self):
        super().__post_init__()
        if self.planner == "codes" and self.agent == "dreamer":
            raise director.UserError("--planner codes: a flat agent has none; use actions or mcts")
        unread = {"none": (),  # the actors of a run that was trained with any of them
                  "actions": ("simulations", "tried"),
                  "codes": ("plan_length", "simulations", "tried"),
                  "mcts": ("plan_length", "candidates", "rounds")}
        refuse(self, unread[self.planner], f"--planner {self.planner} does not read it")


class Agent(director.Director):
    """Director, or the flat agent, that plans."""

    Config = Config
    compatible_variants = ("director",)

    @property
    def moves_are_codes(self) -> bool:
        return bool(self.manager) and self.config.planner in ("codes", "mcts")

    def act(self, state: dict, first: np.ndarray, mode: str) -> dict:
        state = super().act(state, first, mode)
        if self.config.planner == "none" or self.moves_are_codes:
            return state
        return {**state, "action": self.search(state)}

    def sample_skill(self, state: dict[str, Tensor]) -> Tensor:
        imagining = "count" not in state  # only `policy` counts steps
        if imagining or not self.moves_are_codes:
            return super().sample_skill(state)
        return self.search(state)

    def search(self, state: dict[str, Tensor]) -> Tensor:
        """The best move found in states [E, ...]: actions [E, A] or codes [E, GL]."""
        config = self.config
        if config.planner == "mcts":
            moves, visits = tree_search(
                state, self.moves_to_try, self.imagine_move, self.value, config.simulations)
            return moves[torch.arange(len(visits)), visits.argmax(1)]

        player, length = self.worker, config.plan_length
        if self.moves_are_codes:
            player, length = self.manager, config.horizon // config.goal_duration
        start = torch.zeros(length, len(state["deter"]), *player.action_shape, device=config.device)
        score = functools.partial(self.score, state)
        elite = cross_entropy(score, start, player.discrete, config.candidates, config.rounds)
        return elite[0, :, 0].flatten(1)

    def score(self, state: dict[str, Tensor], sequences: Tensor) -> Tensor:
        """Discounted rewards and the last value: [E, ...], [L, E, C, ...] -> [E, C]."""
        candidates = sequences.shape[2]
        state = {key: state[key].repeat_interleave(candidates, 0) for key in ("deter", "stoch")}
        total = 0.0
        weight = 1.0
        for move in sequences.flatten(1, 2).flatten(2):  # [E C, ...]
            state, reward, discount = self.imagine_move(state, move)
            total = total + weight * reward
            weight = weight * discount
        total = total + weight * self.value(state)
        return total.unflatten(0, (-1, candidates))

    def imagine_move(self, state: dict, move: Tensor) -> tuple[dict, Tensor, Tensor]:
        """Make a move [N, A or GL]: the next state, the reward on the way, the discount, [N].

        A code lasts K steps, an action one.
        """
        model = self.world_model
        k = self.config.goal_duration
        gamma = self.config.discount
        if self.manager:  # its critic discounts once per K steps
            gamma = gamma ** (1 / k)
        goal = self.goals.decode(move) if self.moves_are_codes else None
        action = move
        reward = 0.0
        discount = 1.0
        for _ in range(k if self.moves_are_codes else 1):
            if self.moves_are_codes:
                feat = self.worker.feat({**state, "goal": goal})
                action = self.worker.dist(feat).rsample()
            deter, stoch = self.imagine_step(state["deter"], state["stoch"], action)
            state = {"deter": deter, "stoch": stoch}
            feat = torch.cat([deter, stoch], -1)
            reward = reward + discount * model.reward_head(feat).mean
            discount = discount * gamma * model.cont_head(feat).sigmoid()
        return state, reward, discount

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next deter and stoch, [N, ...]."""
        return self.world_model.rssm.img_step(deter, stoch, action)

    def value(self, state: dict) -> Tensor:
        """The task's return from these states on, [N], in rewards of single steps."""
        player = self.manager or self.worker
        value = player.critics["extr"](player.feat(state)).mean
        return value * (self.config.goal_duration if self.manager else 1)

    def moves_to_try(self, state: dict) -> tuple[Tensor, Tensor]:
        """Moves to try, [E, M, ...], and their prior probabilities, [E, M].

        Discrete actions, and codes of a single group, are all tried; else samples of the actor.
        """
        player = self.manager or self.worker
        dist = player.dist(player.feat(state))
        groups = math.prod(player.action_shape[:-1])
        if player.discrete and groups == 1:
            probs = dist.probs.flatten(1)  # [E, M]
            moves = torch.eye(probs.shape[1], device=self.config.device)
            return moves.expand(len(probs), -1, -1), probs
        moves = torch.stack([dist.rsample().flatten(1) for _ in range(self.config.tried)], 1)
        # Equal priors: the samples already follow the actor.
        return moves, torch.full_like(moves[..., 0], 1 / self.config.tried)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
