"""Planning: an agent that has learned acts by search in its world model.

    python -m variants.planner --logdir RUN --eval 10 --planner mcts     a run of director.py, too

`--planner actions` looks for a sequence of primitive actions by the cross-entropy method (PETS,
Chua et al., 2018; PlaNet, Hafner et al., 2019), with `--rounds 1` by random shooting. `codes` looks
for a sequence of the manager's codes, on which the worker acts. `mcts` is MuZero's tree search
(Schrittwieser et al., 2020), over codes or, for `--agent dreamer`, primitive actions; where there
are too many, each node tries a few from the actor, as in Sampled MuZero (Hubert et al., 2021).

What changes: how moves are chosen outside imagination, in training, too. Networks and learning are
Director's, whose checkpoints load. The first move of the best imagined sequence is made (in PETS
and PlaNet the mean one), then the search starts anew; codes last for K steps, sequences are H / K
of them. Imagined ways are scored by predicted rewards, discounted by the predicted continuation,
and by the critic's value of their end. The manager's values are means over K steps, discounted once
in K: so a step is discounted by the K-th root, and they count K times. Left out: chance nodes (a
child is one sample), noise at the root, learning from searches.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

import director
from variants.search import cross_entropy, tree_search


@dataclasses.dataclass
class Config(director.Config):
    planner: str = director.flag("actions", "how to act", ("none", "actions", "codes", "mcts"),
                                 group="planner")
    plan_length: int = director.flag(10, "primitive actions in a sequence")
    candidates: int = director.flag(100, "sequences in each round, a tenth elites", low=20)
    rounds: int = director.flag(5, "of CEM; 1: random shooting")
    simulations: int = director.flag(50, "of the tree search")
    tried: int = director.flag(8, "moves that a node of the tree tries", low=2)

    def __post_init__(self):
        super().__post_init__()
        if self.planner == "codes" and self.agent == "dreamer":
            raise director.UserError("--planner codes: a flat agent has none; use actions or mcts")


class Agent(director.Director):
    """Director, or the flat agent, that plans."""

    Config = Config
    compatible_variants = ("director",)

    @property
    def over_codes(self) -> bool:
        """Whether a move is a code, on which the worker acts for K steps, or an action."""
        return bool(self.manager) and self.config.planner in ("codes", "mcts")

    def act(self, state: dict, first: np.ndarray, mode: str) -> dict:
        state = super().act(state, first, mode)
        if self.config.planner == "none" or self.over_codes:
            return state
        return {**state, "action": self.search(state)}

    def sample_skill(self, state: dict[str, Tensor]) -> Tensor:
        acts = "count" in state  # rather than imagines
        return self.search(state) if acts and self.over_codes else super().sample_skill(state)

    def search(self, state: dict[str, Tensor]) -> Tensor:
        """The best move found, [E, ...]."""
        config, player = self.config, self.manager if self.over_codes else self.worker
        if config.planner == "mcts":
            moves, visits = tree_search(
                state, self.options, self.imagine_move, self.value, config.simulations)
            return moves[torch.arange(len(visits)), visits.argmax(1)]

        def score(moves: Tensor) -> Tensor:  # [L, E, candidates, ...] -> [E, candidates]
            now = {key: state[key].repeat_interleave(config.candidates, 0)
                   for key in ("deter", "stoch")}
            total, weight = 0.0, 1.0
            for move in moves.flatten(1, 2).flatten(2):
                now, reward, discount = self.imagine_move(now, move)
                total, weight = total + weight * reward, weight * discount
            return (total + weight * self.value(now)).unflatten(0, (-1, config.candidates))

        length = config.horizon // config.goal_duration if self.over_codes else config.plan_length
        start = torch.zeros(length, len(state["deter"]), *player.action, device=config.device)
        elite = cross_entropy(score, start, player.discrete, config.candidates, config.rounds)
        return elite[0, :, 0].flatten(1)

    def imagine_move(self, state: dict, move: Tensor) -> tuple[dict, Tensor, Tensor]:
        """An action [N, A], or K steps with a code [N, GL]: state, reward on the way, discount."""
        model, k, reward, discount = self.world_model, self.config.goal_duration, 0.0, 1.0
        gamma = self.config.discount ** (1 / k) if self.manager else self.config.discount
        goal = {"goal": self.goals.decode(move)} if self.over_codes else {}
        for _ in range(k if goal else 1):
            seen = self.worker.feat({**state, **goal}) if goal else None
            action = self.worker.dist(seen).rsample() if goal else move
            deter, stoch = model.rssm.img_step(state["deter"], state["stoch"], action)
            state, feat = {"deter": deter, "stoch": stoch}, torch.cat([deter, stoch], -1)
            reward = reward + discount * director.symexp(model.reward_head(feat))
            discount = discount * gamma * model.cont_head(feat).sigmoid()
        return state, reward, discount

    def value(self, state: dict) -> Tensor:
        """What the task will pay from here on, [N], in rewards of single steps."""
        player = self.manager or self.worker
        value = director.symexp(player.critics["extr"](player.feat(state)))
        return value * (self.config.goal_duration if self.manager else 1)

    def options(self, state: dict) -> tuple[Tensor, Tensor]:
        """A flat agent's discrete actions, else moves that the actor draws: [E, M, ...], prior."""
        player = self.manager or self.worker
        dist = player.dist(player.feat(state))
        if self.discrete and not self.manager:
            moves = torch.eye(dist.probs.shape[-1], device=self.config.device)
            return moves.expand(len(dist.probs), -1, -1), dist.probs
        moves = torch.stack([dist.rsample().flatten(1) for _ in range(self.config.tried)], 1)
        return moves, torch.full_like(moves[..., 0], 1 / self.config.tried)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
