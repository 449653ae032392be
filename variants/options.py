"""Option-Critic: ways to behave that learn when to end (Bacon, Harb, Precup, 2017).

An option w is a policy for a while, with a chance beta(s, w) to end in a state; a policy over
options pi(w | s) picks the next. All learn from the task reward; nobody is set a goal.

    python -m variants.options --task pinpad_three [--option_entropy 0 --option_cost 0]

What changes: the worker sees an option (one-hot) and is paid by the task. In the state that was
arrived in, the option that led there may end; then one is picked, maybe the same. The critic is
Q(s, w), V(s) its mean under pi(w | s), and lambda returns are bootstrapped from

    U(s', w) = (1 - beta(s', w)) Q(s', w) + beta(s', w) V(s')     (their eq. 3).

beta minimises beta(s', w) (Q(s', w) - V(s') + cost), the bracket without gradient, over discounted
chances to get there (theorem 2, the paper's xi); pi maximises V and its entropy, in all states. In
the soft version V counts entropy, so it pays for ending: with the best pi, w ends where pi(w | s)
< exp(-cost / entropy). Both are in deviations of Q - V, as rewards may be of any size.

What is left out: the paper's pi is epsilon-greedy in a Q learned from single real steps; ours is a
network, learned in imagination. The cost is in beta's gradient, not in rewards (Harb et al., 2018).
Actions get no gradient through ends and picks. Flags for goals only divide --horizon.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

import director


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has none", ("director",), fixed=True)
    options: int = director.flag(4, "how many there are", group="options", fixed=True)
    option_entropy: float = director.flag(1.0, "weight of the entropy of a pick", low=0)
    option_cost: float = director.flag(1.4, "what ending an option costs", low=0)


class OptionCritic(director.ActorCritic):
    """An actor-critic with options, the last part of what it sees; beta is `end`, pi is `over`."""

    def __init__(self, keys: tuple, feat: int, *args):
        super().__init__(keys, feat, *args)
        count = self.config.options
        self.end, self.over = (director.MLP(feat - count, (count,), self.config) for _ in range(2))
        self.optimizers["end"] = director.Optimizer(self.end, self.config)
        self.optimizers["over"] = director.Optimizer(self.over, self.config)
        self.gapnorm = director.Normalizer("std", 0.99, 1e8)

    def pick(self, state: Tensor) -> director.OneHot:
        return director.OneHot(self.over(state), unimix=0.01)  # [..., W], as all discrete actors

    def values(self, state: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        """Q(s, w) of the slow critic, [..., W], and V(s) without its entropy, [...]."""
        each = torch.eye(pick.shape[-1], device=pick.device).expand(*pick.shape, -1).unbind(-2)
        values = [self.slow["extr"](torch.cat([state, option], -1)) for option in each]
        values = director.symexp(torch.stack(values, -1))
        return values, (values * pick).sum(-1)

    def returns(self, name: str, feat: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns of the options that act, and their Q, [H, N] both, like all here."""
        before, pick, beta = traj["option"][:-1], traj["pick"], traj["beta"][1:]
        values, anew = self.values(feat[..., : -pick.shape[-1]], pick)  # [H+1, N, W], [H+1, N]
        self.gapnorm(values - anew[..., None])
        active, going_on = ((x * before).sum(-1) for x in (values[:-1], values[1:]))
        arrived = going_on + beta * (anew[1:] - going_on)  # U of states 1..H and the options before
        # Entropy is earned by picking, so it is a reward: sampled parts of a return have it, too.
        unit = self.config.option_entropy / self.gapnorm(torch.ones_like(beta), update=False)
        discount = self.config.discount * traj["cont"][1:]
        reward = traj["reward_extr"] + discount * beta * unit * torch.special.entr(pick[1:]).sum(-1)
        value = torch.cat([active[:1], arrived])  # the first one is not used
        return director.lambda_return(reward, value, discount, self.config.lam), active

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        metrics, config, before = super().learn(traj, copy_slow), self.config, traj["option"][:-1]
        weight = director.trajectory_weights(traj["cont"].detach(), config.discount)  # [H+1, N]
        state = self.feat(traj)[..., : -config.options].detach()
        with director.autocast(config):
            pick, end = self.pick(state), (self.end(state[1:]).sigmoid() * before).sum(-1)
            values, anew = self.values(state, traj["pick"])
        gap = self.gapnorm(values - anew[..., None], update=False)  # [H+1, N, W], not centred
        entropy = config.option_entropy * pick.entropy()
        keep = (gap[1:] * before).sum(-1) - entropy[1:].detach() + config.option_cost  # [H, N]
        better = (pick.probs * gap).sum(-1) + entropy  # [H+1, N]
        return metrics | {
            "end_grad_norm": self.optimizers["end"].minimize((end * keep * weight[1:]).mean()),
            "over_grad_norm": self.optimizers["over"].minimize(-(better * weight).mean()),
            "option_length": 1 / traj["beta"][1:].mean(), "pick_ent": pick.entropy().mean()}


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
        """The option that led to a state goes on or ends. Also its beta [N], and pi as pick."""
        features = torch.cat([state["deter"], state["stoch"]], -1)
        pick, first = self.worker.pick(features), count == 0
        option, beta = pick.rsample(), torch.ones(len(features), device=features.device)
        if not first.all():
            beta = (self.worker.end(features).sigmoid() * state["option"]).sum(-1)
            if first.any():
                beta = beta.masked_fill(torch.as_tensor(first, device=beta.device), 1.0)
            option = torch.where((torch.rand_like(beta) < beta)[:, None], option, state["option"])
        return {"option": option, "beta": beta, "pick": pick.probs}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
