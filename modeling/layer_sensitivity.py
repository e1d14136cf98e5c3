"""Which layers of a network suffer most from being quantised, in blocks on the way from the picture to the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_BLOCKS = 8


def layer_depths(model: Any, op_types: Sequence[str]) -> dict[str, int]:
    """For each layer of an ONNX model, by its node's name: how many layers lie before it on the longest way from the
    input. Networks of an ensemble stand side by side, so their layers of one position share a depth."""
    behind: dict[str, int] = {}
    depths = {}
    for node in model.graph.node:  # ONNX orders nodes topologically
        depth = max((behind.get(name, 0) for name in node.input), default=0)
        if node.op_type in op_types:
            depths[node.name] = depth
            depth += 1
        behind.update(dict.fromkeys(node.output, depth))
    return depths


def depth_blocks(depths: dict[str, int], number: int = _BLOCKS) -> list[list[str]]:
    """Layers in at most `number` blocks of neighbouring depths that hold about as many layers each."""
    blocks: list[list[str]] = [[]]
    taken = 0
    for depth in sorted(set(depths.values())):
        layers = [name for name, value in depths.items() if value == depth]
        if blocks[-1] and taken >= len(blocks) * len(depths) / number:
            blocks.append([])
        blocks[-1] += layers
        taken += len(layers)
    return [block for block in blocks if block]


def last_layers(model: Any, op_types: Sequence[str]) -> list[str]:
    """The layers behind which there is no other: the network's heads."""
    ahead: set[str] = set()  # tensors on the way to a layer
    found = []
    for node in reversed(model.graph.node):
        is_layer, leads_on = node.op_type in op_types, bool(ahead & set(node.output))
        if is_layer and not leads_on:
            found.append(node.name)
        if is_layer or leads_on:
            ahead.update(node.input)
    return found[::-1]


def most_sensitive(
    model: Any, layers: Sequence[str], share: float, disturbance: Callable[[list[str]], float]
) -> list[str]:
    """The blocks of layers that disturb the answer most, until they hold `share` of all layers; none of one block only.

    Args:
        layers: names of the nodes that may be quantised.
        disturbance: how far the answer moves when the named layers alone are quantised.
    """
    op_types = {node.op_type for node in model.graph.node if node.name in layers}
    depths = {name: depth for name, depth in layer_depths(model, sorted(op_types)).items() if name in layers}
    blocks = depth_blocks(depths)
    chosen: list[str] = []
    if share >= 1:
        return list(depths)
    if len(blocks) == 1:
        return []
    for block in sorted(blocks, key=disturbance, reverse=True):
        if len(chosen) >= share * len(depths):
            break
        chosen += block
    return chosen
