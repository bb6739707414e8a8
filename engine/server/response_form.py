"""The form that a request wants its answer to have, in whichever words it says so."""

from typing import Any

from engine.errors import RequestError
from engine.server.api_errors import invalid_request
from engine.server.request_models import GenerationRequest, ResponseFormat, StructuredOutputs
from engine.structured_output import StructuredOutput

_GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields, by the engine's names."""


def response_form(request: GenerationRequest) -> tuple[StructuredOutput | None, str | None]:
    """Return the form, and the field that asks for it; None for both if any text will do.

    Raises:
        ApiError: Two fields ask for a form, or one is malformed.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if request.response_format is not None:
        wanted["response_format"] = _of_response_format(request.response_format)
    if request.structured_outputs is not None:
        wanted["structured_outputs"] = _of_structured_outputs(request.structured_outputs)
    for field, name in _GUIDED.items():
        value = getattr(request, field)
        if value is not None:
            wanted[field] = {name: value}
    wanted = {field: options for field, options in wanted.items() if options}
    if not wanted:
        return None, None
    if len(wanted) > 1:
        raise invalid_request(
            f"{' and '.join(wanted)} each ask for a form; give one of them", list(wanted)[-1]
        )
    [(field, options)] = wanted.items()
    try:
        return StructuredOutput(**options), field
    except RequestError as error:
        raise invalid_request(f"{field}: {error}", field) from error


def _of_response_format(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "text":
        return {}
    if wanted.json_schema is None:
        raise invalid_request("response_format.json_schema is missing", "response_format")
    return {"json_schema": wanted.json_schema.json_schema}


def _of_structured_outputs(wanted: StructuredOutputs) -> dict[str, Any]:
    options = {
        name: getattr(wanted, name) for name in ("json_schema", "regex", "choice", "grammar")
    }
    given = {name: value for name, value in options.items() if value is not None}
    return given | ({"json_object": True} if wanted.json_object else {})
