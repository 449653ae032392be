"""DIAYN: skills that differ, learned without any reward (Eysenbach, Gupta, Ibarz, Levine, 2018).

Diversity Is All You Need. A skill z, one of a few, is drawn from a uniform prior p; the worker
sees it and is paid

    log q(z | s[t+1]) - log p(z)     (its eq. 3),

where the discriminator q guesses the skill from the state (`deter`). So skills come to lead where
they can be told apart, and the worker's entropy keeps each from being a single way there.

    python -m variants.diayn --task pinpad_three
    python -m variants.diayn --task pinpad_three --skills_for task     resumes the same run

What changes: a goal is a skill, and reaching it is being recognised. Worker and discriminator learn
in imagination. Skills are drawn anew every K steps, there and in the environment. With
`--skills_for task`, from the start or in a run that goes on, a manager learns which skill serves
the task, skills being options of K steps: it picks them in the environment and in one half of the
imagined trajectories, from which it learns; in the other half they stay uniform, and from these
the discriminator learns, so that p stays uniform.

What is left out: the paper's skills last an episode and its agent is soft actor-critic; here they
last K steps (a worker's value at their end is that of the skill going on), and the entropy is
Director's, steered to a half. The paper stops learning skills before it puts a manager on top (its
Section 4.2.2). The manager is paid by the task alone: with no goal autoencoder there is no novelty,
and `--manager_expl` does nothing.
"""

import dataclasses
import math
import sys

import torch
from torch import Tensor, nn

import director


class Skills(nn.Module):
    """The discriminator: log q(z | s), [..., D] -> [..., skills]. A goal is a skill."""

    def __init__(self, config: "Config"):
        super().__init__()
        self.groups, self.size = (1, config.skills), config.skills
        self.discriminator = director.MLP(config.deter, (config.skills,), config)

    def forward(self, deter: Tensor) -> Tensor:
        return self.discriminator(deter).log_softmax(-1)

    def decode(self, skill: Tensor) -> Tensor:
        return skill


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no skills", ("director",), fixed=True)
    skills: int = director.flag(16, "how many there are", low=2, group="diayn", fixed=True)
    skills_for: str = director.flag("diversity", "task: a manager picks skills",
                                   ("diversity", "task"))


class Agent(director.Director):
    """Director with skills that the worker invents."""

    Config, Goals = Config, Skills

    def build(self, action: tuple):
        super().build(action)
        self.manager = self.player(("deter", "stoch"), self.goals.groups, True, {"extr": 1.0})

    def sample_skill(self, state: dict[str, Tensor]) -> Tensor:
        skill = super().sample_skill(state)
        drawn = director.OneHot(torch.zeros_like(skill)).rsample()
        if self.config.skills_for == "task":
            return torch.where(state["uniform"], drawn, skill) if "uniform" in state else skill
        return drawn

    def imagine(self, starts: dict[str, Tensor]) -> dict[str, Tensor]:
        column = torch.arange(len(starts["deter"]), device=self.config.device)[:, None]
        half = len(column) // 2 if self.config.skills_for == "task" else len(column)
        return super().imagine({**starts, "uniform": column < half})

    def reward_goal(self, traj: dict[str, Tensor]) -> Tensor:
        log_q = (self.goals(traj["deter"][1:]) * traj["goal"][:-1]).sum(-1)
        return log_q + math.log(self.config.skills)

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        views = super().player_trajectories(traj)
        manager, half = views.pop("manager"), traj["cont"].shape[1] // 2
        if self.config.skills_for == "task":
            views["manager"] = {key: value[:, half:] for key, value in manager.items()}
        return views

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # skills are recognised in imagination

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics, half = super().train_imagined(traj), traj["cont"].shape[1] // 2
        drawn = slice(half if self.config.skills_for == "task" else None)  # from the prior
        skill, state = traj["skill"][:-1, drawn].detach(), traj["deter"][1:, drawn].detach()
        with director.autocast(self.config):
            log_q = self.goals(state)  # [H, N, skills]
        alive = director.trajectory_weights(traj["cont"].detach(), 1.0)[1:, drawn]  # chances
        loss = -((log_q * skill).sum(-1) * alive).mean()
        right = (log_q.argmax(-1) == skill.argmax(-1)).float().mean()  # by chance 1 / skills
        norm = self.optimizers["goals"].minimize(loss)
        return metrics | {"skill_loss": loss, "skill_right": right, "skill_grad_norm": norm}

    def picture_goal(self, goal: Tensor):
        """A skill looks like nothing."""


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
