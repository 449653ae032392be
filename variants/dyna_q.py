"""Dyna-Q: Q-learning from replayed steps and from steps imagined by a learned model.

Papers: Integrated Architectures for Learning, Planning, and Reacting (Sutton, 1990); for
`--expand`, Model-Based Value Expansion for Efficient Model-Free RL (Feinberg et al., 2018).

    python -m variants.dyna_q --task pinpad_three [--planning 0] [--expand 3]

Actions have to be discrete.

Idea: Dyna learns action values from each real step, learns a model from the same step, and then
plans: from states it has visited it makes single steps in the model, and learns from them in the
same way.

What changes: there are no goals, no manager and no actor. A network Q(s, a) of the latent state s
(`deter` and `stoch`) learns

    Q(s, a) <- r + discount * cont * max over a' of Q'(s', a'),

once from the transitions of the replay batch, and then `--planning` times from one imagined step
out of each replayed state. Q' is a copy of Q that is renewed every `--slow_every` of these updates,
of which a gradient step makes 1 + `--planning`.
Values are learned in symlog space, as Director's are. cont is 0 at terminal states, not at time
limits. The agent acts epsilon-greedily.

Value expansion, `--expand h`: the target has h rewards instead of one. The first step is that of
the transition, and h - 1 imagined steps follow, with the greedy actions of Q':

    Q(s, a) <- r_1 + d_1 (r_2 + d_2 (... (r_h + d_h max over a' of Q'(s_h, a')))),
    d_i = discount * cont_i

Rewards and continuations of the imagined steps are those that the world model predicts. Both kinds
of updates use this target; the first transition is a replayed one, or an imagined one with a random
action. h = 1 is plain Dyna-Q.

What is left out: Dyna-Q+, which adds a reward for actions that were not tried for long; double
Q-learning against the bias of the maximum (here Q' both chooses and values a'). Sutton learns from
each real step once, when it happens; here real steps are replayed. His model is a table, so he
repeats actions that were tried; here imagined actions are uniformly random. Feinberg et al. also
learn the values of the states within the expansion (their "TD-k trick"); here only the state before
the first step learns. (They count imagined steps alone: their H is h - 1.)
"""

import copy
import dataclasses
import sys

import torch
from gymnasium import spaces
from torch import Tensor, nn

import director
from variants import refuse, same_episode


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("dreamer", "there are no goals", ("dreamer",), fixed=True)
    planning: int = director.flag(5, "imagined steps for each replayed one", low=0, group="dyna_q")
    expand: int = director.flag(1, "rewards in a target; the first is that of the transition")
    epsilon: float = director.flag(0.1, "fraction of random actions", low=0, high=0.999)

    def __post_init__(self):
        super().__post_init__()
        unread = ("worker_extr", "manager_expl", "skill_groups", "skill_classes", "goal_duration")
        refuse(self, unread, "there are no goals")
        refuse(self, ("horizon", "lam"), "there are no imagined trajectories")
        if self.batch_length < 2:
            raise director.UserError("--batch_length: has to be more than 1")


class QNetwork(nn.Module):
    """Values of all actions, in symlog space, [..., F] -> [..., A]; acts epsilon-greedily."""

    def __init__(self, feat: int, actions: int, config: Config):
        super().__init__()
        self.epsilon = config.epsilon
        self.q = director.MLP(feat, (actions,), config)
        self.slow = copy.deepcopy(self.q).requires_grad_(False)

    def feat(self, state: dict[str, Tensor]) -> Tensor:
        """What Q reads of a state, [..., F]."""
        return torch.cat([state["deter"], state["stoch"]], -1)

    def dist(self, feat: Tensor) -> director.OneHot:
        """The best action, but with probability epsilon a uniformly random one, [..., A]."""
        best = director.OneHot(self.q(feat)).mode
        return director.OneHot(1e9 * best, unimix=self.epsilon)


def check_actions(config: Config, act_space: spaces.Space):
    if not isinstance(act_space, spaces.Discrete):
        raise director.UserError(f"--task {config.task}: dyna_q needs discrete actions")


