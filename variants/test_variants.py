"""What a user of the variants can rely on: mechanisms and formulas; returns are in experiments/."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import director
from experiments import relatives
from test_director import (
    CONTINUOUS,
    DISCRETE,
    HERE,
    RUN,
    TINY,
    close,
    needs_rendering,
    random_batch,
    read_metrics,
    starts_at,
    tensor,
)
from variants import (
    diayn,
    disagreement,
    dyna_q,
    feudal,
    gaussian,
    hac,
    hdreamer,
    higl,
    hindsight,
    options,
    parallel,
    planner,
    prioritized,
    same_episode,
    search,
)

VARIANTS = [  # agent, flags
    (feudal.Agent, {}), (feudal.Agent, {"feudal_reward": "dot"}),
    (feudal.Agent, {"agent": "dreamer"}),
    (higl.Agent, {}), (higl.Agent, {"higl_loss": "contrastive"}),
    (diayn.Agent, {}), (diayn.Agent, {"skills_for": "task"}),
    (disagreement.Agent, {}), (disagreement.Agent, {"agent": "dreamer"}),
    (disagreement.Agent, {"disagreement_target": "embed"}),
    (disagreement.Agent, {"disagreement_target": "deter"}),
    (hindsight.Agent, {}),
    (planner.Agent, {"candidates": 20, "rounds": 2}),
    (planner.Agent, {"candidates": 20, "rounds": 2, "planner": "codes"}),
    (planner.Agent, {"planner": "mcts", "simulations": 4, "agent": "dreamer"}),
    (planner.Agent, {"planner": "mcts", "simulations": 4}),
    (hdreamer.Agent, {"bottom_stoch": 3, "bottom_classes": 5}),
    (gaussian.Agent, {}),
    (options.Agent, {}), (options.Agent, {"options": 1}), (options.Agent, {"option_entropy": 0}),
    (hac.Agent, {"horizon": 32}), (hac.Agent, {"hindsight": 0.5, "middle_extr": 0.5}),
    (dyna_q.Agent, {}), (dyna_q.Agent, {"planning": 0}),
    (prioritized.Agent, {}), (prioritized.Agent, {"agent": "dreamer"})]


def name(value) -> str:
    if isinstance(value, type):
        return director.agent_name(value)
    return "-".join(map(str, value.values())) if isinstance(value, dict) else type(value).__name__


def make(made, space=DISCRETE, **flags):
    torch.manual_seed(0)
    config = made.Config(size="xs", **{**TINY, **flags})
    return made(spaces.Dict({"image": director.IMAGE}), space, config)


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=name)
@pytest.mark.parametrize(("agent", "flags"), VARIANTS, ids=name)
def test_a_variant_learns_and_acts_and_each_parameter_has_one_optimiser(agent, flags, space):
    if agent is dyna_q.Agent and space is CONTINUOUS:
        with pytest.raises(director.UserError, match="discrete"):
            make(agent, space, **flags)
        return
    agent = make(agent, space, **flags)
    owned = [p for optimizer in agent.optimizers.values() for p in optimizer.params]
    assert len(owned) == len(set(owned)) == sum(p.requires_grad for p in agent.parameters())
    for optimizer in agent.optimizers.values():
        def check(loss, optimizer=optimizer, minimize=optimizer.minimize):
            before = {p: p.detach().clone() for p in agent.parameters()}
            norm = minimize(loss)
            moved = {p for p, old in before.items() if not torch.equal(p, old)}
            assert moved and moved <= set(optimizer.params)
            return norm
        optimizer.minimize = check
    batch = random_batch(np.random.default_rng(0), 2, 19, agent.discrete, agent.sizes["action"])
    for _ in range(3):
        metrics = agent.train_step(batch)
        assert all(value.isfinite() for value in metrics.values()), metrics
    assert ("goal_reward_other" in metrics) == bool(agent.manager)
    state, skills = None, []
    for step in range(9):  # three environments, of which the second begins anew at step 4
        first = np.array([step == 0, step in (0, 4), step == 0])
        action, state = agent.policy(
            {"image": np.zeros((3, 64, 64, 3), np.uint8), "is_first": first}, state)
        assert action.shape == (3, agent.sizes["action"]) and action.isfinite().all()
        skills.append(state.get("skill"))
    if agent.manager:
        assert all(torch.equal(x[0], skills[0][0]) for x in skills[:8])
        assert all(torch.equal(x[1], skills[4][1]) for x in skills[4:])
    if agent.discrete:
        close(action.sum(-1), np.ones(3))


@pytest.mark.parametrize(("agent", "flags"), dict(VARIANTS[::-1]).items(), ids=name)
def test_a_variant_trains_resumes_evaluates_and_draws(agent, flags, tmp_path):
    run = [*RUN, "--task=gym_ShortPinPad-v0", "--batch_length=10", "--horizon=8",
           "--video_every=50", f"--logdir={tmp_path}"]
    run += [f"--{key}={value}" for key, value in flags.items()]
    for steps in (250, 300):
        assert director.main([*run, f"--steps={steps}"], agent) == 0
    assert read_metrics(tmp_path)[-1]["train/grad_steps"] == 25
    assert director.main([f"--logdir={tmp_path}", "--eval=1"], agent) == 0
    assert len(json.loads((tmp_path / "eval.json").read_text())["scores"]) == 1
    pictures = [path.stem.split("-") for path in (tmp_path / "pictures").iterdir()]
    assert len({step for step, _ in pictures}) > 1  # while it trained, too
    goals = agent.picture_goal is director.Director.picture_goal and (
        director.load(tmp_path, agent).manager)
    assert {name for _, name in pictures} == {"episode", "openloop", *(["worker"] if goals else [])}


def test_a_variant_runs_as_a_program_that_a_signal_stops_and_the_same_command_resumes(tmp_path):
    command = [sys.executable, "-m", "variants.feudal", *RUN, "--task=gym_Corridor-v0",
               "--batch_length=10", "--steps=100000", f"--logdir={tmp_path}"]
    for word in ("gradient steps", "Resumed at step"):
        with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
            assert any(word in line for line in process.stdout)
            process.terminate()
            assert "Stopped and saved" in process.stdout.read()
    assert director.main([f"--logdir={tmp_path}", "--eval=1"]) == 2  # it is no Director


def test_the_search_loads_and_plays_what_director_trained(tmp_path, capsys):
    run = [*RUN, "--task=gym_Corridor-v0", "--steps=150", f"--logdir={tmp_path}"]
    assert director.main(run) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    flags = ["--candidates=20", "--rounds=1", "--eval=1", f"--logdir={tmp_path}"]
    assert director.main(flags, planner.Agent) == 0
    assert director.main(flags[2:], director.Director) == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert director.main(flags[2:], feudal.Agent) == 2
    assert "holds a run of director" in capsys.readouterr().err


@pytest.mark.parametrize(("agent", "flags", "words"), [
    (feudal.Agent, ["--batch_length=8"], "--batch_length: has to be more than --goal_duration"),
    (higl.Agent, ["--batch_length=8"], "--batch_length: has to be more than --goal_duration"),
    (higl.Agent, ["--agent=dreamer"], "invalid choice: 'dreamer'"),
    (higl.Agent, ["--temperature=0"], "must be from 0.001"),
    (diayn.Agent, ["--skills=1"], "must be from 2"),
    (diayn.Agent, ["--agent=dreamer"], "invalid choice: 'dreamer'"),
    (disagreement.Agent, ["--batch_length=1"], "has to be more than 1"),
    (disagreement.Agent, ["--members=1"], "must be from 2"),
    (dyna_q.Agent, ["--agent=director"], "invalid choice: 'director'"),
    (dyna_q.Agent, ["--batch_length=1"], "has to be more than 1"),
    (dyna_q.Agent, ["--epsilon=2"], "must be from 0 to 1"),
    (prioritized.Agent, ["--priority_beta=2"], "must be from 0 to 1"),
    (hindsight.Agent, ["--agent=dreamer"], "invalid choice: 'dreamer'"),
    (hindsight.Agent, ["--batch_length=1"], "must be from 2"),
    (hindsight.Agent, ["--worker_extr=0.5"], "must be from 0 to 0"),
    (planner.Agent, ["--planner=codes", "--agent=dreamer"], "a flat agent has none"),
    (planner.Agent, ["--candidates=9"], "must be from 20"),
    (options.Agent, ["--options=0"], "--options 0: must be from 1"),
    (options.Agent, ["--option_cost=-1"], "must be from 0"),
    (options.Agent, ["--agent=dreamer"], "invalid choice: 'dreamer'"),
    (hac.Agent, ["--top_duration=3"], "--horizon: no multiple of --goal_duration * --top_duration"),
    (hac.Agent, ["--hindsight=2"], "must be from 0 to 1"),
    (hac.Agent, ["--agent=dreamer"], "invalid choice: 'dreamer'")])
def test_bad_flags_get_one_line(agent, flags, words, capsys):
    assert director.main(flags, agent) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("task", ["Grid-v0", "Corridor-v0", "LongCorridor-v0"])
def test_the_small_worlds_pass_the_gymnasium_checker(task):
    check_env(gymnasium.make(task, disable_env_checker=True).unwrapped, skip_render_check=True)


def test_pairs_are_those_within_an_episode():
    is_first = torch.rand(7, 20, generator=torch.manual_seed(0)) < 0.15
    for k in (1, 4):
        for row, found in zip(is_first, same_episode(is_first, k), strict=True):
            assert found.tolist() == [not row[t + 1 : t + k + 1].any() for t in range(20 - k)]


def replayed(agent, steps=12):
    """Random states of three chunks, with a second episode in the last one, and their flags."""
    gen = torch.manual_seed(1)
    states = {"deter": torch.randn(3, steps, 16, generator=gen),
              "is_first": torch.zeros(3, steps, dtype=torch.bool)}
    states["is_first"][2, 5] = True
    return states


def test_the_program_that_compares_disconnects_what_it_says_and_ranks_ties_fairly():
    assert relatives.ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    agent = make(relatives.unpaid(director.Director), horizon=8)
    traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    assert traj["reward_goal"].abs().sum() > 0
    assert agent.views(traj)["worker"]["reward_goal"].abs().sum() == 0
    agent = make(relatives.frozen("manager.actor"))
    before = [agent.manager.actor.out.weight.clone(), agent.worker.actor.out.weight.clone()]
    agent.train_step(random_batch(np.random.default_rng(0), 2, 9, True, 5))
    assert torch.equal(before[0], agent.manager.actor.out.weight)
    assert not torch.equal(before[1], agent.worker.actor.out.weight)


# ---- Feudal ---------------------------------------------------------------------------------


def test_feudal_pays_the_mean_cosine_of_all_moves_since_the_goal_was_set():
    agent = make(feudal.Agent, horizon=4, goal_duration=2)
    deter = tensor([[0, 0], [3, 4], [3, 0], [3, 0], [4, 0]])[:, None]
    goal = tensor([[1, 0], [1, 0], [0, 2], [0, 2], [5, 5]])[:, None]
    reward = agent.reward_goal({"deter": deter, "goal": goal})
    # 3 of 5 along x; then (0, -4) and (3, 0); no move at all; then (1, 0) and (1, 0), across.
    close(reward, [[0.6], [(0 + 1) / 2], [0], [0]])
    agent.config.feudal_reward = "dot"
    close(agent.reward_goal({"deter": deter, "goal": goal}), [[3], [0], [0], [0]])


def test_feudal_learns_unit_directions_of_pairs_within_an_episode():
    agent = make(feudal.Agent, goal_duration=4)
    states, losses = replayed(agent), []
    close(agent.goals.decode(torch.randn(5, 64)).norm(dim=-1), np.ones(5))
    agent.goals.optimizer.minimize = losses.append
    agent.goals.loss = lambda move, weight: (losses.append((move, weight)) or (0, {}))
    agent.train_goals(states)
    move, weight = losses[0]
    close(move.norm(dim=-1), np.ones(24))
    way = states["deter"][1, 7] - states["deter"][1, 3]
    close(move[8 + 3], way / way.norm())
    assert weight.tolist() == [True] * 16 + [True] + [False] * 4 + [True] * 3


def test_pairs_of_no_weight_do_not_train_the_goal_autoencoder(monkeypatch):
    monkeypatch.setattr(director.OneHot, "rsample", lambda dist: dist.probs)
    agent, gradients = make(feudal.Agent), []
    deter, weight = torch.randn(6, 16), tensor([1, 1, 0, 1, 0, 0])
    for other in (deter, torch.where(weight[:, None] > 0, deter, 5.0), deter + 1):
        agent.goals.kl_adapt.scale.fill_(1.0)
        loss = agent.goals.loss(other, weight)[0]
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(
            loss, list(agent.goals.parameters()))]))
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(*gradients[1:])


def test_feudal_explores_directions_that_are_new_over_a_whole_goal():
    agent = make(feudal.Agent, horizon=4, goal_duration=2)
    agent.goals.novelty = lambda way: way[..., 0]
    deter = tensor([[0, 0], [9, 9], [3, 4], [9, 9], [3, 9]])[:, None]
    close(agent.reward_expl({"deter": deter}), [[0.6], [0.6], [0], [0]])


# ---- Continuous latent goals ----------------------------------------------------------------


def test_higl_pays_the_squared_distance_of_codes_and_explores_far_from_the_replayed():
    agent = make(higl.Agent, latent=2, horizon=8)
    agent.goals.encode = lambda deter: deter[..., :2]
    deter = tensor([[0, 0], [1, 2], [1, 1]])[:, None].expand(-1, 4, -1)
    goal = tensor([[1, 0], [1, 0], [7, 7]])[:, None].expand(-1, 4, -1)
    close(agent.reward_goal({"deter": deter, "goal": goal})[:, 0], [-4, -1])
    agent.goals.memory.fill_(9.0)[5] = tensor([1, 5])
    close(agent.reward_expl({"deter": deter})[:, 1], [3, 4])


@pytest.mark.parametrize("loss", ["reconstruction", "contrastive"])
def test_higl_learns_from_pairs_within_an_episode_and_remembers_the_newest_codes(loss):
    agent = make(higl.Agent, latent=2, higl_loss=loss, goal_duration=4)
    states, goals, losses = replayed(agent), agent.goals, []
    goals.memory.copy_(torch.arange(2048.0).view(1024, 2))
    goals.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)
    with torch.no_grad():
        codes = goals.encode(states["deter"])
        pairs = [(b, t) for b in range(3) for t in range(8)]
        now, later = (torch.stack([codes[b, t + k] for b, t in pairs]) for k in (0, 4))
        if loss == "reconstruction":
            after = torch.stack([states["deter"][b, t + 4] for b, t in pairs])
            errors = (goals.predictor(now) - after).square().sum(-1)
        else:
            errors = torch.nn.functional.cross_entropy(
                -torch.cdist(now, later) ** 2 / 0.5, torch.arange(24), reduction="none")
    errors = [float(x) for x, (b, t) in zip(errors, pairs, strict=True) if b < 2 or t < 1 or t > 4]
    close(losses[0], sum(errors) / 24, rtol=1e-4)
    close(goals.memory[:36], codes.flatten(0, 1))
    close(goals.memory[36:38], [[0, 1], [2, 3]])


def test_higl_contrasts_each_pair_with_all_others():
    agent = make(higl.Agent, latent=3, temperature=0.7)
    now, later = torch.randn(2, 5, 3, requires_grad=True)
    weight = tensor([1, 1, 0, 1, 1])
    loss, metrics = agent.goals.info_nce(now, later, weight)
    logits = -torch.cdist(now, later) ** 2 / 0.7
    each = torch.nn.functional.cross_entropy(logits, torch.arange(5), reduction="none")
    close(loss, (each * weight).sum().detach() / 5)
    before = [(logits[i] > logits[i, i]).float().mean() for i in range(5)]
    close(metrics["goal_rank"], (tensor(before) * weight).sum() / 5)
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(loss, [now, later]))


@pytest.mark.parametrize("loss", ["reconstruction", "contrastive"])
def test_higl_codes_of_a_walk_tell_how_far_apart_its_places_are(loss):
    """The tell-tale, in a second: places on a line, of which no one looks like its neighbour.

    Reconstruction learns to predict, too, but distances mean something only if they did before.
    """
    agent = make(higl.Agent, higl_loss=loss, goal_duration=2, learning_rate=3e-3, units=32)
    gen = np.random.default_rng(0)
    place = torch.as_tensor(np.abs((gen.integers(-1, 2, (16, 24)).cumsum(1) + 12) % 24 - 12))
    looks = torch.randn(13, 16, generator=torch.manual_seed(0))

    def told() -> float:
        with torch.no_grad():
            far = torch.cdist(*2 * [agent.goals.encode(looks)])
        moves = (torch.arange(13)[:, None] - torch.arange(13)).abs().float()
        return float(torch.corrcoef(torch.stack([far.flatten(), moves.flatten()]))[0, 1])

    before, states = told(), {"deter": looks[place], "is_first": torch.zeros(16, 24).bool()}
    losses = [float(agent.train_goals(states)["goal_loss"].detach()) for _ in range(150)]
    assert losses[-1] < 0.95 * losses[0]
    assert told() > before + 0.3 or loss == "reconstruction", (before, told())


# ---- Skills ---------------------------------------------------------------------------------


def test_diayn_pays_how_much_better_than_by_chance_a_skill_is_recognised():
    agent = make(diayn.Agent, skills=4)
    agent.goals.discriminator.forward = lambda deter: deter[..., :4].log()
    deter = tensor([[1, 1, 1, 1], [0.7, 0.1, 0.1, 0.1], [0.25] * 4])[:, None]
    goal = torch.eye(4)[[0, 1, 2]][:, None]
    close(agent.reward_goal({"deter": deter, "goal": goal}),
          [[math.log(0.7 * 4)], [math.log(0.25 * 4)]], atol=1e-6)


def test_the_discriminator_learns_which_skill_led_to_a_state_of_those_drawn_from_the_prior():
    agent, losses = make(diayn.Agent, skills=4, horizon=8), []
    agent.goals.discriminator.forward = lambda deter: deter[..., :4]
    agent.goals.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    for agent.config.skills_for, columns in (("diversity", 6), ("task", 3)):
        metrics = agent.train_imagined(traj)
        logits, skill = traj["deter"][1:, :columns, :4], traj["skill"][:-1, :columns].argmax(-1)
        close(losses[-1], torch.nn.functional.cross_entropy(logits.flatten(0, 1), skill.flatten()))
        close(metrics["skill_right"], (logits.argmax(-1) == skill).float().mean())


def test_diayn_draws_skills_uniformly_until_a_manager_picks():
    agent = make(diayn.Agent, skills=4)
    agent.manager.actor.out.bias.data[:] = tensor([9, 0, 0, 0])  # it wants the first
    deter, stoch = torch.randn(2, 2000, 16)
    starts, batch = starts_at(deter, stoch), random_batch(np.random.default_rng(0), 2, 9, True, 5)
    uniform = 0.25 * np.ones(4)
    assert agent.imagine(starts)["skill"][0].mean(0).numpy() == pytest.approx(uniform, abs=0.05)
    assert agent.pick(starts).mean(0).numpy() == pytest.approx(uniform, abs=0.05)
    before = agent.manager.actor.out.weight.detach().clone()
    agent.train_step(batch)
    assert torch.equal(agent.manager.actor.out.weight, before)
    agent.config.skills_for = "task"
    traj = agent.imagine(starts)
    assert traj["skill"][0, :1000].mean(0).numpy() == pytest.approx(uniform, abs=0.07)
    assert traj["skill"][0, 1000:, 0].mean() > 0.95 and agent.pick(starts)[:, 0].mean() > 0.95
    view = agent.views(traj)["manager"]
    assert torch.equal(view["action"], traj["skill"][::8, 1000:])
    agent.train_step(batch)
    assert not torch.equal(agent.manager.actor.out.weight, before)


def test_skills_become_recognisable_in_a_fixed_world_model():
    """The tell-tale, in seconds; without the worker's reward they stay what they were."""
    found = []
    for paid in (1, 0):
        agent = make(diayn.Agent, skills=4, learning_rate=3e-3, horizon=8)
        agent.world_model.rssm.inputs[0].weight.data[:, 16:] *= 3  # actions matter
        for step in range(100):
            traj = agent.imagine(starts_at(*torch.zeros(2, 64, 16)))
            metrics = agent.train_imagined(traj)
            view = agent.views(traj)["worker"]
            agent.worker.learn({**view, "reward_goal": paid * view["reward_goal"]}, step % 10 == 0)
        found.append(float(metrics["skill_right"]))
        assert (metrics["goal_reward_last"] > metrics["goal_reward_other"] + 0.2) == paid
    assert found[0] > 0.5 and found[1] < 0.4, found


