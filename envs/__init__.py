"""Environments: the paper's tasks, small worlds for tests, and how Director runs them."""
