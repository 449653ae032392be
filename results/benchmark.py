"""Where does the time of training go on this machine?

    python results/benchmark.py --task pinpad_three
    python results/benchmark.py --task dmc_walker_walk --render_quality fast --json

All flags but --json, which prints one object for a program to read, are those of director.py. Timed
are the whole program until its first gradient step, and in its loop; environments; acting; drawing
a batch; a train step and its parts; a matrix product, as a measure of the machine. A line is the
median of some repetitions, with the least and the most.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import director
from variants.graph import Graphed


class Table(dict):
    """{part: {median, min, max, unit}}."""

    def add(self, part: str, unit: str, values) -> float:
        low, median, high = np.quantile(values, (0, 0.5, 1)).tolist()
        self[part] = {"median": median, "min": low, "max": high, "unit": unit}
        return median

    def measure(self, part: str, repeats: int, call, amount: float = 0, unit="steps/s") -> float:
        """Median seconds of a call, after two others; or the rate, if it does some amount."""
        times = [time.perf_counter()]
        for _ in range(repeats + 2):
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        seconds = np.diff(times)[2:]
        return self.add(part, unit if amount else "s", amount / seconds if amount else seconds)


def time_program(table: Table, config: director.Config) -> float:
    """From its start to the first gradient step, then its loop; returns steps per second of it."""
    with tempfile.TemporaryDirectory() as folder:
        log_every = max(4 * config.train_every, config.envs)  # a step of all is a line at least
        settings = dataclasses.asdict(config) | {
            "logdir": folder, "prefill": config.envs * config.batch_length, "random": 0,
            "log_every": log_every}
        flags = []
        for name, value in settings.items():
            if not isinstance(value, bool):
                flags.append(f"--{name}={value}")
            elif value:
                flags.append(f"--{name}")
        for steps in (config.train_every, 6 * log_every):  # the second goes on with the first
            command = [sys.executable, director.__file__, *flags,
                       f"--steps={settings['prefill'] + steps}"]
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if steps == config.train_every:
                table.add("start to first gradient step", "s", time.perf_counter() - begin)
        lines = map(json.loads, pathlib.Path(folder, "metrics.jsonl").read_text().splitlines())
        rates = [x["train/steps_per_second"] for x in lines if "train/model_loss" in x]
        return table.add("whole loop", "steps/s", rates[2:])


def time_train_step(table: Table, agent: director.Director, arrays: dict) -> float:
    """A train step and its parts; returns its seconds."""
    seconds = table.measure("train step", 5, lambda: agent.train_step(arrays))
    if agent.config.device == "cuda" and not agent.config.eager:
        graphed = Graphed(agent)
        for _ in range(4):  # the last one records
            graphed(arrays)
        seconds = table.measure("train step, as a CUDA graph", 20, lambda: graphed(arrays))
    batch, model = agent.tensors(arrays), agent.world_model

    def learn_model() -> dict[str, torch.Tensor]:
        with director.autocast(agent.config):
            loss, states, _ = model.loss(batch)
        agent.optimizers["world_model"].minimize(loss)
        return {**batch, **{key: value.detach() for key, value in states.items()}}

    def learn_behavior():
        with director.autocast(agent.config):
            traj = agent.imagine(starts)
        for name, view in agent.player_trajectories(traj).items():
            agent.players[name].learn(view, False)
        agent.train_imagined(traj)

    table.measure("  of it the world model", 5, learn_model)
    states = learn_model()
    starts = {key: states[key].flatten(0, 1) for key in ("deter", "stoch", "is_terminal")}
    if agent.manager:
        table.measure("  of it goals", 5, lambda: agent.train_goals(states))
    table.measure("  of it behavior", 5, learn_behavior)
    for param in agent.parameters():
        param.grad = torch.zeros_like(param)
    optimizers = agent.optimizers.values()
    table.measure("  of it optimizers, in all", 5, lambda: [x.step() for x in optimizers])
    for optimizer in optimizers:
        optimizer.zero_grad()
    return seconds


def benchmark(config: director.Config) -> dict[str, dict]:
    director.make_env(config.task, config).close()  # a user's mistake shows here
    table, replay = Table(), director.Replay(config.replay_size)
    loop = time_program(table, config)

    with contextlib.ExitStack() as stack:
        envs = stack.enter_context(director.vector_envs(config, config.envs))
        driver = director.Driver(envs, config.seed)
        drivers = {"environments, all at once": driver}
        bare = "state" if config.task.startswith("dmc_") else config.obs  # without rendering
        for obs in dict.fromkeys((config.obs, bare)):
            alone = dataclasses.replace(config, obs=obs, processes="no")
            env = stack.enter_context(director.vector_envs(alone, 1))
            drivers[f"one environment, --obs {obs}"] = director.Driver(env, config.seed)
        for part, each in drivers.items():
            play = functools.partial(lambda each: each.step(each.random_action()), each)
            table.measure(part, 200, play, len(each.rows["reward"]))
        for _ in range(2 * config.batch_length):
            replay.add(driver.rows)
            driver.step(driver.random_action())
        torch.manual_seed(config.seed)
        agent = director.Director(envs.single_observation_space, envs.single_action_space, config)
        table.measure("acting", 50, lambda: agent.policy(driver.rows)[0].cpu())

    sample = functools.partial(replay.sample, config.batch_size, config.batch_length)
    table.measure("replay, one batch", 20, sample)
    arrays = sample()
    seconds = time_train_step(table, agent, arrays)
    table.add("whole loop, all but train steps", "of 1", 1 - seconds / config.train_every * loop)

    n = 2048 if config.device == "cpu" else 8192
    x = torch.randn(n, n, device=config.device, dtype=getattr(torch, config.precision))
    rate = table.measure("matrix product", 10, lambda: F.linear(x, x), 2e-12 * n**3, "TFLOP/s")
    with FlopCounterMode(display=False) as counter:
        agent.train_step(arrays)
    work = table.add("train step, arithmetic", "TFLOP", counter.get_total_flops() / 1e12)
    table.add("train step, of the matrix rate", "of 1", work / seconds / rate)
    if config.device == "cuda":
        memory = torch.cuda.max_memory_reserved() / 2**30
    else:
        import resource  # not on Windows
        unit = 2**20 if sys.platform == "linux" else 2**30
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    table.add("peak memory", "GB", memory)
    return table


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code, which is 2 for a user's mistake."""
    try:
        flags = director.parse_args([x for x in argv if x != "--json"], director.Config)
        config = director.Config(**flags)
        director.keep_freed_memory()
        table = benchmark(config)
    except director.UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    if "--json" in argv:
        print(json.dumps({"config": dataclasses.asdict(config), **table}))
    else:
        for part, row in table.items():
            print(f"{part:32}" + "{median:10.4g} {unit} ({min:.4g} to {max:.4g})".format(**row))
    return 0


if __name__ == "__main__":  # environments may start processes
    sys.exit(main(sys.argv[1:]))
