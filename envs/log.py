"""Where the metrics of a run are written."""

import contextlib
import io
import json
import os
import pathlib
import sys

from torch.utils.tensorboard import SummaryWriter

from envs import require, write_file


class Logger:
    """metrics.jsonl, TensorBoard's events and, with --track, Weights & Biases, with equal names.

    It continues the files of the run at `step`: lines of metrics.jsonl that are later or damaged
    are dropped. At step 0, an earlier metrics.jsonl is of a run that never saved, and is renamed.
    config: all settings of the run.
    """

    def __init__(self, logdir: pathlib.Path, run_id: str, step: int, config: dict):
        self.wandb_run = None
        if config["track"]:
            wandb = require("wandb", "--track: wandb is missing; pip install wandb")
            self.wandb_run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "director"), name=logdir.name,
                id=run_id, config=config, sync_tensorboard=True, resume="allow")
        self.path = logdir / "metrics.jsonl"
        if step == 0 and self.path.exists():
            aside = self.path.with_name(f"metrics-before-{run_id}.jsonl")
            self.path.rename(aside)
            print(f"{self.path} is of a run that never saved; it is now {aside.name}")
        self.path.touch()
        lines = []
        for line in self.path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line, after a kill
                if json.loads(line)["step"] <= step:
                    lines.append(line + "\n")
        write_file(self.path, io.BytesIO("".join(lines).encode()), run_id)
        self.events = SummaryWriter(logdir, purge_step=step + 1)

    def write(self, metrics: dict[str, float], step: int, **more: float):
        """Append metrics of this step; `more` goes to metrics.jsonl only."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **more, **metrics}) + "\n")
        for key, value in metrics.items():
            self.events.add_scalar(key, value, step)

    def close(self):
        self.events.close()
        if self.wandb_run:
            self.wandb_run.finish(exit_code=1 if sys.exc_info()[0] else 0)
