"""What a user of the variants can rely on: mechanisms and formulas; returns are in experiments/."""

import concurrent.futures
import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import zlib

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

import director
from experiments import levels, relatives
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
    run_program,
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
from variants.graph import Graphed
from variants.pin_pad import PinPad

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
           "--video_every=100", "--prefill=180", f"--logdir={tmp_path}"]
    run += [f"--{key}={value}" for key, value in flags.items()]
    for steps in (210, 230):
        assert director.main([*run, f"--steps={steps}"], agent) == 0
    assert read_metrics(tmp_path)[-1]["train/grad_steps"] == 6
    assert director.main([f"--logdir={tmp_path}", "--eval=1"], agent) == 0
    assert len(json.loads((tmp_path / "eval.json").read_text())["scores"]) == 1
    pictures = [path.stem.split("-") for path in (tmp_path / "pictures").iterdir()]
    assert len({step for step, _ in pictures}) > 1  # while it trained, too
    goals = agent.picture_goal is director.Director.picture_goal and (
        director.load(tmp_path, agent).manager)
    assert {name for _, name in pictures} == {"episode", "openloop", *(["worker"] if goals else [])}


def test_a_variant_runs_as_a_program_that_a_signal_stops_and_resumes(tmp_path, capsys):
    flags = [*RUN, "--task=gym_Corridor-v0", "--batch_length=10", f"--logdir={tmp_path}"]
    command = [sys.executable, "-m", "variants.feudal", *flags, "--steps=100000"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        assert any("gradient steps" in line for line in process.stdout)
        process.terminate()
        step = int(re.search(r"Saved at step (\d+)", process.stdout.read())[1])
    assert director.main([*flags, f"--steps={step + 20}"], feudal.Agent) == 0
    assert f"Resumed at step {step}." in capsys.readouterr().out
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
    (dyna_q.Agent, ["--epsilon=1"], "must be from 0 to 0.999"),
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
            errors = F.cross_entropy(
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
    each = F.cross_entropy(logits, torch.arange(5), reduction="none")
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
    traj["cont"] = torch.ones(9, 6)
    traj["cont"][3, 1], traj["cont"][5, 2] = 0, 0.5
    for agent.config.skills_for, columns in (("diversity", 6), ("task", 3)):
        metrics = agent.train_imagined(traj)
        logits, skill = traj["deter"][1:, :columns, :4], traj["skill"][:-1, :columns].argmax(-1)
        entropy = F.cross_entropy(logits.movedim(-1, 1), skill, reduction="none")
        entropy[2:, 1] = 0  # one has ended in state 3, half of one in state 5
        entropy[4:, 2] /= 2
        close(losses[-1], entropy.mean())
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
                 manager_discount=0.8, planner="mcts", goal_duration=4, horizon=4)
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
        F.pad(action, (0, 11)), stoch)
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


# ---- Hindsight ------------------------------------------------------------------------------


def script(steps=12):
    """Three chunks whose states tell chunk and step; a second episode in the last one."""
    deter = torch.zeros(3, steps, 16)
    deter[..., 0], deter[..., 1] = torch.arange(3)[:, None], torch.arange(steps)
    is_first = torch.zeros(3, steps, dtype=torch.bool)
    is_first[:, 0] = is_first[2, 5] = True
    return {"deter": deter, "stoch": torch.randn(3, steps, 16), "is_first": is_first,
            "action": torch.eye(5)[torch.randint(5, (3, steps))],
            "is_terminal": torch.zeros(3, steps, dtype=torch.bool)}


@pytest.fixture
def only_worker(monkeypatch):
    """train_goals trains no goal autoencoder."""
    monkeypatch.setattr(director.Director, "train_goals", lambda agent, states: {})


def test_goals_in_hindsight_are_all_that_comes_later_in_the_episode_and_nothing_else():
    torch.manual_seed(0)
    states = script()
    goals = hindsight.later_states(states["deter"], states["is_first"], 300)
    assert goals.shape == (300, 3, 11, 16)
    for b, t in itertools.product(range(3), range(11)):
        end = 5 if b == 2 and t < 5 else 12
        assert (goals[:, b, t, 0] == b).all()
        found, counts = goals[:, b, t, 1].unique(return_counts=True)
        if t + 1 < end:  # else it is masked
            assert found.tolist() == list(range(t + 1, end))
            assert counts.min() > 0.4 * 300 / len(found)


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_q_is_trained_towards_what_a_loop_says_under_own_and_later_goals(
        space, monkeypatch, only_worker):
    agent = make(hindsight.Agent, space, her=2, goal_duration=4, horizon=8, reached=0.8)
    states, own, later = script(), torch.randn(3, 11, 16), torch.randn(2, 3, 11, 16)
    if not agent.discrete:
        states["action"] = torch.randn(3, 12, 3)
    states["deter"] = torch.randn(3, 12, 16)
    states["is_terminal"][1, 11] = states["is_terminal"][2, 4] = states["is_terminal"][0, 6] = True
    own[0, 3], later[0, 1, 2] = states["deter"][0, 4], states["deter"][1, 3]  # these are reached
    later[1, 1, 7] = states["deter"][1, 7]  # not this: it is where one starts
    monkeypatch.setattr(hindsight, "later_states", lambda *args: later)
    agent.goals.decode.forward = lambda code: own.flatten(0, 1)
    for param in agent.slow.parameters():  # no copy of the worker
        param += 0.3 * torch.randn_like(param)
    agent.grad_steps, losses = 2, []
    worker, slow = agent.worker, agent.slow
    worker.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)

    def q(nets, b, t, goal, action):
        x = torch.cat([states["deter"][b, t], states["stoch"][b, t], goal])
        x = (x if agent.discrete else torch.cat([x, action]))[None]
        return nets.q(x)[0, action.argmax()] if agent.discrete else nets.q(x)[0]

    def actor(nets, b, t, goal):
        x = torch.cat([states["deter"][b, t], states["stoch"][b, t], goal])
        return nets.actor(x[None])[0].tanh()

    expected, climbed, paid, clipped = 0.0, 0.0, 0, 0
    for goals, b, t in itertools.product([own, *later], range(3), range(11)):
        if states["is_first"][b, t + 1]:
            continue
        goal, there = goals[b, t], states["deter"][b, t + 1]
        cosine = goal @ there / max(goal @ goal, there @ there)
        if agent.discrete:
            future = max(float(q(slow, b, t + 1, goal, action)) for action in torch.eye(5))
        else:
            future = float(q(slow, b, t + 1, goal, actor(slow, b, t + 1, goal)))
            climbed += q(slow, b, t, goal, actor(worker, b, t, goal)) / 99
        paid, clipped = paid + int(cosine > 0.8), clipped + int(not 0 <= future <= 1)
        ends = states["is_terminal"][b, t + 1]
        target = 1.0 if cosine > 0.8 else 0.0 if ends else 0.75 * min(max(future, 0), 1)
        expected += (q(worker, b, t, goal, states["action"][b, t + 1]) - target) ** 2 / 99
    assert paid == 2 and clipped > 0
    close(losses[0], expected - climbed, rtol=1e-4)
    # The actor's gradient reaches nothing but the actor, and Q's nothing but Q.
    assert all(x.grad is None for x in agent.slow.parameters())
    params = list(worker.q.parameters())
    for found, wanted in zip(torch.autograd.grad(losses[0], params, retain_graph=True),
                             torch.autograd.grad(expected, params), strict=True):
        close(found, wanted, rtol=1e-3, atol=1e-6)
    if not agent.discrete:
        params = list(worker.actor.parameters())
        for found, wanted in zip(torch.autograd.grad(losses[0], params),
                                 torch.autograd.grad(-climbed, params), strict=True):
            close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_transition_has_its_own_goal_from_the_manager_in_the_state_it_starts_from(only_worker):
    agent = make(hindsight.Agent, her=1, goal_duration=4, horizon=8)
    states, seen, losses = script(), [], []
    agent.pick = lambda state: seen.append(state) or state["deter"]
    agent.goals.decode.forward = lambda code: seen.append(code) or code.requires_grad_()
    agent.worker.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.train_goals(states)
    assert torch.equal(seen[0]["stoch"], states["stoch"][:, :-1].reshape(33, 16))
    assert torch.equal(seen[1], states["deter"][:, :-1].reshape(33, 16))
    assert torch.autograd.grad(losses[0], seen[1], allow_unused=True) == (None,)


