"""Pictures show what their captions say."""

import numpy as np

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
