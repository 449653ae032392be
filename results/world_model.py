"""What does the world model of a run reconstruct and predict, and what would other settings change?

    python results/world_model.py RUN                                the trained model
    python results/world_model.py RUN --train 1600                   a new one, from its episodes
    python results/world_model.py RUN --train 1600 --deter 512       the same with other settings
    python results/world_model.py RUN --train 1600 --kl_weight 0.1   the same with a weaker KL
    python results/world_model.py RUN --finetune 1200 --reward_weight 100    the trained model,
                                                    after more gradient steps with another loss

A model learns from the finished episodes of the run but the last --test ones, without acting. It
has the run's settings except the given flags, which are those of director.py; for a new one,
--size also sets the networks and batches of that size. All models are tested on the last --test
episodes; the trained one may have learned from these, too. Printed are, every 400 gradient steps:

    image, state   squared error of reconstructions, summed over an image or a state vector
    kl             nats per step between posterior and prior
    reward         fraction of the variance of rewards that the model explains, in filtered states
    ahead 1, 4, 8  the same (and the error of images and states) that many imagined steps ahead,
                   with the actions that were taken; predicted rewards are means of four samples
"""

import argparse
import dataclasses
import math
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import director
from variants import same_episode

CONTEXT = 5  # steps that the model observes before it is tested
AHEAD = (1, 4, 8)


def load_episodes(run: pathlib.Path, agent: director.Director, test: int):
    """Two replays: finished episodes to learn from, and the last ones for tests."""
    resumed = agent.resumed_from
    replay = director.Replay(10**9)
    replay.load(run / "replay" / resumed["run_id"], resumed["episodes"], skip_missing=True)
    finished = {name: episode for name, episode in sorted(replay.episodes.items())
                if episode["is_last"][-1]}
    if len(finished) <= test:
        raise director.UserError(f"{run}: holds {len(finished)} finished episodes, not more than "
                                 f"--test {test}")
    replays = director.Replay(10**9), director.Replay(10**9)
    for i, (name, episode) in enumerate(finished.items()):
        replays[i >= len(finished) - test].episodes[name] = episode
    return replays


def changed(config: director.Config, flags: dict) -> director.Config:
    """The settings of a run with these flags; a size replaces all that it sets."""
    settings = dataclasses.asdict(config)
    if "size" in flags:
        for name in director.SIZES["xs"]:
            settings[name] = None
    return director.Config(**{**settings, **flags})


def explained(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Fraction of the variance: 1 if all is predicted, 0 for the mean; NaN if nothing varies."""
    variance = float(truth.var(correction=0))
    return 1 - float(((prediction - truth) ** 2).mean()) / variance if variance else math.nan


@torch.no_grad()
def test_model(agent: director.Director, replay: director.Replay, chunks: int) -> dict[str, float]:
    """Errors on the same chunks in each call; see the top."""
    model = agent.world_model
    replay.rng = np.random.default_rng(0)
    batch = agent.tensors(replay.sample(chunks, CONTEXT + 3 * max(AHEAD)))
    states = model.observe(batch)
    targets = {key: model.encoder.preprocess(key, batch[key]) for key in model.encoder.keys}

    def error(deter, stoch, ahead: int) -> dict[str, float]:
        decoded = model.decoder(torch.cat([deter, stoch], -1))
        squares = {key: (x - targets[key][:, CONTEXT + ahead :]) ** 2 for key, x in decoded.items()}
        return {key: float(x.flatten(2).sum(-1)[valid(ahead)].mean()) for key, x in squares.items()}

    def valid(ahead: int) -> torch.Tensor:
        """Where no other episode begins in between: bool [B, steps that are predicted]."""
        is_first = batch["is_first"][:, CONTEXT:]
        return same_episode(is_first, ahead) if ahead else torch.ones_like(is_first)

    def reward(deter, stoch) -> torch.Tensor:
        return model.reward_head(torch.cat([deter, stoch], -1)).mean

    deter, stoch = (states[key][:, CONTEXT:] for key in ("deter", "stoch"))
    kl = director.balanced_kl(states["post"], states["prior"], 0.8)
    results = {**error(deter, stoch, 0), "kl": float(kl[:, CONTEXT:].mean()),
               "reward": explained(reward(deter, stoch), batch["reward"][:, CONTEXT:])}
    for ahead in AHEAD:
        predictions = []
        for _ in range(4):
            deter, stoch = (states[key][:, CONTEXT:-ahead] for key in ("deter", "stoch"))
            for step in range(ahead):
                first = CONTEXT + step + 1
                action = batch["action"][:, first : first + deter.shape[1]]
                deter, stoch = model.rssm.img_step(deter, stoch, action)
            predictions.append(reward(deter, stoch))
        truth, predicted = batch["reward"][:, CONTEXT + ahead :], torch.stack(predictions).mean(0)
        same = valid(ahead)
        results[f"reward, ahead {ahead}"] = explained(predicted[same], truth[same])
        for key, value in error(deter, stoch, ahead).items():
            results[f"{key}, ahead {ahead}"] = value
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", type=pathlib.Path,
                        help="folder of a run of director.py, before all flags")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--train", type=int, default=0, help="gradient steps of a new model")
    steps.add_argument("--finetune", type=int, default=0, help="more steps of the trained one")
    parser.add_argument("--test", type=int, default=12, help="episodes for tests")
    parser.add_argument("--chunks", type=int, default=48, help="test chunks of replay")
    parser.add_argument("--kl_weight", type=float, default=1.0, help="highest weight of the KL")
    parser.add_argument("--reward_weight", type=float, default=1.0, help="of the reward loss")
    args, flags = parser.parse_known_args(argv)
    if args.test < 1:
        parser.error("--test: must be at least 1")
    try:
        flags = director.parse_args(flags, director.Config)
        agent = director.load(args.run, **({} if args.train else flags))
        learn, test = load_episodes(args.run, agent, args.test)
        config = changed(agent.config, flags) if args.train else agent.config
        torch.manual_seed(config.seed)
        learn.rng = np.random.default_rng(config.seed)
        if args.train:
            agent = director.Director(agent.obs_space, agent.act_space, config)
    except director.UserError as error:
        print(f"world_model.py: {error}", file=sys.stderr)
        return 2
    adapt = agent.world_model.kl_adapt
    adapt.high = min(adapt.high, args.kl_weight)
    adapt.scale.clamp_(max=adapt.high)
    last_step = args.train or args.finetune
    for step in range(last_step + 1):
        if step % 400 == 0 or step == last_step:
            results = test_model(agent, test, args.chunks)
            numbers = ", ".join(f"{key}: {value:.4g}" for key, value in results.items())
            print(f"{step} gradient steps: {numbers}", flush=True)
        if step < last_step:
            batch = agent.tensors(learn.sample(config.batch_size, config.batch_length))
            with director.autocast(config):
                loss, _, metrics = agent.world_model.loss(batch)
            loss = loss + (args.reward_weight - 1) * metrics["reward_loss"]
            agent.optimizers["world_model"].minimize(loss)
    return 0


if __name__ == "__main__":
    sys.exit(main())