def test_the_slow_worker_becomes_the_worker_every_so_many_steps():
    agent = make(hindsight.Agent, CONTINUOUS, slow_every=3)
    batch = random_batch(np.random.default_rng(0), 2, 9, False, 3)
    for step in range(5):
        before = [copy.deepcopy(x.state_dict()) for x in (agent.worker, agent.slow)]
        agent.train_step(batch)
        for key, value in agent.slow.state_dict().items():
            assert torch.equal(value, before[0 if step % 3 == 0 else 1][key])
    assert not torch.equal(agent.worker.actor.out.weight, agent.slow.actor.out.weight)


def test_noise_is_in_what_is_sampled_and_never_in_an_evaluation():
    feat = torch.randn(20_000, 48)
    for space, noise in itertools.product((DISCRETE, CONTINUOUS), (0.0, 0.3)):
        agent = make(hindsight.Agent, space, noise=noise)
        dist, best = agent.worker.dist(feat), agent.worker.best(feat)
        close(dist.mode, best)
        off = dist.rsample() - best
        if agent.discrete:
            assert torch.equal(best.argmax(-1), agent.worker.q(feat).argmax(-1))
            share = off.abs().amax(-1).mean().detach()  # a random action is the best one, too
            assert abs(float(share) - noise * 4 / 5) < 0.015
        else:
            close(best, agent.worker.actor(feat).tanh())
            assert abs(float(off.std().detach()) - noise) < 0.01
    obs = {"image": np.zeros((50, 64, 64, 3), np.uint8)}
    for space, mode in itertools.product((DISCRETE, CONTINUOUS), ("eval", "train")):
        agent = make(hindsight.Agent, space, noise=0.9)
        action, state = agent.policy(obs, mode=mode)
        exact = torch.equal(action, agent.worker.best(agent.worker.feat(state)))
        assert exact == (mode == "eval")


def test_reaching_a_goal_pays_1_in_imagination_and_the_worker_is_not_trained_there():
    agent = make(hindsight.Agent, horizon=8, reached=0.5)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    near = director.max_cosine(traj["goal"][:-1], traj["deter"][1:])
    paid = agent.reward_goal(traj)
    assert torch.equal(paid, (near > 0.5).float()) and list(agent.views(traj)) == ["manager"]
    assert not any(value.requires_grad for value in traj.values())
    close(agent.train_imagined(traj)["goal_reward_last"], paid[7::8].mean())
    goal, deter = tensor([[1, 0]] * 3), tensor([[9, 9], [1, 0.1], [1, 3]])
    assert agent.reward_goal({"goal": goal, "deter": deter}).tolist() == [1, 0]


def test_hindsight_teaches_the_way_to_goals_where_goals_alone_never_pay(only_worker):
    """The tell-tale, in seconds: a line of eight places; the manager's goals lie outside of it."""
    reached, moves = [], torch.tensor([0, 1, -1, 1, -1])
    for her in (4, 0):
        agent, gen = make(hindsight.Agent, her=her, learning_rate=1e-2, units=32, slow_every=10,
                          noise=0.0), torch.manual_seed(0)
        places, no = 3 * torch.eye(16)[:8], torch.zeros(8, 20, dtype=torch.bool)
        agent.pick = lambda state: torch.zeros(len(state["deter"]), 64)
        agent.goals.decode.forward = lambda code: -torch.ones(len(code), 16)
        for _ in range(200):
            agent.grad_steps += 1
            action = torch.randint(5, (8, 20), generator=gen)
            place = [torch.randint(8, (8,), generator=gen)]
            for t in range(1, 20):
                place.append((place[-1] + moves[action[:, t]]).clamp(0, 7))
            agent.train_goals({
                "deter": places[torch.stack(place, 1)], "stoch": torch.zeros(8, 20, 16),
                "action": torch.eye(5)[action], "is_first": no, "is_terminal": no})
        here, goal = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)
        for _ in range(8):
            feat = torch.cat([places[here], torch.zeros(64, 16), places[goal]], -1)
            here = (here + moves[agent.worker.dist(feat).mode.argmax(-1)]).clamp(0, 7)
        reached.append(float((here == goal).float().mean()))
    assert reached[0] > 0.5 and reached[1] < 0.25, reached


# ---- Options --------------------------------------------------------------------------------

# Two states, two options: option 0 stays, option 1 goes to the other state.
BETA = np.array([[0.3, 0.8], [0.6, 0.1]])  # state, option
PICK = np.array([[0.7, 0.3], [0.4, 0.6]])
REWARD, CONT, DISCOUNT = np.array([1.0, -2.0]), np.array([0.9, 0.7]), 0.3  # of the state reached


def option_values(beta, pick, bonus):
    """Q [state, option], by solving a linear system; a pick in state s earns bonus[s]."""
    system, right = np.eye(4), np.zeros(4)
    for s, w in itertools.product(range(2), range(2)):
        s2, row = s ^ w, 2 * s + w
        d, end = DISCOUNT * CONT[s2], beta[s2, w]
        right[row] = REWARD[s2] + d * end * bonus[s2]
        system[row, 2 * s2 + w] -= d * (1 - end)
        system[row, 2 * s2 : 2 * s2 + 2] -= d * end * pick[s2]
    return np.linalg.solve(system, right).reshape(2, 2)


def entropies(pick):
    return -(pick * np.log(pick)).sum(-1)


