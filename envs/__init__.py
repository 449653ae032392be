"""Environments: the paper's tasks, small worlds for tests, and how Director runs them."""

import importlib


class UserError(ValueError):
    """A mistake of the user's: the program prints it in one line and exits with code 2."""


def require(module: str, message: str):
    """An optional package; UserError with this message if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(message) from error
