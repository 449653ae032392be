"""The programs that measured run, and give the numbers that the page shows."""

import csv
import functools
import gzip
import itertools
import json
import math
import pathlib
import re
import runpy
import sys
import types

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium import spaces

import director
from conftest import HERE, RUN, close, make_variant, random_batch, run_program, starts_at, tensor
from envs.pin_pad import PinPad
from envs.vector import side_by_side
from envs.wrappers import image_and_state
from variants import dyna_q, feudal, pets

sys.path.insert(0, str(HERE / "results"))
import grid
import parity


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_five_train_steps_give_the_metrics_of_the_official_program(kind):
    # Its weights, its batch, modes in place of samples: see results/parity.py.
    errors = parity.compare(kind)
    assert len(errors) == 41
    assert all(error < parity.TOLERANCE for error in errors.values()), errors


def test_a_metric_that_is_not_a_number_differs_from_the_official_one(monkeypatch):
    learn = director.Director.train_step

    def train_step(agent, batch):
        metrics = learn(agent, batch)
        return metrics | {"kl": metrics["kl"] * math.nan}

    monkeypatch.setattr(director.Director, "train_step", train_step)
    errors = parity.compare("discrete")
    assert [name for name, error in errors.items() if not error < parity.TOLERANCE] == ["kl"]


@pytest.mark.parametrize("variant", ["", "feudal"])
def test_goals_shows_whether_the_manager_leads_and_the_worker_reaches(
        variant, tmp_path, capsys, monkeypatch):
    flags = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", "--batch_length=10",
             f"--logdir={tmp_path}"]
    agent = feudal.Agent if variant else director.Director
    assert director.main([*flags, "--batch_length=10", "--steps=128"], agent) == 0
    more = ["--variant", variant] if variant else []
    text = run_program(monkeypatch, capsys, "results/goals.py", tmp_path, *more)
    assert len(re.findall(r"actions: mean return \d+", text)) == 4
    if not variant:  # feudal's goals are directions
        cosines = [float(x) for x in re.findall(r"max-cosine (-?\d\.\d+)", text)]
        assert len(cosines) == 12 and all(-1 <= x <= 1 for x in cosines)


class Countdown(gymnasium.Env):
    """Rewards 1 per step; an episode has 2 or 5 steps, the same number in each environment."""

    observation_space, action_space = spaces.Box(0, 1, (2,)), spaces.Discrete(3)

    def __init__(self, length):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(2, np.float32), 1.0, False, self.steps == self.length, {}


def test_goals_counts_one_episode_of_each_environment(tmp_path):
    play = runpy.run_path(str(HERE / "results/goals.py"))["play"]
    lengths = [2, 5, 2]
    makes = [functools.partial(image_and_state, Countdown(length), "auto") for length in lengths]
    agent = make_variant(director.Director, spaces.Discrete(3), {"state": spaces.Box(0, 1, (2,))})
    with side_by_side(makes, processes=False) as envs:
        scores, _, justified = play(agent, envs, "eval")
    assert scores == lengths
    assert 0 < justified < 100  # a reset brings no reward


def test_goals_says_in_a_line_that_a_folder_holds_no_run(tmp_path, capsys, monkeypatch):
    for command in ([tmp_path], [tmp_path, "--variant", "no_such"]):
        with pytest.raises(SystemExit) as raised:
            run_program(monkeypatch, capsys, "results/goals.py", *command)
        assert raised.value.code == 2
        assert re.fullmatch(r"goals.py: .*(checkpoint.pt|no_such).*\n", capsys.readouterr().err)


