"""How many trials a cluster holds. Too many would not be slow but stop: train workers keep their CPUs while they wait
for data."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.cluster_nodes import Resources, cluster_nodes
from data_pipelines.image_dataset import task_cpus
from training.config import TrainingConfig

# A trial itself only waits. Trials that held CPUs while they waited for their workers would deadlock a small machine.
TRIAL_CPUS = 0.1

_SLACK = 1e-9


def worker_resources(base: TrainingConfig, has_gpu: bool) -> list[Resources]:
    """CPU and GPU of each train worker of a trial; the search space holds no field of them."""
    workers = base.workers
    use_gpu = has_gpu if workers.use_gpu is None else workers.use_gpu
    return [{"CPU": workers.cpus_per_worker, "GPU": float(use_gpu)}] * workers.num_workers


def trials_that_fit(nodes: Sequence[Resources], read_cpus: float, workers: Sequence[Resources], most: int) -> int:
    """Trials, at most `most`, that can train at a time without waiting for each other forever.

    A worker fits on one node or not at all. Beside all trials, one read task must find room on some node.

    Args:
        nodes: CPU and GPU of each.
        read_cpus: of a read task.
        workers: of one trial.
    """
    free = [{name: node.get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes]
    trial = {"CPU": TRIAL_CPUS, "GPU": 0.0}
    for fitting in range(most):
        # Ray may put the trials themselves where they take the last room to read: on the emptiest nodes.
        if not (all(_place(free, worker) for worker in workers) and _place(free, trial, fullest=False)):
            return fitting
        if max(node["CPU"] for node in free) + _SLACK < read_cpus:
            return fitting
    return most


def _place(free: list[dict[str, float]], need: Resources, fullest: bool = True) -> bool:
    """Takes the resources from the fullest (or emptiest) node that has them, and from one with a GPU last."""
    fitting = [node for node in free if all(node[name] + _SLACK >= need[name] for name in ("CPU", "GPU"))]
    if not fitting:
        return False
    chosen = min(fitting, key=lambda node: (node["GPU"], node["CPU"] if fullest else -node["CPU"]))
    for name in ("CPU", "GPU"):
        chosen[name] -= need[name]
    return True


def cluster_room(base: TrainingConfig, most: int) -> tuple[int, list[Resources]]:
    """Trials of this config, at most `most`, that the connected cluster holds at a time, and the workers of one.

    Raises:
        ValueError: it does not hold one.
    """
    import ray

    workers = worker_resources(base, ray.cluster_resources().get("GPU", 0) > 0)
    fitting = trials_that_fit(cluster_nodes(), task_cpus(), workers, most)
    if fitting < 1:
        cpus, gpus = (sum(worker[name] for worker in workers) for name in ("CPU", "GPU"))
        raise ValueError(
            f"the cluster is too small for a trial: it takes {TRIAL_CPUS} CPU, {len(workers)} workers of together "
            f"{cpus:g} CPU and {gpus:g} GPU, each on one node, and {task_cpus():g} CPU to read"
        )
    return fitting, workers
