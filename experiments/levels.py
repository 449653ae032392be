"""Pin Pad: what does each level of the latents of variants/hdreamer.py hold?

    python experiments/levels.py RUN        a run of hdreamer, or one of director.py to compare with

On replayed images, linear probes (ridge regression to one-hot labels) of parts of the state: the
share of steps of held-out episodes whose column and row of the player, pads visited last and
before, and tinted floor are told right; the most frequent value is as often as "none" says.
Then the image's error, with levels drawn from the prior in place of the posterior.
"""

import pathlib
import sys

import numpy as np
import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
from command import agent_and_replay, command
from foresee import place

import director
from variants import hdreamer


def labels(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an image [N, 64, 64, 3] in 0..1 shows, integers [N]."""
    cell, dots = place(image), image[:, 58, 6:26:8]  # the last three pads, the oldest first
    pads = torch.where(dots.sum(-1) == 1, dots.argmax(-1) + 1, 0)  # 0: no dot
    last = (pads > 0).sum(-1) - 1
    before = [torch.where(last >= i, pads.gather(1, (last - i).clamp(min=0)[:, None])[:, 0], 0)
              for i in (0, 1)]
    return {"column": cell % 14, "row": cell // 14, "last pad": before[0], "the one before":
            before[1], "tinted floor": ((255 * image[..., 0]).round() == 223).any(2).any(1).long()}


def probe(seen: torch.Tensor, told: torch.Tensor, train: torch.Tensor) -> float:
    """Accuracy on other steps than `train` [N] of ridge regression from [N, F] to classes [N]."""
    classes = torch.eye(int(told.max()) + 1, dtype=torch.float64)[told]
    x = torch.cat([seen.double(), torch.ones(len(seen), 1, dtype=torch.float64)], 1)
    gram = x[train].T @ x[train] + 1.0 * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x[train].T @ classes[train])
    return float(((x[~train] @ weight).argmax(1) == told[~train]).double().mean())


@torch.no_grad()
def main(run: str):
    try:
        agent, replay = agent_and_replay(run, hdreamer.Agent)
    except director.UserError:
        agent, replay = agent_and_replay(run)
    levels, held_out = isinstance(agent, hdreamer.Agent), director.Replay(10**9)
    for name in list(replay.episodes)[::4]:
        held_out.episodes[name] = replay.episodes.pop(name)
    model, parts, told, errors = agent.world_model, [], [], []
    coarse = model.rssm.parts[0] if levels else model.rssm.size
    for i in range(64):
        batch = agent.tensors((replay if i < 48 else held_out).sample(8, 32))
        states = {key: x[:, 8:].flatten(0, 1) for key, x in model.observe(batch).items()}
        image = batch["image"][:, 8:].flatten(0, 1).float() / 255
        told.append(labels(image))
        parts.append({"none": states["deter"][:, :0], "deter": states["deter"],
                      "coarse": states["stoch"][:, :coarse], "fine": states["stoch"][:, coarse:],
                      "coarse and fine": states["stoch"]})
        deter, stoch, guess = states["deter"], states["stoch"], model.rssm.guess(states["deter"])
        ways = {"both seen": stoch, "both guessed": guess}
        if levels:
            logit = model.rssm.prior(deter, stoch)[:, coarse:]
            fine = director.OneHot(logit.unflatten(-1, model.rssm.levels[1])).rsample().flatten(-2)
            ways["fine guessed"] = torch.cat([stoch[:, :coarse], fine], -1)
        errors.append({key: float(((model.decoder(torch.cat([deter, x], -1))["image"] - image)
                                   ** 2).flatten(1).sum(-1).mean()) for key, x in ways.items()})
    told = {key: torch.cat([x[key] for x in told]) for key in told[0]}
    train = torch.arange(len(told["row"])) < 48 * 8 * 24
    print("seen", *told, sep="\t")
    for part in parts[0]:
        seen = torch.cat([x[part] for x in parts])
        if part == "none" or seen.shape[1]:
            print(part, *(f"{probe(seen, x, train):.3f}" for x in told.values()), sep="\t")
    for way in errors[0]:
        print(f"image error, {way}: {np.mean([x[way] for x in errors]):.3f}")


if __name__ == "__main__":  # environments may start processes
    command(main, __doc__)
