"""Option-Critic: policies that last for a while and learn when to end; options by hand beside them.

Papers: The Option-Critic Architecture (Bacon, Harb, Precup, 2017), whose notation this file uses.
Options are those of Between MDPs and semi-MDPs (Sutton, Precup, Singh, 1999).

    python -m variants.options --task pinpad_three [--option_entropy 0 --option_cost 0]

Idea: an option w has a policy over actions, and a probability beta(s, w) of ending in state s (its
termination function). A policy over options, pi(w | s), then picks the next one. Everything learns
from the task reward; there are no goals. In this file, a *pick* is a choice by pi, an option that
does not end *goes on* (continues), the *cost of ending* is what later papers call the deliberation
cost, and options *by hand* are hand-written ones.

What changes: the worker's actor and critic read an option (one-hot). In each state that is reached,
the option that led there ends with probability beta. If it ends, pi picks an option, perhaps the
same; otherwise it goes on. Imagined trajectories and episodes begin with a pick. The quantities of
the paper, all computed from the slow critic:

    Q(s, w)                                                     value of option w in state s
    V(s)     = sum_w pi(w | s) Q(s, w)                          value of a pick
    A(s, w)  = Q(s, w) - V(s)                                   advantage of w over a pick
    U(s', w) = (1 - beta(s', w)) Q(s', w) + beta(s', w) V(s')   value of arriving with w (eq. 3)

With H(s) the entropy of pi(. | s), e = `--option_entropy` and c = `--option_cost` (the paper has
e = 0, and calls the cost xi):

- Q learns lambda returns that bootstrap from U(s', w) + beta(s', w) e H(s'): each pick adds the
  weighted entropy to the return, so Q includes the entropies of later picks.
- The actor learns from the lambda return minus Q(s, w), as Director's does. There is no separate
  Q_U(s, w, a) as in theorem 1.
- beta minimizes beta(s', w) (A(s', w) - e H(s') + c), without a gradient through the bracket,
  weighted by the discounted probability of getting there (theorem 2): to end brings V and the
  entropy of a pick, to go on brings Q. With the optimal pi, option w ends where
  pi(w | s) < exp(-c / e) (for e > 0).
- pi maximizes V(s) + e H(s), in all states.
- e and c are in units of the standard deviation of A over states and options, because rewards may
  have any scale. (A counts as 0 if the option cannot start.)

Options by hand: `HandWritten` has an initiation set, a policy and a probability to end that a
person wrote. Only Q and pi learn for them, by the formulas above: beta and actions are given, and
neither has a gradient. pi is 0 for an option whose initiation set does not hold the state; learned
options start in every state. An option that has started may leave its set. They stand beside
learned ones, or alone (`--options 0`) if in each state at least one can start. To use them, write a
file with a subclass, here for `envs/grid.py`:

    import sys, torch
    from variants import options

    def column(obs):  # of the player, [N]
        return obs["state"][:, :6].argmax(-1)

    right = options.HandWritten(  # goes right until the wall
        starts=lambda obs: column(obs) < 5, ends=lambda obs: column(obs) == 5,
        policy=lambda obs: torch.full_like(column(obs), 3))

    class Agent(options.Agent):
        hand_written = (right,)

    if __name__ == "__main__":
        sys.exit(options.director.main(agent=Agent))

Learned options differ little, so random picks cost little, and the entropy keeps all in use.
Options by hand differ, so random picks cost return: set `--option_entropy 0` if all are by hand
(their ends have no cost).

The functions always read the observation that the decoder reconstructs from the latent state, in
imagination and in the environment, so that an option acts in the same way in both. The price is
that options by hand make mistakes until the decoder is good, and see nothing that it leaves out.

What is left out: in the paper pi is epsilon-greedy in a Q learned from single real steps, whose
target (Algorithm 1) has the maximum of Q in place of V. Here pi is a network that learns in
imagination. The cost is part of beta's gradient, not of the rewards, where Harb et al. (2018) put
it. Soft versions of option-critic also add the entropy of actions to Q; here it is Director's bonus
in the actor's loss, and no value includes it. Where continuous actions learn by gradients through
the dynamics, ends and picks are constants. Picks and ends are sampled with `--eval`, too. Options
by hand are Markov: they do not know how long they have lasted, so they have no time limits. There
are no goals, but `--horizon` still has to be a multiple of `--goal_duration`.
"""

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor

import director
from variants import refuse


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no options", ("director",),
                               fixed=True)
    options: int = director.flag(4, "number of learned options", low=0, group="options",
                                 fixed=True)
    option_entropy: float = director.flag(1.0, "weight of the entropy of picks", low=0)
    option_cost: float = director.flag(
        1.4, "cost of ending; with less than about log(options) all end at once", low=0)

    def __post_init__(self):
        super().__post_init__()
        unread = ("worker_extr", "manager_expl", "skill_groups", "skill_classes")
        refuse(self, unread, "there are no goals")
        if not self.options:
            refuse(self, ("option_cost",), "options by hand end as they say")


@dataclasses.dataclass(frozen=True)
class HandWritten:
    """An option that a person wrote: three functions of a decoded observation.

    They read a dict of tensors: "state" [N, n] in the environment's units and "image" [N, 64, 64,
    3] in 0..1, those of the two that the agent observes. They are called without gradients.
    """

    starts: Callable  # -> bool [N], the initiation set: states in which pi may pick the option
    policy: Callable  # -> actions: numbers [N] of discrete ones, else [N, A]
    ends: Callable  # -> beta, [N], bool or a probability: whether it ends in a state it reached


class PartlyByHand:
    """A distribution of actions, which are given where `by_hand` [...] is true.

    An actor gets no gradient from such steps: their log-probability is 0. Their entropy is the mean
    of the other steps, so that `AutoAdapt` sees the entropy of learned actions alone, or the target
    of `AutoAdapt` if there are no others. (Statistics of returns and scores include such steps.)
    """

    def __init__(self, dist, by_hand: Tensor, given: Callable, target: float):
        self.dist, self.by_hand, self.given = dist, by_hand, given
        self.entropy_range = dist.entropy_range
        low, high = dist.entropy_range
        self.target = low + target * (high - low)

    def replace(self, x: Tensor, value: Tensor | float) -> Tensor:
        """[..., A], or [...] for one discrete action."""
        mask = self.by_hand if x.ndim == self.by_hand.ndim else self.by_hand[..., None]
        return torch.where(mask, value, x)

    def rsample(self) -> Tensor:
        return self.replace(self.dist.rsample(), self.given())

    @property
    def mode(self) -> Tensor:
        return self.replace(self.dist.mode, self.given())

    def log_prob(self, action: Tensor) -> Tensor:
        return self.replace(self.dist.log_prob(action), 0.0)

    def entropy(self) -> Tensor:
        entropy = self.dist.entropy()  # [...] or [..., A]
        learned = self.replace(torch.ones_like(entropy), 0.0)
        dims = tuple(range(self.by_hand.ndim))
        count = learned.sum(dims)
        mean = (entropy * learned).sum(dims) / count.clamp(min=1)
        return self.replace(entropy, torch.where(count > 0, mean, self.target).detach())


