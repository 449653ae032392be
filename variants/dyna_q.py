"""Dyna-Q: learn values from what happened, and from what would have (Sutton, 1990).

Dyna learns from each step that it makes, learns a model of the world from it, too, and then plans:
it makes a few steps in the model, from states that it has seen, and learns from them alike.

    python -m variants.dyna_q --task pinpad_three [--planning 0]      discrete actions only

What changes: there is no actor, no manager and no goal, and flags of these do nothing. A network
gives each action a value in a latent state, deter and stoch, and learns by

    Q(s, a) <- r + discount * cont * max over a' of Q'(s', a'),

once from the replayed transitions of the batch, then `--planning` times from one imagined step out
of each replayed state. Q' is a copy of Q, made every `--slow_every` of these updates. Values are
learned in symlog space, as Director's are. At an end cont is 0, at a time limit it is not. Imagined
actions are uniformly random. Sutton's repeat what was tried, as his model is a table of just that.

Left out: Dyna-Q+, which pays for what was long not tried; a second network against the bias of max.
"""

import copy
import dataclasses
import sys

import torch
from torch import Tensor, nn

import director
from variants import same_episode


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("dreamer", "there are no goals", ("dreamer",), fixed=True)
    planning: int = director.flag(5, "imagined steps for a replayed one", low=0, group="dyna_q")
    epsilon: float = director.flag(0.1, "share of random actions", low=0, high=0.999)

    def __post_init__(self):
        super().__post_init__()
        if self.batch_length < 2:
            raise director.UserError("--batch_length: has to be more than 1")


class QNetwork(nn.Module):
    """Values of all actions in a state, in symlog space; in place of an actor-critic."""

    def __init__(self, feat: int, actions: int, config: Config):
        super().__init__()
        self.epsilon = config.epsilon
        self.q = director.MLP(feat, (actions,), config)
        self.slow = copy.deepcopy(self.q).requires_grad_(False)

    def feat(self, state: dict[str, Tensor]) -> Tensor:
        """What it sees of a state, [..., F]."""
        return torch.cat([state[key] for key in ("deter", "stoch")], -1)

    def dist(self, feat: Tensor) -> director.OneHot:
        """The best action, [..., F] -> [..., A], but with chance epsilon a uniformly random one."""
        best = director.OneHot(self.q(feat)).mode
        return director.OneHot(1e9 * best, unimix=self.epsilon)


class Agent(director.Director):
    """A flat agent that learns values of actions from replayed and from imagined steps."""

    Config = Config

    def build(self, action: tuple):
        if not self.discrete:
            raise director.UserError(f"--task {self.config.task}: dyna_q needs discrete actions")
        self.worker = QNetwork(self.sizes["deter"] + self.sizes["stoch"], *action, self.config)
        self.optimizers["q"] = director.Optimizer(self.worker.q, self.config)

    def learn(self, index: int, steps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the updates in a gradient step, this one, from transitions [..., F]; metrics."""
        config, network = self.config, self.worker
        with director.autocast(config):
            best = director.symexp(network.slow(steps["after"]).amax(-1))  # has no gradient
            target = steps["reward"] + config.discount * steps["cont"] * best
            value = (network.q(steps["before"]) * steps["action"]).sum(-1)
        loss = ((value - director.symlog(target)) ** 2 * steps["weight"]).mean()
        norm = self.optimizers["q"].minimize(loss)
        done = (self.grad_steps - 1) * (1 + config.planning) + index  # updates before this one
        if done % config.slow_every == 0:
            network.slow.load_state_dict(network.q.state_dict())
        return {"loss": loss, "value": director.symexp(value).mean(), "grad_norm": norm}

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """Learn from replayed pairs of states, [B, T, ...]; the later row's action led to it."""
        feat, cont = self.worker.feat(states), 1 - states["is_terminal"].float()
        rows = {"action": states["action"], "reward": states["reward"], "cont": cont, "after": feat}
        steps = {key: value[:, 1:] for key, value in rows.items()}
        steps |= {"before": feat[:, :-1], "weight": same_episode(states["is_first"], 1)}
        return {f"replayed_{key}": value for key, value in self.learn(0, steps).items()}

    @torch.no_grad()
    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Plan: a transition from each of N states in each round, [planning, N, ...]."""
        deter, stoch, end = (starts[key].expand(self.config.planning, *starts[key].shape)
                             for key in ("deter", "stoch", "is_terminal"))
        logits = torch.zeros(*end.shape, self.sizes["action"], device=end.device)
        action, model = director.OneHot(logits).rsample(), self.world_model
        after = torch.cat(model.rssm.img_step(deter, stoch, action), -1)
        return {"before": torch.cat([deter, stoch], -1), "action": action, "after": after,
                "reward": director.symexp(model.reward_head(after)),
                "cont": model.cont_head(after).sigmoid(), "weight": 1 - end.float()}

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict:
        return {}  # nobody learns from whole trajectories

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update for each round of planning; returns metrics of the last one."""
        metrics = {}
        for i in range(self.config.planning):
            metrics = self.learn(1 + i, {key: x[i] for key, x in traj.items()})
        return {f"imagined_{key}": value for key, value in metrics.items()}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