def every_way(horizon):
    """All trajectories of the two states: [H+1, N], with their probabilities given the start."""
    columns = []
    for start, *ways in itertools.product(range(2), *[range(2)] * (horizon + 1)):
        states, chance, ends = [start], 1.0, [1.0]
        for t in range(horizon):
            s, w, after = states[-1] ^ ways[t], ways[t], ways[t + 1]
            chance *= (1 - BETA[s, w]) * (after == w) + BETA[s, w] * PICK[s, after]
            states.append(s)
            ends.append(BETA[s, w])
        columns.append((states, ways, ends, chance))
    states, ways, ends, chance = map(np.array, zip(*columns, strict=True))
    traj = {"deter": torch.eye(16)[states.T], "stoch": torch.zeros(horizon + 1, len(states), 16),
            "option": torch.eye(2)[ways.T], "beta": tensor(ends.T), "pick": tensor(PICK[states.T]),
            "cont": tensor(CONT[states.T]), "reward_extr": tensor(REWARD[states.T[1:]]),
            "action": torch.eye(5)[ways.T]}
    return traj, states.T, ways.T, chance


def two_states(table, **flags):
    """An agent whose slow critic has these Q, and whose advantages are taken as they are."""
    agent = make(options.Agent, options=2, discount=DISCOUNT, **flags)
    worker = agent.worker
    worker.slow["extr"].forward = lambda feat: director.symlog(
        torch.einsum("...s,...w,sw->...", feat[..., :2], feat[..., -2:], tensor(table)))
    worker.gapnorm.forward = lambda x, update=True: x
    logits = tensor(np.log(PICK))
    worker.over.forward = lambda state: torch.einsum("...s,sw->...w", state[..., :2], logits)
    worker.pick = lambda state: director.OneHot(worker.over(state))
    return agent


def test_options_are_worth_going_on_and_picking_anew_by_hand():
    agent = two_states([[1, 2], [3, 5]], lam=0.5, option_entropy=0)
    at, option = [0, 1, 1], [1, 0, 0]
    traj = {"deter": torch.eye(16)[at][:, None], "stoch": torch.zeros(3, 1, 16),
            "option": torch.eye(2)[option][:, None], "pick": tensor(PICK[at])[:, None],
            "beta": tensor([1, 0.1, 0.6])[:, None], "cont": torch.ones(3, 1),
            "reward_extr": tensor([10, 20])[:, None]}
    ret, value = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    close(value, [[2], [3]])  # Q of the options that act
    # V of state 1 is 0.4 * 3 + 0.6 * 5 = 4.2. With option 1 it is worth 0.9 * 5 + 0.1 * 4.2 = 4.92
    # to arrive there, with option 0 it is 0.4 * 3 + 0.6 * 4.2 = 3.72.
    last = 20 + 0.3 * 3.72
    close(ret, [[10 + 0.3 * (0.5 * 4.92 + 0.5 * last)], [last]])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_true_option_values_are_what_their_returns_are_on_average(entropy, lam):
    """Over all ways that a trajectory can go, each with its chance; the values solve the chain."""
    table = option_values(BETA, PICK, entropy * entropies(PICK))
    traj, states, ways, chance = every_way(3)
    agent = two_states(table, lam=lam, option_entropy=entropy)
    ret, value = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    close(value, table[states, ways][:-1], rtol=1e-4)
    for t, s, w in itertools.product(range(3), range(2), range(2)):
        chosen = (states[t] == s) & (ways[t] == w)
        mean = (ret[t].numpy() * chance)[chosen].sum() / chance[chosen].sum()
        close(mean, table[s, w], rtol=1e-4)


@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_the_gradient_of_ending_is_that_of_the_option_values(entropy):
    """Against finite differences of the values' linear system in each of the four chances."""
    bonus, logits = entropy * entropies(PICK), np.log(BETA / (1 - BETA))
    table, expected = option_values(BETA, PICK, bonus), np.zeros((2, 2))
    for s, w in itertools.product(range(2), range(2)):
        step = np.zeros((2, 2))
        step[s, w] = 1e-4
        high, low = (option_values(1 / (1 + np.exp(-x)), PICK, bonus).sum()
                     for x in (logits + step, logits - step))
        expected[s, w] = (high - low) / 2e-4
    traj, states, ways, chance = every_way(8)
    traj["cont"][0] = tensor(chance)  # a trajectory counts by its chance
    agent, losses = two_states(table, option_entropy=entropy, option_cost=0), []
    param = tensor(logits).requires_grad_()
    agent.worker.end.forward = lambda state: torch.einsum("...s,sw->...w", state[..., :2], param)
    agent.worker.end.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.worker.over.optimizer.minimize = lambda loss: torch.zeros(())
    agent.worker.learn(traj, copy_slow=False)
    gradient, = torch.autograd.grad(losses[0], param, retain_graph=True)
    close(-gradient * traj["reward_extr"].numel(), expected, rtol=1e-3, atol=1e-4)

    agent.config.option_cost = 1.5  # of ending, where one gets to with an option
    agent.worker.learn(traj, copy_slow=False)
    dearer, = torch.autograd.grad(losses[1] - losses[0], param)
    weights = director.trajectory_weights(traj["cont"], DISCOUNT)[1:].numpy()
    for s, w in itertools.product(range(2), range(2)):
        there = (states[1:] == s) & (ways[:-1] == w)
        slope = BETA[s, w] * (1 - BETA[s, w])
        close(dearer[s, w], 1.5 * slope * (weights * there).mean(), rtol=1e-4)


def test_picks_go_to_options_that_are_worth_more_and_stay_uncertain():
    table = np.array([[1.0, 4.0], [2.0, 1.0]])
    traj, states, _, _ = every_way(2)
    agent, losses = two_states(table, option_entropy=0.5), []
    agent.worker.over.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.worker.end.optimizer.minimize = lambda loss: torch.zeros(())
    param = tensor(np.log(PICK)).requires_grad_()
    agent.worker.over.forward = lambda state: torch.einsum("...s,sw->...w", state[..., :2], param)
    agent.worker.learn(traj, copy_slow=False)
    weights = director.trajectory_weights(traj["cont"], DISCOUNT).numpy()
    gradient, = torch.autograd.grad(losses[0], param)
    for s, w in itertools.product(range(2), range(2)):
        worth = table[s] - 0.5 * np.log(PICK[s])  # Q - 0.5 log pi, whose mean is V with entropy
        slope = PICK[s, w] * (worth[w] - (PICK[s] * worth).sum())
        close(gradient[s, w], -slope * (weights * (states == s)).mean(), rtol=1e-4, atol=1e-6)


def test_rewards_of_any_size_teach_the_same_ends_and_picks():
    found = []
    for size in (1, 1000):
        agent = make(options.Agent, options=2, option_entropy=0.1, option_cost=0.2)
        traj = agent.imagine(starts_at(*torch.randn(2, 8, 16)))
        old = agent.worker.slow["extr"].forward
        agent.worker.slow["extr"].forward = lambda feat, size=size, old=old: director.symlog(
            size * old(feat))
        traj["reward_extr"] = size * traj["reward_extr"]
        for name in ("end", "over"):
            getattr(agent.worker, name).optimizer.minimize = (
                lambda loss: found[-1].append(loss.detach()) or torch.zeros(()))
        found.append([])
        agent.worker.learn(traj, copy_slow=False)
        ret, _ = agent.worker.returns("extr", agent.worker.feat(traj), traj)
        found[-1].append(ret.mean() / size)
    close(found[0], found[1], rtol=1e-3)


