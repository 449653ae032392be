"""Hindsight: the worker also learns as if states it reached had been its goals.

Paper: Hindsight Experience Replay (HER; Andrychowicz et al., 2017).

    python -m variants.hindsight --task pinpad_three [--her 0]

Idea: if a goal is rewarded only where it is reached, an untrained worker hardly ever gets a reward.
But it reached some states. So each replayed transition (s, a, s') is learned with 1 + her goals g:
one of the manager's, and `--her` states that came later in the same episode and chunk (Algorithm 1;
strategy "future" of Section 4.5). The reward is recomputed for each goal.

What changes: the worker, since such experience is off-policy. It learns Q(s, g, a) by squared error
towards

    y = r + (1 - r) gamma clip(Q_slow(s', g, pi_slow(s', g)), 0, 1),   gamma = (1 - 1/K) (1 - end')

with r = 1 if max_cosine(g, s') > `--reached`, else 0; end' = 1 if s' is terminal. A goal ends when
it is reached. That it also ends after K steps is approximated by an end with probability 1/K in
each step, since Q does not know how long the goal has lasted. So `--discount` and `--lam` are the
manager's alone. The slow networks are copied every `--slow_every` steps.
- Discrete actions: pi is the action of the largest Q, and acting is epsilon-greedy (DQN).
- Continuous actions: pi is an actor that maximises Q_slow(s, g, pi(s, g)) and acts with Gaussian
  noise. (DDPG's actor maximises Q, and its slow networks are moving averages.)
- The manager's goal is drawn from the present manager in s, not the goal that was pursued when a
  was taken, because old goals are points in the latent space of an older world model.
The manager learns in imagination, as before.

What is left out:
- HER's reward is 0 where g is reached, else -1, and learning goes on after that without an end. If
  the worker can stay at g, this only scales and shifts Q. Otherwise HER prefers actions after which
  it can stay at g, while here only the first arrival counts.
- HER also clips the whole target, normalises inputs, penalises large actions, and mixes Gaussian
  with uniform noise. Q and actor have optimizers of their own there; here they share one, so that
  their gradients are clipped together.
"""

import copy
import dataclasses
import sys

import torch
from torch import Tensor, nn

import director
from variants import refuse, same_episode


def later_states(deter: Tensor, is_first: Tensor, amount: int) -> Tensor:
    """Random later states of each step's episode: [B, T, D], bool [B, T] -> [amount, B, T-1, D].

    Where step t+1 begins another episode, row t has no meaning and has to be masked.
    """
    step = torch.arange(deter.shape[1], device=deter.device)
    starts = torch.where(is_first, step, len(step))  # T where no episode starts
    next_start = starts.flip(1).cummin(1).values.flip(1)  # the first start at or after each step
    steps_left = next_start[:, 1:] - step[1:]  # [B, T-1]
    random = torch.rand(amount, *steps_left.shape, device=step.device)
    later = step[1:] + (random * steps_left).long()  # uniform in t+1 .. next start - 1
    return deter[None].take_along_dim(later[..., None], 2)


class Worker(nn.Module):
    """Q [..., F] -> [..., A]; for continuous actions Q [..., F + A] -> [...], and an actor."""

    keys = ("deter", "stoch", "goal")
    reinforce = True  # imagination needs no gradients
    feat = director.ActorCritic.feat

    def __init__(self, feat: int, action: int, discrete: bool, config: "Config"):
        super().__init__()
        self.discrete = discrete
        self.noise = config.noise
        if discrete:
            self.q = director.MLP(feat, (action,), config)
            self.actor = None
        else:
            self.q = director.MLP(feat + action, (), config)
            self.actor = director.MLP(feat, (action,), config)

    def value(self, feat: Tensor, action: Tensor) -> Tensor:
        """Q of an action, [..., F], [..., A] -> [...]."""
        if self.discrete:
            return (self.q(feat) * action).sum(-1)
        return self.q(torch.cat([feat, action], -1))

    def best(self, feat: Tensor) -> Tensor:
        """The best action, [..., F] -> [..., A]."""
        return director.OneHot(self.q(feat)).mode if self.discrete else self.actor(feat).tanh()

    def dist(self, feat: Tensor) -> director.OneHot | torch.distributions.Normal:
        """The best action with noise; its mode is without."""
        if self.discrete:  # almost one-hot, so that unimix is epsilon
            return director.OneHot(1e3 * self.best(feat), unimix=self.noise)
        return torch.distributions.Normal(self.best(feat), self.noise, validate_args=False)


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no goals", ("director",), fixed=True)
    batch_length: int = director.flag(None, "steps in a replay chunk", low=2)
    her: int = director.flag(4, "later states as goals of each step", low=0, group="hindsight")
    reached: float = director.flag(0.95, "max-cosine above which a goal is reached", low=0,
                                   high=0.999)
    noise: float = director.flag(0.2, "epsilon, or the standard deviation of continuous actions",
                                 low=0, high=0.999)

    def __post_init__(self):
        super().__post_init__()
        refuse(self, ("worker_extr",), "the worker is rewarded for goals only")


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
        """1 where the goal is reached, else 0, [H, N]."""
        return (super().reward_goal(traj) > self.config.reached).float()

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Goal autoencoder, then the worker, on replayed states [B, T, ...]."""
        metrics = super().train_goals(states)
        if (self.grad_steps - 1) % self.config.slow_every == 0:
            self.slow.load_state_dict(self.worker.state_dict())
        with director.autocast(self.config):
            loss = self.worker_loss(states)
        metrics["worker_loss"] = loss
        metrics["worker_grad_norm"] = self.optimizers["worker"].minimize(loss)
        return metrics

    def worker_loss(self, states: dict[str, Tensor]) -> Tensor:
        """Of all B (T-1) transitions with each of their 1 + her goals."""
        config, worker, slow = self.config, self.worker, self.slow
        deter, is_first = states["deter"], states["is_first"]

        # Goals, [1 + her, B, T-1, D]: the manager's, then states that came later.
        now = {key: states[key][:, :-1].flatten(0, 1) for key in ("deter", "stoch")}
        with torch.no_grad():
            manager_goal = self.goals.decode(self.sample_skill(now)).view_as(deter[:, :-1])
        goal = torch.cat([manager_goal[None], later_states(deter, is_first, config.her)])

        # Transitions, [1 + her, B (T-1), ...]; the action of row t + 1 led from t to t + 1.
        state = torch.cat([deter, states["stoch"]], -1).expand(len(goal), -1, -1, -1)
        before = torch.cat([state[:, :, :-1], goal], -1).flatten(1, 2)
        after = torch.cat([state[:, :, 1:], goal], -1).flatten(1, 2)
        action = states["action"][:, 1:].flatten(0, 1).expand(len(goal), -1, -1)
        r = (director.max_cosine(goal, deter[:, 1:]) > config.reached).float().flatten(1)
        gamma = (1 - 1 / config.goal_duration) * ~states["is_terminal"][:, 1:].flatten()

        next_q = slow.value(after, slow.best(after))
        target = r + (1 - r) * gamma * next_q.clamp(0, 1)  # y
        loss = (worker.value(before, action) - target) ** 2
        if not self.discrete:  # -Q_slow(s, g, pi(s, g)); slow gets no gradients, so only pi moves
            loss = loss - slow.value(before, worker.best(before))
        return (loss * same_episode(is_first, 1).flatten()).mean()  # 0 where t + 1 is a first step

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        return {"manager": super().player_trajectories(traj)["manager"]}

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        return super().train_imagined({**traj, "reward_goal": self.reward_goal(traj)})


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