@pytest.mark.parametrize("observe", ["state", "image"])
def test_pads_counts_pad_visits_and_histories(observe, tmp_path, capsys, monkeypatch):
    env = PinPad("three", observe=observe)
    env.reset(seed=0)
    env.player, env.history = (5, 1), ()  # beside pad 1
    observations, total = [env.render_observation()[observe]], 0.0
    for action in [4] + 14 * [3] + 14 * [4] + 14 * [3] + 5 * [1] + 6 * [4] + 6 * [1]:
        # to pad 1, to pad 3 on the right, to pad 1 on the left, to pad 3, then down and to the left
        # to pad 2
        obs, reward, *_ = env.step(action)
        observations.append(obs[observe])
        total += reward
    assert env.history == (1, 3, 2) and total == 0
    steps = len(observations)
    is_last = np.arange(steps) == steps - 1
    (tmp_path / "config.json").write_text('{"run_id": "x", "task": "pinpad_three"}')
    (tmp_path / "replay/x").mkdir(parents=True)
    for name in range(2):
        np.savez(tmp_path / f"replay/x/{name}.npz", is_last=is_last,
                 reward=np.full(steps, name / steps), **{observe: np.stack(observations)})
    text = run_program(monkeypatch, capsys, "results/pads.py", tmp_path, "--episodes=2")
    assert text == (f"{2 * steps} steps: return 0.5, 5 pad visits an episode, "
                    "3 of 12 histories seen so far\n")
    with pytest.raises(SystemExit) as raised:
        run_program(monkeypatch, capsys, "results/pads.py", tmp_path / "nothing")
    assert raised.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_an_agent_whose_worker_has_no_reward_differs_in_that_reward_only():
    agent = make_variant(grid.without_reward(director.Director), horizon=8)
    traj = agent.imagine(starts_at(*torch.randn(2, 4, 16)))
    expected = director.Director.player_trajectories(agent, traj)
    for player, trajectory in agent.player_trajectories(traj).items():
        for key, value in trajectory.items():
            same = torch.equal(value, expected[player][key])
            assert same == ((player, key) != ("worker", "reward_goal")), (player, key)
    assert agent.player_trajectories(traj)["worker"]["reward_goal"].abs().sum() == 0


def test_a_frozen_part_never_changes_while_the_others_learn():
    agent = make_variant(grid.frozen("manager/actor"))
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    agent.train_step(random_batch(np.random.default_rng(0), 2, 9, True, 5))
    changed = {key for key, value in agent.state_dict().items()
               if not torch.equal(value, before[key])}
    assert not any(key.startswith("manager.actor") for key in changed)
    assert {"manager.critics.extr.out.weight", "worker.actor.out.weight"} <= changed


def test_the_twin_of_dyna_q_learns_as_often_from_replayed_steps_alone(monkeypatch):
    updates = []

    def learn(agent, index, steps):
        updates.append((index, steps))
        return {}

    monkeypatch.setattr(dyna_q.Agent, "learn", learn)
    agent = make_variant(grid.ReplayedAgain, planning=2)
    agent.train_step(random_batch(np.random.default_rng(0), 2, 9, True, 5))
    assert [index for index, _ in updates] == [0, 1, 2]
    assert all(steps is updates[0][1] for _, steps in updates)
    assert updates[0][1]["before"].shape[:2] == (2, 8)  # pairs of replayed states


def test_q_is_compared_with_returns_that_do_not_end_at_the_time_limit():
    def policy(obs, state, mode):
        x, y = grid.cells_of(obs["state"]).unbind(-1)
        move = torch.where(y < 5, 1, torch.where(x < 5, 3, 0))  # down, then right, then stay
        return torch.eye(5)[move], {"deter": torch.zeros(len(x), 1)}

    for claimed in (0.0, 100.0):  # what Q says everywhere
        value = director.symlog(torch.tensor(claimed))
        worker = types.SimpleNamespace(feat=lambda state: state["deter"],
                                       q=lambda feat, value=value: value.expand(len(feat), 5))
        agent = types.SimpleNamespace(
            policy=policy, worker=worker, config=types.SimpleNamespace(discount=0.99))
        found = grid.value_errors(agent, players=1)
        # From the eighth action on, each one is rewarded, for ever: 100 in sum.
        returns = [100 * 0.99 ** max(0, 7 - t) for t in range(60)]
        assert found["return"] == pytest.approx(np.mean(returns), rel=1e-3)
        assert found["value"] == pytest.approx(claimed)
        assert found["signed"] == pytest.approx(claimed - np.mean(returns), abs=0.02)
        assert found["absolute"] == pytest.approx(abs(found["signed"]), abs=0.02)
        assert found["late_reward"] == 1
    several = grid.value_errors(agent, players=12)  # the others start elsewhere
    assert abs(several["return"] - found["return"]) > 0.1 and several["late_reward"] == 1