class OptionCritic(director.ActorCritic):
    """An actor-critic with W options, the last part of what it reads: learned, then by hand.

    pi_net, beta_net: logits of pi and beta, [..., W]; they read the state without the option, [...,
    F - W]. A trajectory has also option [H+1, N, W], the one that acts; pi [H+1, N, W]; and beta
    [H+1, N], the probability that the option that led to a state ended there.
    """

    def __init__(self, keys: tuple, feat: int, *args, hand_written: tuple, decode: Callable):
        super().__init__(keys, feat, *args)
        self.hand_written, self.decode = hand_written, decode
        self.learned = self.config.options
        self.count = self.learned + len(hand_written)  # W
        self.beta_net = director.MLP(feat - self.count, (self.count,), self.config)
        self.pi_net = director.MLP(feat - self.count, (self.count,), self.config)
        self.optimizers["beta"] = director.Optimizer(self.beta_net, self.config)
        self.optimizers["pi"] = director.Optimizer(self.pi_net, self.config)
        self.advantage_std = director.Normalizer("std", 0.99, 1e8)  # of A

    def pi(self, state: Tensor, available: Tensor) -> director.OneHot:
        """The policy over options, [..., W]; 0 where `available` [..., W] is false.

        It is mixed with the uniform distribution over what is available, like all discrete actors.
        """
        probs = self.pi_net(state).masked_fill(~available, -1e4).softmax(-1)
        probs = 0.99 * probs + 0.01 * available / available.sum(-1, keepdim=True)
        logits = probs.masked_fill(~available, 1).log()  # not log(0), whose gradient is NaN
        return director.OneHot(logits.masked_fill(~available, -1e4))

    def available_and_beta(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Which options can start, bool [N, W], and beta(s, w), [N, W], in states [N, F - W]."""
        beta = self.beta_net(state).sigmoid()
        available = torch.ones_like(beta, dtype=torch.bool)
        if self.hand_written:
            obs = self.decode(state)
            for w, hand in enumerate(self.hand_written, self.learned):
                available[:, w] = hand.starts(obs)
                beta[:, w] = hand.ends(obs)
        return available, beta

    def dist(self, feat: Tensor):
        """Distribution of actions of the option that feat [..., F] ends with."""
        dist = super().dist(feat)
        if not self.hand_written:
            return dist
        by_hand = feat[..., -len(self.hand_written) :].sum(-1) > 0
        return PartlyByHand(dist, by_hand, lambda: self.given(feat), self.ent_adapt.target)

    @torch.no_grad()
    def given(self, feat: Tensor) -> Tensor:
        """Actions of the options by hand, [N, F] -> [N, A]; 0 where a learned option acts."""
        option = feat[:, -self.count :]
        obs = self.decode(feat[:, : -self.count])
        given = torch.zeros(len(feat), self.action_shape[-1], device=feat.device)
        for w, hand in enumerate(self.hand_written, self.learned):
            action = hand.policy(obs)
            if self.discrete:
                action = F.one_hot(action.long(), self.action_shape[-1])
            given = torch.where(option[:, w, None] > 0, action.float(), given)
        return given

    def values(self, state: Tensor, pi: Tensor) -> tuple[Tensor, Tensor]:
        """Q(s, w) of the slow critic, [..., W], and V(s) without entropies, [...]."""
        q = []
        for w in torch.eye(self.count, device=pi.device):
            w = w.expand(*pi.shape[:-1], self.count)
            q.append(self.slow["extr"](torch.cat([state, w], -1)).mean)
        q = torch.stack(q, -1)
        return q, (pi * q).sum(-1)

    def returns(self, name: str, feat: Tensor, traj: dict) -> tuple[Tensor, Tensor]:
        """Lambda returns of the options that act, and their Q, [H, N] both."""
        config = self.config
        w = traj["option"][:-1]  # acts in states s = 0..H-1, leads to states s' = 1..H
        pi, beta = traj["pi"], traj["beta"][1:]  # beta(s', w)
        q, v = self.values(feat[..., : -self.count], pi)  # [H+1, N, W], [H+1, N]
        q_acting = (q[:-1] * w).sum(-1)  # Q(s, w), [H, N]
        q_next = (q[1:] * w).sum(-1)  # Q(s', w), [H, N]
        u = (1 - beta) * q_next + beta * v[1:]  # U(s', w), eq. 3
        # The entropy of a pick is a reward, so that sampled parts of a return include it, too.
        # Its unit is the standard deviation of A, by which advantage_std divides. `learn` updates
        # it after all calls of this method; before the first gradient step it is about 0.
        std = 1 / self.advantage_std(torch.ones_like(beta), update=False)
        entropy = config.option_entropy * std * torch.special.entr(pi[1:]).sum(-1)
        discount = config.discount * traj["cont"][1:]
        reward = traj["reward_extr"] + discount * beta * entropy
        value = torch.cat([q_acting[:1], u])  # [H+1, N]; lambda_return ignores the first
        return director.lambda_return(reward, value, discount, config.lam), q_acting

    def learn(self, traj: dict[str, Tensor], copy_slow: bool) -> dict[str, Tensor]:
        """Train critic and actor, then beta and pi."""
        metrics = super().learn(traj, copy_slow)
        config = self.config
        state = self.feat(traj)[..., : -self.count].detach()
        w = traj["option"][:-1]  # leads to states s' = 1..H
        weight = director.trajectory_weights(traj["cont"].detach(), config.discount)  # [H+1, N]
        available = traj["pi"] > 0  # at least 0.01 / W where an option can start, else 0
        with director.autocast(config):
            pi = self.pi(state, available)
            beta = (self.beta_net(state[1:]).sigmoid() * w).sum(-1)  # beta(s', w), [H, N]
            q, v = self.values(state, traj["pi"])
        # A(s, w), [H+1, N, W]; 0 where w cannot start: Q(s, w) may be untrained there.
        advantage = self.advantage_std((q - v[..., None]) * available)
        entropy = config.option_entropy * pi.entropy()  # [H+1, N]

        # To end brings V plus the entropy of a pick, to go on brings Q.
        gain = (advantage[1:] * w).sum(-1) - entropy[1:].detach()  # of w over a pick in s', [H, N]
        learned = w[..., : self.learned].sum(-1)  # 1 where a learned option acts, else 0
        # Theorem 2.
        beta_loss = (beta * (gain + config.option_cost) * learned * weight[1:]).mean()
        pi_loss = -(((pi.probs * advantage).sum(-1) + entropy) * weight).mean()
        metrics["beta_grad_norm"] = self.optimizers["beta"].minimize(beta_loss)
        metrics["pi_grad_norm"] = self.optimizers["pi"].minimize(pi_loss)
        metrics["option_length"] = 1 / traj["beta"][1:].mean().clamp(min=1e-6)  # at most 1e6
        metrics["pick_ent"] = pi.entropy().mean()
        return metrics


def check_options(config: Config, hand_written: tuple):
    if not config.options and not hand_written:
        raise director.UserError("--options 0: there are no options by hand either")


class Run(director.Run):
    """Refuses an agent without options before it makes a folder."""

    def __init__(self, config: Config, agent: type, obs_space: spaces.Dict,
                 act_space: spaces.Space):
        check_options(config, agent.hand_written)
        super().__init__(config, agent, obs_space, act_space)


class Agent(director.Director):
    """An agent with options and without goals; `hand_written`: options that a person wrote."""

    Config, Run = Config, Run
    hand_written: tuple[HandWritten, ...] = ()

    def build(self, action: tuple):
        check_options(self.config, self.hand_written)
        self.sizes["option"] = self.config.options + len(self.hand_written)
        keys = ("deter", "stoch", "option")
        feat = sum(self.sizes[key] for key in keys)
        self.worker = OptionCritic(
            keys, feat, action, self.discrete, {"extr": 1.0}, self.config,
            hand_written=self.hand_written, decode=self.decode)

    def decode(self, state: Tensor) -> dict[str, Tensor]:
        """What options by hand read: the observation in a state [N, D + SC]."""
        obs = self.world_model.decoder(state)
        norm = self.world_model.encoder.norm
        if "state" in obs and norm:  # it was decoded in standard deviations from a running mean
            zero = norm(torch.zeros_like(obs["state"]), update=False)
            one = norm(torch.ones_like(obs["state"]), update=False)
            obs["state"] = (obs["state"] - zero) / (one - zero)
        return obs

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        """The option that led to a state continues, or ends and another one is picked.

        Returns option [N, W], pi [N, W] and beta [N], which is 1 in a first state.
        """
        feat = torch.cat([state["deter"], state["stoch"]], -1)
        available, betas = self.worker.available_and_beta(feat)
        if not self.config.options and not available.any(-1).all():
            raise director.UserError("no option by hand can start in a state; let one start in "
                                     "every state, or add learned options with --options")
        pi = self.worker.pi(feat, available)
        picked = pi.rsample()
        # Because of rounding, sampling can pick what has probability 0.
        picked = torch.where((picked * available).sum(-1, keepdim=True) > 0, picked, pi.mode)
        first = count == 0
        if first.all():
            beta = torch.ones(len(feat), device=feat.device)
            return {"option": picked, "beta": beta, "pi": pi.probs}
        beta = (betas * state["option"]).sum(-1)
        if first.any():
            beta = beta.masked_fill(torch.as_tensor(first, device=beta.device), 1.0)
        ends = (torch.rand_like(beta) < beta)[:, None]
        option = torch.where(ends, picked, state["option"])
        return {"option": option, "beta": beta, "pi": pi.probs}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
