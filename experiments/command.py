"""The command line of the programs in this folder that look at a run: its folder, and flags."""

import argparse
import pathlib
import sys

sys.path[:0] = map(str, (pathlib.Path(__file__).parents[1], pathlib.Path(__file__).parent))
import told  # noqa: F401, the task of some runs

import director


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
