"""Pictures show what their captions say."""

import numpy as np
import torch

import director
from conftest import make_agent, random_batch
from envs import pictures


def test_predictions_are_black_once_another_episode_has_begun():
    batch = random_batch(np.random.default_rng(0), 2, 12, False, 3)  # row 1: a new episode at 7
    film = [(np.zeros((64, 64, 3), np.uint8), None)] * 2
    openloop = pictures.draw(make_agent(), film, batch)["openloop"]  # [frames, 3 * 64, 2 * 64, 3]
    assert openloop.shape == (7, 192, 128, 3)  # steps 5 to 11
    dark = openloop.reshape(7, 3, 64, 2, 64, 3).max((2, 4, 5)) == 0  # [frames, row, chunk]
    assert not dark[:, :, 0].any() and not dark[:2, :, 1].any()
    assert dark[2:, :, 1].all()
    truth = openloop[:, :64, :64]
    assert np.abs(truth.astype(int) - batch["image"][0, 5:]).max() <= 1


def test_a_film_keeps_the_frames_and_goals_of_one_environment_only():
    config = director.Config(task="pinpad_three", size="xs", device="cpu", processes="no")
    with director.vector_envs(config, 3) as envs:
        driver = director.Driver(envs, seed=0)
        goals = torch.arange(6.0).reshape(3, 2)
        driver.step(driver.random_action(), {"goal": goals})
        (image, goal), = driver.film
        assert image.base is None and image.shape == (64, 64, 3)
        assert goal.tolist() == [0, 1] and goal.untyped_storage().nbytes() == 8