# ---- Disagreement ---------------------------------------------------------------------------


def test_disagreement_is_the_variance_of_means_and_grows_where_nothing_was_seen():
    agent = make(disagreement.Agent, members=3)
    ensemble, x = agent.ensemble, torch.randn(7, 37)
    means = torch.stack([member(x)[:, 0] for member in ensemble.members]).detach()
    close(ensemble.disagreement(x), means.numpy().var(0, ddof=1).mean(-1))
    sides = [torch.rand(256, 37) * side for side in (1, -1)]  # the tell-tale, in a second
    target = sides[0][:, :16].sin()
    for _ in range(200):
        mean, std = ensemble(sides[0])
        ensemble.optimizer.minimize((0.5 * ((mean - target) / std) ** 2 + std.log()).mean())
    seen, unseen = (ensemble.disagreement(x).mean() for x in sides)
    assert unseen > 2 * seen


def test_the_ensemble_learns_the_next_state_from_state_and_action_by_likelihood():
    agent = make(disagreement.Agent)
    states = {**replayed(agent), "stoch": torch.randn(3, 12, 16), "action": torch.randn(3, 12, 5),
              "is_terminal": torch.zeros(3, 12)}
    loss = agent.train_goals(states)["ensemble_loss"]
    agent = make(disagreement.Agent)
    expected = 0.0
    for member in agent.ensemble.members:
        for b, t in itertools.product(range(3), range(11)):
            if states["is_first"][b, t + 1]:
                continue
            x = [states["deter"][b, t], states["stoch"][b, t], states["action"][b, t + 1]]
            mean, std = member(torch.cat(x))
            dist = torch.distributions.Normal(mean, std.exp().log1p() + 0.1)
            log_prob = dist.log_prob(states["stoch"][b, t + 1]) + 0.5 * math.log(2 * math.pi)
            expected -= log_prob.mean() / 33
    close(loss, expected, rtol=1e-4)


