"""`/about`: what the model is for, its limits, its data, and what is kept of whom."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from serve.backend import Backend
from serve.lesion_view import BANDS, CONTEXTS
from serve.page_templates import render


def add_about_routes(api: FastAPI, backend: Backend) -> None:
    """`GET /about`."""

    async def about(request: Request) -> Response:
        card = await backend.service.model_card()
        return render(request, card["synthetic"], "about.html", card=card, bands=BANDS, contexts=CONTEXTS)

    api.add_route("/about", about, ["GET"], include_in_schema=False)
