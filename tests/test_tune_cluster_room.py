"""No more trials are started than can all train, on the nodes there are."""

from types import SimpleNamespace

import pytest

from training.config import TrainingConfig
from tune import cluster_room
from tune.cluster_room import trials_that_fit


def fitting(nodes, read_cpus, cpus, gpus=0.0, num_workers=1, most=100):
    nodes = [dict(zip(("CPU", "GPU"), node, strict=False)) for node in nodes]
    return trials_that_fit(nodes, read_cpus, [{"CPU": cpus, "GPU": gpus}] * num_workers, most)


def test_only_as_many_trials_as_leave_room_to_read():
    assert fitting([(2.0,)], read_cpus=0.5, cpus=0.5) == 2
    # Three would hold 1.8 of 2 CPUs and wait for their pictures forever.
    assert fitting([(2.3,)], read_cpus=0.5, cpus=0.5) == 3
    assert fitting([(1.0,)], read_cpus=0.5, cpus=0.5) == 0
    assert fitting([(64.0, 4.0)], read_cpus=1.0, cpus=4.0, gpus=1.0, num_workers=2) == 2
    assert fitting([(64.0,)], read_cpus=1.0, cpus=4.0, gpus=1.0) == 0
    assert fitting([(64.0,)], read_cpus=1.0, cpus=1.0, most=3) == 3
    assert fitting([], read_cpus=0.5, cpus=0.5) == 0


def test_a_worker_is_never_spread_over_nodes():
    # As many CPUs in all as two trials take.
    assert fitting([(2.0,), (2.0,)], read_cpus=0.5, cpus=3.0) == 0
    assert fitting([(4.0,)], read_cpus=0.5, cpus=1.6) == 2
    assert fitting([(2.0,), (2.0,)], read_cpus=0.5, cpus=1.6) == 1
    # The workers of one trial may lie on two nodes.
    assert fitting([(2.0,), (2.0,)], read_cpus=0.5, cpus=1.4, num_workers=2) == 1


def test_a_read_task_finds_room_on_one_node():
    # Beside four trials each node has 0.4 CPU left: 1.6 in all, and no room to read.
    assert fitting([(2.0,)] * 4, read_cpus=0.5, cpus=1.5) == 3
    assert fitting([(2.0,)] * 4 + [(1.0,)], read_cpus=0.5, cpus=1.5) == 4


def test_nodes_without_a_gpu_hold_what_needs_none():
    # The node with the GPU has no CPU to spare.
    assert fitting([(1.0, 1.0), (1.0, 0.0)], read_cpus=0.5, cpus=1.0, gpus=1.0) == 1


@pytest.mark.parametrize(("largest", "expected"), [(None, 2), ({"CPU": 7.0}, 3)])
def test_dead_nodes_hold_nothing_and_an_autoscaler_may_add_some(monkeypatch, largest, expected):
    import ray
    from ray._private import state

    nodes = [{"Alive": alive, "Resources": {"CPU": 2.0}} for alive in (True, True, False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(state, "state", SimpleNamespace(get_max_resources_from_cluster_config=lambda: largest))
    config = TrainingConfig.model_validate({"workers": {"cpus_per_worker": 1.4}})
    assert cluster_room.cluster_room(config, 10)[0] == expected
    with pytest.raises(ValueError, match="1 workers of together 5 CPU and 0 GPU, each on one node"):
        cluster_room.cluster_room(TrainingConfig.model_validate({"workers": {"cpus_per_worker": 5.0}}), 10)