def test_disagreement_is_about_the_action_that_leads_to_the_state():
    agent = make(disagreement.Agent)
    agent.ensemble.disagreement = lambda x: x[..., 0] + 10 * x[..., 16] + 100 * x[..., 32]
    traj = agent.imagine(starts_at(*torch.randn(2, 3, 16)))
    expected = traj["deter"][:, :, 0] + 10 * traj["stoch"][:, :, 0] + 100 * traj["action"][:, :, 0]
    close(traj["reward_expl"], expected[:-1])


def test_only_the_flat_agent_is_led_by_the_gradient_of_disagreement():
    for flat in (True, False):
        agent = make(disagreement.Agent, CONTINUOUS, agent="dreamer" if flat else "director")
        traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
        assert traj["reward_expl"].requires_grad == flat
        assert dict(agent.worker.rewards) == ({"extr": 1.0, "expl": 0.1} if flat else {"goal": 1.0})


# ---- Search ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("flat", [True, False])
def test_a_move_is_worth_its_rewards_and_the_value_at_its_end_in_rewards_of_single_steps(flat):
    agent = make(planner.Agent, agent="dreamer" if flat else "director", discount=0.8,
                 planner="mcts", goal_duration=4, horizon=4)
    agent.world_model.reward_head.forward = lambda feat: director.symlog(torch.ones(len(feat)))
    agent.world_model.cont_head.forward = lambda feat: torch.full((len(feat),), math.log(9))  # 0.9
    player = agent.worker if flat else agent.manager
    player.critics["extr"].forward = lambda feat: director.symlog(torch.full((len(feat),), 3.0))
    start = {"deter": torch.randn(2, 16), "stoch": torch.randn(2, 16)}
    move, prior = agent.options(start)
    assert move.shape == ((2, 5, 5) if flat else (2, 8, 64))
    close(prior.sum(-1), np.ones(2))
    state, reward, discount = agent.imagine_move(start, move[:, 0])
    gamma, steps = (0.9 * 0.8, 1) if flat else (0.9 * 0.8**0.25, 4)
    close(reward, np.full(2, sum(gamma**t for t in range(steps))))
    close(discount, np.full(2, gamma**steps))
    close(agent.value(state), np.full(2, 3.0 if flat else 12.0))


