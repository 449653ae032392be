"""DIAYN: skills that can be told apart, learned without a task reward.

Paper: Diversity Is All You Need (Eysenbach, Gupta, Ibarz, Levine, 2018).

    python -m variants.diayn --task pinpad_three
    python -m variants.diayn --task pinpad_three --skills_for task      resumes the same run

Idea: a skill z is one of a few classes, drawn from a uniform prior p(z). The worker observes it and
is rewarded by

    log q(z | s[t+1]) - log p(z)     (eq. 3),

where the discriminator q predicts the skill from the state s (`deter`). Skills therefore learn to
lead to states in which they can be told apart. The worker's entropy bonus keeps its actions as
random as this allows.

What changes:
- A goal is a skill, and reaching it means that the discriminator recognises it.
- Worker and discriminator learn in imagination. A new skill is drawn every K steps, in imagination
  as in the environment.
- With `--skills_for task`, from the start or in a resumed run, a manager learns which skill serves
  the task. It picks the skills in the environment, and in the second half of the imagined
  trajectories, from which it learns. In the first half skills remain uniform; the discriminator
  learns from that half alone, since the prior in eq. 3 is uniform.

What is left out:
- In the paper a skill lasts a whole episode, and the agent is soft actor-critic. Here it lasts K
  steps, after which its critic bootstraps as if the same skill went on (`split_trajectory`), and
  the entropy bonus is Director's, which keeps the entropy at half of its range.
- In the paper q reads observed states, so that actions without visible effect do not tell skills
  apart. Here it reads `deter`, which is computed from past actions, so that skills can also be told
  apart by actions that change nothing.
- The paper trains q on states of the environment. Here they are imagined, and count by the
  probability of arriving in them.
- The paper stops learning skills before it adds a manager (its Section 4.2.2).
- The manager's only reward is the task's: without a goal autoencoder there is no novelty.
"""

import dataclasses
import math
import sys

import torch
from torch import Tensor, nn

import director
from variants import refuse


class Skills(nn.Module):
    """The discriminator q(z | s) of skills z. A skill is its own goal."""

    discrete = True  # the manager picks one of the skills

    def __init__(self, config: "Config"):
        super().__init__()
        self.groups = (1, config.skills)
        self.size = config.skills  # of a goal
        self.discriminator = director.MLP(config.deter, (config.skills,), config)

    def log_q(self, deter: Tensor) -> Tensor:
        """log q(z | s) of all skills, [..., D] -> [..., skills]."""
        return self.discriminator(deter).log_softmax(-1)

    def decode(self, skill: Tensor) -> Tensor:
        return skill


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no skills", ("director",), fixed=True)
    skills: int = director.flag(16, "number of skills", low=2, group="diayn", fixed=True)
    skills_for: str = director.flag("diversity", "task: a manager picks the skills",
                                    ("diversity", "task"))

    def __post_init__(self):
        super().__post_init__()
        refuse(self, ("skill_groups", "skill_classes"), "--skills is their number")
        refuse(self, ("manager_expl",), "there is no novelty")


class Agent(director.Director):
    """Director with skills that the worker invents."""

    Config, Goals = Config, Skills

    def build(self, action: tuple):
        super().build(action)
        # In place of Director's, which is also rewarded for novelty.
        self.manager = self.player(("deter", "stoch"), self.goals.groups, True, {"extr": 1.0})

    def uniform_trajectories(self, count: int) -> int:
        """How many of `count` imagined trajectories, the first ones, have skills of the prior."""
        return count // 2 if self.config.skills_for == "task" else count

    def sample_skill(self, state: dict[str, Tensor]) -> Tensor:
        picked = super().sample_skill(state)
        drawn = director.OneHot(torch.zeros_like(picked)).rsample()
        if self.config.skills_for == "diversity":
            return drawn
        if "uniform" in state:  # in imagination, [N, 1]
            return torch.where(state["uniform"], drawn, picked)
        return picked

    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        count = len(starts["deter"])
        index = torch.arange(count, device=self.config.device)[:, None]
        return super().imagine({**starts, "uniform": index < self.uniform_trajectories(count)})

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        """log q(z | s[t+1]) - log p(z), eq. 3, with p(z) = 1 / skills: [H, N]."""
        log_q = (self.goals.log_q(traj["deter"][1:]) * traj["goal"][:-1]).sum(-1)
        return log_q + math.log(self.config.skills)

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        players = super().player_trajectories(traj)
        manager = players.pop("manager")
        if self.config.skills_for == "task":
            uniform = self.uniform_trajectories(traj["cont"].shape[1])
            players["manager"] = {key: value[:, uniform:] for key, value in manager.items()}
        return players

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # the discriminator learns in imagination

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().train_imagined(traj)
        uniform = self.uniform_trajectories(traj["cont"].shape[1])
        skill = traj["skill"][:-1, :uniform].detach()
        state = traj["deter"][1:, :uniform].detach()
        with director.autocast(self.config):
            log_q = self.goals.log_q(state)  # [H, N, skills]
        # States count by the probability of arriving in them. Ends count, too, since the worker is
        # rewarded for them.
        arrival = director.trajectory_weights(traj["cont"].detach(), 1.0)[:-1, :uniform]
        loss = -((log_q * skill).sum(-1) * arrival).mean()
        metrics["skill_loss"] = loss
        metrics["skill_right"] = (log_q.argmax(-1) == skill.argmax(-1)).float().mean()
        metrics["skill_grad_norm"] = self.optimizers["goals"].minimize(loss)
        return metrics

    def picture_goal(self, goal: Tensor) -> None:
        """A skill has no picture."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
