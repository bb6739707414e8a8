"""`POST /v1/completions`."""

from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.server.answer import AnswerHead
from engine.server.answering import Answering
from engine.server.call_info import call_info
from engine.server.completion_answer import CompletionAnswer
from engine.server.request_models import CompletionRequest, GenerationRequest
from engine.server.request_params import completion_params, each_choice
from engine.server.response_form import response_form
from engine.server.response_models import Completion, documented
from engine.server.service import Service


def completion_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/completions", **documented(Completion, "OpenAI", streams=True))
    async def complete(call: Request, request: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        model = service.check_model(request.model)
        params = completion_params(request)
        n = request.n or 1
        service.check_count(len(_listed(request)) * n)
        prompts = await service.run_encoding(partial(_encode, service, request))
        for token_ids in prompts:
            service.check_request(token_ids, params, request.max_tokens)
        head = answer_head(
            call, request, "cmpl", model, sum(len(token_ids) for token_ids in prompts)
        )
        repeated = [token_ids for token_ids in prompts for _ in range(n)]
        echoes: list[str] = []
        if request.echo:
            texts = await service.run_encoding(partial(_prompt_texts, service, request))
            echoes = [text for text in texts for _ in range(n)]
        if request.echo and request.max_tokens == 0:
            head = replace(head, prompt_only=True)
        service.metrics.request_n.observe(n)
        answer = CompletionAnswer(head, repeated, echoes, service.texts)
        choices = each_choice(params, n) * len(prompts)
        return Answering(service, answer, lambda: service.generate(repeated, choices))

    return router


def answer_head(
    call: Request, request: GenerationRequest, prefix: str, model: str, num_prompt_tokens: int
) -> AnswerHead:
    """Return what every part of an answer has.

    Args:
        call: The HTTP call.
        request: Its body.
        prefix: Of the answer's id.
        model: The name to answer with.
        num_prompt_tokens: Of all prompts.
    """
    options = request.stream_options
    return AnswerHead(
        answer_id=f"{prefix}-{call_info(call.scope).request_id}",
        model=model,
        num_prompt_tokens=num_prompt_tokens,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
        return_token_ids=bool(request.return_token_ids),
        prompt_logprobs=request.prompt_logprobs is not None,
        form_field=response_form(request)[1],
    )


def _listed(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, also of a request that has one."""
    prompt: Any = request.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _encode(service: Service, request: CompletionRequest) -> list[list[int]]:
    special = request.add_special_tokens is not False
    return [
        service.encoder.tokenize(prompt, add_special_tokens=special)
        if isinstance(prompt, str)
        else prompt
        for prompt in _listed(request)
    ]


def _prompt_texts(service: Service, request: CompletionRequest) -> list[str]:
    """Return the prompts' texts: as they were given, or decoded."""
    skip = request.skip_special_tokens is not False
    return [
        prompt
        if isinstance(prompt, str)
        else service.encoder.detokenize(prompt, skip_special_tokens=skip)
        for prompt in _listed(request)
    ]
