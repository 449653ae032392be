"""When does a world model see the player of Pin Pad, and foresee its moves? It alone learns.

    python experiments/sight.py --steps 2000                 from scratch
    python experiments/sight.py --steps 400 --logdir RUN     on from a run, whose folder stays

Other flags are director.py's, but --steps counts gradient steps here. It learns from --prefill
steps of random actions. A line for 200 gradient steps: losses, and squared errors of images, summed
over pixels and channels, in as many other random steps: of what is seen, and 1 and 8 steps ahead,
imagined with the actions taken. An image without the player is off by about 40, one with the player
elsewhere by twice as much.
"""

import dataclasses
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import director


@dataclasses.dataclass
class Config(director.Config):
    task: str = director.option("pinpad_three", "what to look at", group="run", fixed=True)
    steps: int = director.option(2000, "gradient steps")


class Agent(director.Director):
    Config, loads = Config, ("director",)


def random_steps(config: Config, steps: int, seed: int) -> director.Replay:
    replay = director.Replay(10**9, seed)
    with director.vector_envs(config, 4) as envs:
        driver = director.Driver(envs, seed)
        for _ in range(-(-steps // 4)):
            replay.add(driver.rows)
            driver.step(driver.random())
    return replay


@torch.no_grad()
def errors(agent: director.Director, batches: list[dict[str, np.ndarray]]) -> dict[int, float]:
    """By steps ahead: mean squared errors of the images of step 18 of these chunks [B, T, ...]."""
    model, values = agent.world_model, {0: [], 1: [], 8: []}
    for batch in map(agent.tensors, batches):
        states = model.observe(batch)
        for ahead, rows in values.items():
            deter, stoch = (states[key][:, 18 - ahead] for key in ("deter", "stoch"))
            for t in range(19 - ahead, 19):
                deter, stoch = model.rssm.img_step(deter, stoch, batch["action"][:, t])
            image = model.decoder(torch.cat([deter, stoch], -1))["image"]
            rows.append(((image - batch["image"][:, 18].float() / 255) ** 2).sum((1, 2, 3)))
    return {ahead: torch.cat(rows).mean().item() for ahead, rows in values.items()}


def main(argv: list[str] | None = None) -> dict[int, float]:
    """Print lines; returns the last errors."""
    flags = director.parse_args(argv, Config)
    if "logdir" in flags:
        agent = director.load(flags["logdir"], Agent, **{"steps": 2000, **flags})
    else:
        config = Config(**flags)
        torch.manual_seed(config.seed)
        with director.vector_envs(config, 1) as envs:
            agent = Agent(envs.single_observation_space, envs.single_action_space, config)
    config, model, lines = agent.config, agent.world_model, []
    if "image" not in model.encoder.keys:
        raise director.UserError(f"--task {config.task}: has no images")
    replay, other = (random_steps(config, config.prefill, seed) for seed in (5, 99))
    test = [other.sample(8, 32) for _ in range(12)]
    for step in range(config.steps + 1):
        if step % 200 == 0 or step == config.steps:
            means = {key: np.mean([line[key] for line in lines[-200:]])
                     for key in ("image_loss", "kl", "kl_scale", "sees") if lines}
            with torch.random.fork_rng():
                torch.manual_seed(0)
                result = errors(agent, test)
            print(f"{step:5} gradient steps:", *(f"{key} {x:.3g}" for key, x in means.items()),
                  *(f"| {ahead} ahead {x:.1f}" for ahead, x in result.items()), flush=True)
        with director.autocast(config):
            loss, _, metrics = model.loss(agent.tensors(
                replay.sample(config.batch_size, config.batch_length)))
        model.optimizer.minimize(loss)
        lines.append({key: value.item() for key, value in metrics.items()})
    return result


if __name__ == "__main__":  # environments may start processes
    try:
        main()
    except director.UserError as error:
        print(f"sight.py: {error}", file=sys.stderr)
        sys.exit(2)