@pytest.mark.parametrize("acting", [True, False])
def test_an_option_ends_in_the_state_arrived_in_by_its_own_chance(acting):
    """Option 0 never ends, 1 always, 2 where t is a multiple of 3; picks are 0, 1, 2 in turns."""
    agent = make(options.Agent, options=3, horizon=8)
    worker = agent.worker

    def end(features):
        where = features[:, :1]  # t
        never, always = torch.full_like(where, -50), torch.full_like(where, 50)
        return torch.cat([never, always, torch.where(where % 3 == 0, always, never)], -1)

    worker.end.forward = end
    picks = torch.eye(3)[[0, 1, 2]]
    worker.pick = lambda features: type("", (), {"rsample": lambda _: picks, "probs": picks})()
    agent.world_model.rssm.img_step = lambda deter, stoch, action: (deter + 1, stoch)
    steps, state = [], starts_at(torch.zeros(3, 16), torch.zeros(3, 16))
    if acting:
        for t in range(9):
            state["deter"] = torch.full((3, 16), float(t))
            picks = torch.eye(3)[[0, 1, 2]].roll(t, 0)
            state = {"count": np.zeros(3), **state}
            state = agent.act(state, np.array([t == 0, t == 0, t in (0, 5)]), "train")
            steps.append(state["option"].argmax(-1).tolist())
        # Picks at time t: (0 - t, 1 - t, 2 - t) mod 3, used where the option before has ended.
        assert [x[0] for x in steps] == [0] * 9
        assert [x[1] for x in steps] == [1, 0, 0, 0, 0, 0, 0, 0, 0]
        assert [x[2] for x in steps] == [2, 2, 2, 2, 2, 0, 0, 0, 0]  # anew at 5
    else:
        traj = agent.imagine(state)
        assert traj["option"].argmax(-1)[:, 1].tolist() == [1] * 9  # picked again in each state
        close(traj["beta"], [[1, 1, 1]] + [[0, 1, t % 3 == 0] for t in range(1, 9)])


def test_options_last_as_long_as_beta_says_and_an_episode_picks_anew():
    agent = make(options.Agent, options=4)
    agent.worker.end.forward = lambda features: torch.full((len(features), 4), 0.25).logit()
    agent.worker.over.forward = lambda features: torch.zeros(len(features), 4)
    state, ended = {"deter": torch.zeros(4000, 16), "stoch": torch.zeros(4000, 16)}, []
    before = agent.choose(state, np.zeros(4000))["option"]
    close(before.mean(0), [0.25] * 4, atol=0.03)
    count = np.where(np.arange(4000) < 2000, 0, 7)
    chosen = agent.choose({**state, "option": before}, count)
    close(chosen["beta"], np.where(count == 0, 1, 0.25))
    close(chosen["pick"], np.full((4000, 4), 0.25))
    ended = (chosen["option"] != before).any(-1).float()
    assert float(ended[:2000].mean()) == pytest.approx(3 / 4, abs=0.04)
    assert float(ended[2000:].mean()) == pytest.approx(3 / 16, abs=0.04)  # of 1/4, 1 of 4 the same


def test_one_option_is_the_flat_agent():
    agent = make(options.Agent, options=1, option_entropy=0.3, option_cost=0.1)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    feat = agent.worker.feat(traj)
    flat = director.ActorCritic.returns(agent.worker, "extr", feat, traj)
    for found, expected in zip(agent.worker.returns("extr", feat, traj), flat, strict=True):
        close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE])
def test_no_gradient_of_actions_leads_through_ends_and_picks(space):
    agent = make(options.Agent, space)
    traj = agent.imagine(starts_at(*torch.randn(2, 6, 16)))
    assert not any(traj[key].requires_grad for key in ("option", "beta", "pick"))
    assert traj["reward_extr"].requires_grad == (space is CONTINUOUS)
    ret, _ = agent.worker.returns("extr", agent.worker.feat(traj), traj)
    assert ret.requires_grad == (space is CONTINUOUS)


def test_options_learn_to_end_where_another_is_worth_more():
    """The tell-tale, in seconds: option w is worth 1 more in state w; a high cost ends nothing."""
    found = []
    for cost in (0.1, 50):
        agent = make(options.Agent, options=2, learning_rate=1e-2, discount=DISCOUNT,
                     option_cost=cost, option_entropy=0.01)
        worker, feats = agent.worker, torch.eye(32)[:2]
        worker.slow["extr"].forward = lambda feat: (feat[..., :2] * feat[..., -2:]).sum(-1)
        traj, *_ = every_way(2)
        for _ in range(100):
            traj["pick"] = worker.pick(worker.feat(traj)[..., :-2]).probs.detach()
            worker.learn(traj, copy_slow=False)
        found.append((worker.pick(feats).probs, worker.end(feats).sigmoid()))
    (pick, end), (_, dear) = found
    assert (pick.diagonal() > 0.9).all() and (end.diagonal() < 0.3).all(), (pick, end)
    assert (end.flip(0).diagonal() > 0.7).all() and (dear < 0.3).all(), (end, dear)


# ---- Three levels ---------------------------------------------------------------------------


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
    agent = make(hac.Agent, goal_duration=2, top_duration=2, horizon=8, hindsight=0)
    del agent.goals, agent.top_goals
    agent.goals = agent.top_goals = Scripted(0)
    views = {name: {key: value[:, ::3].reshape(len(value), -1).T.tolist()  # of three equal columns
                    for key, value in view.items()}
             for name, view in agent.views(counted(agent)).items()}
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
    agent = make(hac.Agent, goal_duration=2, top_duration=2, horizon=8, hindsight=1)
    del agent.goals, agent.top_goals
    agent.goals, agent.top_goals = Scripted(0.25), Scripted(0.5)
    views = agent.views(counted(agent))
    action = views["manager"]["action"].squeeze(-1)
    assert action[:-1, ::3].T.tolist() == [[2.25, 4.25], [6.25, 8.25]]  # the last one earns nothing
    assert views["top"]["action"][:-1, 0, 0].tolist() == [4.5, 8.5]
    assert views["worker"]["skill"][0, ::3, 0].tolist() == [1, 11, 21, 31]  # these stay
    agent.config.hindsight = 0.3
    many = {key: value[:, :1].repeat_interleave(5000, 1) if value.dim() > 1 else value
            for key, value in counted(agent).items()}
    changed = agent.views(many)["top"]["action"][:-1, :, 0] == tensor([4.5, 8.5])[:, None]
    assert torch.equal(*changed) and 0.27 < changed.float().mean() < 0.33


