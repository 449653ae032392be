"""Whole train steps beside those of the official TensorFlow program (danijar/director).

    python results/parity.py

parity_continuous.npz and parity_discrete.npz hold numbers of the official program alone: a batch,
its first weights, and its metrics of five train steps on that batch, in float32 on a CPU. Learning
rates were 0 (what moves are adaptive scales, normalisers and copies to the slow critics), each
sample was replaced by the mode, and the worker's boundary reward follows equation 8. This program
loads the weights, makes the same steps, and prints how far each metric is off.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
from gymnasium import spaces

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import director
from envs.wrappers import IMAGE

TOLERANCE = 5e-5  # relative; rounding alone gives 6e-6 to 1e-5, depending on the processor
METRICS = {  # ours: theirs
    "image_loss": "image_loss_mean", "reward_loss": "reward_loss_mean",
    "cont_loss": "cont_loss_mean", "kl_loss": "kl_loss_mean", "model_loss": "model_loss",
    "kl": "wmkl_mean", "kl_scale": "wmkl_scale_mean", "prior_ent": "prior_ent",
    "post_ent": "post_ent", "model_grad_norm": "model_grad_norm", "goal_loss": "goal_loss",
    "goal_rec": "goalrec_mean", "goal_kl": "goalkl_mean", "goal_kl_scale": "goalkl_scale_mean",
    "goal_grad_norm": "goal_grad_norm"}
for player, rewards in (("worker", ("goal",)), ("manager", ("extr", "expl"))):
    for key in ("actor_loss", "actor_grad_norm"):
        METRICS[f"{player}_{key}"] = f"{player}_{key}"
    METRICS |= {f"{player}_ent": f"{player}_actent_mean",
                f"{player}_ent_scale": f"{player}_actent_scale_mean"}
    for name in rewards:
        for key in ("critic_loss", "critic_grad_norm"):
            METRICS[f"{player}_{name}_{key}"] = f"{player}_{name}_{key}"
        for ours, theirs in (("reward", "imag_reward"), ("return", "imag_return"),
                             ("value", "imag_critic"), ("advantage", "score")):
            METRICS[f"{player}_{name}_{ours}"] = f"{player}_{name}_{theirs}_mean"


def copy_layers(file, prefix: str, layers: list):
    """[(our module, their name)]: kernels, biases, scales, offsets."""
    for layer, name in layers:
        if isinstance(layer, director.Norm):
            pairs = [(layer.weight, "scale"), (layer.bias, "offset")]
        else:
            pairs = [(layer.weight, "kernel"), (layer.bias, "bias")]
        for param, key in pairs:
            if param is not None:
                value = torch.from_numpy(file[f"{prefix}/{name}/{key}"])
                # Theirs are [in, out] and [height, width, in, out], or, transposed, [.., out, in].
                if value.ndim == 2:
                    value = value.T
                elif value.ndim == 4:
                    value = value.permute(3, 2, 0, 1)
                assert param.shape == value.shape, (prefix, name, param.shape, value.shape)
                param.data.copy_(value)


def copy_mlp(file, prefix: str, mlp: director.MLP):
    layers = []
    for i, layer in enumerate(mlp.hidden[::3]):
        layers += [(layer, f"dense{i}/linear"), (mlp.hidden[3 * i + 1], f"dense{i}/norm")]
    copy_layers(file, prefix, [*layers, (mlp.out, "dist_out/out")])


def copy_weights(file, agent: director.Director):
    """Give an agent the official program's first weights."""
    model = agent.world_model
    networks = {"encoder": model.encoder.image, "head_decoder": model.decoder.image}
    for prefix, network in networks.items():
        layers = [(x, f"_cnn/conv{i // 3}") for i, x in enumerate(network) if i % 3 < 2]
        if prefix == "head_decoder":
            layers[-1] = layers[-1][0], "_cnn/out"
        copy_layers(file, f"w0/{prefix}", layers)
    rssm = model.rssm
    rssm.initial_deter.data.copy_(torch.from_numpy(file["w0/rssm/initial_deter"]))
    copy_layers(file, "w0/rssm", [
        (rssm.inputs[0], "img_in/linear"), (rssm.inputs[1], "img_in/norm"),
        (rssm.gru[0], "gru/linear"), (rssm.gru[1], "gru/norm"),
        (rssm.prior_net[0], "img_out/linear"), (rssm.prior_net[1], "img_out/norm"),
        (rssm.prior_net[3], "img_stats/linear"),
        (rssm.post_net[0], "obs_out/linear"), (rssm.post_net[1], "obs_out/norm"),
        (rssm.post_net[3], "obs_stats/linear")])
    copy_mlp(file, "w0/head_reward", model.reward_head)
    copy_mlp(file, "w0/head_cont", model.cont_head)
    copy_mlp(file, "w0/goal_enc", agent.goals.encoder)
    copy_mlp(file, "w0/goal_dec", agent.goals.decode)
    for name, player in agent.players.items():
        for reward in player.rewards:
            copy_mlp(file, f"w0/{name}_critic_{reward}", player.critics[reward])
            copy_mlp(file, f"w0/{name}_slow_{reward}", player.slow[reward])
        if player.discrete:
            copy_mlp(file, f"w0/{name}_actor", player.actor)
        else:  # theirs has two output layers, ours one with both
            parts = [[torch.from_numpy(file[f"w0/{name}_actor/dist_out/{part}/{key}"])
                      for part in ("out", "std")] for key in ("kernel", "bias")]
            out = f"w0/{name}_actor/dist_out/out"
            copy_mlp({**file, f"{out}/kernel": torch.cat(parts[0], 1).numpy(),
                      f"{out}/bias": torch.cat(parts[1]).numpy()}, f"w0/{name}_actor", player.actor)