def test_sequences_are_scored_by_discounted_rewards_and_the_value_of_their_end(monkeypatch):
    agent, scores = make(planner.Agent, candidates=20, plan_length=3), []

    def imagine_move(state, move):  # pays the move's first number; then half is left
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
    agent, calls = make(planner.Agent, planner="codes"), []
    agent.search = lambda state: calls.append(1) or torch.zeros(len(state["deter"]), 64)
    agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    assert not calls
    agent.policy({"image": np.zeros((3, 64, 64, 3), np.uint8)})
    assert calls == [1]


@pytest.mark.parametrize("way", ["actions", "codes", "mcts"])
def test_search_does_what_pays_in_the_model(way):
    """The reward head is made to pay for the last action; the actors know nothing."""
    torch.manual_seed(0)
    agent = make(planner.Agent, planner=way, candidates=40, goal_duration=1, horizon=2,
                 simulations=30, tried=16)
    agent.world_model.rssm.img_step = lambda deter, stoch, action: (
        torch.nn.functional.pad(action, (0, 11)), stoch)
    agent.world_model.reward_head.forward = lambda feat: feat[:, 2]
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


# ---- Latents --------------------------------------------------------------------------------

def kl(post, prior):
    """KL of categoricals, [..., S, C] -> [...], by PyTorch's distributions."""
    kind = torch.distributions.OneHotCategorical
    return torch.distributions.kl_divergence(kind(logits=post), kind(logits=prior)).sum(-1)


