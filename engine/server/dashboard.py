"""The page at `/` and the numbers it polls."""

import base64
import hashlib
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response

from engine.server.json_text import to_json
from engine.server.response_models import ErrorBody
from engine.server.service import Service

PAGE = Path(__file__).parent / "static" / "index.html"


class DashboardState(BaseModel):
    """What the page shows; `now_s` and the steps' `start_s` are on one monotonic clock."""

    now_s: float
    server: dict[str, Any]
    gauges: dict[str, Any]
    rates: dict[str, Any]
    totals: dict[str, Any]
    steps: list[dict[str, Any]]


def dashboard_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, tags=["Dashboard"])
    async def page() -> HTMLResponse:
        """Show the dashboard."""
        text = _page()
        return HTMLResponse(text, headers=_page_headers(text))

    @router.get(
        "/dashboard/state",
        response_model=None,
        responses={200: {"model": DashboardState}, 400: {"model": ErrorBody}},
        tags=["Dashboard"],
    )
    async def state(since: Annotated[int, Query(ge=0)] = 0) -> Response:
        """Tell how things stand, and of the steps after number `since` that are still kept."""
        return Response(to_json(_state(service, since)), media_type="application/json")

    return router


@lru_cache(maxsize=1)
def _page() -> str:
    return PAGE.read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _page_headers(text: str) -> dict[str, str]:
    """Return headers that allow the page's own style and script, calls to its own server, no more.

    Both are inline, so they are allowed by their hashes.
    """
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(text, "script"),
        "style-src": _hash_of(text, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _hash_of(text: str, tag: str) -> str:
    """Return the CSP source of the only inline element of a kind."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _state(service: Service, since: int) -> dict[str, Any]:
    metrics = service.metrics
    recent = metrics.recent
    return {
        "now_s": time.monotonic(),
        "server": _server(service),
        "gauges": {
            **metrics.gauges._asdict(),
            "num_device_blocks": service.ready.num_device_blocks if service.is_open else 0,
            "num_host_blocks": service.ready.num_host_blocks if service.is_open else 0,
        },
        "rates": {
            "tokens_per_s": recent.tokens_per_s(),
            "finished_per_s": recent.finished_per_s(),
            "ttft_s": recent.ttft_percentiles_s(),
            "tpot_s": recent.tpot_percentiles_s(),
        },
        "totals": {
            "prompt_tokens": metrics.prompt_tokens,
            "generation_tokens": metrics.generation_tokens,
            "finished": dict(metrics.finished),
            "steps_by_mode": dict(metrics.steps_by_mode),
            "rows": dict(metrics.rows),
            "failed_steps": metrics.num_failed_steps,
            "preemptions": metrics.num_preemptions,
            "swapped_out_blocks": metrics.swapped_out_blocks,
            "swapped_in_blocks": metrics.swapped_in_blocks,
            "graph_steps": metrics.num_graph_steps,
            "step_s": metrics.step_s,
            "device_busy_s": metrics.device_busy_s,
            "cpu_attention_s": metrics.cpu_attention_s,
            "cpu_waiting_s": metrics.cpu_waiting_s,
        },
        "steps": [step.as_json() for step in service.engine.steps if step.number > since],
    }


def _server(service: Service) -> dict[str, Any]:
    """Return what does not change, as far as it is known."""
    facts: dict[str, Any] = {
        "state": service.state.value,
        "started_s": service.started_s,  # tells a server from the one before it
        "model_names": service.model_names,
    }
    if service.is_open:
        ready = service.ready
        facts |= {
            "device": ready.device,
            "dtype": ready.dtype,
            "description": ready.description,
            "block_size": ready.block_size,
            "block_bytes": ready.block_bytes,
            "max_num_seqs": ready.max_num_seqs,
            "max_model_len": ready.limits.max_model_len,
        }
    return facts