@pytest.mark.parametrize("imagined", [True, False])
def test_hac_levels_choose_at_their_own_times_and_the_middle_sees_the_new_goal(imagined):
    agent, seen = make(hac.Agent, goal_duration=2, top_duration=3, horizon=12), []
    pick = agent.pick
    agent.pick = lambda state: seen.append(state["top_goal"]) or pick(state)
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


def test_hac_pays_the_middle_for_where_its_choice_has_led_and_for_nothing_before():
    agent = make(hac.Agent, goal_duration=2, top_duration=2, horizon=8)
    deter = tensor([[1, 0], [9, 9], [0, 2], [9, 9], [4, 0], [9, 9], [3, 4], [9, 9], [3, 4]])
    goal = tensor([[2, 0]] * 4 + [[3, 4]] * 4 + [[7, 7]])
    reward = agent.reward_reach({"deter": deter[:, None], "top_goal": goal[:, None]})
    close(reward[:, 0], [0, 0, 0.5, 0.5, 1, 1, 1, 1], atol=1e-6)
    assert dict(agent.manager.rewards) == {"reach": 1} and "extr" in agent.top.rewards
    assert make(hac.Agent, middle_extr=0.5).manager.rewards == {"reach": 1, "extr": 0.5}
    agent.goals.novelty = lambda deter: 0 * deter[..., 0]
    agent.top_goals.novelty = lambda deter: deter[..., 0]
    close(agent.reward_expl({"deter": deter})[:2], [9, 0])


def test_hac_autoencoders_are_two_that_learn_the_same_states():
    agent, learned = make(hac.Agent), []
    for goals in (agent.goals, agent.top_goals):
        goals.loss = lambda deter, goals=goals: learned.append((goals, deter)) or (
            sum(p.square().sum() for p in goals.parameters()), {})
    agent.train_goals({"deter": torch.arange(96.0).view(2, 3, 16)})
    assert [goals for goals, _ in learned] == [agent.goals, agent.top_goals]
    assert all(torch.equal(x, torch.arange(96.0).view(6, 16)) for _, x in learned)
    assert agent.goals is not agent.top_goals


def test_hac_goals_of_the_top_that_are_reached_show_beside_those_of_others():
    agent = make(hac.Agent, goal_duration=2, top_duration=2, horizon=8)
    traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    for start in (0, 4):  # reached at the end, and never before
        traj["top_goal"][start : start + 4] = traj["deter"][start + 4]
    traj["reward_reach"] = agent.reward_reach(traj)
    metrics = agent.train_imagined(traj)
    close(metrics["reach_last"], 1, rtol=1e-4)
    other = [director.max_cosine(traj["deter"][t].roll(2, 0), traj["deter"][t]) for t in (4, 8)]
    close(metrics["reach_other"], torch.stack(other).mean())
    assert float(metrics["reach_other"]) < 0.99


# ---- Dyna-Q ---------------------------------------------------------------------------------


def symlog(x: float) -> float:
    return math.copysign(math.log1p(abs(x)), x)


def test_dyna_q_learns_the_one_step_target_also_at_ends_and_time_limits():
    agent, losses = make(dyna_q.Agent, batch_length=5), []
    values = tensor([[0, 1], [2, -1], [0.5, 0.2], [1, 3], [4, 5], [0.1, 2]])  # of states 0..5
    agent.worker.q.forward = lambda feat: values[feat[..., 0].long()]
    agent.worker.slow.forward = lambda feat: 2 * values[feat[..., 0].long()]
    agent.worker.q.optimizer.minimize = lambda loss: losses.append(loss) or torch.zeros(())
    agent.grad_steps = 1
    deter = torch.arange(6.0)[None, :, None].expand(1, 6, 16)
    action = tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1], [1, 0]])[None]  # led to the state
    states = {"deter": deter, "stoch": deter, "action": action,
              "reward": tensor([[9, 1, -2, 9, 5, 7]]),
              "is_first": torch.tensor([[1, 0, 0, 1, 0, 0]]).bool(),
              "is_terminal": torch.tensor([[0, 0, 0, 0, 0, 1]]).bool(),
              "is_last": torch.tensor([[0, 0, 1, 0, 0, 1]]).bool()}  # at 2 a time limit
    agent.train_goals(states)
    expected = [
        (1 - symlog(1 + 0.99 * math.expm1(4))) ** 2,  # 0 to 1 by the second action; 2 max(2, -1)
        (2 - symlog(-2 + 0.99 * math.expm1(1))) ** 2,  # 1 to 2: a time limit, so it goes on
        (3 - symlog(5 + 0.99 * math.expm1(10))) ** 2,  # 3 to 4; from 2 to 3 nothing leads
        (4 - symlog(7)) ** 2]  # 4 to 5, the end
    close(losses[0], sum(expected) / 5)


def test_dyna_q_plans_one_random_step_from_each_replayed_state_but_ends():
    agent, seen = make(dyna_q.Agent, planning=3), []
    deter, stoch = torch.randn(2, 400, 16)
    end = torch.arange(400) % 4 == 0
    agent.world_model.reward_head.forward = lambda feat: feat[..., 0]
    agent.world_model.cont_head.forward = lambda feat: feat[..., 1]
    traj = agent.imagine({**starts_at(deter, stoch), "is_terminal": end})
    assert {len(x) for x in traj.values()} == {3}
    share = traj["action"].flatten(0, 1).mean(0).numpy()
    assert share == pytest.approx(0.2 * np.ones(5), abs=0.06)
    assert not torch.equal(traj["action"][0], traj["action"][1])
    for i in range(3):
        close(traj["before"][i], torch.cat([deter, stoch], -1))
        after = agent.world_model.rssm.recur(deter, stoch, traj["action"][i])
        close(traj["after"][i, :, :16], after)
    close(traj["reward"], director.symexp(traj["after"][..., 0]))
    close(traj["cont"], traj["after"][..., 1].sigmoid())
    assert torch.equal(traj["weight"], (~end).float().expand(3, -1))
    agent.learn = lambda index, steps: seen.append((index, steps)) or {}
    agent.train_imagined(traj)
    assert [index for index, _ in seen] == [1, 2, 3]
    for i, (_, steps) in enumerate(seen):
        assert all(torch.equal(steps[key], traj[key][i]) for key in traj)


def test_dyna_q_updates_once_from_replay_then_plans_and_copies_by_the_number_of_updates():
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    for planning in (0, 2):
        agent, updates = make(dyna_q.Agent, planning=planning, slow_every=4), []
        network, minimize = agent.worker, agent.worker.q.optimizer.minimize

        def check(loss, network=network, minimize=minimize, updates=updates):
            if updates:  # whether it was copied after the last update
                updates[-1] = torch.equal(network.q.out.weight, network.slow.out.weight)
            updates.append(None)
            assert loss.requires_grad
            return minimize(loss)

        network.q.optimizer.minimize = check
        for _ in range(4):
            metrics = agent.train_step(batch)
        assert len(updates) == 4 * (1 + planning)
        assert [i for i, copied in enumerate(updates) if copied] == list(range(0, len(updates), 4))
        assert ("imagined_loss" in metrics) == bool(planning)