def test_hdreamer_has_a_kl_and_a_scale_for_each_level():
    agent = make(hdreamer.Agent, stoch=4, classes=4, bottom_stoch=3, bottom_classes=5)
    model, gen = agent.world_model, torch.manual_seed(0)
    states = {key: torch.randn(2, 6, 16 + 15, generator=gen, requires_grad=True)
              for key in ("post", "prior")}
    close(model.kl_adapt.target, [3.5 * 4 / 7, 3.5 * 3 / 7])
    model.kl_adapt.target = tensor([1e3, 1e-3])  # so that one scale falls, the other stays at most
    loss, metrics = model.kl_loss(states)
    coarse, fine = ((states[key][..., :16].unflatten(-1, (4, 4)),
                     states[key][..., 16:].unflatten(-1, (3, 5))) for key in ("post", "prior"))
    coarse, fine = kl(coarse[0], fine[0]), kl(coarse[1], fine[1])
    close(metrics["coarse_kl"].detach(), coarse.detach().mean(), rtol=1e-5)
    close(metrics["fine_kl"].detach(), fine.detach().mean(), rtol=1e-5)
    close(model.kl_adapt.scale, [1 / 1.1, 1])
    close(loss.detach(), (coarse / 1.1 + fine).detach(), rtol=1e-5)
    whole = torch.autograd.grad((coarse / 1.1 + fine).sum(), list(states.values()))
    found = torch.autograd.grad(loss.sum(), list(states.values()))
    close(found[0], 0.2 * whole[0], atol=1e-6)
    close(found[1], 0.8 * whole[1], atol=1e-6)


