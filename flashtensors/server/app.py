"""The table of routes, and the application made of it."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import FlashError
from . import health
from .context import ServerContext
from .endpoint import Endpoint, Handler
from .ollama import generate, library, pull
from .openai import batches, chat, completions, files, models
from .responses import ErrorBody, ollama_error_body, openai_error_body

_PUBLIC: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", health.health),
    ("GET", "/health", health.health),
    ("GET", "/ready", health.ready),
    ("GET", "/ping", health.health),
)
_OPENAI: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/metrics", health.metrics),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model:path}", models.retrieve_model),
    ("POST", "/v1/chat/completions", chat.create_chat_completion),
    ("POST", "/v1/completions", completions.create_completion),
    ("GET", "/v1/files", files.list_files),
    ("GET", "/v1/files/{file_id}", files.retrieve_file),
    ("DELETE", "/v1/files/{file_id}", files.delete_file),
    ("GET", "/v1/files/{file_id}/content", files.read_file),
    ("POST", "/v1/batches", batches.create_batch),
    ("GET", "/v1/batches", batches.list_batches),
    ("GET", "/v1/batches/{batch_id}", batches.retrieve_batch),
)
_BODILESS: tuple[tuple[str, str, Handler], ...] = (("POST", "/v1/batches/{batch_id}/cancel", batches.cancel_batch),)
_UPLOADS: tuple[tuple[str, str, Handler], ...] = (("POST", "/v1/files", files.create_file),)
_OLLAMA: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/api/tags", library.list_tags),
    ("GET", "/api/ps", library.list_running),
    ("GET", "/api/version", library.version),
    ("POST", "/api/show", library.show),
    ("DELETE", "/api/delete", library.delete),
    ("POST", "/api/load", library.load),
    ("POST", "/api/pull", pull.pull_model),
    ("POST", "/api/generate", generate.generate),
    ("POST", "/api/chat", generate.chat),
)


def build_app(server: ServerContext) -> Starlette:
    """The ASGI application of one daemon."""
    routes = [
        *_routes(_PUBLIC, server, openai_error_body, is_public=True),
        *_routes(_OPENAI, server, openai_error_body),
        *_routes(_BODILESS, server, openai_error_body, needs_body=False),
        *_routes(_UPLOADS, server, openai_error_body, takes_upload=True),
        *_routes(_OLLAMA, server, ollama_error_body),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})
    app.router.redirect_slashes = False
    return app


def _routes(
    table: tuple[tuple[str, str, Handler], ...],
    server: ServerContext,
    error_body: ErrorBody,
    *,
    is_public: bool = False,
    takes_upload: bool = False,
    needs_body: bool = True,
) -> list[Route]:
    return [
        Route(
            path,
            Endpoint(
                handler, server, error_body, is_public=is_public, takes_upload=takes_upload, needs_body=needs_body
            ),
            methods=[method],
        )
        for method, path, handler in table
    ]


async def _no_such_route(request: Request, error: Exception) -> Response:
    """404 and 405, which belong to no route, in the shape of the part of the API that was meant."""
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    text = "no such route" if error.status_code == 404 else "this route has another method"
    body = ollama_error_body if request.url.path.startswith("/api/") else openai_error_body
    translated = FlashError(text)
    translated.code = "no_such_route" if error.status_code == 404 else "method_not_allowed"
    translated.http_status = error.status_code
    return Response(body(translated), error.status_code, error.headers, media_type="application/json")
