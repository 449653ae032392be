"""How does an agent explore Pin Pad? Counts what the replay of a run holds.

    python results/pads.py RUN [--episodes 10]      a run of --task pinpad_...
    python results/pads.py --random four            random actions, 50 episodes

For each ten finished episodes, it prints their mean return, their mean number of pad visits, and
how many of the possible histories, sequences of the last n pads, have been seen so far. A visit is
the arrival at a pad that is not the last one visited; the first pad of a player counts. The replay
has to hold all episodes since the run began. Steps are those of finished episodes.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from envs.folder import read_settings
from envs.pin_pad import COLORS, PADS, PinPad


def histories_of_states(state: np.ndarray) -> np.ndarray:
    """Numbers of the last n pads, oldest first, 0 if there are fewer: [T, size] -> [T, n]."""
    pads = int(np.sqrt(state.shape[1] - 27))  # see PinPad: 14 + 12 + n * n + 1
    one_hot = state[:, 26:-1].reshape(-1, pads, pads)
    return np.where(one_hot.any(-1), one_hot.argmax(-1) + 1, 0)


def histories_of_images(image: np.ndarray, pads: int) -> np.ndarray:
    """The same from the squares below the room: [T, 64, 64, 3] -> [T, n]."""
    squares = image[:, 4 * 14, 4 : 4 + 8 * pads : 8]  # [T, n, 3]; cells have 4x4 pixels
    same_color = (squares[:, :, None] == COLORS[1 : pads + 1]).all(-1)  # [T, n, n]
    return np.where(same_color.any(-1), same_color.argmax(-1) + 1, 0)


def replayed_episodes(run: pathlib.Path) -> Iterator[tuple[np.ndarray, float]]:
    """Histories and return of each finished episode of a run, in the order of their beginnings."""
    settings = read_settings(run)
    name = settings.get("task", "").removeprefix("pinpad_")
    if name not in PADS:
        return
    pads = max(pad for pad, *_ in PADS[name])
    folder = run / "replay" / settings["run_id"]
    for path in sorted(folder.glob("[0-9]*.npz"), key=lambda path: int(path.stem)):
        with np.load(path) as episode:
            if not episode["is_last"][-1]:
                continue
            if "state" in episode:
                history = histories_of_states(episode["state"])
            else:
                history = histories_of_images(episode["image"], pads)
            yield history, float(episode["reward"].sum())


def random_episodes(name: str, count: int = 50) -> Iterator[tuple[np.ndarray, float]]:
    """Histories and return of episodes with random actions."""
    env = PinPad(name, observe="state")
    rng = np.random.default_rng(0)
    for seed in range(count):
        states = [env.reset(seed=seed)[0]["state"]]
        total = 0.0
        while env.steps < env.length:
            obs, reward, *_ = env.step(int(rng.integers(5)))
            states.append(obs["state"])
            total += reward
        yield histories_of_states(np.stack(states)), total


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=pathlib.Path, help="folder of a run")
    parser.add_argument("--random", choices=list(PADS), help="random actions instead of a run")
    parser.add_argument("--episodes", type=int, default=10,
                        help="episodes in a line; the last line may have fewer")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        parser.error("--episodes: must be at least 1")
    if (args.run is None) == (args.random is None):
        parser.error("give a run or --random")
    episodes = list(random_episodes(args.random) if args.random else replayed_episodes(args.run))
    seen, steps, visits, scores = set(), 0, [], []
    for number, (history, score) in enumerate(episodes, 1):
        pads = history.shape[1]
        # A player who is put elsewhere has an empty history, which is no visit.
        moved = (history[1:] != history[:-1]).any(1) & history[1:].any(1)
        visits.append(int(moved.sum()))
        scores.append(score)
        seen |= {tuple(row) for row in history[history.all(1)].tolist()}
        steps += len(history)
        if number % args.episodes == 0 or number == len(episodes):
            group = (number - 1) % args.episodes + 1  # episodes since the last line
            possible = pads * (pads - 1) ** (pads - 1)
            print(f"{steps} steps: return {np.mean(scores[-group:]):.1f}, "
                  f"{np.mean(visits[-group:]):.0f} pad visits an episode, "
                  f"{len(seen)} of {possible} histories seen so far")
    if not episodes:
        parser.exit(2, f"pads.py: {args.run}: holds no finished episode of Pin Pad\n")


if __name__ == "__main__":
    sys.exit(main())