def test_hdreamer_draws_the_fine_level_given_the_coarse_and_corrects_its_prior():
    rssm = make(hdreamer.Agent, bottom_stoch=3, bottom_classes=5).world_model.rssm
    rssm.correction[-1].weight.data.normal_()
    deter, embed = torch.randn(7, 16), torch.randn(7, rssm.correction[0].in_features - 32)
    stoch, post = rssm.posterior(deter, embed)
    coarse, fine = stoch.split([16, 15], -1)
    close(fine.detach().unflatten(-1, (3, 5)).sum(-1), np.ones((7, 3)))
    prior = rssm.prior(deter, stoch)
    correction = rssm.correction(torch.cat([deter, coarse, embed], -1))
    close((post - prior)[:, 16:].detach(), correction.detach(), atol=1e-5)
    assert correction.abs().max() > 0.1 and not torch.equal(post[:, :16], prior[:, :16])
    nets = [rssm.fine_net[0].weight, rssm.correction[0].weight, rssm.post_net[0].weight]
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(post[:, 16:].square().sum(), nets))
    other = rssm.prior(deter, stoch.roll(1, 0))
    assert torch.equal(other[:, :16], prior[:, :16]) and not torch.equal(other, prior)
    # A guess is the chain of both priors: the mode of one, then the other's mode given it.
    mode = director.OneHot(rssm.prior_net(deter).unflatten(-1, (4, 4))).mode.flatten(-2)
    logit = rssm.fine_net(torch.cat([deter, mode], -1)).unflatten(-1, (3, 5))
    expected = torch.cat([mode, director.OneHot(logit).mode.flatten(-2)], -1)
    assert torch.equal(rssm.guess(deter, sample=False), expected)
    found = torch.stack([rssm.guess(deter)[:, 16:] for _ in range(2000)]).mean(0)
    chance = torch.stack([director.OneHot(rssm.prior(deter, rssm.guess(deter))[:, 16:].unflatten(
        -1, (3, 5))).probs.flatten(-2) for _ in range(2000)]).mean(0)
    close(found.detach(), chance.detach(), atol=0.05)


@pytest.mark.parametrize("task", ["gym_ShortPinPad-v0", "gym_Corridor-v0"])
def test_hdreamer_goes_on_with_a_run_of_director_and_first_acts_as_it_did(
        task, tmp_path, monkeypatch):
    run = [*RUN, f"--task={task}", f"--logdir={tmp_path}"]
    assert director.main([*run, "--steps=150"]) == 0
    flags = {"bottom_stoch": 3, "bottom_classes": 5, "precision": "float32"}
    agents = [director.load(tmp_path, precision="float32"),
              director.load(tmp_path, hdreamer.Agent, **flags)]
    assert agents[1].grad_steps == agents[0].grad_steps > 0
    with monkeypatch.context() as patch:
        patch.setattr(director.OneHot, "rsample", lambda dist: dist.mode)
        found = []
        for agent in agents:
            state, outs = None, []
            for step in range(6):
                gen = np.random.default_rng(step)
                obs = {key: gen.integers(0, 256, (3, *x.shape), np.uint8) if key == "image" else
                       np.float32(gen.normal(size=(3, *x.shape)))
                       for key, x in agent.obs_space.items()}
                action, state = agent.policy(obs, state)
                outs.append(action)
            starts = {key: state[key] for key in ("deter", "stoch")}
            with torch.no_grad():
                traj = agent.imagine({**starts, "is_terminal": torch.zeros(3)})
                feat = torch.cat([traj["deter"], traj["stoch"]], -1)
                outs += [traj[key] for key in (
                    "deter", "goal", "cont", "reward_extr", "reward_expl", "reward_goal")]
                outs += agent.world_model.decoder(feat).values()
                for player in agent.players.values():
                    seen = player.feat(traj)
                    outs += [x(seen) for x in (*player.critics.values(), *player.slow.values())]
            found.append(outs)
        for flat, made in zip(*found, strict=True):
            close(made, flat, rtol=1e-6, atol=1e-6)
    shape = agents[1].world_model.reward_head.hidden[0].weight.shape
    assert shape[1] == agents[0].world_model.reward_head.hidden[0].weight.shape[1] + 15
    for steps in (200, 250):  # as itself, from then on
        more = ["--bottom_stoch=3", "--bottom_classes=5", f"--steps={steps}"]
        assert director.main([*run, *more], hdreamer.Agent) == 0
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert saved["variant"] == "hdreamer" and saved["step"] == 250
    fine = saved["agent"]["world_model.reward_head.hidden.0.weight"][:, -15:]
    assert fine.abs().sum() > 0
    assert director.main([*run, "--steps=300"]) == 2


def test_gaussian_draws_reparameterised_numbers_and_pays_their_balanced_kl():
    model = make(gaussian.Agent).world_model
    rssm, deter = model.rssm, torch.randn(3, 16)
    mean, std = rssm.prior(deter).unbind(-1)
    out = rssm.prior_net(deter)
    close(mean.detach(), out[:, :16].detach())
    close(std.detach(), (1 + out[:, 16:].exp()).log().detach() + 0.1, rtol=1e-5)
    found = torch.stack([rssm.guess(deter) for _ in range(4000)])
    close(found.mean(0).detach(), mean.detach(), atol=0.08)
    close(found.std(0).detach(), std.detach(), rtol=0.08)
    assert torch.equal(rssm.guess(deter, sample=False), mean)
    stoch, params = rssm.posterior(deter, torch.randn(3, rssm.post_net[0].in_features - 16))
    grad, = torch.autograd.grad(stoch.sum(), params)
    noise = (stoch - params[..., 0]) / params[..., 1]
    close(grad, torch.stack([torch.ones_like(noise), noise], -1), atol=1e-5)
    gen = torch.manual_seed(0)
    states = {key: (torch.rand(2, 5, 16, 2, generator=gen) + 0.1).requires_grad_()
              for key in ("post", "prior")}
    (m1, s1), (m2, s2) = (states[key].unbind(-1) for key in ("post", "prior"))
    whole = ((s2 / s1).log() + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5).sum(-1)
    loss, metrics = model.kl_loss(states)
    close(metrics["kl"].detach(), whole.mean().detach(), rtol=1e-5)
    close(loss.detach(), whole.detach() * model.kl_adapt.scale, rtol=1e-5)
    for scale, key in ((0.2, "post"), (0.8, "prior")):
        grad, = torch.autograd.grad(loss.sum(), states[key], retain_graph=True)
        full, = torch.autograd.grad(whole.sum(), states[key], retain_graph=True)
        close(grad, scale * model.kl_adapt.scale * full, atol=1e-5)


