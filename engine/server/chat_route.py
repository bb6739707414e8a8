"""`POST /v1/chat/completions`."""

from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.server.answering import Answering
from engine.server.chat_answer import ChatAnswer
from engine.server.completion_route import answer_head
from engine.server.conversation import chat_prompt
from engine.server.request_models import ChatRequest
from engine.server.request_params import chat_params, each_choice
from engine.server.response_models import ChatCompletion, documented
from engine.server.service import Service
from engine.tool_calls import ToolUse


def chat_router(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", **documented(ChatCompletion, "OpenAI", streams=True))
    async def chat(call: Request, request: ChatRequest) -> Response:
        """Answer a conversation."""
        model = service.check_model(request.model)
        tool_use = ToolUse.of(
            service.tool_format,
            request.tools,
            request.tool_choice,
            parallel_tool_calls=request.parallel_tool_calls is not False,
        )
        service.check_count(request.n or 1)
        params = chat_params(request)
        if tool_use is not None:
            params = tool_use.sampling_params(params)
        token_ids = await service.run_encoding(
            partial(chat_prompt, service.encoder, request, tool_use)
        )
        service.check_request(token_ids, params, params.max_tokens)
        head = answer_head(call, request, "chatcmpl", model, len(token_ids))
        if tool_use is not None and tool_use.structured_output is not None:
            head = replace(head, form_field="tools")
        service.metrics.request_n.observe(request.n or 1)
        choices = each_choice(params, request.n or 1)
        parsers = [] if tool_use is None else [tool_use.parser() for _ in choices]
        answer = ChatAnswer(head, token_ids, service.texts, parsers)
        prompts = [token_ids] * len(choices)
        return Answering(service, answer, lambda: service.generate(prompts, choices))

    return router
