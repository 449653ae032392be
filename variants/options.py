"""Option-Critic: policies that last for a while, and learn when to end.

Paper: The Option-Critic Architecture (Bacon, Harb, Precup, 2017).

    python -m variants.options --task pinpad_three [--option_entropy 0 --option_cost 0]

Idea: an option w is a policy with a probability beta(s, w) of ending in state s. A policy over
options, pi(w | s), then picks the next one. Everything learns from the task reward; there are no
goals.

What changes: the worker reads an option (one-hot) and is rewarded for the task. In each state that
is reached, the option that led there ends with probability beta; then pi picks an option, which may
be the same one. The critic is Q(s, w), and V(s) is its mean under pi(w | s). Lambda returns
bootstrap from the value of arriving in s' with option w (eq. 3),

    U(s', w) = (1 - beta(s', w)) Q(s', w) + beta(s', w) V(s').

- beta minimises beta(s', w) (Q(s', w) - V(s') + `--option_cost`), without a gradient through the
  bracket, weighted by the discounted probability of getting there (theorem 2; xi is the cost).
- pi maximises V plus `--option_entropy` times its entropy, in all states. V then includes future
  entropies, and each pick adds one, which is a reason to end. With the optimal pi, option w ends
  where pi(w | s) < exp(-cost / entropy weight).
- Cost and entropy weight are in units of the standard deviation of Q - V, because rewards may have
  any scale.

What is left out: in the paper pi is epsilon-greedy in a Q learned from single real steps; here it
is a network that learns in imagination. The cost is part of beta's gradient, not of rewards (as in
Harb et al., 2018). Soft versions of option-critic also add the entropy of actions to Q; here it is
Director's bonus in the actor's loss, and no value includes it. Gradients of continuous actions do
not flow through ends and picks. There are no goals, but `--horizon` still has to be a multiple of
`--goal_duration`.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

import director
from variants import refuse


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no options", ("director",),
                               fixed=True)
    options: int = director.flag(4, "number of options", group="options", fixed=True)
    option_entropy: float = director.flag(1.0, "weight of the entropy of picks", low=0)
    option_cost: float = director.flag(1.4, "cost of ending an option", low=0)

    def __post_init__(self):
        super().__post_init__()
        unread = ("worker_extr", "manager_expl", "skill_groups", "skill_classes")
        refuse(self, unread, "there are no goals")


class OptionCritic(director.ActorCritic):
    """An actor-critic with W options, the last part of what it reads.

    end: logits of beta. over: logits of pi. Both read the state without the option, [..., F - W].
    A trajectory has also option [H+1, N, W], the one that acts; pick [H+1, N, W], the probabilities
    pi; and beta [H+1, N], the probability that the option that led to a state ended there.
    """

    def __init__(self, keys: tuple, feat: int, *args):
        super().__init__(keys, feat, *args)
        count = self.config.options
        self.end = director.MLP(feat - count, (count,), self.config)
        self.over = director.MLP(feat - count, (count,), self.config)
        self.optimizers["end"] = director.Optimizer(self.end, self.config)
        self.optimizers["over"] = director.Optimizer(self.over, self.config)
        self.gapnorm = director.Normalizer("std", 0.99, 1e8)  # of Q - V

    def pick(self, state: Tensor) -> director.OneHot:
        """pi, [..., W]; mixed with the uniform distribution like all discrete actors."""
        return director.OneHot(self.over(state), unimix=0.01)

    def values(self, state: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Q(s, w) of the slow critic, [..., W], and V(s) without entropies, [...]."""
        count = pick.shape[-1]
        q = []
        for option in torch.eye(count, device=pick.device):
            option = option.expand(*pick.shape[:-1], count)
            q.append(self.slow["extr"](torch.cat([state, option], -1)).mean)
        q = torch.stack(q, -1)
        return q, (q * pick).sum(-1)

    def returns(self, name: str, feat: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns of the options that act, and their Q, [H, N] both."""
        config = self.config
        w = traj["option"][:-1]  # acts in states 0..H-1 and leads to states 1..H
        pick = traj["pick"]
        beta = traj["beta"][1:]
        state = feat[..., : -config.options]
        q, v = self.values(state, pick)  # [H+1, N, W], [H+1, N]
        q_acting = (q[:-1] * w).sum(-1)  # Q(s, w), [H, N]
        q_next = (q[1:] * w).sum(-1)  # Q(s', w), [H, N]
        u = (1 - beta) * q_next + beta * v[1:]  # U(s', w), eq. 3
        # The entropy of a pick is a reward, so that sampled parts of a return include it, too.
        # Its unit is that of earlier gradient steps, so that all calls in one step agree; before
        # the first step there is none, and the weight is 0.
        weight = config.option_entropy / self.gapnorm(torch.ones_like(beta), update=False)
        discount = config.discount * traj["cont"][1:]
        entropy = torch.special.entr(pick[1:]).sum(-1)
        reward = traj["reward_extr"] + discount * beta * weight * entropy
        u = torch.cat([q_acting[:1], u])  # [H+1, N]; lambda_return ignores the first
        return director.lambda_return(reward, u, discount, config.lam), q_acting

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        """Train critics and actor, then beta and pi."""
        metrics = super().learn(traj, copy_slow)
        config = self.config
        w = traj["option"][:-1]
        weight = director.trajectory_weights(traj["cont"].detach(), config.discount)  # [H+1, N]
        state = self.feat(traj)[..., : -config.options].detach()
        with director.autocast(config):
            pick = self.pick(state)
            beta = (self.end(state[1:]).sigmoid() * w).sum(-1)  # beta(s', w), [H, N]
            q, v = self.values(state, traj["pick"])
        advantage = self.gapnorm(q - v[..., None])  # Q - V, [H+1, N, W]
        entropy = config.option_entropy * pick.entropy()  # [H+1, N]
        gain = (advantage[1:] * w).sum(-1) - entropy[1:].detach()  # of w over another pick, [H, N]
        end_loss = (beta * (gain + config.option_cost) * weight[1:]).mean()
        over_loss = -(((pick.probs * advantage).sum(-1) + entropy) * weight).mean()
        metrics["end_grad_norm"] = self.optimizers["end"].minimize(end_loss)
        metrics["over_grad_norm"] = self.optimizers["over"].minimize(over_loss)
        metrics["option_length"] = 1 / traj["beta"][1:].mean()
        metrics["pick_ent"] = pick.entropy().mean()
        return metrics


class Agent(director.Director):
    """The flat agent with options."""

    Config = Config

    def build(self, action: tuple):
        self.sizes["option"] = self.config.options
        keys = ("deter", "stoch", "option")
        feat = sum(self.sizes[key] for key in keys)
        self.worker = OptionCritic(keys, feat, action, self.discrete, {"extr": 1.0}, self.config)

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        """The option that led to a state continues, or ends and another one is picked.

        Returns option [N, W], pick [N, W] and beta [N], which is 1 in a first state.
        """
        feat = torch.cat([state["deter"], state["stoch"]], -1)
        pick = self.worker.pick(feat)
        picked = pick.rsample()
        first = count == 0
        if first.all():
            beta = torch.ones(len(feat), device=feat.device)
            return {"option": picked, "beta": beta, "pick": pick.probs}
        beta = (self.worker.end(feat).sigmoid() * state["option"]).sum(-1)
        if first.any():
            beta = beta.masked_fill(torch.as_tensor(first, device=beta.device), 1.0)
        ends = (torch.rand_like(beta) < beta)[:, None]
        option = torch.where(ends, picked, state["option"])
        return {"option": option, "beta": beta, "pick": pick.probs}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
