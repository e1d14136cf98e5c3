"""Free ports for one cluster, chosen so that several clusters live on one host.

Ray's defaults (6379, 8265, 10001, 52365, ...) and Serve's (8000, 8404, 9101, 30000-31000, 40000-41000) clash as soon
as a second cluster starts. Each local cluster takes one whole block instead, below the kernel's ephemeral range (32768
up on Linux) and outside 10002-19999, where Ray numbers its workers.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

BLOCK_SIZE = 100
FIRST_BLOCK = 20_000
NUM_BLOCKS = 100  # 20000-29999


def is_free(port: int) -> bool:
    """Whether a server could listen on the port, on every interface."""
    with ExitStack() as stack:
        return _bind(port, stack)


def _bind(port: int, stack: ExitStack) -> bool:
    listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    # What servers set too: a port whose last connections are in TIME_WAIT counts as free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(1)
    except OSError:
        return False
    return True


def preferred_port(port: int, otherwise: int) -> int:
    """`port` where it is free, else `otherwise`."""
    return port if is_free(port) else otherwise


def free_block(seed: int | None = None) -> range:
    """A random block of 100 consecutive ports none of which is in use.

    The order is random so that two clusters that start together hardly meet; `seed` fixes it.

    Raises:
        RuntimeError: no block of 20000-29999 is wholly free.
    """
    blocks = list(range(NUM_BLOCKS))
    random.Random(seed).shuffle(blocks)
    for number in blocks:
        block = range(FIRST_BLOCK + number * BLOCK_SIZE, FIRST_BLOCK + (number + 1) * BLOCK_SIZE)
        with ExitStack() as stack:
            if all(_bind(port, stack) for port in block):
                return block
    raise RuntimeError(f"no {BLOCK_SIZE} consecutive free ports in {FIRST_BLOCK}-{FIRST_BLOCK + 9999}")