def test_dyna_q_acts_greedily_but_for_a_share_of_epsilon():
    agent = make(dyna_q.Agent, epsilon=0.3)
    agent.worker.q.forward = lambda feat: feat[..., :5]
    feat = tensor([[0, 3, 1, 2, 2.9]]).expand(20_000, -1)
    dist = agent.worker.dist(feat)
    close(dist.probs[0], [0.06, 0.76, 0.06, 0.06, 0.06])
    assert dist.rsample().mean(0).numpy() == pytest.approx([0.06, 0.76, 0.06, 0.06, 0.06], abs=0.01)
    assert dist.mode[:, 1].all()
    agent.worker.epsilon = 0.0
    assert agent.worker.dist(feat).rsample()[:, 1].all()


def test_the_twin_of_dyna_q_learns_as_often_from_replayed_steps_alone(monkeypatch):
    agent, seen = make(relatives.Again, planning=2), []
    monkeypatch.setattr(dyna_q.Agent, "learn", lambda _, index, steps: (
        seen.append((index, steps)) or {}))
    agent.train_step(random_batch(np.random.default_rng(0), 2, 9, True, 5))
    assert [index for index, _ in seen] == [0, 1, 2] and "weight" in seen[0][1]
    assert all(steps is seen[0][1] for _, steps in seen)
    assert seen[0][1]["before"].shape[:2] == (2, 8)  # of pairs


def test_planning_finds_the_way_that_replay_never_took():
    """The tell-tale, in seconds: a model in which an action that nobody tried pays."""
    found = []
    for planning in (0, 5):
        agent = make(dyna_q.Agent, planning=planning, learning_rate=3e-3)
        model = agent.world_model
        model.rssm.img_step = lambda deter, stoch, action: (
            torch.cat([action, deter[..., 5:]], -1), stoch)
        model.reward_head.forward = lambda feat: 2 * feat[..., 3]  # the fourth action
        model.cont_head.forward = lambda feat: -9 + 0 * feat[..., 0]  # one step, and it ends
        gen = torch.manual_seed(0)
        for _ in range(60):
            agent.grad_steps += 1
            deter, stoch = torch.randn(2, 4, 9, 16, generator=gen)
            tried = torch.eye(5)[torch.randint(0, 3, (4, 9), generator=gen)]
            agent.train_goals({
                "deter": deter, "stoch": stoch, "action": tried, "reward": torch.zeros(4, 9),
                "is_first": torch.zeros(4, 9).bool(), "is_terminal": torch.ones(4, 9).bool()})
            traj = agent.imagine({"deter": deter.flatten(0, 1), "stoch": stoch.flatten(0, 1),
                                  "is_terminal": torch.zeros(36).bool()})
            agent.train_imagined(traj)
        feat = agent.worker.feat({"deter": deter, "stoch": stoch})
        found.append(float(agent.worker.dist(feat).mode[..., 3].mean()))
    assert found[0] < 0.9 < found[1], found


def test_dyna_q_wants_discrete_actions_and_no_goals(capsys, tmp_path):
    run = ["--task=gym_Pendulum-v1", f"--logdir={tmp_path}/run"]
    assert director.main(run, dyna_q.Agent) == 2
    error = capsys.readouterr().err
    assert "dyna_q needs discrete actions" in error and error.count("\n") == 1
    folder = director.folder_of(dyna_q.Config(task="gym_Corridor-v0", size="xs"), dyna_q.Agent)
    assert str(folder) == "runs/gym_Corridor-v0/dyna_q-dreamer-xs-0"
    assert {field.name for field in dataclasses.fields(dyna_q.Config)} >= {"planning", "epsilon"}
    assert make(dyna_q.Agent, DISCRETE).players == {}


# ---- Prioritised replay ---------------------------------------------------------------------


def row(number: int, episode: int, is_last: bool) -> dict:
    """A step whose reward is its number in the episode, and whose state is the episode's."""
    return {"reward": np.float32([number]), "state": np.float32([[episode]]),
            "action": np.zeros((1, 2), np.float32), "is_first": np.array([number == 0]),
            "is_last": np.array([is_last]), "is_terminal": np.zeros(1, bool)}


def prioritized_replay(*lengths: int, capacity: int = 10**6):
    """A replay with episodes of these lengths and the agent whose errors it hears of."""
    replay = prioritized.Replay(capacity)
    replay.agent = make(prioritized.Agent)
    for episode, length in enumerate(lengths):
        for number in range(length):
            replay.add(row(number, episode, number == length - 1))
    return replay


def hand_back(replay, places, errors):
    replay.agent.seen = torch.tensor([places]), tensor([errors])
    replay.update()


def test_priorities_follow_curious_replay_and_belong_to_the_steps_that_were_trained_on():
    replay, new = prioritized_replay(4, 3), prioritized.NEW
    hand_back(replay, [[0, 1], [0, 2], [1, 2]], [2.0, 5.0, 0.3])
    close(replay.priority[0], [new, 7000 + 2.01**0.7, 7000 + 5.01**0.7, new])
    close(replay.priority[1], [new, new, 7000 + 0.31**0.7])
    hand_back(replay, [[0, 2], [0, 2], [1, 0]], [1.0, 1.0, 4.0])  # twice in a batch
    close(replay.priority[0], [new, 7000 + 2.01**0.7, 3430 + 1.01**0.7, new])
    close(replay.visits[0], [0, 1, 3, 0])
    close(replay.visits[1], [1, 0, 1])
    for name in (0, 1):
        assert replay.total[name] == pytest.approx(replay.priority[name].sum(), rel=1e-12)
    replay.update()  # errors count once
    close(replay.visits[0], [0, 1, 3, 0])
    for _ in range(100):
        hand_back(replay, [[0, 1]], [6.0])
    close(replay.priority[0][1], 6.01**0.7)  # now the error alone decides


def test_chunks_start_as_often_as_priorities_say():
    replay = prioritized_replay(5, 2, 7)
    priority = {0: [1, 5, 2, 0.5, 8], 1: [3, 1], 2: [1, 1, 9, 1, 4, 1, 2]}
    for name, values in priority.items():
        replay.update()
        replay.priority[name][:] = values
        replay.total[name] = sum(values)
    total, length, draws = sum(map(sum, priority.values())), 2, 20_000
    expected, found = {}, {}
    for name, values in priority.items():
        for step, value in enumerate(values):
            key = name, max(0, min(step, len(values) - length))
            expected[key] = expected.get(key, 0) + value / total
    for key in map(tuple, replay.sample(draws, length)["place"][:, 0]):
        found[key] = found.get(key, 0) + 1 / draws
    assert found.keys() == expected.keys()
    for key, share in expected.items():
        assert abs(found[key] - share) < 4 * (share / draws) ** 0.5, key


