"""Why do returns of Pin Pad Three fall? The same task without images, at three times the speed.

    python experiments/falls.py AGENT [--seed 0 ...]      train; other flags are director.py's
    python experiments/falls.py table RUN RUN ...         values beside what rewards justify

AGENT is "director", as it is, or "fresh", whose batches are drawn from running episodes, too.
Their runs are in runs/gym_PinPadTold-v0; with --task pinpad_three, they train from images.
A RUN is the folder of any run of Director, or a file with its metrics, compressed or not.
"""

import gzip
import json
import pathlib
import sys

import gymnasium
import numpy as np
from gymnasium import spaces

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import director
from variants.pin_pad import PinPad


class Told(PinPad):
    """Pin Pad that tells what its image shows: x, y, the last pads visited, whether it was paid."""

    def __init__(self, name: str = "three", length: int = 2000):
        super().__init__(name, length)
        self.size = 14 + 12 + len(self.target) ** 2 + 1
        self.observation_space = spaces.Dict(
            {"state": spaces.Box(0, 1, (self.size,), np.float32)})

    def look(self) -> dict[str, np.ndarray]:
        state, (x, y) = np.zeros(self.size, np.float32), self.player
        state[[x - 1, 14 + y - 1]] = 1
        for place, pad in enumerate(self.history):
            state[26 + place * len(self.target) + pad - 1] = 1
        state[-1] = self.countdown > 0
        return {"state": state}


gymnasium.register("PinPadTold-v0", Told)


class Fresh(director.Director):
    """What was seen last is learned from at once, not when its episode has ended."""

    class Replay(director.Replay):
        def sample(self, batch_size, length):
            finished = self.episodes
            self.episodes = {**finished, **{name: episode for name, episode in self.running.values()
                                            if len(episode["reward"]) >= length}}
            try:
                return super().sample(batch_size, length)
            finally:
                self.episodes = finished


AGENTS = {"director": director.Director, "fresh": Fresh}


def table(path: pathlib.Path, every: int = 8):
    """Print, per `every` lines of training: the manager's reward and value, in its choices' units.

    justified: the value that the mean reward of imagined choices would have, if it went on forever.
    The manager's discount is that of the folder's config.json; without one, it is 0.99, or 0.92 if
    the path has "nearer" in it.
    """
    discount = 0.92 if "nearer" in str(path) else 0.99
    if path.is_dir():
        config = json.loads((path / "config.json").read_text())
        discount = config.get("manager_discount", config["discount"])
        path = path / "metrics.jsonl"
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    print(path, "    steps  return  reward  value  justified", sep="\n")
    trained, scores = [], []
    for line in lines:
        scores += [line["episode/score"]] if "episode/score" in line else []
        trained += [line] if "train/model_loss" in line else []
        if len(trained) == every:
            reward, value = (np.mean([x[f"train/manager_extr_{key}"] for x in trained])
                             for key in ("reward", "value"))
            score = f"{np.mean(scores):7.0f}" if scores else " " * 7
            justified = reward / (1 - discount)
            print(f"{line['step']:9} {score} {reward:7.4f} {value:6.2f} {justified:10.2f}")
            trained, scores = [], []


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        for run in sys.argv[2:]:
            table(pathlib.Path(run))
    elif sys.argv[1:] and sys.argv[1] in AGENTS:
        sys.exit(director.main(["--task=gym_PinPadTold-v0", *sys.argv[2:]], AGENTS[sys.argv[1]]))
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
