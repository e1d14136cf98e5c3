"""The servers that the graph is compared with: one process that answers /v1/predict, no log, no metadata, no scaling.

python -m benchmarks.serving_peers --kind fastapi_ort --bundle DIR --port PORT

fastapi_ort: FastAPI; the bundle's network in ONNX Runtime, one core for each of two threads.
fastapi_eager: FastAPI whose async handler runs torchvision's MobileNetV2 at 224 px in torch, eager, with two threads:
    the way of the earlier system that this one must outdo. Its weights are random; their values cost no time.
litserve: LitServe with two workers of the bundle's network in ONNX Runtime (benchmarks/litserve_peer.py). Needs the
    extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, File, HTTPException, UploadFile

from modeling.bundle import load_bundle
from modeling.engines import create_engine
from modeling.preprocessing import UndecodableImageError, load_image

KINDS = ("fastapi_ort", "fastapi_eager", "litserve")
THREADS = 2
EAGER_PIXELS = 224

Score = Callable[[bytes], float]


def onnx_score(bundle_uri: str) -> Score:
    """Encoded picture -> P(malignant), by the bundle's network on one core."""
    bundle = load_bundle(bundle_uri)
    engine = create_engine(bundle)
    engine.warm_up(1)
    size, mask = bundle.manifest.input_size, bundle.task.malignant_mask

    def score(data: bytes) -> float:
        logits = engine.run(load_image(data, size)[None]).logits[0]
        weights = np.exp(logits - logits.max())
        return float(weights[mask].sum() / weights.sum())

    return score


def eager_score() -> Score:
    """Encoded picture -> softmax of torchvision's MobileNetV2 at 224 px, eager."""
    import torch

    from modeling.torchvision_compat import prepare_torchvision

    prepare_torchvision()
    from torchvision.models import mobilenet_v2

    torch.set_num_threads(THREADS)
    network = mobilenet_v2(weights=None, num_classes=2).eval()

    def score(data: bytes) -> float:
        pixels = torch.from_numpy(load_image(data, EAGER_PIXELS)).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            return float(torch.softmax(network(pixels), dim=1)[0, 1])

    return score


def build_server(score: Score, threads: int) -> FastAPI:
    """POST /v1/predict scores one picture, in one of `threads` threads; with 0 in the handler itself."""
    pool = ThreadPoolExecutor(threads) if threads else None
    server = FastAPI()

    @server.post("/v1/predict")
    async def predict(image: Annotated[UploadFile, File()]) -> dict[str, float]:
        data = await image.read()
        try:
            if pool is None:
                return {"image_score": score(data)}
            return {"image_score": await asyncio.get_running_loop().run_in_executor(pool, score, data)}
        except UndecodableImageError as error:
            raise HTTPException(422, str(error)) from error

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="fastapi_ort")
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "litserve":
        from benchmarks.litserve_peer import run_litserve

        run_litserve(arguments.bundle, arguments.port, THREADS)
        return
    if arguments.kind == "fastapi_ort":
        server = build_server(onnx_score(arguments.bundle), THREADS)
    else:
        server = build_server(eager_score(), 0)
    uvicorn.run(server, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