def test_values_are_measured_while_training_goes_on_as_without_it(monkeypatch):
    def value_errors(agent):
        return {"absolute": float(torch.rand(())) + agent.grad_steps}

    monkeypatch.setattr(grid, "value_errors", value_errors)
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    found, weights = [], []
    for agent_class in (dyna_q.Agent, grid.measuring_values(dyna_q.Agent, found, every=2)):
        agent = make_variant(agent_class)
        torch.manual_seed(0)
        for _ in range(5):
            agent.train_step(batch)
        weights.append(agent.worker.q.out.weight)
    assert [int(row["absolute"]) for row in found] == [2, 4]
    assert torch.equal(*weights)


def test_the_twins_of_pets_plan_with_the_world_model_alone(modes):
    """With modes in place of samples, the mean over samples is each of them."""
    state = dict(zip(("deter", "stoch"), torch.randn(2, 3, 16), strict=True))
    moves = torch.eye(5)[torch.randint(5, (4, 3, 7))]
    scores = [make_variant(agent, members=3).score(state, moves).detach() for agent in
              (grid.OneModel, grid.OneSample, pets.Agent)]
    close(scores[0], scores[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(scores[0], scores[2], rtol=1e-3)


def test_the_twin_of_pets_with_one_member_asks_the_others_nothing(modes):
    state = dict(zip(("deter", "stoch"), torch.randn(2, 3, 16), strict=True))
    moves = torch.eye(5)[torch.randint(5, (4, 3, 7))]
    agent = make_variant(grid.OneMember, members=3, disagreement_cost=9)
    score = agent.score(state, moves)
    for member in agent.ensemble.members[1:]:
        torch.nn.init.normal_(member.out.weight)
    close(agent.score(state, moves), score)
    torch.nn.init.normal_(agent.ensemble.members[0].out.weight)
    assert not torch.allclose(agent.score(state, moves), score, rtol=1e-3)


def test_the_options_by_hand_lead_from_every_cell_to_the_walls_of_the_grid():
    """Each from every cell, with the true observation in place of the decoded one."""
    ends = [lambda x, y: (x, 5), lambda x, y: (x, 0), lambda x, y: (5, y), lambda x, y: (0, y),
            lambda x, y: (x, y)]
    env = grid.Grid()
    for cell in itertools.product(range(6), range(6)):
        for option, end in zip(grid.OptionsByHand.hand_written, ends, strict=True):
            env.reset()
            env.cell = np.array(cell)
            obs = {"state": torch.eye(6)[env.cell].flatten()[None]}
            if option.starts(obs):
                for _ in range(6):
                    state = env.step(int(option.policy(obs)))[0]
                    obs = {"state": torch.as_tensor(state)[None]}
                    if option.ends(obs):
                        break
                assert option.ends(obs)
            assert tuple(env.cell) == end(*cell)


def test_equal_numbers_share_a_rank_and_entropies_are_those_of_fractions():
    assert grid.ranks(np.array([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    assert grid.entropy(np.array([[4, 0], [1, 1]])).tolist() == pytest.approx([0, np.log(2)])


def test_walks_stay_in_their_half_of_the_grid_and_their_actions_lead_from_cell_to_cell():
    moves = np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)])
    for half in range(2):
        replay = director.Replay(10**6)
        grid.add_walks(replay, half, 5, seed=0)
        walks = list(replay.episodes.values())
        assert len(walks) == 5
        for walk in walks:
            cells = grid.cells_of(walk["state"]).numpy()  # [33, 2]
            assert (cells[:, 0] // 3 == half).all() and len(np.unique(cells, axis=0)) > 3
            move = moves[walk["action"][1:].argmax(-1)]
            assert ((cells[:-1] + move).clip(0, 5) == cells[1:]).all()


def test_the_comparison_writes_a_row_per_run_and_skips_those_that_are_there(
        tmp_path, monkeypatch, capsys):
    short = ["--steps=1048", "--log_every=16", "--processes=no"]
    monkeypatch.setattr(grid, "AGENTS", {
        name: (agent, [*flags, *short]) for name, (agent, flags) in grid.AGENTS.items()})
    command = ["--seeds", "0", "--only", "higl, contrastive", "--out", str(tmp_path / "rows.jsonl")]
    grid.main(command)
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert (row["agent"], row["seed"]) == ("higl, contrastive", 0)
    for key in ("distances", "distances_untrained"):
        assert -1 <= row[key]["moves"] <= 1 and 0 <= row[key]["rank"] <= 1
    assert len(row["goal_reward_last"]) == 2
    assert json.loads(capsys.readouterr().out) == row
    grid.main(command)
    assert not capsys.readouterr().out


def test_the_rows_of_the_comparison_are_of_agents_that_the_program_has():
    rows = [json.loads(line) for line in open(HERE / "results/grid.jsonl")]
    searches = {f"{name}, {search}" for name, found in grid.SEARCHES.items() for search in found}
    for row in rows:
        assert row["agent"] in {*grid.AGENTS, *grid.HALF_WORLDS, *grid.RARE, *searches}, row


def test_returns_are_drawn_from_folders_and_compressed_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")  # results/requirements.txt
    lines = [{"step": 100 * i, "episode/score": float(i)} for i in range(30)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/metrics.jsonl").write_text(text)
    picture = tmp_path / "returns.png"
    runs = [tmp_path / "x", tmp_path / "x.jsonl.gz"]
    run_program(monkeypatch, capsys, "results/plot.py", *runs, "--out", picture)
    assert imageio.imread(picture).ndim == 3
    plot = runpy.run_path(str(HERE / "results/plot.py"))
    means = plot["mean_returns"](*plot["read_episodes"](tmp_path / "x"), 1000)
    assert means == {0: 0, 1000: 5.5, 2000: 15.5, 2900: 25}  # the last window ends with the run
    with pytest.raises(SystemExit) as raised:
        run_program(monkeypatch, capsys, "results/plot.py", tmp_path / "nothing")
    assert raised.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_every_row_of_runs_csv_has_its_metrics_and_every_metrics_file_its_row():
    with open(HERE / "results/runs.csv") as file:
        rows = list(csv.DictReader(file))
    files = {str(path.relative_to(HERE / "results")) for path in
             pathlib.Path(HERE / "results/metrics").rglob("*.jsonl.gz")}
    assert {row["file"] for row in rows} == files and len(rows) == len(files)
    for row in rows:
        with gzip.open(HERE / "results" / row["file"], "rt") as file:
            steps = [json.loads(line)["step"] for line in file]
        assert 0 <= int(row["steps"]) - steps[-1] < 13_000, row


def test_world_model_shows_what_a_model_explains(tmp_path, capsys, monkeypatch):
    flags = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no", f"--logdir={tmp_path}"]
    assert director.main([*flags, "--steps=400"]) == 0
    program = functools.partial(run_program, monkeypatch, capsys, "results/world_model.py")
    trained = program(tmp_path, "--test=4", "--chunks=8").splitlines()
    again = program(tmp_path, "--test=4", "--chunks=8", "--train=100", "--units=8").splitlines()
    assert [line.split(":")[0] for line in trained] == ["0 gradient steps"]
    assert [line.split(":")[0] for line in again] == ["0 gradient steps", "100 gradient steps"]
    pattern = re.compile(r"([a-z][a-z, 0-9]*): ([-.\de]+)")
    tables = [{key: float(value) for key, value in pattern.findall(line)} for line in again]
    assert list(tables[0]) == [
        "state", "kl", "reward", "reward, ahead 1", "state, ahead 1", "reward, ahead 4",
        "state, ahead 4", "reward, ahead 8", "state, ahead 8"]
    assert tables[1]["state"] < tables[0]["state"] / 2  # it has learned to reconstruct
    assert tables[0]["reward"] < tables[1]["reward"] <= 1
    finetuned = program(tmp_path, "--test=4", "--chunks=8", "--finetune=1").splitlines()
    weighted = program(tmp_path, "--test=4", "--chunks=8", "--finetune=1", "--reward_weight=100")
    assert finetuned[0] == trained[0] == weighted.splitlines()[0]
    assert [line.split(":")[0] for line in finetuned] == ["0 gradient steps", "1 gradient steps"]
    assert len({trained[0][1:], finetuned[1][1:], weighted.splitlines()[1][1:]}) == 3
    for test in ("--test=1000", "--test=0"):
        with pytest.raises(SystemExit) as stop:
            program(tmp_path, test)
        assert stop.value.code == 2


def test_explained_variance_is_one_for_the_truth_and_zero_for_the_mean():
    world_model = runpy.run_path(str(HERE / "results/world_model.py"))
    truth = tensor([1, 2, 3, 4])
    assert world_model["explained"](truth, truth) == 1
    assert world_model["explained"](torch.full((4,), 2.5), truth) == 0
    assert math.isnan(world_model["explained"](truth, torch.ones(4)))  # nothing to be explained


def test_world_model_predicts_nothing_beyond_the_end_of_an_episode(monkeypatch):
    test_model = runpy.run_path(str(HERE / "results/world_model.py"))["test_model"]
    agent = make_variant(director.Director)
    batch = random_batch(np.random.default_rng(0), 2, 29, True, 5)
    batch["is_first"][:, 14] = True  # each chunk holds a second episode
    states = agent.world_model.observe(agent.tensors(batch))
    monkeypatch.setattr(agent.world_model, "observe", lambda batch: states)
    batch["action"][:, 14] = math.nan  # so all predictions across the border are NaN
    batch["action"][1, 7] = math.nan  # here random_batch begins a new episode, too
    results = test_model(agent, types.SimpleNamespace(sample=lambda *_: batch), 2)
    assert len(results) == 9 and all(map(math.isfinite, results.values())), results


def test_world_model_takes_the_networks_of_another_size():
    changed = runpy.run_path(str(HERE / "results/world_model.py"))["changed"]
    config = director.Config(size="xs", deter=64, seed=3, device="cpu")
    assert changed(config, {"units": 7}) == director.Config(
        size="xs", deter=64, units=7, seed=3, device="cpu")
    assert changed(config, {"size": "s", "units": 7}) == director.Config(
        size="s", units=7, seed=3, device="cpu")


@pytest.mark.slow
def test_benchmark_measures_a_train_step_and_its_parts(background):
    table = json.loads((background / "output").read_text().splitlines()[-1])
    assert table["config"]["task"] == "pinpad_three" and table["config"]["batch_size"] == 2
    medians = {key: row["median"] for key, row in table.items() if key != "config"}
    medians.pop("whole loop, all but train steps")  # a difference, which may be below 0 by chance
    assert all(value > 0 for value in medians.values()), medians
    parts = sum(medians[f"  of it {part}"] for part in ("the world model", "goals", "behavior"))
    assert medians["train step"] / 3 < parts < 3 * medians["train step"]


BENCHMARK_FLAGS = [flag for flag in RUN if not flag.startswith(("--prefill", "--log_every"))]
BACKGROUND = {  # see conftest.py
    "test_benchmark_measures_a_train_step_and_its_parts": [
        str(HERE / "results/benchmark.py"), *BENCHMARK_FLAGS, "--json"]}
