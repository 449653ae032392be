"""Command-line flags from the fields of a dataclass, and what this machine suggests for them."""

import argparse
import contextlib
import ctypes
import dataclasses
import typing

import torch

from envs import UserError


def parse_args(argv: list[str] | None, config: type, description: str = "") -> dict:
    """The flags that are given on the command line, and only those; raises UserError.

    config: a dataclass whose fields are made by `director.flag`; its `sizes` hold the defaults of
    fields whose default is None.
    """

    def integer(text: str) -> int:
        if not float(text).is_integer():  # people write --steps 1e6
            raise ValueError
        return int(float(text))

    def fail(message: str):
        raise UserError(message)

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = fail
    group = parser
    types = typing.get_type_hints(config)  # field.type may be a string
    for field in dataclasses.fields(config):
        meta = field.metadata
        if meta["group"]:
            group = parser.add_argument_group(meta["group"])
        default = field.default
        if default is None:
            default = ", ".join(f"{size} {x[field.name]}" for size, x in config.sizes.items())
        text = meta["text"] if default == "" else f"{meta['text']} [{default}]"
        settings = {"default": argparse.SUPPRESS, "help": text}
        kind = types[field.name]
        if kind is bool:
            settings |= {"action": "store_true"}
        else:
            choices = meta["choices"]
            settings |= {"type": integer if kind is int else kind,
                         "metavar": f"{{{','.join(choices)}}}" if choices else ""}
        group.add_argument(f"--{field.name}", **settings)
    return vars(parser.parse_args(argv))


def check_values(config):
    """UserError if a field has a value that is not among its choices, or not in its range."""
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{field.name} {value}: choose from {', '.join(choices)}")
        low, high = field.metadata["low"], field.metadata["high"]
        if types[field.name] in (int, float) and not low <= value <= high:
            raise UserError(f"--{field.name} {value}: must be from {low} to {high:g}")


def fastest_precision(device: str) -> str:
    """ "bfloat16" where the hardware multiplies matrices of it faster than of float32."""
    if device == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        faster = found.get("amx_bf16") or found.get("bf16")
        if "Intel" not in found.get("cpu_name", ""):  # on Intel, only AMX is faster
            faster = faster or found.get("avx512_bf16")
    return "bfloat16" if faster else "float32"


def keep_freed_memory():
    """Let glibc keep large buffers that were freed; clearing new ones takes time."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
