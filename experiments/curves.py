"""Returns of training over environment steps and over minutes, to a PNG.

    pip install -r experiments/requirements.txt
    python experiments/curves.py RUN RUN ... [--out curves.png] [--episodes 10] [--grad_steps]

A RUN is the folder of a run, or a file with its metrics, compressed or not: metrics.jsonl,
pinpad-0.jsonl.gz. Runs whose names differ after the last "-" are seeds of one setting, drawn thin,
with their mean, which goes as far as all of them do; "random" in a name makes a level of it. Each
point is the mean of ten episodes (--episodes), at their middle. --grad_steps adds a picture over
gradient steps.
"""

import argparse
import gzip
import json
import pathlib
import re
import sys

import matplotlib.pyplot as plt
import numpy as np


def read(path: pathlib.Path) -> np.ndarray:
    """An episode a row: environment steps, minutes, gradient steps, return; NaN: not known."""
    if path.is_dir():
        path = path / "metrics.jsonl"
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        # A run that goes on may have written a half of its last line.
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    updates = [(x["step"], x["train/grad_steps"]) for x in lines if "train/grad_steps" in x]
    steps, counts = zip(*updates or [(0, np.nan)], strict=True)
    return np.array([
        (x["step"], x.get("seconds", np.nan) / 60, np.interp(x["step"], steps, counts),
         x["episode/score"]) for x in lines if "episode/score" in x]).reshape(-1, 4)


def main(runs: list[str], out: str = "curves.png", episodes: int = 10, grad_steps: bool = False):
    groups = {}  # name: seeds
    for run in runs:
        try:
            rows = read(pathlib.Path(run))
        except (OSError, ValueError, KeyError) as error:
            print(f"curves.py: {run} holds no metrics: {error!r}", file=sys.stderr)
            sys.exit(2)
        if len(rows) < episodes:
            print(f"{run} is left out: it has {len(rows)} episodes, not {episodes}")
            continue
        name = re.sub(r"(/metrics)?(\.jsonl?)?(\.gz)?$", "", run.rstrip("/"))
        groups.setdefault(name.rpartition("-")[0] or name, []).append(rows)
    labels = ["environment steps", "minutes"] + ["gradient steps"] * grad_steps
    figure, axes = plt.subplots(
        1, len(labels), sharey=True, figsize=(5 * len(labels), 4), layout="constrained")
    for i, (name, seeds) in enumerate(groups.items()):
        for column, ax in enumerate(axes):
            if "random" in name:
                ax.axhline(np.vstack(seeds)[:, 3].mean(), color="gray", ls="--", label=name)
                continue
            curves = [[np.convolve(x, np.ones(episodes) / episodes, "valid")
                       for x in rows[:, [column, 3]].T] for rows in seeds]
            for curve in curves:
                ax.plot(*curve, color=f"C{i}", alpha=0.4, lw=1)
            at = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
            at = at if at[0] <= at[-1] else at[:0]  # no two seeds at a time
            mean = np.mean([np.interp(at, *curve) for curve in curves], 0)
            ax.plot(at, mean, color=f"C{i}", lw=2, label=name)
    axes[0].set(ylabel=f"return, mean of {episodes} episodes")
    for ax, label in zip(axes, labels, strict=True):
        ax.set(xlabel=label)
        ax.locator_params(axis="x", nbins=6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    print(f"{out}: {', '.join(f'{name} ({len(seeds)})' for name, seeds in groups.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders, metrics.jsonl or .jsonl.gz files")
    parser.add_argument("--out", default="curves.png", help="the picture to write")
    parser.add_argument("--episodes", type=int, default=10, help="for each point")
    parser.add_argument("--grad_steps", action="store_true", help="also over gradient steps")
    main(**vars(parser.parse_args()))
