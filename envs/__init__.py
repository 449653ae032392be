"""Environments: the paper's tasks, small worlds for tests, and how Director runs them."""


class UserError(ValueError):
    """A mistake of the user's: the program prints it in one line and exits with code 2."""
