"""What a client's author reads in the OpenAPI document, and answers that HTTP itself asks for."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from serve.ingress import build_api
from serve.key_ring import KeyRing
from tests.bundle_factory import backend, served_bundle
from tests.local_service import LocalService


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    home = tmp_path_factory.mktemp("docs")
    return LocalService(served_bundle(home / "bundle"), home)


@pytest.fixture(params=["open", "keys"])
def document(local, request):
    keys = None if request.param == "open" else KeyRing(list, 300)
    return TestClient(build_api(backend(local.service, local.log, keys=keys))).get("/openapi.json").json()


def operations(document):
    return [(f"{method} {path}", found) for path, by in document["paths"].items() for method, found in by.items()]


def json_schemas(document, operation):
    """Names of the models of a route's JSON request and of its answers, by status."""
    bodies = {"request": operation.get("requestBody", {}), **operation["responses"]}
    for place, body in bodies.items():
        schema = body.get("content", {}).get("application/json", {}).get("schema", {})
        for part in [schema, schema.get("items", {}), *schema.get("anyOf", [])]:
            if "$ref" in part:
                yield place, part["$ref"].rsplit("/", 1)[1]


def test_generated_clients_get_a_readable_name_and_a_line_for_every_route(document):
    names = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(names)) == len(names) >= 21
    for place, operation in operations(document):
        assert operation["operationId"].isidentifier() and "v1" not in operation["operationId"], place
        assert 10 < len(operation["summary"]) < 110 and operation["description"], place


def test_there_is_one_error_model(document):
    for place, operation in operations(document):
        errors = {status: name for status, name in json_schemas(document, operation) if status[0] in "45"}
        expected = {"Problem", "Health"} if "readyz" in place else {"Problem"}
        assert set(errors.values()) <= expected, place
        assert set(errors) == {status for status in operation["responses"] if status[0] in "45"}, place
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])


def test_every_model_of_a_json_request_or_answer_has_an_example(document):
    schemas = document["components"]["schemas"]
    named = {name for _, operation in operations(document) for _, name in json_schemas(document, operation)}
    assert {name for name in named if "examples" not in schemas[name]} == set()


def test_a_refused_method_is_told_which_ones_there_are(local):
    response = local.client.put("/v1/predictions")
    assert response.status_code == 405 and response.headers["Allow"] == "GET"
    assert response.json() == {"error": "method_not_allowed", "detail": "Method Not Allowed"}


def test_a_slash_too_many_is_not_found_and_not_redirected(local):
    response = local.client.get("/v1/predictions/", follow_redirects=False)
    assert response.status_code == 404 and response.json()["error"] == "not_found"


def test_a_request_that_reads_no_form_is_answered_whatever_its_content_type(local):
    assert local.client.get("/v1/predictions", headers={"Content-Type": "multipart/form-data"}).status_code == 200