# ---- Several processes ----------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
HALVES = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, torch, director
from variants import parallel, test_variants

def steps(kind, parts):
    agent = test_variants.make(director.Director, getattr(test_variants, kind))
    batch = test_variants.random_batch(
        np.random.default_rng(0), 4, 9, agent.discrete, agent.sizes["action"])
    batch = {{key: x.astype(float) if x.dtype == np.float32 else x for key, x in batch.items()}}
    part = {{key: np.split(x, parts)[parallel.RANK % parts] for key, x in batch.items()}}
    for _ in range(5):
        metrics = agent.train_step(part)
    metrics.pop("goal_reward_other")  # other goals are exchanged
    return torch.stack(director.average(list(metrics.values()))), agent.state_dict()

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
director.OneHot.rsample = lambda dist: dist.mode + (dist.probs - dist.probs.detach())
director.BoundedNormal.rsample = lambda dist: dist.mean
kinds = "DISCRETE", "CONTINUOUS"
whole = [steps(kind, 1) for kind in kinds]
torch.distributed.init_process_group()
director.average = parallel.average
halves = [steps(kind, 2) for kind in kinds]
torch.save((whole, halves), f"{{parallel.RANK}}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES.format(here=str(HERE)))
    subprocess.run([*TORCHRUN, "halves.py"], check=True, cwd=tmp_path)
    for rank in range(2):
        for whole, halves in zip(*torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert whole[0].dtype == torch.float64
            np.testing.assert_allclose(halves[0], whole[0], rtol=1e-10)
            for key, value in whole[1].items():
                np.testing.assert_allclose(halves[1][key], value, rtol=1e-10, atol=1e-10)


def test_two_processes_train_save_and_resume_as_one_run(tmp_path, monkeypatch, capsys):
    flags = [*RUN, "--task=gym_Corridor-v0", "--envs=4", f"--logdir={tmp_path}", "--steps=700"]
    go = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True, check=True)
    run = [*TORCHRUN, "-m", "variants.parallel", *flags]
    assert go([*run, "--steps=600"]).stdout.count("step 600: 63 grad") == 1  # rank 0 alone prints
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert [sum(episodes.values()) for episodes in saved["episodes"].values()] == [300, 300]
    # A signal to one of them stops both, after the same step.
    with subprocess.Popen([*run, "--steps=9000"], cwd=HERE, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as process:
        assert any("Resumed at step 600" in line for line in process.stdout)
        time.sleep(1)
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (bytes(tmp_path) in (folder / "cmdline").read_bytes()
                        and b"\0RANK=1\0" in (folder / "environ").read_bytes()):
                    os.kill(int(folder.name), signal.SIGTERM)
        rest = process.stdout.read()
    saved = torch.load(tmp_path / "checkpoint.pt")
    assert f"Stopped and saved at step {saved['step']}; the same" in rest
    assert [sum(x.values()) for x in saved["episodes"].values()] == [saved["step"] // 2] * 2
    assert director.main(flags, parallel.Agent) == 2
    assert "is of 2 processes, not 1" in capsys.readouterr().err
    monkeypatch.setattr(parallel, "RANKS", 2)
    assert director.main([*flags, "--envs=3"], parallel.Agent) == 2
    assert "--envs: not multiples of 2 processes" in capsys.readouterr().err


# ---- Ant Maze -------------------------------------------------------------------------------

OFFICIAL_MAZES = {  # crc32 of the layout, shortest way in cells, yaw on the last steps to the goal;
    # then what the official environment shows and pays in the episode of the test: state
    # @ cos(0, 1, ..., 152), mean of the image's channels, reward
    "S": (3676918905, 12, 90, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-17.251844, 40.208, 58.464, 55.360, 0), (-2.938773, 63.385, 56.210, 61.562, 1),
        (-5.196243, 27.605, 76.392, 109.983, 1))),
    "M": (2363714658, 16, 180, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-7.977971, 40.302, 59.012, 56.284, 0), (-2.184181, 63.580, 56.401, 61.798, 1),
        (-5.680140, 27.764, 76.949, 110.822, 1))),
    "L": (515737317, 22, 180, (
        (-0.159662, 59.368, 63.767, 55.016, 0), (-1.207208, 59.841, 64.490, 57.627, 0),
        (-7.977971, 38.977, 62.875, 60.581, 0), (-2.184181, 59.702, 68.385, 77.060, 1),
        (-5.680140, 58.796, 61.558, 64.209, 1))),
    "XL": (129366694, 26, 0, (
        (-0.159662, 25.321, 72.606, 106.109, 0), (-1.207208, 26.099, 74.460, 109.115, 0),
        (-1.534766, 39.045, 62.693, 60.717, 0), (-2.685182, 59.455, 68.098, 76.738, 1),
        (-6.022177, 46.468, 50.454, 59.262, 1))),
}


