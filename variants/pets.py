"""Planning over an ensemble: the score of a sequence is its mean over models.

Paper: Deep Reinforcement Learning in a Handful of Trials using Probabilistic Dynamics Models (PETS;
Chua, Calandra, McAllister, Levine, 2018).

    python -m variants.disagreement --task pinpad_three --logdir RUN
    python -m variants.pets --logdir RUN --eval 10 [--disagreement_cost 1]

Idea: a planner that searches in one learned model finds the errors of that model, and prefers
sequences whose return the model overestimates. Several models rarely make the same error. So a
sequence is imagined once with each of them, and its score is the mean of the returns.

What changes: the planner is that of `planner.py`, the ensemble and its training are those of
`disagreement.py`, whose checkpoints can be loaded. Each member imagines a trajectory of its own and
stays with it until the end (the paper's TS-infinity, with one particle per member). A member
replaces one part of the imagined step; `--disagreement_target` says which:
- `stoch`: deter' = recur(deter, stoch, action); stoch' is sampled, in each group in proportion to
  the member's mean, which estimates the probabilities of classes.
- `embed`: deter' as above; stoch' is a sample of the posterior for the member's embedding.
- `deter`: deter' is the member's mean; stoch' is a sample of the prior for it.
Rewards, continuation and the value at the end are those of each member's trajectory:

    score = mean over members of the return - `--disagreement_cost` * their standard deviation.

The cost, which PETS does not have, makes the planner avoid what the members disagree on (0 by
default). It is a standard deviation, not a variance, so that the weight means the same for rewards
of any size. Since each member has one sample, it also contains the randomness of the samples.

What is left out: several particles per member, and the variants that change members within a
trajectory (TS1); members learn from the same batches, not from bootstrapped data sets, so they
differ by their initial weights alone; a member's standard deviation is not used, so that with
`embed` imagined states lack the noise of the next observation; there is one recurrent model and one
reward and continuation head for all members. PETS knows the rewards and has no value at the end,
here the critic's. Tree search is refused.
"""

import dataclasses
import sys

import torch
from torch import Tensor

import director
from variants import disagreement, planner, refuse


@dataclasses.dataclass
class Config(planner.Config, disagreement.Config):
    planner: str = director.flag("actions", "how to act", ("none", "actions", "codes"),
                                 group="pets")
    disagreement_cost: float = director.flag(
        0.0, "cost of a standard deviation of the members' returns", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.planner == "none":
            refuse(self, ("disagreement_cost",), "--planner none does not read it")


class Agent(planner.Agent, disagreement.Agent):
    """Director, or the flat agent, that plans over an ensemble."""

    Config = Config
    compatible_variants = ("disagreement",)

    def score(self, state: dict[str, Tensor], sequences: Tensor) -> Tensor:
        """Mean score over members, minus the cost: [E, ...], [L, E, C, ...] -> [E, C]."""
        members = self.config.members
        # [M E, ...]: first all states for the first member, then all for the second.
        state = {key: torch.cat([state[key]] * members) for key in ("deter", "stoch")}
        returns = super().score(state, torch.cat([sequences] * members, 1))  # [M E, C]
        returns = returns.unflatten(0, (members, -1))
        return returns.mean(0) - self.config.disagreement_cost * returns.std(0)

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """A step of [M N, ...] states: the first N follow the first member, and so on."""
        rssm, target = self.world_model.rssm, self.config.disagreement_target
        parts = torch.cat([deter, stoch, action], -1).chunk(self.config.members)
        mean = torch.cat([member(part)[:, 0]  # index 1 holds standard deviations
                          for member, part in zip(self.ensemble.members, parts, strict=True)])
        if target == "deter":
            return mean, rssm.predict_stoch(mean)
        deter = rssm.recur(deter, stoch, action)
        if target == "embed":
            return deter, rssm.posterior(deter, mean)[0]
        probs = mean.unflatten(-1, rssm.groups).clamp(min=1e-6)  # of each class, up to a factor
        return deter, director.OneHot(probs.log()).rsample().flatten(-2)


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
