"""Hindsight: what was reached by accident is learned from as if it had been the goal (HER).

Andrychowicz et al., 2017. A goal that pays only where it is reached hardly ever pays a beginner.
But what was done led somewhere: each transition is learned under its own goal and under `--her`
states that came later in its replay chunk (Algorithm 1; "future" in Section 4.5), paid accordingly.

    python -m variants.hindsight --task pinpad_three [--her 0]

What changes: the worker. Relabelled experience is off-policy, so it learns Q(s, g, a) from replayed
transitions to s', with cont = 0 at terminal states, by squared error, towards

    r + (1 - r) (1 - 1/K) cont max over a' of Q_slow(s', g, a'),  r = max_cosine(g, s') > --reached,

and acts epsilon-greedily; continuous actions come from an actor that climbs Q_slow (DDPG's climbs
Q), with noise. Reaching a goal ends it, and so does, as Q sees no clock, a chance of 1/K per step.
A transition's own goal is one that the manager, which learns in imagination as before, would set
there now: what was set then was a point of an older state space. Left out: HER's rewards of -1 and
0 (equal up to scale and offset), input normalisation, penalty on actions and mixture of noises.
"""

import copy
import dataclasses
import sys

import torch
from torch import Tensor, nn

import director
from variants import same_episode


def later_states(deter: Tensor, is_first: Tensor, amount: int) -> Tensor:
    """Later states of a step's episode: [B, T, D], bool [B, T] -> [amount, B, T-1, D]."""
    step = torch.arange(deter.shape[1], device=deter.device)
    starts = torch.where(is_first, step, len(step)).flip(1).cummin(1).values.flip(1)
    left = starts[:, 1:] - step[1:]  # steps of it to come; where there are none, it is masked
    later = step[1:] + (torch.rand(amount, *left.shape, device=step.device) * left).long()
    return deter[None].take_along_dim(later[..., None], 2)


class Worker(nn.Module):
    """Q [..., F] -> [..., A], or of continuous actions [..., F + A] -> [...], with an actor."""

    keys, reinforce, feat = ("deter", "stoch", "goal"), True, director.ActorCritic.feat

    def __init__(self, feat: int, action: int, discrete: bool, config: "Config"):
        super().__init__()
        self.discrete, self.noise, sizes = discrete, config.noise, (feat, (action,))
        self.q = director.MLP(*sizes if discrete else (feat + action, ()), config)
        self.actor = None if discrete else director.MLP(*sizes, config)

    def value(self, feat: Tensor, action: Tensor) -> Tensor:
        q = self.q(feat if self.discrete else torch.cat([feat, action], -1))
        return (q * action).sum(-1) if self.discrete else q

    def best(self, feat: Tensor) -> Tensor:
        return director.OneHot(self.q(feat)).mode if self.discrete else self.actor(feat).tanh()

    def dist(self, feat: Tensor) -> director.OneHot | torch.distributions.Normal:
        if self.discrete:  # the best action, but for a share of random ones
            return director.OneHot(1e3 * self.best(feat), unimix=self.noise)
        return torch.distributions.Normal(self.best(feat), self.noise, validate_args=False)


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no goals", ("director",), fixed=True)
    batch_length: int = director.flag(None, "steps in a replay chunk", low=2)
    worker_extr: float = director.flag(0.0, "none: reaching goals pays", low=0, high=0)
    her: int = director.flag(4, "later states as goals", low=0, group="hindsight")
    reached: float = director.flag(0.95, "a goal is, above this max-cosine", low=0, high=1)
    noise: float = director.flag(0.2, "share of random actions, or std", low=0, high=0.999)


class Agent(director.Director):
    """Director with a worker that learns off-policy, in hindsight."""

    Config = Config

    def build(self, action: tuple):
        super().build(action)
        feat = sum(self.sizes[key] for key in Worker.keys)
        self.worker = Worker(feat, action[0], self.discrete, self.config)
        self.slow = copy.deepcopy(self.worker).requires_grad_(False)
        self.optimizers["worker"] = director.Optimizer(self.worker, self.config)

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        return (super().reward_goal(traj) > self.config.reached).float()

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics, worker, slow = super().train_goals(states), self.worker, self.slow
        config, deter, is_first = self.config, states["deter"], states["is_first"]
        if (self.grad_steps - 1) % config.slow_every == 0:
            slow.load_state_dict(worker.state_dict())
        with director.autocast(config):
            now = {key: states[key][:, :-1].flatten(0, 1) for key in ("deter", "stoch")}
            own = self.goals.decode(self.sample_skill(now)).detach().view_as(deter[:, :-1])
            goal = torch.cat([own[None], later_states(deter, is_first, config.her)])
            state = torch.cat([deter, states["stoch"]], -1).expand(len(goal), -1, -1, -1)
            feat, after = (torch.cat([x, goal], -1).flatten(1, 2)  # [1 + her, B(T-1), F]
                           for x in (state[:, :, :-1], state[:, :, 1:]))
            action = states["action"][:, 1:].flatten(0, 1).expand(len(goal), -1, -1)
            reward = (director.max_cosine(goal, deter[:, 1:]) > config.reached).float().flatten(1)
            cont = (1 - 1 / config.goal_duration) * ~states["is_terminal"][:, 1:].flatten()
            future = slow.value(after, slow.best(after)).clamp(0, 1)
            error = worker.value(feat, action) - reward - (1 - reward) * cont * future
            climb = 0 if self.discrete else slow.value(feat, worker.best(feat))  # for the actor
        loss = ((error**2 - climb) * same_episode(is_first, 1).flatten()).mean()
        metrics["worker_loss"] = loss
        metrics["worker_grad_norm"] = self.optimizers["worker"].minimize(loss)
        return metrics

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"manager": super().player_trajectories(traj)["manager"]}

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().train_imagined({**traj, "reward_goal": self.reward_goal(traj)})


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
