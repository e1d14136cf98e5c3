"""The port on which replicas call each other: on the node's own address only.

Serve opens it on all interfaces, whatever `http_options.host` says, without encryption (unless Ray runs with TLS) and
without asking who calls; what comes in is unpickled, so whoever reaches it runs code. On one machine, whose Ray listens
on loopback, it is closed to the network by this. In a cluster, other nodes must reach it: a network policy keeps
everyone else out, as for Ray's own ports.
"""

from __future__ import annotations

from typing import Any


def listen_on_node_address() -> None:
    """Has this replica's port opened on the node's address. Called by a deployment's constructor, after which Serve
    opens it; does nothing in a process that is no replica.

    Raises:
        RuntimeError: this version of Ray opens it in another way.
    """
    import ray
    from ray import serve
    from ray.serve._private import replica
    from ray.serve.exceptions import RayServeException

    try:
        serve.get_replica_context()
    except RayServeException:
        return
    open_port = getattr(replica, "add_port_to_grpc_server", None)
    if open_port is None:
        raise RuntimeError("Ray Serve opens the port between replicas in an unknown way; it may be open to the network")
    if getattr(open_port, "_on_node_address", False):
        return
    address = ray.util.get_node_ip_address()
    host = f"[{address}]" if ":" in address else address

    def on_node_address(server: Any, wanted: str) -> int:
        return open_port(server, f"{host}:{wanted.rpartition(':')[2]}")

    on_node_address._on_node_address = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = on_node_address
