"""What holds for every variant: it learns, acts, saves, resumes, evaluates and draws."""

import copy
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import director
from conftest import (
    CONTINUOUS,
    DISCRETE,
    HERE,
    RUN,
    check_optimizer_ownership,
    close,
    make_variant,
    random_batch,
    read_metrics,
    replayed,
    short_name,
    starts_at,
)
from variants import (
    diayn,
    disagreement,
    dreamer_v3,
    dyna_q,
    feudal,
    gaussian,
    hac,
    hdreamer,
    higl,
    hindsight,
    options,
    pets,
    planner,
    prioritized,
    same_episode,
)

VARIANTS = [  # agent, flags
    (feudal.Agent, {}), (feudal.Agent, {"feudal_reward": "dot"}),
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
    (pets.Agent, {"candidates": 20, "rounds": 2, "disagreement_target": "embed"}),
    (pets.Agent, {"candidates": 20, "rounds": 2, "planner": "codes", "members": 2}),
    (pets.Agent, {"candidates": 20, "rounds": 2, "agent": "dreamer"}),
    (hdreamer.Agent, {"bottom_stoch": 3, "bottom_classes": 5}),
    (hdreamer.Agent, {"bottom_stoch": 3, "bottom_classes": 5, "free_nats": 0.1}),
    (gaussian.Agent, {}),
    (dreamer_v3.Agent, {"warmup": 0}),
    (dreamer_v3.Agent, {"warmup": 0, "agent": "dreamer", "rms_silu": "no"}),
    (options.Agent, {}), (options.Agent, {"options": 1}), (options.Agent, {"option_entropy": 0}),
    (hac.Agent, {"horizon": 32}), (hac.Agent, {"hindsight": 0.5, "middle_extr": 0.5}),
    (dyna_q.Agent, {}), (dyna_q.Agent, {"planning": 0}), (dyna_q.Agent, {"expand": 3}),
    (prioritized.Agent, {}), (prioritized.Agent, {"agent": "dreamer"})]


@pytest.mark.parametrize("space", [CONTINUOUS, DISCRETE], ids=short_name)
@pytest.mark.parametrize(("agent", "flags"), VARIANTS, ids=short_name)
def test_a_variant_makes_train_steps_and_acts_and_each_parameter_has_one_optimizer(
        agent, flags, space, monkeypatch):
    if agent is dyna_q.Agent and space is CONTINUOUS:
        with pytest.raises(director.UserError, match="discrete"):
            make_variant(agent, space, **flags)
        return
    agent = make_variant(agent, space, **flags)
    batch = random_batch(np.random.default_rng(0), 2, 19, agent.discrete, agent.sizes["action"])
    metrics = [check_optimizer_ownership(agent, batch) for _ in range(3)][-1]
    assert all(value.isfinite() for value in metrics.values()), metrics
    assert ("goal_reward_other" in metrics) == bool(agent.manager)
    state, skills, choices = None, [], []
    if agent.manager:
        choose_skill = agent.sample_skill

        def record(state):
            choices.append(len(skills))
            return choose_skill(state)

        monkeypatch.setattr(agent, "sample_skill", record)
    for step in range(9):  # three environments, of which the second begins anew at step 4
        first = np.array([step == 0, step in (0, 4), step == 0])
        action, state = agent.policy(
            {"image": np.zeros((3, 64, 64, 3), np.uint8), "is_first": first}, state)
        assert action.shape == (3, agent.sizes["action"]) and action.isfinite().all()
        skills.append(state.get("skill"))
    if agent.manager:
        assert all(torch.equal(x[0], skills[0][0]) for x in skills[:8])
        assert all(torch.equal(x[1], skills[4][1]) for x in skills[4:])
        assert choices == [0, 4, 8]  # the second environment's time is 4 steps behind
    if agent.discrete:
        close(action.sum(-1), np.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "flags"), dict(VARIANTS[::-1]).items(), ids=short_name)
def test_a_variant_trains_resumes_evaluates_and_draws(agent, flags, tmp_path):
    run = [*RUN, "--task=gym_ShortPinPad-v0", "--batch_length=10", "--video_every=100",
           "--prefill=180", f"--logdir={tmp_path}"]
    if agent is not dyna_q.Agent:  # which refuses it
        run.append("--horizon=8")
    run += [f"--{key}={value}" for key, value in flags.items()]
    for steps in (210, 230):
        assert director.main([*run, f"--steps={steps}"], agent) == 0
    assert read_metrics(tmp_path)[-1]["train/grad_steps"] == 6
    assert director.main([f"--logdir={tmp_path}", "--eval=1"], agent) == 0
    assert len(json.loads((tmp_path / "eval.json").read_text())["scores"]) == 1
    pictures = [path.stem.split("-") for path in (tmp_path / "pictures").iterdir()]
    assert len({step for step, _ in pictures}) > 1  # while it trained, too
    assert {name for _, name in pictures} == {"episode", "openloop"}


