"""Free loopback ports."""

from __future__ import annotations

import random
import socket

# Below the range the kernel hands to outgoing connections, so that none of those takes a port between choice and use.
_LOW, _HIGH = 15000, 32000


_given: set[int] = set()
"""What this process was given before: its servers take some time until they listen."""


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports nobody listens on at 127.0.0.1, none of them given before. Another process may still
    take one before its use.

    Raises:
        RuntimeError: none found in a thousand tries.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample([port for port in range(_LOW, _HIGH) if port not in _given], 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        _given.add(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no {count} free ports between {_LOW} and {_HIGH}")


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server may listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
