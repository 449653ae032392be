"""What pin pad does, against numbers worked out by hand."""

import hashlib

import numpy as np
import pytest

from conftest import (
    towards_next_pad,
)
from envs.pin_pad import PADS, PinPad


def play(env, steps, seed=0):
    """Random and purposeful steps; a digest of all images and rewards, and the return."""
    rng, digest, total = np.random.default_rng(seed), hashlib.sha256(), 0.0
    obs, _ = env.reset(seed=seed)
    for step in range(steps):
        action = int(rng.integers(5)) if step // 500 % 2 == 0 else towards_next_pad(env)
        obs, reward, _, truncated, _ = env.step(action)
        digest.update(obs["image"].tobytes() + bytes([int(reward)]))
        total += reward
        if truncated:
            obs, _ = env.reset()
    return digest.hexdigest()[:16], total


PINPAD = {
    "three": ("d9dfe7654ddd74e9", 590.0),
    "four": ("6bf6e3cf1a7c9494", 400.0),
    "five": ("086487bf941ce03c", 340.0),
    "six": ("96ec4330afaeec96", 280.0),
    "seven": ("e6efd9d239d4f8f1", 200.0),
    "eight": ("1b6ce678c19b88ae", 200.0),
}


@pytest.mark.parametrize("name", list(PADS))
def test_pinpad_shows_and_pays_what_the_official_environment_does(name):
    # Each frame and reward of these very steps was compared with the official environment.
    assert play(PinPad(name), 4000) == PINPAD[name]


def test_pinpad_respawns_ten_steps_after_the_reward_with_an_empty_history():
    env = PinPad("three")
    env.reset(seed=0)
    rewards = []
    while not rewards or not rewards[-1]:
        rewards.append(env.step(towards_next_pad(env))[1])
    assert rewards[-1] == 10
    for _ in range(9):
        obs, reward, _, _, _ = env.step(0)
        assert reward == 0 and env.history == (1, 2, 3)
        assert (obs["image"] == (223, 255, 223)).all(-1).sum() > 1000
    obs = env.step(0)[0]
    assert env.history in ((), (int(env.cells[env.player[1], env.player[0]]),))
    assert not (obs["image"] == (223, 255, 223)).all(-1).any()