def test_chunks_keep_the_rules_of_replay_and_tell_their_places():
    replay = prioritized_replay(5, 2, 7)
    batch = replay.sample(200, 4)
    assert batch["place"].shape == (200, 4, 2) and batch["state"].shape == (200, 4, 1)
    close(batch["place"][..., 0], batch["state"][..., 0].astype(int))
    close(batch["place"][..., 1], batch["reward"].astype(int))
    assert batch["is_first"][:, 0].all()
    name, step = batch["place"][..., 0], batch["place"][..., 1]
    goes_on = (name[:, 1:] == name[:, :-1]) & (step[:, 1:] == step[:, :-1] + 1)
    assert (goes_on | batch["is_first"][:, 1:]).all()
    short = (name == 1).any(1)  # too short: the next one drawn follows
    assert short.any() and (batch["is_first"][~short].sum(1) == 1).all()
    assert not replay.episodes[0]["is_first"][1:].any()  # it is as it was


def test_what_is_new_is_drawn_first_and_what_is_forgotten_never():
    replay = prioritized_replay(6, 6, capacity=17)
    hand_back(replay, [[name, step] for name in (0, 1) for step in range(6)], 12 * [50.0])
    for number in range(6):
        replay.add(row(number, 2, number == 5))
    assert list(replay.episodes) == [1, 2]
    names = replay.sample(400, 2)["place"][..., 0]
    assert set(np.unique(names)) == {1, 2} and (names == 2).mean() > 0.85  # 1e5 against 7e3
    assert replay.visits.keys() == replay.priority.keys() == replay.total.keys() == {1, 2}
    hand_back(replay, [[0, 1], [2, 1]], [1.0, 1.0])  # errors of what was forgotten meanwhile
    close(replay.visits[2], [0, 1, 0, 0, 0, 0])


def test_each_step_gets_its_own_error_of_the_model_and_a_picture_is_no_visit():
    agent = make(prioritized.Agent)
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    place = np.stack(np.meshgrid([3, 4], range(9), indexing="ij"), -1)
    loss, states, _ = agent.world_model.loss(agent.tensors(batch))
    assert states["error"].shape == (2, 9)
    close(states["error"].mean(), loss.detach())
    image = agent.world_model.decoder(torch.cat([states["deter"], states["stoch"]], -1))["image"]
    squares = (image - agent.tensors(batch)["image"] / 255).square().flatten(2).sum(-1)
    rest = states["error"] - squares
    assert rest.std() < 0.2 * squares.std()  # so they are in the right places
    agent.train_step(batch)
    assert agent.seen is None  # another replay's
    losses, model_loss = [], agent.world_model.loss
    agent.world_model.loss = lambda batch: losses.append(model_loss(batch)) or losses[-1]
    agent.train_step({**batch, "place": place})
    seen, error = agent.seen
    assert torch.equal(seen, torch.as_tensor(place)) and not error.requires_grad
    assert torch.equal(error, losses[0][1]["error"])
    replay = prioritized.Replay(100)
    replay.agent = agent
    for episode in range(5):
        for number in range(9):
            replay.add(row(number, episode, number == 8))
    replay.sample(6, 8)
    replay.sample(6, 8)  # what is not trained on is not visited
    close(np.stack([replay.visits[name] for name in range(5)]),
          np.repeat([[0], [0], [0], [1], [1]], 9, 1))
    close(replay.priority[4], 7000 + (error[1].numpy() + 0.01) ** 0.7, rtol=1e-6)


