"""Three levels, after Hierarchical Actor-Critic (HAC); its hindsight actions are optional.

Paper: Learning Multi-Level Hierarchies with Hindsight (Levy, Konidaris, Platt, Saenko, 2019).

    python -m variants.hac --task pinpad_three [--top_duration 4] [--hindsight 1]

Idea: every level but the lowest acts by setting goals for the level below, at its own pace, and is
rewarded for reaching the goal from above. Such levels are hard to train together: what a level's
action leads to depends on the policy of the level below, which changes while it learns. HAC
therefore learns from *hindsight actions*: the action (a goal) of level i is replaced by the state
that level i - 1 reached.

What changes:
- Director's manager becomes the middle level. It sets the worker's goals every K steps, as before,
  but reads a goal of the top level and is rewarded only for reaching that: by the max-cosine
  (Director's eq. 8) of that goal and the state in which the worker's goal ends, K steps later. (In
  HAC it is -1 until the goal is reached, then 0, and the return ends.) With `--middle_extr`, it is
  rewarded for the task, too.
- The top level sets a goal every K * `--top_duration` steps. It is rewarded for the task and for
  novelty, the error of its own autoencoder. In HAC, the goal of the highest level is the task's
  goal. As in HAC, a lower level does not see the task.
- Each of these two levels has its own goal autoencoder. Both learn from all replayed states.
- Each level discounts by `--discount` per decision of its own. In environment steps, the top level
  looks K * `--top_duration` times as far ahead as the worker. With the default `--horizon` it makes
  one decision per imagined trajectory, so its return is r + discount * v.
- With `--hindsight p`, in a fraction p of trajectories the code that a level chose is replaced by a
  code of the state at its next decision, drawn from encode(s). REINFORCE then raises or lowers the
  probability of an action that the policy did not take, and nothing corrects for it, while HAC's
  DDPG is off-policy. In experiments the middle level then no longer pursues the goals of the top.
  So p is 0 by default, and what remains of HAC are its levels.

HAC's H, the number of actions per goal, is K for the worker and `--top_duration` for the middle.

What is left out: subgoal testing, a penalty for goals that the level below has missed (here the
decoder has learned from replayed states, which should keep goals reachable); hindsight goal
transitions, in which the goal from above becomes the state reached in the end (for sparse rewards);
that a goal ends when it is reached.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import Tensor

import director
from variants import reward_at_end


@dataclasses.dataclass
class Config(director.Config):
    agent: str = director.flag("director", "a flat agent has no levels", ("director",), fixed=True)
    horizon: int = director.flag(32, "imagined steps, a multiple of the duration of a top goal")
    top_duration: int = director.flag(4, "middle goals for each top goal", group="hac")
    hindsight: float = director.flag(0.0, "fraction of relabelled trajectories", low=0, high=1)
    middle_extr: float = director.flag(0.0, "task reward for the middle level", low=0, fixed=True)

    def __post_init__(self):
        super().__post_init__()
        if self.horizon % (self.goal_duration * self.top_duration):
            raise director.UserError("--horizon: no multiple of --goal_duration * --top_duration")


class Agent(director.Director):
    """Director with two levels of managers: `top`, and `manager`, the middle one."""

    Config = Config

    def build(self, action: tuple):
        super().build(action)
        config = self.config
        state = ("deter", "stoch")
        self.top_goals = self.Goals(config)
        self.optimizers["top_goals"] = director.Optimizer(self.top_goals, config)
        self.sizes["top_skill"] = self.sizes["skill"]
        self.sizes["top_goal"] = self.sizes["goal"]
        rewards = {"reach": 1.0}
        if config.middle_extr:
            rewards["extr"] = config.middle_extr
        self.manager = self.player((*state, "top_goal"), self.goals.groups, True, rewards)
        rewards = {"extr": 1.0, "expl": config.manager_expl}
        self.top = self.player(state, self.top_goals.groups, True, rewards)

    @torch.no_grad()
    def choose(self, state: dict[str, Tensor], count: np.ndarray) -> dict[str, Tensor]:
        """The top's decision, every K * top_duration steps, then the middle's, every K steps."""
        due = count % (self.config.goal_duration * self.config.top_duration) == 0
        chosen = {}
        if due.any():
            skill = self.top.dist(self.top.feat(state)).rsample().flatten(1)
            chosen = {"top_skill": skill, "top_goal": self.top_goals.decode(skill)}
        if due.any() and not due.all():
            due = torch.as_tensor(due, device=skill.device)[:, None]
            chosen = {key: torch.where(due, value, state[key]) for key, value in chosen.items()}
        return {**chosen, **super().choose({**state, **chosen}, count)}

    def train_goals(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        metrics = super().train_goals(states)
        with director.autocast(self.config):
            loss, top_metrics = self.top_goals.loss(states["deter"].flatten(0, 1))
        top_metrics["goal_grad_norm"] = self.optimizers["top_goals"].minimize(loss)
        return metrics | {f"top_{key}": value for key, value in top_metrics.items()}

    def reward_expl(self, traj: dict[str, Tensor]) -> Tensor:
        return self.top_goals.novelty(traj["deter"][1:])

    def reward_reach(self, traj: dict[str, Tensor]) -> Tensor:
        """r = max_cosine(g_top, s[t+K]) at the last step of each middle goal, else 0: [H, N].

        It is K-fold there, because `abstract_trajectory` takes the mean over K steps.
        """
        k = self.config.goal_duration
        reward = director.max_cosine(traj["top_goal"][:-k:k], traj["deter"][k::k])  # [H/K, N]
        return reward_at_end(reward, k)

    def player_trajectories(self, traj: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The middle acts every K steps and learns one trajectory for each goal of the top."""
        players = super().player_trajectories(traj)
        duration = self.config.top_duration  # decisions of the middle for each goal of the top
        middle = self.relabel(players["manager"], self.goals)
        # At the end of a segment, split_trajectory repeats the goal that was pursued, but only of
        # the key "goal". So the top's goal travels under that name.
        middle["goal"] = middle["top_goal"]
        middle = director.split_trajectory(middle, duration)
        middle["top_goal"] = middle["goal"]
        players["manager"] = middle
        top = {key: value.detach() for key, value in traj.items()}
        top["skill"] = top["top_skill"]  # which abstract_trajectory takes as the action
        top = director.abstract_trajectory(top, self.config.goal_duration * duration)
        players["top"] = self.relabel(top, self.top_goals)
        return players

    @torch.no_grad()
    def relabel(self, traj: dict[str, Tensor], goals: director.GoalAutoencoder) -> dict:
        """Hindsight actions: in some trajectories, the codes of the states that were reached."""
        if not self.config.hindsight:
            return traj
        with director.autocast(self.config):
            reached = goals.encode(traj["deter"][1:]).rsample().flatten(-2)  # [n, N, GL]
        chosen = torch.rand_like(traj["cont"][0, :, None]) < self.config.hindsight  # [N, 1]
        action = torch.where(chosen, reached, traj["action"][:-1])
        last = traj["action"][-1:]  # of the state at the end, where nothing is learned
        return {**traj, "action": torch.cat([action, last])}

    def train_imagined(self, traj: dict[str, Tensor]) -> dict[str, Tensor]:
        """Also the top's goal reward at the end of its goals, and the same with exchanged goals."""
        metrics = super().train_imagined(traj)
        k = self.config.goal_duration
        duration = k * self.config.top_duration
        shift = traj["top_goal"].shape[1] // 2
        with torch.no_grad():
            other = self.reward_reach({**traj, "top_goal": traj["top_goal"].roll(shift, 1)})
        # reward_reach is K-fold.
        metrics["reach_last"] = traj["reward_reach"][duration - 1 :: duration].mean() / k
        metrics["reach_other"] = other[duration - 1 :: duration].mean() / k
        return metrics


if __name__ == "__main__":
    sys.exit(director.main(agent=Agent))
