"""Planning and tree search."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import director
from conftest import (
    close,
    make_variant,
    prediction,
    starts_at,
    tensor,
)
from variants import (
    planner,
    search,
)


def test_tree_search_tries_first_what_the_prior_prefers():
    def options(state):
        return torch.eye(3).expand(2, -1, -1), tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])

    def imagine(state, move):
        return state, torch.zeros(2), torch.ones(2)

    root = {"deter": torch.zeros(2, 1), "stoch": torch.zeros(2, 1)}
    visits = [search.tree_search(root, options, imagine, lambda state: torch.zeros(2), n)[1]
              for n in (1, 50)]
    assert visits[0].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert visits[1].argsort(1).tolist() == [[0, 2, 1], [1, 2, 0]]


def test_the_cross_entropy_method_finds_the_best_sequences():
    torch.manual_seed(0)
    wanted = torch.eye(4)[torch.tensor([[0, 3], [2, 1], [1, 1]])]  # [L, E, 4]

    def right(moves):  # [L, E, candidates, 4]
        return (moves * wanted[:, :, None]).sum((0, -1))

    elite = search.cross_entropy(right, torch.zeros(3, 2, 4), True, 100, 5)
    close(elite[:, :, 0], wanted)
    target = tensor([[0.8, -0.3], [0.1, 0.6]])[..., None]  # [L, E, 1]

    def near(moves):
        return -(moves - target[:, :, None]).square().sum((0, -1))

    best = [search.cross_entropy(near, torch.zeros(2, 2, 1), False, 200, n) for n in (1, 8)]
    errors = [(x[:, :, 0] - target).abs().max() for x in best]
    assert errors[1] < 0.05 and errors[1] < errors[0]


def test_tree_search_agrees_with_trying_everything():
    """Random rewards of all ways of four moves: a greedy first move is often wrong."""
    gen, depth, trees = np.random.default_rng(0), 4, 12
    rewards, scale = np.zeros((trees, *[3] * depth, depth)), 10.0 ** np.arange(-6, 6)
    for level in range(depth):  # the reward of move `level` depends on the moves until it
        shape = (trees, *[3] * (level + 1), *[1] * (depth - level - 1))
        rewards[..., level] = gen.normal(size=shape) * scale.reshape(-1, *[1] * depth)
    ways = (rewards * 0.9 ** np.arange(depth)).sum(-1).reshape(trees, 3, -1).max(-1)

    def options(state):
        return torch.eye(3).expand(trees, -1, -1), torch.full((trees, 3), 1 / 3)

    def imagine(state, move):
        way, count = state["deter"].clone(), state["stoch"][:, 0].long()
        rows = torch.arange(trees)
        done = count >= depth
        way[rows, count.clamp(max=depth - 1)] = torch.where(done, way[:, -1], move.argmax(-1))
        got = [0.0 if done[i] else rewards[(i, *way[i].long().tolist(), int(count[i]))]
               for i in range(trees)]
        return ({"deter": way, "stoch": state["stoch"] + 1}, torch.tensor(got),
                torch.full((trees,), 0.9))

    root = {"deter": torch.zeros(trees, depth), "stoch": torch.zeros(trees, 1)}
    moves, visits = search.tree_search(
        root, options, imagine, lambda state: torch.zeros(trees), simulations=600)
    assert (visits.sum(1) == 600).all() and moves.shape == (trees, 3, 3)
    greedy = rewards[..., 0].reshape(trees, 3, -1)[..., 0].argmax(1)
    assert (visits.argmax(1).numpy() == ways.argmax(1)).sum() >= 11
    assert (greedy != ways.argmax(1)).sum() >= 3


def test_tree_search_weighs_moves_by_values_and_not_by_single_returns():
    """In random MDPs with 6 moves a state, whose leaves have their true values.

    Scaled by the least and the largest return of a simulation, which lie further apart than those
    of Q, 20 simulations find the best move in 46% of these MDPs.
    """
    gen, trees, states, actions = np.random.default_rng(0), 400, 12, 6
    successor = gen.integers(states, size=(trees, states, actions))
    reward = gen.normal(size=successor.shape)
    each = np.arange(trees)
    value = np.zeros((trees, states))
    for _ in range(200):
        q = reward + 0.9 * value[each[:, None, None], successor]
        value = q.max(-1)

    def options(state):
        return torch.eye(actions).expand(trees, -1, -1), torch.full((trees, actions), 1 / actions)

    def imagine(state, move):
        at = each, state["deter"][:, 0].numpy(), move.argmax(-1).numpy()
        after = {"deter": torch.as_tensor(successor[at])[:, None], "stoch": state["stoch"]}
        return after, torch.as_tensor(reward[at]), torch.full((trees,), 0.9)

    def leaf_value(state):
        return torch.as_tensor(value[each, state["deter"][:, 0].numpy()])

    root = {"deter": torch.zeros(trees, 1, dtype=torch.long), "stoch": torch.zeros(trees, 1)}
    _, visits = search.tree_search(root, options, imagine, leaf_value, simulations=20)
    best = visits.argmax(1).numpy() == q[:, 0].argmax(1)
    assert best.mean() > 0.56, best.mean()


@pytest.mark.parametrize("flat", [True, False])
def test_a_move_is_worth_its_rewards_and_the_value_at_its_end_in_rewards_of_single_steps(flat):
    agent = make_variant(planner.Agent, agent="dreamer" if flat else "director", discount=0.8,
                 planner="mcts", goal_duration=4, horizon=4)
    agent.world_model.reward_head.forward = lambda feat: prediction(torch.ones(len(feat)))
    agent.world_model.cont_head.forward = lambda feat: torch.full((len(feat),), math.log(9))  # 0.9
    player = agent.worker if flat else agent.manager
    player.critics["extr"].forward = lambda feat: prediction(torch.full((len(feat),), 3.0))
    start = {"deter": torch.randn(2, 16), "stoch": torch.randn(2, 16)}
    move, prior = agent.moves_to_try(start)
    assert move.shape == ((2, 5, 5) if flat else (2, 8, 64))
    close(prior.sum(-1), np.ones(2))
    state, reward, discount = agent.imagine_move(start, move[:, 0])
    gamma, steps = (0.9 * 0.8, 1) if flat else (0.9 * 0.8**0.25, 4)
    close(reward, np.full(2, sum(gamma**t for t in range(steps))))
    close(discount, np.full(2, gamma**steps))
    close(agent.value(state), np.full(2, 3.0 if flat else 12.0))


def test_codes_of_one_group_are_all_tried_with_the_probabilities_of_the_manager():
    agent = make_variant(planner.Agent, planner="mcts", skill_groups=1, skill_classes=3, tried=2)
    start = {"deter": torch.randn(2, 16), "stoch": torch.randn(2, 16)}
    move, prior = agent.moves_to_try(start)
    close(move, np.tile(np.eye(3), (2, 1, 1)))
    close(prior, agent.manager.dist(agent.manager.feat(start)).probs[:, 0].detach())


def test_sequences_are_scored_by_discounted_rewards_and_the_value_of_their_end(monkeypatch):
    agent, scores = make_variant(planner.Agent, candidates=20, plan_length=3), []

    def imagine_move(state, move):  # reward: the move's first number; cont 0.5
        return {**state, "deter": state["deter"] + 1}, move[:, 0], torch.full((40,), 0.5)

    def cross_entropy(score, start, *args):
        assert start.shape == (3, 2, 5)
        scores.append(score(torch.arange(600.0).view(3, 2, 20, 5)))
        return torch.zeros(3, 2, 2, 5)

    agent.imagine_move, agent.value = imagine_move, lambda state: 1000 * state["deter"][:, 0]
    monkeypatch.setattr(planner, "cross_entropy", cross_entropy)
    agent.search({"deter": torch.zeros(2, 16), "stoch": torch.zeros(2, 16)})
    first = torch.arange(0.0, 200.0, 5.0).view(2, 20)  # later ones are 200 and 400 more
    close(scores[0], first + (first + 200) / 2 + (first + 400) / 4 + 3000 / 8)


def test_codes_are_searched_for_where_the_agent_acts_and_not_where_it_imagines():
    agent, calls = make_variant(planner.Agent, planner="codes"), []
    agent.search = lambda state: calls.append(1) or torch.zeros(len(state["deter"]), 64)
    agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    assert not calls
    agent.policy({"image": np.zeros((3, 64, 64, 3), np.uint8)})
    assert calls == [1]


@pytest.mark.parametrize("way", ["actions", "codes", "mcts"])
def test_search_finds_the_action_that_the_model_rewards(way):
    """The reward head rewards the third action; the actors are not trained."""
    torch.manual_seed(0)
    flags = {"simulations": 30, "tried": 16} if way == "mcts" else {"candidates": 40}
    agent = make_variant(planner.Agent, planner=way, goal_duration=1, horizon=2, **flags)
    agent.world_model.rssm.img_step = lambda deter, stoch, action: (
        F.pad(action, (0, 11)), stoch)
    agent.world_model.reward_head.forward = lambda feat: director.Symlog(feat[:, 2])
    # The worker obeys goals: it takes the largest of their first five numbers.
    agent.worker.actor.forward = lambda feat: 50 * feat[:, -16:-11]
    code = agent.goals.decode.out.weight.data
    code *= 30  # so that codes differ in what they ask for
    obs = {"image": np.zeros((3, 64, 64, 3), np.uint8)}
    action, _ = agent.policy(obs, mode="eval")
    assert (action.argmax(-1) == 2).all()
    agent.config.planner = "none"
    found = torch.cat([agent.policy(obs, mode="eval")[0] for _ in range(5)]).argmax(-1)
    assert (found != 2).any()


def test_each_sequence_starts_from_the_state_of_its_own_environment():
    agent = make_variant(planner.Agent)
    agent.imagine_move = lambda state, move: (
        state, 10 * state["deter"][:, 0] + move[:, 0], torch.ones(len(move)))
    agent.value = lambda state: 0.0
    deter = tensor([[1], [2]]).expand(2, 16)
    moves = torch.arange(6.0).view(1, 2, 3, 1).expand(1, 2, 3, 5)
    score = agent.score({"deter": deter, "stoch": deter}, moves)
    close(score, [[10, 11, 12], [23, 24, 25]])


def test_the_first_move_of_the_best_sequence_is_made(monkeypatch):
    agent = make_variant(planner.Agent)
    elite = torch.arange(60.0).view(3, 2, 2, 5)  # [L, E, elites, A]
    monkeypatch.setattr(planner, "cross_entropy", lambda *args: elite)
    zeros = torch.zeros(2, 16)
    close(agent.search({"deter": zeros, "stoch": zeros}), elite[0, :, 0])


def test_the_cross_entropy_method_tries_no_moves_outside_of_the_action_space():
    found = []

    def score(moves):  # the larger the better
        found.append(moves.abs().max())
        return moves.sum((0, -1))

    best = search.cross_entropy(score, torch.zeros(2, 1, 1), False, 50, 4)
    assert max(found) <= 1
    close(best[:, 0, 0], np.ones((2, 1)))


def test_a_node_of_the_tree_has_the_prior_of_its_own_state():
    tried = []

    def options(state):
        prior = [0.1, 0.9] if state["deter"].any() else [0.6, 0.4]
        return torch.eye(2)[None], tensor([prior])

    def imagine(state, move):
        tried.append((int(state["deter"]), int(move.argmax())))
        return {**state, "deter": state["deter"] + 1}, torch.zeros(1), torch.ones(1)

    root = {"deter": torch.zeros(1, 1), "stoch": torch.zeros(1, 1)}
    search.tree_search(root, options, imagine, lambda state: torch.zeros(1), 3)
    assert tried == [(0, 0), (0, 1), (1, 1)]
