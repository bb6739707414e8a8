"""What a client can learn of the server and its tokenizer without generating anything."""

from functools import partial
from importlib import metadata
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from engine.server.api_errors import invalid_request
from engine.server.conversation import tokenized_conversation
from engine.server.request_models import DetokenizeRequest, TokenizeRequest
from engine.server.response_models import (
    Health,
    Model,
    ModelList,
    Text,
    Tokens,
    Version,
    documented,
)
from engine.server.service import Service


def model_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get(
        "/health",
        response_model=Health,
        responses={503: {"model": Health, "description": "It does not take requests."}},
        tags=["Operations"],
    )
    async def health() -> JSONResponse:
        """Tell whether the server takes requests; needs no API key."""
        problem = service.problem
        body = {"status": service.state.value, "problem": problem}
        return JSONResponse(body, 200 if problem is None else 503)

    @router.get("/version", response_model=Version, tags=["Operations"])
    async def version() -> dict[str, str]:
        """Tell NEO's version."""
        return {"version": metadata.version("neo-llm")}

    @router.get("/v1/models", **documented(ModelList, "OpenAI"))
    async def models() -> dict[str, Any]:
        """List the names under which the model is served."""
        service.check_serving()
        return {"object": "list", "data": [_model(service, name) for name in service.model_names]}

    @router.get("/v1/models/{name:path}", **documented(Model, "OpenAI"))
    async def model(name: str) -> dict[str, Any]:
        """Describe a served model."""
        return _model(service, service.check_model(name))

    @router.post("/tokenize", **documented(Tokens, "Tokens"))
    async def tokenize(request: TokenizeRequest) -> dict[str, Any]:
        """Return the tokens of a prompt or of a conversation."""
        service.check_model(request.model)
        token_ids = await service.run_encoding(partial(_tokenize, service, request))
        texts = None
        if request.return_token_strs:
            texts = service.encoder.tokenizer.convert_ids_to_tokens(token_ids)
        return {
            "count": len(token_ids),
            "max_model_len": service.ready.limits.max_model_len,
            "tokens": token_ids,
            "token_strs": texts,
        }

    @router.post("/detokenize", **documented(Text, "Tokens"))
    async def detokenize(request: DetokenizeRequest) -> dict[str, str]:
        """Return the text of tokens."""
        service.check_model(request.model)
        service.ready.limits.check_vocabulary(request.tokens, "tokens")
        work = partial(service.encoder.detokenize, request.tokens, skip_special_tokens=False)
        return {"prompt": await service.run_encoding(work)}

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_s),
        "owned_by": "neo",
        "root": service.model_names[0],
        "parent": None,
        "max_model_len": service.ready.limits.max_model_len,
    }


def _tokenize(service: Service, request: TokenizeRequest) -> list[int]:
    if (request.prompt is None) == (request.messages is None):
        raise invalid_request("give either prompt or messages", "prompt")
    if request.messages is not None:
        return tokenized_conversation(service.encoder, request)
    assert request.prompt is not None
    special = request.add_special_tokens is not False
    return service.encoder.tokenize(request.prompt, add_special_tokens=special)
