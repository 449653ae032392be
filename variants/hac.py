"""Three levels: a manager of managers, after Hierarchical Actor-Critic (HAC).

Levy, Konidaris, Platt and Saenko, 2019. Every level but the lowest acts by setting goals for the
one below, at its own pace, and is paid for reaching the goal from above. Such levels are hard to
train together: the same goal leads elsewhere once the level below has learned. So HAC learns from
*hindsight actions*: the state that was reached counts as the goal that was asked for.

    python -m variants.hac --task pinpad_three [--top_duration 4] [--hindsight 1]

What changes: Director's manager becomes the middle level. It still picks the worker's goals every K
steps, but sees a goal of the top's and is paid for reaching that, nothing else: the max-cosine of
that goal and the state K steps later. The top picks a goal every K * `--top_duration` steps; it
alone is paid for the task and for novelty, since in HAC, too, a lower level knows only its goal.
Each of the two has its own goal autoencoder; both learn all replayed states.

With `--hindsight 1`, what a level picked is replaced, when it learns, by the code into which its
autoencoder puts the state that was reached; with less, in that share of trajectories. HAC's DDPG
may do so. For REINFORCE a relabelled action is off-policy, and nothing corrects for that: in trials
the middle level then came to obey nobody. So it is off by default.

What is left out: subgoal testing, which fines a goal that the level below has missed (ours decode
codes of replayed states), and hindsight goal transitions, which pretend that the goal from above
was the state reached in the end (for sparse rewards). HAC's goals end once they are reached.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

import director


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no levels", ("director",), fixed=True)
    horizon: int = director.flag(32, "imagined steps, a multiple of what a top goal lasts")
    top_duration: int = director.flag(4, "how many of the middle's goals it lasts", group="hac")
    hindsight: float = director.flag(0.0, "share of relabelled trajectories", low=0, high=1)
    middle_extr: float = director.flag(0.0, "task reward for the middle", low=0, fixed=True)

    def __post_init__(self):
        super().__post_init__()
        if self.horizon % (self.goal_duration * self.top_duration):
            raise director.UserError("--horizon: no multiple of --goal_duration * --top_duration")


class Agent(director.Director):
    """Director with two levels of managers: `top`, and `manager`, the middle one."""

    Config = Config

    def build(self, action: tuple):
        super().build(action)
        config, parts = self.config, ("deter", "stoch")
        self.top_goals = self.Goals(config)
        self.optimizers["top_goals"] = director.Optimizer(self.top_goals, config)
        self.sizes |= {"top_skill": self.sizes["skill"], "top_goal": self.sizes["goal"]}
        rewards = {"reach": 1.0}
        if config.middle_extr:
            rewards["extr"] = config.middle_extr
        self.manager = self.player((*parts, "top_goal"), self.goals.groups, True, rewards)
        rewards = {"extr": 1.0, "expl": config.manager_expl}
        self.top = self.player(parts, self.top_goals.groups, True, rewards)

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        now, chosen = count % (self.config.goal_duration * self.config.top_duration) == 0, {}
        if now.any():
            skill = self.top.dist(self.top.feat(state)).rsample().flatten(1)
            chosen = {"top_skill": skill, "top_goal": self.top_goals.decode(skill)}
        if now.any() and not now.all():
            now = torch.as_tensor(now, device=skill.device)[:, None]
            chosen = {key: torch.where(now, value, state[key]) for key, value in chosen.items()}
        return chosen | super().choose({**state, **chosen}, count)

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().train_goals(states)
        with director.autocast(self.config):
            loss, more = self.top_goals.loss(states["deter"].flatten(0, 1))
        more["goal_grad_norm"] = self.optimizers["top_goals"].minimize(loss)
        return metrics | {f"top_{key}": value for key, value in more.items()}

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        return self.top_goals.novelty(traj["deter"][1:])

    def reward_reach(self, traj: dict[str, Tensor]) -> Tensor:
        k = self.config.goal_duration
        reward = director.max_cosine(traj["top_goal"][:-k:k], traj["deter"][k::k])  # [H/K, N]
        return reward.repeat_interleave(k, 0)  # in each step, since the middle gets their mean

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        lasts, views = self.config.top_duration, super().player_trajectories(traj)
        top = {key: value.detach() for key, value in {**traj, "skill": traj["top_skill"]}.items()}
        top = director.abstract_trajectory(top, self.config.goal_duration * lasts)
        middle = self.relabel(views["manager"], self.goals)
        middle = director.split_trajectory({**middle, "goal": middle["top_goal"]}, lasts)
        views["manager"] = {**middle, "top_goal": middle["goal"]}
        return {**views, "top": self.relabel(top, self.top_goals)}

    @torch.no_grad()
    def relabel(self, traj: dict[str, Tensor], goals: director.GoalAutoencoder) -> dict:
        """In some trajectories, the codes of the states that were reached are the actions."""
        with director.autocast(self.config):
            reached = goals.encode(traj["deter"][1:]).rsample().flatten(-2)  # [n, N, GL]
        some = torch.rand_like(traj["cont"][0, :, None]) < self.config.hindsight
        action = torch.where(some, reached, traj["action"][:-1])
        return {**traj, "action": torch.cat([action, traj["action"][-1:]])}  # it earns nothing

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        span = self.config.goal_duration * self.config.top_duration
        other = {**traj, "top_goal": traj["top_goal"].roll(traj["top_goal"].shape[1] // 2, 1)}
        return super().train_imagined(traj) | {
            "reach_last": traj["reward_reach"][span - 1 :: span].mean(),
            "reach_other": self.reward_reach(other)[span - 1 :: span].mean()}


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