FEUDAL = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", "--batch_length=10"]


def run_feudal(folder):
    command = [sys.executable, "-m", "variants.feudal", *FEUDAL, "--steps=100000",
               f"--logdir={folder}/run"]
    with subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        assert any("gradient steps" in line for line in process.stdout)
        process.terminate()
        (folder / "rest").write_text(process.stdout.read())


@pytest.mark.slow
def test_a_variant_runs_as_a_program_that_a_signal_stops_and_resumes(background, capsys):
    step = int(re.search(r"Saved at step (\d+)", (background / "rest").read_text())[1])
    logdir = f"--logdir={background}/run"
    assert director.main([*FEUDAL, logdir, f"--steps={step + 20}"], feudal.Agent) == 0
    assert f"Resumed at step {step}." in capsys.readouterr().out
    assert director.main([logdir, "--eval=1"]) == 2  # it is no Director


BACKGROUND = {  # see conftest.py
    "test_a_variant_runs_as_a_program_that_a_signal_stops_and_resumes": run_feudal}


def test_the_network_in_the_readme_is_saved_with_its_optimizer(tmp_path, monkeypatch):
    program, = re.findall(r"```python\n(.*?)```", (HERE / "variants/README.md").read_text(), re.S)
    (tmp_path / "distillation.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    agent = importlib.import_module("distillation").Agent
    check_optimizer_ownership(make_variant(agent), random_batch(np.random.default_rng(0), 2, 9,
                                                                True, 5))
    flags = [*RUN, "--task=gym_CartPole-v1", "--outputs=8", f"--logdir={tmp_path}/run"]
    for steps in (150, 200):
        assert director.main([*flags, f"--steps={steps}"], agent) == 0
    loaded = director.load(tmp_path / "run", agent)
    updates = {int(x["step"]) for x in loaded.optimizers["predictor"].state.values()}
    assert updates == {loaded.grad_steps} and loaded.grad_steps > 10
    losses = [x["train/rnd_loss"] for x in read_metrics(tmp_path / "run") if "train/rnd_loss" in x]
    assert 0 < losses[-1] < losses[0]


def test_the_search_loads_and_plays_what_director_trained(tmp_path, capsys):
    run = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no",
           "--steps=150", f"--logdir={tmp_path}"]
    assert director.main(run) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    flags = ["--candidates=20", "--rounds=1", "--eval=1", f"--logdir={tmp_path}"]
    assert director.main(flags, planner.Agent) == 0
    assert director.main(flags[2:], director.Director) == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    for agent in (feudal.Agent, pets.Agent):
        assert director.main(flags[2:], agent) == 2
        assert "holds a run of director" in capsys.readouterr().err


