"""The plain server that the graph is compared with: one process, FastAPI and ONNX Runtime, no log, no batching.

python -m benchmarks.serving_peers --bundle DIR --port PORT [--threads 2]
"""

from __future__ import annotations

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, File, HTTPException, UploadFile

from modeling.bundle import load_bundle
from modeling.engines import create_engine
from modeling.preprocessing import UndecodableImageError, load_image


def build_server(bundle_uri: str, threads: int) -> FastAPI:
    """POST /v1/predict scores one picture in one of `threads` threads, each running the network on one core."""
    bundle = load_bundle(bundle_uri)
    engine = create_engine(bundle)
    engine.warm_up(1)
    size, mask = bundle.manifest.input_size, bundle.task.malignant_mask
    pool = ThreadPoolExecutor(threads)
    server = FastAPI()

    def score(data: bytes) -> float:
        logits = engine.run(load_image(data, size)[None]).logits[0]
        weights = np.exp(logits - logits.max())
        return float(weights[mask].sum() / weights.sum())

    @server.post("/v1/predict")
    async def predict(image: Annotated[UploadFile, File()]) -> dict[str, float]:
        data = await image.read()
        try:
            return {"image_score": await asyncio.get_running_loop().run_in_executor(pool, score, data)}
        except UndecodableImageError as error:
            raise HTTPException(422, str(error)) from error

    @server.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    server = build_server(arguments.bundle, arguments.threads)
    uvicorn.run(server, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
