"""What prioritized does, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

import director
from conftest import (
    RUN,
    close,
    make_variant,
    random_batch,
    tensor,
)
from variants import (
    prioritized,
)


def row(number: int, episode: int, is_last: bool) -> dict:
    """A step whose reward is its number in the episode, and whose state is the episode's."""
    return {"reward": np.float32([number]), "state": np.float32([[episode]]),
            "action": np.zeros((1, 2), np.float32), "is_first": np.array([number == 0]),
            "is_last": np.array([is_last]), "is_terminal": np.zeros(1, bool)}


def prioritized_replay(*lengths: int, capacity: int = 10**6):
    """A replay with episodes of these lengths and the agent whose errors it hears of."""
    replay = prioritized.Replay(capacity)
    replay.agent = make_variant(prioritized.Agent)
    for episode, length in enumerate(lengths):
        for number in range(length):
            replay.add(row(number, episode, number == length - 1))
    return replay


def hand_back(replay, places, errors, first=False):
    is_first = torch.full((1, len(places)), first)
    replay.agent.trained_on = torch.tensor([places]), tensor([errors]), is_first
    replay.update()


def test_priorities_follow_curious_replay_and_belong_to_the_steps_that_were_trained_on():
    replay, new = prioritized_replay(4, 3), prioritized.NEW
    hand_back(replay, [[0, 1], [0, 2], [1, 2]], [2.0, 5.0, 0.3])
    close(replay.priority[0], [0, 7000 + 2.01**0.7, 7000 + 5.01**0.7, new])  # 0: it begins
    close(replay.priority[1], [0, new, 7000 + 0.31**0.7])
    hand_back(replay, [[0, 2], [0, 2], [1, 1]], [1.0, 1.0, 4.0])  # twice in a batch
    close(replay.priority[0], [0, 7000 + 2.01**0.7, 3430 + 1.01**0.7, new])
    hand_back(replay, [[0, 0], [0, 3], [1, 1]], [9.0, 9.0, 9.0], first=True)  # without memory
    close(replay.priority[1], [0, 7000 + 4.01**0.7, 7000 + 0.31**0.7])
    close(replay.visits[0], [0, 1, 3, 0])
    close(replay.visits[1], [0, 1, 1])
    for name in (0, 1):
        assert replay.total[name] == pytest.approx(replay.priority[name].sum(), rel=1e-12)
    replay.update()  # errors count once
    close(replay.visits[0], [0, 1, 3, 0])
    for _ in range(100):
        hand_back(replay, [[0, 1]], [6.0])
    close(replay.priority[0][1], 6.01**0.7)  # now the error alone decides


def test_chunks_start_as_often_as_priorities_say():
    replay = prioritized_replay(5, 2, 7)
    priority = {0: [0, 5, 2, 0.5, 8], 1: [0, 1], 2: [0, 1, 9, 1, 4, 1, 2]}
    for name, values in priority.items():
        replay.update()
        replay.priority[name][:] = values
        replay.total[name] = sum(values)
    total, length, draws = sum(map(sum, priority.values())), 2, 20_000
    expected, found = {}, {}
    for name, values in priority.items():
        for step, value in enumerate(values):
            key = name, max(0, min(step - 1, len(values) - length))
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


def test_new_steps_are_drawn_first_and_steps_that_left_the_replay_never():
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
    agent = make_variant(prioritized.Agent)
    batch = random_batch(np.random.default_rng(0), 2, 9, True, 5)
    place = np.stack(np.meshgrid([3, 4], range(9), indexing="ij"), -1)
    loss, states, _ = agent.world_model.loss(agent.tensors(batch))
    assert states["loss"].shape == (2, 9)
    close(states["loss"].mean(), loss.detach())
    image = agent.world_model.decoder(torch.cat([states["deter"], states["stoch"]], -1))["image"]
    squares = (image - agent.tensors(batch)["image"] / 255).square().flatten(2).sum(-1)
    rest = states["loss"] - squares
    assert rest.std() < 0.2 * squares.std()  # so they are in the right places
    agent.train_step(batch)
    assert agent.trained_on is None  # another replay's
    losses, model_loss = [], agent.world_model.loss
    agent.world_model.loss = lambda batch: losses.append(model_loss(batch)) or losses[-1]
    agent.train_step({**batch, "place": place})
    seen, error, is_first = agent.trained_on
    assert torch.equal(seen, torch.as_tensor(place)) and not error.requires_grad
    assert torch.equal(is_first, torch.as_tensor(batch["is_first"]))
    assert torch.equal(error, losses[0][1]["loss"])
    replay = prioritized.Replay(100)
    replay.agent = agent
    for episode in range(5):
        for number in range(9):
            replay.add(row(number, episode, number == 8))
    replay.sample(6, 8)
    replay.sample(6, 8)  # what is not trained on is not visited
    visits = np.stack([replay.visits[name] for name in range(5)])
    close(visits[3:], ~batch["is_first"])
    assert not visits[:3].any()
    seen = ~batch["is_first"][1]
    close(replay.priority[4][seen], 7000 + (error[1].numpy()[seen] + 0.01) ** 0.7, rtol=1e-6)


def test_a_run_hands_errors_to_its_replay_and_starts_anew_when_it_resumes(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(prioritized.Run, "close", lambda run: (
        runs.append(run), director.Run.close(run)))
    run = [*RUN, "--task=gym_envs.grid:Corridor-v0", "--processes=no",
           "--batch_length=10", f"--logdir={tmp_path}"]
    for steps in (300, 400):
        assert director.main([*run, f"--steps={steps}"], prioritized.Agent) == 0
        replay = runs[-1].replay
        replay.update()
        visits = sum(x.sum() for x in replay.visits.values())
        trained = runs[-1].agent.grad_steps - (runs[0].agent.grad_steps if len(runs) > 1 else 0)
        size = runs[-1].config.batch_size * 9  # all steps of a chunk but the first
        assert 0 < visits <= trained * size and visits % size == 0
    assert len(runs) == 2


def test_each_number_of_the_priority_has_its_own_flag():
    replay = prioritized_replay(3)
    config = replay.agent.config
    config.priority_c, config.priority_beta, config.priority_alpha = 100, 0.5, 0.3
    hand_back(replay, [[0, 1], [0, 1], [0, 2]], [7.0, 7.0, 2.0])
    close(replay.priority[0][1:], [25 + 7.01**0.3, 50 + 2.01**0.3])