@pytest.mark.parametrize(("agent", "flags", "words"), [
    (feudal.Agent, ["--batch_length=8"], "--batch_length: has to be more than --goal_duration"),
    (higl.Agent, ["--batch_length=8"], "--batch_length: has to be more than --goal_duration"),
    (feudal.Agent, ["--agent=dreamer"], "dreamer: choose from"),
    (higl.Agent, ["--agent=dreamer"], "dreamer: choose from"),
    (higl.Agent, ["--skill_groups=4"], "--skill_groups has no effect here: --latent is the size"),
    (higl.Agent, ["--skill_classes=4"], "--skill_classes has no effect here: --latent is the size"),
    (higl.Agent, ["--temperature=0"], "must be from 0.001"),
    (higl.Agent, ["--temperature=3"], "--higl_loss contrastive reads it (default: 0.5)"),
    (diayn.Agent, ["--skills=1"], "must be from 2"),
    (diayn.Agent, ["--skill_groups=4"], "--skill_groups has no effect here: --skills is"),
    (diayn.Agent, ["--manager_expl=0"], "--manager_expl has no effect here: there is no novelty"),
    (diayn.Agent, ["--agent=dreamer"], "dreamer: choose from"),
    (disagreement.Agent, ["--batch_length=1"], "has to be more than 1"),
    (disagreement.Agent, ["--members=1"], "must be from 2"),
    (disagreement.Agent, ["--worker_expl=1"], "--worker_expl has no effect here: the manager"),
    (disagreement.Agent, ["--agent=dreamer", "--manager_expl=1"], "there is no manager"),
    (dyna_q.Agent, ["--worker_extr=1"], "--worker_extr has no effect here: there are no goals"),
    (dyna_q.Agent, ["--lam=0.5"], "--lam has no effect here: there are no imagined trajectories"),
    (pets.Agent, ["--planner=none", "--disagreement_cost=1"], "--disagreement_cost has no effect"),
    (prioritized.Agent, ["--batch_length=1"], "has to be more than 1"),
    (dyna_q.Agent, ["--agent=director"], "director: choose from"),
    (dyna_q.Agent, ["--batch_length=1"], "has to be more than 1"),
    (dyna_q.Agent, ["--epsilon=1"], "must be from 0 to 0.999"),
    (prioritized.Agent, ["--priority_beta=2"], "must be from 0 to 1"),
    (hindsight.Agent, ["--agent=dreamer"], "dreamer: choose from"),
    (hindsight.Agent, ["--batch_length=1"], "must be from 2"),
    (hindsight.Agent, ["--reached=1"], "must be from 0 to 0.999"),
    (hindsight.Agent, ["--worker_extr=0.5"], "--worker_extr has no effect here: the worker"),
    (planner.Agent, ["--planner=codes", "--agent=dreamer"], "a flat agent has none"),
    (planner.Agent, ["--candidates=9"], "must be from 20"),
    (pets.Agent, ["--planner=mcts"], "mcts: choose from"),
    (planner.Agent, ["--tried=4"], "--tried has no effect here: --planner actions does not"),
    (planner.Agent, ["--planner=codes", "--plan_length=5"], "--plan_length has no effect here"),
    (planner.Agent, ["--planner=mcts", "--rounds=1"], "--rounds has no effect here"),
    (pets.Agent, ["--tried=4"], "--tried has no effect here: --planner actions does not read it"),
    (options.Agent, ["--options=-1"], "--options -1: must be from 0"),
    (options.Agent, ["--option_cost=-1"], "must be from 0"),
    (options.Agent, ["--worker_extr=0.5"], "--worker_extr has no effect here: there are no goals"),
    (options.Agent, ["--skill_groups=4"], "--skill_groups has no effect here: there are no goals"),
    (options.Agent, ["--agent=dreamer"], "dreamer: choose from"),
    (dreamer_v3.Agent, ["--kl_target=2"], "--kl_target has no effect here: with --latents yes"),
    (dreamer_v3.Agent, ["--slow_every=50"], "--slow_every has no effect here: with --critic_ema"),
    (dreamer_v3.Agent, ["--laprop=no", "--warmup=5"], "--warmup has no effect here: it is LaP"),
    (hac.Agent, ["--top_duration=3"], "--horizon: no multiple of --goal_duration * --top_duration"),
    (hac.Agent, ["--hindsight=2"], "must be from 0 to 1"),
    (hac.Agent, ["--agent=dreamer"], "dreamer: choose from")])
def test_bad_flags_get_one_line(agent, flags, words, capsys):
    assert director.main(flags, agent) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_pairs_are_those_within_an_episode():
    is_first = torch.rand(7, 20, generator=torch.manual_seed(0)) < 0.15
    for k in (1, 4):
        for row, found in zip(is_first, same_episode(is_first, k), strict=True):
            assert found.tolist() == [not row[t + 1 : t + k + 1].any() for t in range(20 - k)]


@pytest.mark.parametrize(("agent", "flags"), [
    (director.Director, {}), (feudal.Agent, {}), (feudal.Agent, {"feudal_reward": "dot"}),
    (higl.Agent, {}), (diayn.Agent, {}), (hac.Agent, {}), (hdreamer.Agent, {}),
    (gaussian.Agent, {}), (dreamer_v3.Agent, {})], ids=short_name)
def test_a_continuous_worker_is_led_by_the_gradient_of_its_reward(agent, flags):
    agent = make_variant(agent, CONTINUOUS, **flags)
    traj = agent.imagine(starts_at(torch.randn(4, 16), torch.randn(4, agent.sizes["stoch"])))
    gradient, = torch.autograd.grad(traj["reward_goal"].sum(), [agent.worker.actor.out.weight])
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("agent", [
    feudal.Agent, higl.Agent, diayn.Agent, disagreement.Agent, hindsight.Agent, hdreamer.Agent,
    gaussian.Agent, dyna_q.Agent, options.Agent, hac.Agent], ids=short_name)
def test_a_restored_agent_makes_the_train_step_that_the_saved_one_makes(agent):
    batch = random_batch(np.random.default_rng(0), 2, 12, True, 5)
    agents = [make_variant(agent, slow_every=2), make_variant(agent, slow_every=2)]
    for _ in range(3):  # the slow networks are copied in steps 1 and 3
        agents[0].train_step(batch)
    agents[1].restore(copy.deepcopy({
        "agent": agents[0].state_dict(), "grad_steps": 3, "variant": director.agent_name(agent),
        "optimizers": {key: x.state_dict() for key, x in agents[0].optimizers.items()}}))
    found = []
    for each in agents:
        torch.manual_seed(0)
        found.append(each.train_step(batch))
    for key, value in found[0].items():
        close(found[1][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("agent", [feudal.Agent, higl.Agent], ids=short_name)
def test_goal_pairs_is_the_fraction_of_pairs_within_an_episode(agent):
    agent = make_variant(agent, goal_duration=4)
    close(agent.train_goals(replayed(agent))["goal_pairs"], 20 / 24)