def needs_ant_maze(test):
    there = importlib.util.find_spec("labmaze")
    return pytest.mark.skipif(not there, reason="no labmaze for this Python")(needs_rendering(test))


def ant_maze(name, **flags):
    """The environment, what a step of random actions brings, and how to put the ant somewhere."""
    env = gymnasium.make(f"variants.ant_maze:AntMaze{name}-v0", disable_env_checker=True, **flags)
    env, gen = env.unwrapped, np.random.default_rng(0)

    def act():
        return env.step(np.float32(gen.uniform(-1, 1, 8)))

    def put(yaw, distance):  # metres in front of the goal, looking at it; None: at the start
        arena, way = env.env.task.root_entity, np.array([np.cos(yaw), np.sin(yaw), 0])
        place = arena.spawn_positions[0] if distance is None else (
            arena.target_positions[0] - distance * way)
        turn = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        env.env.physics.named.data.qpos["walker/"] = [*place, *turn]

    return env, act, put


@needs_ant_maze
@pytest.mark.parametrize("name", list(OFFICIAL_MAZES))
def test_ant_maze_shows_and_pays_what_the_official_environment_does(name):
    _, _, yaw, expected = OFFICIAL_MAZES[name]
    env, act, put = ant_maze(name)
    (obs, _), reward, found = env.reset(seed=0), 0, []
    for step in range(21):
        if step in (0, 4, 6, 8, 20):
            state = obs["state"] @ np.cos(np.arange(153))
            found.append((state, *obs["image"].mean((0, 1)), reward))
        if step in (4, 6, 8):
            put(np.deg2rad(yaw), {4: 3, 6: 1, 8: None}[step])
        obs, reward, terminated, truncated, _ = act()
        assert not terminated and not truncated
    found, expected = np.array(found), np.array(expected)
    close(found[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
    close(found[:, 1:4], expected[:, 1:4], atol=1)
    assert found[:, 4].tolist() == expected[:, 4].tolist()


@needs_ant_maze
@pytest.mark.parametrize("name", list(OFFICIAL_MAZES))
def test_ant_maze_has_the_official_layout_and_a_way_to_the_goal(name):
    from variants.ant_maze import COLORS, MAZES
    rows, size = MAZES[name], len(MAZES[name])
    checksum, moves, _, _ = OFFICIAL_MAZES[name]
    assert zlib.crc32("\n".join(rows).encode()) == checksum
    assert zlib.crc32(COLORS.astype(np.uint8).tobytes()) == 915387414
    cells = {(y, x): cell for y, row in enumerate(rows) for x, cell in enumerate(row)}
    place = {cell: where for where, cell in cells.items()}
    seen, ring, steps = {place["P"]}, {place["P"]}, 0
    while place["G"] not in seen:
        ring = {(y + dy, x + dx) for y, x in ring for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
                if cells.get((y + dy, x + dx), "1") in " G"} - seen
        assert ring
        seen, steps = seen | ring, steps + 1
    assert steps == moves
    env, *_ = ant_maze(name)  # from above, a wall shows 0.9 of its colour
    env.reset(seed=0)
    image = env.env.physics.render(20 * size, 20 * size, camera_id="top_camera")
    for (y, x), cell in cells.items():
        row, column = (round(10 * size + (i + 0.5 - size / 2) * 20 / 1.1) for i in (y, x))
        if cell.isdigit():
            close(image[row, column], 0.9 * COLORS[int(cell) - 1], atol=4)


@needs_ant_maze
def test_ant_maze_pays_from_the_first_touch_to_the_end_and_begins_anew_after_it():
    env, act, put = ant_maze("S", length=12)
    for _ in range(2):
        env.reset(seed=0)
        assert env.env.physics.named.model.mat_rgba["target/target_sphere", "a"] == 1
        rewards, truncated = [], []
        for step in range(12):
            if step in (3, 6):
                put(0, 0 if step == 3 else None)
            _, reward, _, ended, _ = act()
            rewards.append(reward)
            truncated.append(ended)
        assert rewards == [0] * 3 + [1] * 9 and truncated == [False] * 11 + [True]
        assert env.env.physics.named.model.mat_rgba["target/target_sphere", "a"] == 0
    assert gymnasium.spec("AntMazeXL-v0").kwargs == {"name": "XL"} and type(env)("L").length == 3000


@needs_ant_maze
@pytest.mark.filterwarnings("ignore")
def test_ant_maze_gives_director_pixels_and_proprioception_and_a_seed_makes_the_episode():
    task = "gym_variants.ant_maze:AntMazeFastS-v0"
    env, episodes = director.make_env(task, director.Config(task=task)), []
    check_env(env, skip_render_check=True)
    assert env.observation_space["state"].shape == (153,) and env.action_space.shape == (8,)
    for seed in (1, 1, None):
        episodes.append([env.reset(seed=seed)[0]])
        episodes[-1] += [env.step(np.full(8, 0.5, np.float32))[0] for _ in range(3)]
    same = [all(np.array_equal(x[key], y[key]) for x, y in zip(episodes[0], other, strict=True)
                for key in ("image", "state")) for other in episodes]
    assert same == [True, True, False]
    full, fast = ant_maze("S")[0].reset(seed=1)[0]["image"], episodes[0][0]["image"]
    assert 0 < np.abs(fast.astype(int) - full).mean() < 3


def test_ant_maze_without_labmaze_gets_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "labmaze", None)
    monkeypatch.delitem(sys.modules, "variants.ant_maze", raising=False)
    assert director.main(["--task=gym_variants.ant_maze:AntMazeS-v0"]) == 2
    error = capsys.readouterr().err
    assert "needs labmaze" in error and error.count("\n") == 1
