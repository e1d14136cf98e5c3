"""The route that shows where the network sees evidence."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

from fastapi import FastAPI, File, Form, Request, Response, UploadFile

from serve.api import PROBLEMS, View
from serve.explanation import MAX_SIDE
from serve.http_errors import check_form_fields
from serve.prediction_service import PredictionService

_VISIBLE = "".join(map(chr, range(0x20, 0x7F)))
_HEADERS = {
    "X-Dermray-Model-Version": "version of the model in the registry",
    "X-Dermray-Digest": "sha256 of the bundle's manifest",
    "X-Dermray-Class": "whose evidence the map shows; other characters than ASCII are percent-encoded",
    "X-Dermray-Abstained": "only where the model gives no risk for this picture: why, separated by commas",
}
_PNG = {
    "description": "the map as a picture",
    "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    "headers": {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()},
}


def add_explanation_routes(api: FastAPI, service: PredictionService) -> None:
    """`POST /v1/explain`."""

    @api.post(
        "/v1/explain",
        operation_id="explain",
        response_class=Response,
        responses={200: _PNG, **PROBLEMS},
        description="Draws the network's class-activation map: where it sees evidence for a class. "
        f"As large as the upload, or scaled down to {MAX_SIDE} pixels on the longest side. No risk; not logged as a "
        "prediction. Colour and opacity grow with the evidence: from none, where a place speaks against the class, to "
        "full where it speaks for it 19 to 1, or at the picture's strongest place if that is more.",
    )
    async def explain(
        request: Request,
        image: Annotated[UploadFile, File(description="JPEG, PNG or WebP")],
        view: Annotated[
            View, Form(description="map over the picture; map alone; picture beside the overlay, twice as wide")
        ] = "overlay",
        target_class: Annotated[
            str | None, Form(description="one of classes of /v1/model; default: the likeliest malignant one")
        ] = None,
    ) -> Response:
        await check_form_fields(request, ("image", "view", "target_class"))
        explanation = await service.explain(await image.read(), view, target_class)
        headers = {
            "X-Dermray-Model-Version": quote(explanation.version, safe=_VISIBLE),
            "X-Dermray-Digest": explanation.digest,
            "X-Dermray-Class": quote(explanation.target_class, safe=_VISIBLE),
            "Cache-Control": "no-store",
        }
        if explanation.reasons:
            headers["X-Dermray-Abstained"] = ", ".join(explanation.reasons)
        return Response(explanation.png, media_type="image/png", headers=headers)
