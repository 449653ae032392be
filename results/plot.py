"""Draws the figures of results/README.md, and prints the numbers of its tables at equal steps.

    pip install -r results/requirements.txt
    python results/plot.py                                all figures of the page
    python results/plot.py RUN RUN ... --out returns.png  folders or metrics files of your own

A point is the mean return of the training episodes that ended in a window of environment steps, by
default the 10,000 steps before. A thin line is a seed. A thick line is the mean of all seeds of an
agent, at the steps that all of them have.
"""

import argparse
import gzip
import json
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CURRICULUM = {  # agents on Pin Pad Three that were trained with the curriculum of commit 8cbda9c
    "Director": "pinpad_three/director_curriculum-*",
    "flat agent": "pinpad_three/flat_curriculum-*",
    "flat agent with disagreement": "pinpad_three/flat_disagreement_curriculum-*",
    "hdreamer": "pinpad_three/hdreamer_curriculum-*",
    "feudal": "pinpad_three/feudal_curriculum-*",
    "higl": "pinpad_three/higl_curriculum-*"}
FIGURES = {  # file name: (title, steps in a window, {agent in words: its metrics files})
    "pinpad_three": ("Pin Pad Three", 10_000, {
        "Director, --random 40000": "pinpad_three/director-*",
        "Director, curriculum": "pinpad_three/director_curriculum-*",
        "Director, random actions only in the prefill": "pinpad_three/director_prefill_only-*",
        "flat agent, --random 40000": "pinpad_three/flat-*",
        "flat agent, curriculum": "pinpad_three/flat_curriculum-*"}),
    "pinpad_three_variants": ("Pin Pad Three, all agents with the curriculum", 10_000, CURRICULUM),
    "pinpad_three_official": ("Pin Pad Three, settings of xs at commit 0bb3370", 10_000, {
        "this project": "pinpad_three/director_official_settings-*",
        "official program": "pinpad_three/official-*"}),
    "pinpad_three_state": ("Pin Pad Three from state", 10_000, {
        "Director": "pinpad_three_state/director-*",
        "flat agent": "pinpad_three_state/flat-*",
        "dreamer_v3": "pinpad_three_state/dreamer_v3-*",
        "dreamer_v3, --learning_rate 4e-4": "pinpad_three_state/dreamer_v3_learning_rate-*"}),
    "pinpad_four": ("Pin Pad Four", 10_000, {
        "Director, --random 40000": "pinpad_four/director-*",
        "flat agent, --random 40000": "pinpad_four/flat-*",
        "Director, curriculum": "pinpad_four/director_curriculum-*",
        "Director without exploration reward, curriculum":
            "pinpad_four/director_curriculum_no_exploration-*",
        "flat agent, curriculum": "pinpad_four/flat_curriculum-*"}),
    "pinpad_four_state": ("Pin Pad Four from state", 10_000, {
        "Director": "pinpad_four_state/director-*",
        "Director, --manager_expl 0": "pinpad_four_state/director_no_exploration-*",
        "flat agent": "pinpad_four_state/flat-*",
        "flat agent with disagreement": "pinpad_four_state/flat_disagreement-*",
        "flat agent with disagreement, --worker_expl 1":
            "pinpad_four_state/flat_disagreement_weight_1-*"}),
    "walker_state": ("Walker walk from state", 10_000, {
        "Director": "walker_state/director-*",
        "Director, worker also receives the task reward": "walker_state/director_worker_extr-*",
        "flat agent": "walker_state/flat-*",
        "Director, vectors not standardized": "walker_state/director_not_standardized-*"}),
    "walker_pixels": ("Walker walk from pixels", 10_000, {
        "Director": "walker_pixels/director-*",
        "Director, worker also receives the task reward": "walker_pixels/director_worker_extr-*",
        "flat agent": "walker_pixels/flat-*"}),
    "walker_pixels_repeat": ("Walker walk from pixels, --action_repeat 2", 10_000, {
        "Director, worker also receives the task reward":
            "walker_pixels/director_worker_extr_repeat-*"}),
    "cartpole": ("CartPole", 2_000, {
        "Director": "cartpole/director-*", "flat agent": "cartpole/flat-*"}),
    "pendulum": ("Pendulum", 2_000, {
        "Director": "pendulum/director-*", "flat agent": "pendulum/flat-*"}),
}


def read_episodes(path: pathlib.Path) -> tuple[np.ndarray, int]:
    """Rows of (environment step, return), and the last step; ValueError without any episode."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]  # the last may be cut
    rows = [(line["step"], line["episode/score"]) for line in lines if "episode/score" in line]
    if not rows:
        raise ValueError(f"{path} holds no episodes")
    return np.array(rows), lines[-1]["step"]


def mean_returns(episodes: np.ndarray, last_step: int, window: int) -> dict[int, float]:
    """{step: mean return of the episodes that ended in the window of steps up to it}.

    Windows begin at multiples of their length. The last one ends with the run.
    """
    ends = np.ceil(episodes[:, 0] / window).astype(int) * window
    return {min(int(end), last_step): float(episodes[ends == end, 1].mean())
            for end in np.unique(ends)}


def draw(title: str, window: int, agents: dict[str, list[pathlib.Path]], out: pathlib.Path):
    """Draw the returns of {agent in words: metrics files, one a seed}, and print them."""
    print(f"{title}: mean returns of training episodes that ended in {window:,} steps up to ...")
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for number, (agent, paths) in enumerate(agents.items()):
        seeds = [mean_returns(*read_episodes(path), window) for path in paths]
        for path, seed in zip(paths, seeds, strict=True):
            ax.plot(np.array(list(seed)) / 1000, seed.values(), color=f"C{number}", alpha=0.4, lw=1)
            numbers = ", ".join(f"{step}: {value:.0f}" for step, value in seed.items())
            print(f"  {agent}, {path.name.removesuffix('.jsonl.gz')}: {numbers}")
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        mean = [np.mean([seed[step] for seed in seeds]) for step in steps]
        count = "1 run" if len(seeds) == 1 else f"{len(seeds)} runs"
        label = f"{agent} ({count})"
        ax.plot(np.array(steps) / 1000, mean, color=f"C{number}", lw=2.5, label=label)
    ax.set(title=title, xlabel="environment steps in thousands",
           ylabel=f"mean return of training episodes\nin windows of {window:,} steps")
    if ax.dataLim.ymin >= 0:
        ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f"  written to {out}")


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="folders or metrics files")
    parser.add_argument("--out", type=pathlib.Path, default="returns.png", help="picture to write")
    parser.add_argument("--window", type=int, default=10_000, help="environment steps in a mean")
    args = parser.parse_args(argv)
    if args.runs:
        try:
            draw("Returns", args.window, {str(run): [run] for run in args.runs}, args.out)
        except (OSError, ValueError, KeyError) as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        return
    for name, (title, window, patterns) in FIGURES.items():
        agents = {agent: sorted((HERE / "metrics").glob(pattern + ".jsonl.gz"))
                  for agent, pattern in patterns.items()}
        draw(title, window, agents, HERE / "figures" / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
