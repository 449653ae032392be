"""What hac does, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

import director
from conftest import (
    close,
    make_variant,
    starts_at,
    tensor,
)
from variants import (
    hac,
)


def counted(agent, steps=8):
    """A trajectory whose states are 0, 1, 2 ...; goals are set every 2 steps, the top's every 4."""
    time = torch.arange(steps + 1.0)
    column = {"deter": time, "goal": time // 2 * 10, "skill": time // 2 * 10 + 1,
              "top_goal": time // 4 * 100, "top_skill": time // 4 * 100 + 1}
    traj = {key: value[:, None, None].expand(-1, 3, 1) for key, value in column.items()}
    rewards = {f"reward_{name}": time[1:, None].expand(-1, 3) for name in ("goal", "reach", "extr")}
    return {**traj, **rewards, "cont": torch.ones(steps + 1, 3)}


class Scripted:
    """A goal autoencoder whose code for a state is a number: the state and `plus`."""

    def __init__(self, plus):
        self.plus = plus

    def encode(self, deter):
        self.rsample = lambda: (deter + self.plus)[..., None]
        return self


def test_each_level_of_hac_sees_its_own_steps_goals_and_rewards():
    agent = make_variant(hac.Agent, goal_duration=2, top_duration=2, horizon=8, hindsight=0)
    del agent.goals, agent.top_goals
    agent.goals = agent.top_goals = Scripted(0)
    views = {name: {key: value[:, ::3].reshape(len(value), -1).T.tolist()  # of three equal columns
                    for key, value in view.items()}
             for name, view in agent.player_trajectories(counted(agent)).items()}
    assert list(views) == ["worker", "manager", "top"]
    worker, middle, top = views.values()
    assert worker["deter"] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    assert worker["goal"] == [[0] * 3, [10] * 3, [20] * 3, [30] * 3]
    assert worker["reward_goal"] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert middle["deter"] == [[0, 2, 4], [4, 6, 8]]
    assert middle["top_goal"] == [[0] * 3, [100] * 3]  # the last state's value is under it, too
    assert middle["action"] == [[1, 11, 21], [21, 31, 41]]
    assert middle["reward_reach"] == [[1.5, 3.5], [5.5, 7.5]]
    assert top["deter"] == [[0, 4, 8]]
    assert top["action"] == [[1, 101, 201]]
    assert top["reward_extr"] == [[2.5, 6.5]]


def test_hac_takes_the_codes_of_the_states_that_were_reached_for_the_actions():
    agent = make_variant(hac.Agent, goal_duration=2, top_duration=2, horizon=8, hindsight=1)
    del agent.goals, agent.top_goals
    agent.goals, agent.top_goals = Scripted(0.25), Scripted(0.5)
    views = agent.player_trajectories(counted(agent))
    action = views["manager"]["action"].squeeze(-1)
    assert action[:-1, ::3].T.tolist() == [[2.25, 4.25], [6.25, 8.25]]  # the last one earns nothing
    assert views["top"]["action"][:-1, 0, 0].tolist() == [4.5, 8.5]
    assert views["worker"]["skill"][0, ::3, 0].tolist() == [1, 11, 21, 31]  # these stay
    agent.config.hindsight = 0.3
    many = {key: value[:, :1].repeat_interleave(5000, 1) if value.dim() > 1 else value
            for key, value in counted(agent).items()}
    action = agent.player_trajectories(many)["top"]["action"]
    changed = action[:-1, :, 0] == tensor([4.5, 8.5])[:, None]
    assert torch.equal(*changed) and 0.27 < changed.float().mean() < 0.33


@pytest.mark.parametrize("imagined", [True, False])
def test_hac_levels_choose_at_their_own_times_and_the_middle_sees_the_new_goal(imagined):
    agent, seen = make_variant(hac.Agent, goal_duration=2, top_duration=3, horizon=12), []
    pick = agent.sample_skill
    agent.sample_skill = lambda state: seen.append(state["top_goal"]) or pick(state)
    if imagined:
        traj = agent.imagine(starts_at(*torch.randn(2, 3, 16)))
        states = [{key: traj[key][t] for key in ("skill", "goal", "top_skill", "top_goal")}
                  for t in range(13)]
        counts = np.arange(13)[:, None].repeat(3, 1)
    else:  # the second environment begins anew at step 3, the third at step 7
        state, states, counts = None, [], []
        for t in range(13):
            first = np.array([t == 0, t in (0, 3), t in (0, 7)])
            obs = {"image": np.zeros((3, 64, 64, 3), np.uint8), "is_first": first}
            state = agent.policy(obs, state)[1]
            states.append(state)
            counts.append([t, t - 3 * (t >= 3), t - 7 * (t >= 7)])
        counts = np.array(counts)
    for t in range(13):
        for env in range(3):
            for key, every in (("skill", 2), ("top_skill", 6)):
                if counts[t, env] % every:
                    assert torch.equal(states[t][key][env], states[t - 1][key][env])
    for key in ("goal", "top_goal"):  # continuous, so that a new one differs
        every = 2 if key == "goal" else 6
        code = "skill" if key == "goal" else "top_skill"
        goals = agent.goals if key == "goal" else agent.top_goals
        for t in range(13):
            close(states[t][key], goals.decode(states[t][code]), atol=1e-6)
        changes = [(t, env) for t in range(1, 13) for env in range(3)
                   if not torch.equal(states[t][code][env], states[t - 1][code][env])]
        assert all(counts[t, env] % every == 0 for t, env in changes)
        assert len(changes) == len({(t, e) for t in range(1, 13) for e in range(3)
                                    if counts[t, e] % every == 0})
    choices = [t for t in range(13) if (counts[t] % 2 == 0).any()]
    assert len(seen) == len(choices)
    for t, goal in zip(choices, seen, strict=True):
        assert torch.equal(goal, states[t]["top_goal"])


def test_hac_rewards_the_middle_level_for_the_state_that_its_choice_leads_to():
    agent = make_variant(hac.Agent, goal_duration=2, top_duration=2, horizon=8)
    deter = tensor([[1, 0], [9, 9], [0, 2], [9, 9], [4, 0], [9, 9], [3, 4], [9, 9], [3, 4]])
    goal = tensor([[2, 0]] * 4 + [[3, 4]] * 4 + [[7, 7]])
    reward = agent.reward_reach({"deter": deter[:, None], "top_goal": goal[:, None]})
    close(reward[:, 0], 2 * tensor([0, 0, 0, 0.5, 0, 1, 0, 1]), atol=1e-6)  # means are over 2
    assert dict(agent.manager.rewards) == {"reach": 1} and "extr" in agent.top.rewards
    assert make_variant(hac.Agent, middle_extr=0.5).manager.rewards == {"reach": 1, "extr": 0.5}
    agent.goals.novelty = lambda deter: 0 * deter[..., 0]
    agent.top_goals.novelty = lambda deter: deter[..., 0]
    close(agent.reward_expl({"deter": deter})[:2], [9, 0])


@pytest.mark.parametrize("cont", [0.0, 0.3, 1.0])
def test_hac_rewards_the_middle_level_by_the_probability_of_getting_to_its_state(cont):
    """An episode may end in state 3, within the second middle goal, whose state is 4."""
    agent = make_variant(hac.Agent, goal_duration=2, top_duration=2, horizon=8)
    traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    traj["top_goal"][:4], traj["top_goal"][4:] = traj["deter"][4], traj["deter"][8]  # are reached
    traj["cont"] = torch.ones(9, 4)
    traj["cont"][3] = cont
    traj["reward_reach"] = agent.reward_reach(traj)
    reward = agent.player_trajectories(traj)["manager"]["reward_reach"]  # [2, 2 goals x 4]
    close(reward[1, :4], np.full(4, cont), rtol=1e-4)
    close(reward[1, 4:], np.ones(4), rtol=1e-4)


def test_hac_autoencoders_are_two_that_learn_the_same_states():
    agent, learned = make_variant(hac.Agent), []
    for goals in (agent.goals, agent.top_goals):
        goals.loss = lambda deter, goals=goals: learned.append((goals, deter)) or (
            sum(p.square().sum() for p in goals.parameters()), {})
    agent.train_goals({"deter": torch.arange(96.0).view(2, 3, 16)})
    assert [goals for goals, _ in learned] == [agent.goals, agent.top_goals]
    assert all(torch.equal(x, torch.arange(96.0).view(6, 16)) for _, x in learned)
    assert agent.goals is not agent.top_goals


def test_hac_metrics_compare_the_reward_for_own_and_for_exchanged_goals_of_the_top():
    agent = make_variant(hac.Agent, goal_duration=2, top_duration=2, horizon=8)
    traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    for start in (0, 4):  # reached at the end, and never before
        traj["top_goal"][start : start + 4] = traj["deter"][start + 4]
    traj["reward_reach"] = agent.reward_reach(traj)
    metrics = agent.train_imagined(traj)
    close(metrics["reach_last"], 1, rtol=1e-4)
    other = [director.max_cosine(traj["deter"][t].roll(2, 0), traj["deter"][t]) for t in (4, 8)]
    close(metrics["reach_other"], torch.stack(other).mean())
    assert float(metrics["reach_other"]) < 0.99


def test_the_middle_level_reads_the_goal_of_the_top_and_the_top_weighs_novelty():
    agent = make_variant(hac.Agent, manager_expl=0.3)
    state = {key: torch.randn(5, 16) for key in ("deter", "stoch", "goal", "top_goal")}
    first, second = (agent.manager.dist(agent.manager.feat({**state, "top_goal": goal})).probs
                     for goal in torch.randn(2, 5, 16))
    assert not torch.allclose(first, second, rtol=1e-3)
    assert dict(agent.top.rewards) == {"extr": 1.0, "expl": 0.3}
