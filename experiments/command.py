"""What the programs in this folder that look at a run have in common: command line, replay."""

import argparse
import pathlib
import sys

import torch

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
import told  # noqa: F401, the task of some runs

import director


def agent_and_replay(run: str, agent: type = director.Director, **flags):
    """The agent of a run, as `director.load` has it, and what it has seen."""
    agent, replay = director.load(run, agent, **flags), director.Replay(10**9)
    replay.load(pathlib.Path(run, "replay"), agent.origin["episodes"])
    torch.manual_seed(0)
    return agent, replay


def command(main, doc: str, argv: list[str] | None = None, **arguments: dict) -> None:
    """Call main(run, ...); one line, and exit code 2, where `run` is not the folder of a run."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("run", help="the folder of a trained agent")
    for name, settings in arguments.items():
        parser.add_argument(name, **settings)
    try:
        main(**vars(parser.parse_args(argv)))
    except director.UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