class Run(director.Run):
    """Refuses a task before it makes a folder."""

    def __init__(self, config: Config, agent: type, obs_space: spaces.Dict,
                 act_space: spaces.Space):
        check_actions(config, act_space)
        super().__init__(config, agent, obs_space, act_space)


class Agent(director.Director):
    """A flat agent that learns action values from replayed and from imagined transitions.

    A batch of transitions is a dict of tensors [..., F] or [...]: before, action, after, reward,
    cont, weight.
    """

    Config, Run = Config, Run

    def build(self, action: tuple):
        check_actions(self.config, self.act_space)
        feat = self.sizes["deter"] + self.sizes["stoch"]
        self.worker = QNetwork(feat, action[0], self.config)
        self.optimizers["q"] = director.Optimizer(self.worker.q, self.config)

    def learn(self, index: int, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update from transitions, number `index` of this gradient step; returns metrics."""
        config = self.config
        network = self.worker
        with director.autocast(config):
            target = self.target(steps)
            value = (network.q(steps["before"]) * steps["action"]).sum(-1)
        loss = ((value - director.symlog(target)) ** 2 * steps["weight"]).mean()
        norm = self.optimizers["q"].minimize(loss)
        earlier_updates = (self.grad_steps - 1) * (1 + config.planning) + index
        if earlier_updates % config.slow_every == 0:
            network.slow.load_state_dict(network.q.state_dict())
        return {"loss": loss, "value": director.symexp(value).mean(), "grad_norm": norm}

    @torch.no_grad()
    def target(self, steps: dict[str, Tensor]) -> Tensor:
        """What Q(before, action) learns, [...]: `--expand` rewards, then the best value of Q'."""
        slow, gamma = self.worker.slow, self.config.discount
        feat = steps["after"]
        rewards = [steps["reward"]]
        discounts = [gamma * steps["cont"]]
        for _ in range(self.config.expand - 1):
            action = director.OneHot(slow(feat)).mode
            feat, reward, cont = self.model_step(feat, action)
            rewards.append(reward)
            discounts.append(gamma * cont)
        value = director.symexp(slow(feat).amax(-1))
        for reward, discount in zip(rewards[::-1], discounts[::-1], strict=True):
            value = reward + discount * value
        return value

    def model_step(self, feat: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From states [..., F] by actions [..., A] to the next states, rewards and cont."""
        model = self.world_model
        deter, stoch = feat.split([self.sizes["deter"], self.sizes["stoch"]], -1)
        after = torch.cat(model.rssm.img_step(deter, stoch, action), -1)
        reward = model.reward_head(after).mean
        return after, reward, model.cont_head(after).sigmoid()

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Learn from replayed transitions; the action of row t + 1 led from t to t + 1."""
        feat = self.worker.feat(states)  # [B, T, F]
        cont = 1 - states["is_terminal"].float()
        steps = {
            "before": feat[:, :-1], "action": states["action"][:, 1:], "after": feat[:, 1:],
            "reward": states["reward"][:, 1:], "cont": cont[:, 1:],
            "weight": same_episode(states["is_first"], 1)}
        return {f"replayed_{key}": value for key, value in self.learn(0, steps).items()}

    @torch.no_grad()
    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """In each round of planning, a transition from each of N states, [planning, N, ...]."""
        rounds = self.config.planning
        deter, stoch, end = (starts[key].expand(rounds, *starts[key].shape)
                             for key in ("deter", "stoch", "is_terminal"))
        logits = torch.zeros(*end.shape, self.sizes["action"], device=end.device)
        action = director.OneHot(logits).rsample()  # uniformly random
        before = torch.cat([deter, stoch], -1)
        after, reward, cont = self.model_step(before, action)
        return {"before": before, "action": action, "after": after, "reward": reward,
                "cont": cont, "weight": 1 - end.float()}

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict:
        return {}  # there are no actor-critics

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update for each round of planning; returns metrics of the last one."""
        metrics = {}
        for i in range(self.config.planning):
            metrics = self.learn(1 + i, {key: value[i] for key, value in traj.items()})
        return {f"imagined_{key}": value for key, value in metrics.items()}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