def compare(kind: str) -> dict[str, float]:
    """For each metric, the largest relative difference over the five steps."""
    file = dict(np.load(FOLDER / f"parity_{kind}.npz"))
    config = director.Config(
        size="paper", device="cpu", precision="float32", deter=16, hidden=18, units=16, layers=1,
        stoch=4, classes=4, cnn_depth=4, learning_rate=0.0, slow_every=2)
    size = file["data_action"].shape[-1]
    space = spaces.Discrete(size) if kind == "discrete" else spaces.Box(-1, 1, (size,))
    agent = director.Director(spaces.Dict({"image": IMAGE}), space, config)
    copy_weights(file, agent)
    batch = {key[5:]: value for key, value in file.items() if key.startswith("data_")}
    errors = dict.fromkeys(METRICS, 0.0)
    samples = director.OneHot.rsample, director.BoundedNormal.rsample
    director.OneHot.rsample = lambda dist: dist.mode + (dist.probs - dist.probs.detach())
    director.BoundedNormal.rsample = lambda dist: dist.mean
    try:
        for step in range(5):
            metrics = agent.train_step(batch)
            for ours, theirs in METRICS.items():
                expected = float(file[f"m{step}/{theirs}"])
                error = abs(float(metrics[ours]) - expected) / max(abs(expected), 1e-8)
                errors[ours] = float(np.maximum(errors[ours], error))  # NaN stays NaN
    finally:
        director.OneHot.rsample, director.BoundedNormal.rsample = samples
    return errors


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    results = {kind: compare(kind) for kind in ("continuous", "discrete")}
    title = "largest relative difference of five steps"
    print(f"{title:42}" + "".join(f"{kind:>12}" for kind in results))
    for name in METRICS:
        print(f"{name:42}" + "".join(f"{errors[name]:12.1e}" for errors in results.values()))
    worst = np.max([list(errors.values()) for errors in results.values()])  # or NaN
    print(f"{len(METRICS)} metrics, worst {worst:.1e}")
    sys.exit(0 if worst < TOLERANCE else 1)
