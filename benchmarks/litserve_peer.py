"""LitServe around the bundle's network; its workers import this module, so it is one of its own."""

# LitServe looks at the annotations themselves: no `from __future__ import annotations` here.
import litserve
from fastapi import Request

from benchmarks.serving_peers import Score, onnx_score


class Scorer(litserve.LitAPI):
    """One picture a request, in a worker process that runs the network on one core."""

    bundle_uri: str
    score: Score

    def setup(self, device: str) -> None:
        self.score = onnx_score(self.bundle_uri)

    def decode_request(self, request: Request) -> bytes:
        return request["image"].file.read()

    def predict(self, data: bytes) -> float:
        return self.score(data)

    def encode_response(self, output: float) -> dict[str, float]:
        return {"image_score": output}


def run_litserve(bundle_uri: str, port: int, workers: int) -> None:
    """Serves until it is ended."""
    api = Scorer(api_path="/v1/predict")
    api.bundle_uri = bundle_uri
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, log_level="warning", access_log=False, generate_client_file=False)
