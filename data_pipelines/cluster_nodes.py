"""What the nodes of a cluster have, those included that are not there yet."""

from __future__ import annotations

from collections.abc import Mapping

Resources = Mapping[str, float]


def cluster_nodes() -> list[Resources]:
    """CPU and GPU of each living node of the connected cluster. What an autoscaler may add counts as one more node;
    nobody knows its parts."""
    import ray
    from ray._private.state import state  # as Ray Train and Ray Data ask for it; there is no public way

    nodes: list[Resources] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = state.get_max_resources_from_cluster_config() or {}
    more = {
        name: max(0.0, largest.get(name, 0.0) - sum(node.get(name, 0.0) for node in nodes)) for name in ("CPU", "GPU")
    }
    return [*nodes, more] if any(more.values()) else nodes
