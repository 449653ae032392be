"""Draws the figures of results/: returns in training over environment steps.

    pip install -r results/requirements.txt
    python results/plot.py                              all figures of this page
    python results/plot.py RUN RUN ... --out returns.png    folders or metrics files of your own

Each point is the mean return of the last episodes that ended together. Thin lines are seeds, thick
ones their mean, as far as all of them go.
"""

import argparse
import gzip
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
FIGURES = {  # figure: (title, episodes in a mean, {agent in words: files})
    "pinpad_three": ("Pin Pad Three", 4, {
        "Director": "pinpad_three/director-*",
        "Director, curriculum": "pinpad_three/director_curriculum-*",
        "flat agent, curriculum": "pinpad_three/flat_curriculum-*",
        "feudal, curriculum": "pinpad_three/feudal_curriculum-*",
        "higl, curriculum": "pinpad_three/higl_curriculum-*",
        "hdreamer, curriculum": "pinpad_three/hdreamer_curriculum-*"}),
    "pinpad_three_official": ("Pin Pad Three, the official settings at size xs", 4, {
        "ours": "pinpad_three/director_official_settings-*",
        "official program": "pinpad_three/official-*"}),
    "pinpad_four": ("Pin Pad Four, curriculum", 4, {
        "Director": "pinpad_four/director_curriculum-*",
        "Director without exploration reward": "pinpad_four/director_curriculum_no_exploration-*",
        "flat agent": "pinpad_four/flat_curriculum-*"}),
    "walker_state": ("Walker walk, from state", 10, {
        "Director": "walker_state/director-*",
        "Director, worker also sees the task reward": "walker_state/director_worker_extr-*",
        "flat agent": "walker_state/flat-*"}),
    "walker_pixels": ("Walker walk, from pixels", 10, {
        "Director": "walker_pixels/director-*",
        "Director, worker also sees the task reward": "walker_pixels/director_worker_extr-*",
        "flat agent": "walker_pixels/flat-*"}),
    "cartpole": ("CartPole", 10, {"Director": "cartpole/director-*",
                                  "flat agent": "cartpole/flat-*"}),
    "pendulum": ("Pendulum", 10, {"Director": "pendulum/director-*",
                                  "flat agent": "pendulum/flat-*"}),
}


def read_episodes(path: pathlib.Path) -> np.ndarray:
    """Rows of (environment step, return); ValueError if the file holds none."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]  # the last may be cut
    rows = [(line["step"], line["episode/score"]) for line in lines if "episode/score" in line]
    if not rows:
        raise ValueError(f"{path} holds no episodes")
    return np.array(rows)


def running_mean(rows: np.ndarray, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and mean returns of as many consecutive episodes, at the end of each such group."""
    window = np.ones(episodes) / episodes
    return rows[episodes - 1 :, 0], np.convolve(rows[:, 1], window, "valid")


def draw(title: str, episodes: int, groups: dict[str, list[pathlib.Path]], out: pathlib.Path):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, (label, paths) in enumerate(groups.items()):
        curves = [running_mean(rows, episodes) for rows in map(read_episodes, paths)
                  if len(rows) >= episodes]
        if not curves:
            continue
        color = f"C{number}"
        for steps, scores in curves:
            ax.plot(steps, scores, color=color, alpha=0.35, lw=1)
        start = max(steps[0] for steps, _ in curves)
        stop = min(steps[-1] for steps, _ in curves)
        grid = np.linspace(start, max(start, stop), 200)
        mean = np.mean([np.interp(grid, *curve) for curve in curves], 0)
        seeds = f" ({len(curves)} seed{'s' * (len(curves) > 1)})"
        ax.plot(grid, mean, color=color, lw=2.5, label=label + seeds)
    ax.set(title=title, xlabel="environment steps",
           ylabel=f"return in training, mean of {episodes} episodes")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(out)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="folders or metrics files")
    parser.add_argument("--out", type=pathlib.Path, default="returns.png", help="picture to write")
    parser.add_argument("--episodes", type=int, default=10, help="episodes in a mean")
    args = parser.parse_args(argv)
    try:
        if args.runs:
            groups = {str(run): [run] for run in args.runs}
            draw("Returns", args.episodes, groups, args.out)
            return
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for name, (title, episodes, patterns) in FIGURES.items():
        groups = {label: sorted((HERE / "metrics").glob(pattern + ".jsonl.gz"))
                  for label, pattern in patterns.items()}
        draw(title, episodes, groups, HERE / "figures" / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