def test_a_run_hands_errors_to_its_replay_and_starts_anew_when_it_resumes(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(prioritized.Run, "close", lambda run: (
        runs.append(run), director.Run.close(run)))
    run = [*RUN, "--task=gym_Corridor-v0", "--batch_length=10", f"--logdir={tmp_path}"]
    for steps in (300, 400):
        assert director.main([*run, f"--steps={steps}"], prioritized.Agent) == 0
        replay = runs[-1].replay
        replay.update()
        visits = sum(x.sum() for x in replay.visits.values())
        trained = runs[-1].agent.grad_steps - (runs[0].agent.grad_steps if len(runs) > 1 else 0)
        size = runs[-1].config.batch_size * 10
        assert 0 < visits <= trained * size and visits % size == 0
    assert len(runs) == 2


# ---- Latents --------------------------------------------------------------------------------

def kl(post, prior):
    """KL of categoricals, [..., S, C] -> [...], by PyTorch's distributions."""
    kind = torch.distributions.OneHotCategorical
    return torch.distributions.kl_divergence(kind(logits=post), kind(logits=prior)).sum(-1)


def test_hdreamer_has_a_kl_and_a_scale_for_each_level():
    agent = make(hdreamer.Agent, stoch=4, classes=4, bottom_stoch=3, bottom_classes=5, kl_target=2)
    model, gen = agent.world_model, torch.manual_seed(0)
    states = {key: torch.randn(2, 6, 16 + 15, generator=gen, requires_grad=True)
              for key in ("post", "prior")}
    close(model.kl_adapt.target, [2 * 4 / 7, 2 * 3 / 7])
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
    flags = {"bottom_stoch": 3, "bottom_classes": 5, "device": "cpu", "precision": "float32"}
    agents = [director.load(tmp_path, device="cpu", precision="float32"),
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


def test_what_pin_pad_shows_is_read_off_its_images_and_probes_tell_only_what_is_there():
    env, rng, images, truth = PinPad("three"), np.random.default_rng(0), [], []
    env.reset(seed=0)
    for step in range(600):
        if step % 40 == 39:
            env.countdown = 5
        image = env.step(int(rng.integers(5)) if step % 3 else step % 5)[0]["image"]
        images.append(image)
        last = (0, 0, *env.history)[-2:]
        truth.append((env.player[0] - 1, env.player[1] - 1, last[1], last[0], env.countdown > 0))
    told = levels.labels(torch.as_tensor(np.stack(images)) / 255)
    assert torch.stack(list(told.values()), 1).tolist() == [[*map(int, x)] for x in truth]
    assert all(len(x.unique()) > 1 for x in told.values())
    classes, train = torch.randint(3, (4000,)), torch.arange(4000) < 3000
    shown = torch.cat([torch.eye(3)[classes], torch.randn(4000, 20)], 1)
    assert levels.probe(shown, classes, train) > 0.99
    assert levels.probe(shown[:, 3:], classes, train) < 0.4


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


# ---- CUDA graphs ----------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=name)
def test_a_train_step_as_cuda_graphs_equals_the_eager_one(space):
    """Over copies of the critics, new batches, and random numbers that are seeded in between."""
    results, rng = [], np.random.default_rng(0)
    size = 5 if space is DISCRETE else 3
    batches = [random_batch(rng, 4, 12, space is DISCRETE, size) for _ in range(5)]
    for batch in batches:  # convolutions differ a little from time to time
        batch["state"] = batch.pop("image")[..., 0, 0, :].astype(np.float32) / 255
    for graphs in (False, True):
        torch.manual_seed(0)
        config = director.Config(**{**TINY, "size": "xs", "device": "cuda", "slow_every": 4})
        agent = director.Director(spaces.Dict({"state": spaces.Box(0, 1, (3,))}), space, config)
        step, metrics = Graphed(agent) if graphs else agent.train_step, []
        for i in range(18):
            if i in (7, 10):
                torch.manual_seed(i)  # as where a checkpoint is saved
            metrics.append(step(batches[i % 5]))
        results.append(([{k: float(v) for k, v in x.items()} for x in metrics],
                        {k: v.cpu() for k, v in agent.state_dict().items()}, agent.grad_steps))
    (expected, weights, count), (found, others, other) = results
    assert count == other == 18
    for one, two in zip(expected, found, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-5)


# ---- Several processes ----------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
HALVES = """
import sys
sys.path.insert(0, {here!r})
import numpy as np, torch, director
from variants import parallel, test_variants

def make(kind, parts, darker=1):
    agent = test_variants.make(director.Director, getattr(test_variants, kind))
    batch = test_variants.random_batch(
        np.random.default_rng(0), 4, 9, agent.discrete, agent.sizes["action"])
    batch = {{key: x.astype(float) if x.dtype == np.float32 else x for key, x in batch.items()}}
    batch["image"][:2] //= darker
    return agent, {{key: np.split(x, parts)[parallel.RANK % parts] for key, x in batch.items()}}

def steps(kind, parts):
    agent, part = make(kind, parts)
    for _ in range(5):
        metrics = agent.train_step(part)
    metrics.pop("goal_reward_other")  # other goals are exchanged
    return torch.stack(director.average(list(metrics.values()))), agent.state_dict()

def sees(parts):  # a darker half alone does not explain its variance
    agent, part = make("DISCRETE", parts, darker=8)
    image = agent.tensors(part)["image"] / 255 + 0.03
    agent.world_model.decoder.forward = lambda feat: {{"image": image}}
    return agent.world_model.loss(agent.tensors(part))[2]["sees"].item()

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
director.OneHot.rsample = lambda dist: dist.mode + (dist.probs - dist.probs.detach())
director.BoundedNormal.rsample = lambda dist: dist.mean
kinds = "DISCRETE", "CONTINUOUS"
whole = [steps(kind, 1) for kind in kinds]
alone = sees(2)
torch.distributed.init_process_group("gloo")
director.average = parallel.average
halves = [steps(kind, 2) for kind in kinds]
torch.save((whole, halves, (alone, sees(2))), f"{{parallel.RANK}}.pt")
torch.distributed.destroy_process_group()
"""


def train_halves(folder):
    (folder / "halves.py").write_text(HALVES.format(here=str(HERE)))
    subprocess.run([*TORCHRUN, "halves.py"], check=True, cwd=folder)


def test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole(ended):
    for rank in range(2):
        *results, seen = torch.load(ended / f"{rank}.pt")
        assert seen == (rank, 1)  # alone, together
        for whole, halves in zip(*results, strict=True):
            assert whole[0].dtype == torch.float64
            np.testing.assert_allclose(halves[0], whole[0], rtol=1e-10)
            for key, value in whole[1].items():
                np.testing.assert_allclose(halves[1][key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("agent", [feudal, higl])
def test_it_can_be_measured_whether_the_manager_of_a_variant_leads(
        agent, tmp_path, capsys, monkeypatch):
    flags = [*RUN, "--task=gym_Corridor-v0", f"--logdir={tmp_path}", "--prefill=100"]
    assert director.main([*flags, "--batch_length=10", "--steps=108"], agent.Agent) == 0
    name = agent.__name__.rpartition(".")[2]
    for more in ([], ["--modes"]):
        text = run_program(monkeypatch, capsys, "lead", tmp_path, "--variant", name, *more)
        assert len(re.findall(r"goals: .*, actions: .*: mean return \d+", text)) == 4, text
    for more in ([], ["--variant", "no_such"]):
        with pytest.raises(SystemExit) as raised:
            run_program(monkeypatch, capsys, "lead", tmp_path, *more)
        error = capsys.readouterr().err
        assert raised.value.code == 2 and error.count("\n") == 1
        assert ("--variant no_such: " if more else f"holds a run of {name}") in error


def ranks(*command) -> list[subprocess.Popen]:
    """Both processes of a run, as torchrun starts them, which takes it seconds."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [subprocess.Popen([sys.executable, "-m", "variants.parallel", *command], cwd=HERE,
                             env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for rank in range(2)]


TOGETHER = [*RUN, "--task=gym_Corridor-v0", "--envs=4", "--steps=400"]


def train_save_resume(folder):
    flags = [*TOGETHER, f"--logdir={folder}"]
    # A signal to one of them stops both, after the same step; rank 0 alone prints.
    first, second = ranks(*flags, "--steps=9000")
    assert any("model loss" in line for line in first.stdout)  # both are training
    second.send_signal(signal.SIGTERM)
    said, silence = first.communicate()[0], second.communicate()[0]
    saved = torch.load(folder / "checkpoint.pt")
    assert f"Saved at step {saved['step']}; the same" in said and "gradient" not in silence
    assert [sum(x.values()) for x in saved["episodes"].values()] == [saved["step"] // 2] * 2
    assert first.returncode == second.returncode == 128 + signal.SIGTERM
    for more, word in (("--steps=900", f"Resumed at step {saved['step']}."),
                       ("--eval=1", "episode 1: return")):
        first, second = ranks(*flags, more)
        said, silence = first.communicate()[0], second.communicate()[0]
        assert said.count(word) == 1 and silence == "", said + silence
        assert first.returncode == second.returncode == 0


def test_two_processes_train_save_and_resume_as_one_run(ended, monkeypatch, capsys):
    flags = [*TOGETHER, f"--logdir={ended}"]
    assert read_metrics(ended)[-1]["train/grad_steps"] == (900 - 100) / 8
    assert director.main(flags, parallel.Agent) == 2
    assert "is of 2 processes, not 1" in capsys.readouterr().err
    monkeypatch.setattr(parallel, "RANKS", 2)
    assert director.main([*flags, "--envs=3"], parallel.Agent) == 2
    assert "--envs: not multiples of 2 processes" in capsys.readouterr().err


BESIDE = {  # what these tests wait for: two processes, which take half a minute to start
    "test_two_processes_train_save_and_resume_as_one_run": train_save_resume,
    "test_two_processes_with_halves_of_a_batch_equal_one_with_the_whole": train_halves}


@pytest.fixture(scope="module", autouse=True)
def processes(request, tmp_path_factory):
    """{test: its folder, once its processes have ended}; beside other tests, a pair at a time."""
    def run(name):
        folder = tmp_path_factory.mktemp("beside")
        BESIDE[name](folder)
        return folder

    names = [name for name in BESIDE if name in {item.name for item in request.session.items}]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(run, name) for name in names}


@pytest.fixture
def ended(processes, request):
    return processes[request.node.name].result()


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
