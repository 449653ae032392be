"""Pin Pad shows and rewards what the official environment does."""

import hashlib

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from conftest import towards_next_pad
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
def test_pinpad_equals_the_official_environment_in_images_and_rewards(name):
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


def test_pin_pad_as_numbers_tells_what_the_image_shows():
    env = PinPad("three", length=400, observe="both")
    check_env(env, skip_render_check=True)
    rng, shown = np.random.default_rng(0), {}
    obs, _ = env.reset(seed=3)
    for _ in range(400):
        state = obs["state"]
        assert state[:14].argmax() + 1 == env.player[0] and state[:14].sum() == 1
        assert state[14:26].argmax() + 1 == env.player[1] and state[14:26].sum() == 1
        pads = state[26:35].reshape(3, 3)
        assert tuple(pads.argmax(1)[pads.any(1)] + 1) == env.history
        image = obs["image"].tobytes()
        assert shown.setdefault(state.tobytes(), image) == image  # one image for each state ...
        action = int(rng.integers(5)) if rng.random() < 0.3 else towards_next_pad(env)
        obs, *_ = env.step(action)
    assert len(set(shown.values())) == len(shown) > 50  # ... and one state for each image
    assert any(np.frombuffer(state, np.float32)[-1] for state in shown)


def test_only_what_is_asked_for_is_observed():
    for observe, keys in (("image", {"image"}), ("state", {"state"}),
                          ("both", {"image", "state"})):
        env = PinPad("four", observe=observe)
        assert set(env.observation_space) == set(env.reset(seed=0)[0]) == keys
