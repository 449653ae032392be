"""Moving pictures of episodes, and of what a world model predicts."""

import io
import math
import pathlib

import imageio.v2 as imageio
import numpy as np
import torch

from envs import write_file


@torch.no_grad()
def draw(agent, film: list[tuple], batch: dict) -> dict[str, np.ndarray]:
    """Pictures by name, [frames, height, width, 3] uint8.

    episode: a film of (image, goal) as in `Driver`, side by side. openloop: replayed chunks
    [B, T, ...], the prediction from five frames and the actions, the difference; black where
    another episode has begun since.
    """
    model = agent.world_model
    batch = agent.tensors(batch)
    states = model.observe({key: value[:, :5] for key, value in batch.items()})
    deter, stoch = states["deter"][:, -1], states["stoch"][:, -1]
    feats = []
    for action in batch["action"][:, 5:].unbind(1):
        deter, stoch = model.rssm.img_step(deter, stoch, action)
        feats.append(torch.cat([deter, stoch], -1))
    predicted = model.decoder(torch.stack(feats, 1))["image"]
    truth = batch["image"][:, 5:].float() / 255
    same_episode = batch["is_first"][:, 5:].cumsum(1) == 0  # [B, T-5]
    images = torch.from_numpy(np.stack([image for image, _ in film]))
    # Rows of B pictures [B, frames, 64, 64, 3]; rows are stacked, pictures stand side by side.
    openloop = [truth, predicted, (predicted - truth + 1) / 2]
    pictures = {"openloop": [to_bytes(row * same_episode[..., None, None, None])
                             for row in openloop],
                "episode": [images[None]]}
    if film[0][1] is not None and agent.picture_goal(film[0][1]) is not None:
        goals = torch.stack([goal for _, goal in film]).split(64)
        goals = torch.cat([to_bytes(agent.picture_goal(goal)) for goal in goals])
        pictures["episode"] = [torch.stack([images, goals])]
    for name, rows in pictures.items():
        pictures[name] = torch.cat(rows, 2).permute(1, 2, 0, 3, 4).flatten(2, 3).numpy()
    return pictures


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Images with values from 0 to 1 as uint8 on the CPU."""
    return (images * 255).byte().cpu()


def write(agent, film: list[tuple], batch: dict, path: pathlib.Path, writer=None):
    """Write the pictures of `draw` to <path>-<name>.gif, and to TensorBoard if it has a writer."""
    for name, frames in draw(agent, film, batch).items():
        write_file(path.with_name(f"{path.name}-{name}.gif"), gif(frames))
        if writer:
            writer.add_image(f"pictures/{name}", strip(frames), int(path.name))


def gif(frames: np.ndarray) -> io.BytesIO:
    """A GIF of 20 frames a second."""
    buffer = io.BytesIO()
    imageio.mimwrite(buffer, frames, "GIF-PIL", duration=0.05, quantizer=2)  # fast octree
    return buffer


def strip(frames: np.ndarray) -> np.ndarray:
    """At most eight of the frames side by side, [3, height, 8 width], for TensorBoard."""
    return np.concatenate(frames[:: math.ceil(len(frames) / 8)], 1).transpose(2, 0, 1)
