"""Whether some node of the cluster can ever hold a replica: one that fits nowhere stays pending and says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.cluster_nodes import Resources
from serve.settings import ServeSettings


def check_room(settings: ServeSettings, nodes: Sequence[Resources]) -> None:
    """Looks for a node for one replica of each deployment, each by itself: what others hold may yet become free.

    Args:
        nodes: CPU and GPU of each node in all, and of what an autoscaler may add.

    Raises:
        ValueError: which field asks for more than any node has.
    """
    for name in ("scorer", "ingress", "fusion", "drift_logger"):
        part = getattr(settings, name)
        need = {"CPU": part.num_cpus, "GPU": getattr(part, "num_gpus", 0.0)}
        if any(all(node.get(unit, 0.0) >= amount for unit, amount in need.items()) for node in nodes):
            continue
        for unit, amount in need.items():
            largest = max((node.get(unit, 0.0) for node in nodes), default=0.0)
            if amount > largest:
                most = f"more than {largest:g} {unit}" if largest else f"a {unit}"
                raise ValueError(f"{name}.num_{unit.lower()}s = {amount:g}: no node of the cluster has {most}")
        raise ValueError(
            f"{name}.num_cpus = {need['CPU']:g} and {name}.num_gpus = {need['GPU']:g}: no node of the cluster has both"
        )
