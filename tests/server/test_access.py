"""Who gets in: every route with and without a key, under odd hosts and odd spellings of its path."""

import contextlib

import httpx
import pytest

from .conftest import FakeDaemon, StartDaemon

KEY = "s3cret-ключ"[:6]
CLOSED = (httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError)
PUBLIC = {"/", "/health", "/ready", "/ping"}


@pytest.fixture
def locked(start_fake_daemon: StartDaemon) -> FakeDaemon:
    return start_fake_daemon(api_key=KEY)


def routes(daemon: FakeDaemon) -> list[tuple[str, str]]:
    from flashtensors.server.app import build_app

    return [
        (method, route.path.replace("{model:path}", "tiny"))
        for route in build_app(daemon.context).routes
        for method in route.methods
    ]


def ask(http: httpx.Client, method: str, path: str, **headers: str) -> httpx.Response:
    content_type = {"content-type": "application/json"} if method in ("POST", "DELETE") else {}
    return http.request(method, path, headers={**content_type, **headers}, content=b"{}" if content_type else None)


def test_every_route_but_the_public_ones_wants_the_key(locked: FakeDaemon) -> None:
    table = routes(locked)
    assert {path for _, path in table} >= PUBLIC | {"/v1/chat/completions", "/api/pull", "/metrics"}
    with locked.client() as http:
        for method, path in table:
            for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": KEY}, {"authorization": "Bearer"}):
                response = ask(http, method, path, **wrong)
                assert (response.status_code == 401) == (path not in PUBLIC), (method, path, wrong)
            assert ask(http, method, path, authorization=f"Bearer {KEY}").status_code != 401


def test_no_spelling_of_a_path_goes_around_the_key(locked: FakeDaemon) -> None:
    with locked.client() as http:
        for _, path in routes(locked):
            if path in PUBLIC:
                continue
            for odd in ("/" + path, path + "/", path.upper(), path.replace("/", "%2f"), "/health/.." + path,
                        path + "/.", "//health/" + path, path + ";/health", path + "%00"):  # fmt: skip
                for method in ("GET", "POST"):
                    response = http.request(method, odd, content=b"{}")
                    if response.request.url.path not in PUBLIC:  # the client reads //metrics as a host
                        assert response.status_code in (400, 401, 404, 405), odd


def test_a_local_daemon_answers_to_local_names_only(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        for host in ("evil.example", "evil.example:8073", "127.0.0.1.evil.example", "localhost.evil", ""):
            for method, path in routes(daemon):
                assert ask(http, method, path, host=host).status_code == 400, (method, path, host)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8073", "[::1]"])
def test_local_names_are_let_in(daemon: FakeDaemon, host: str) -> None:
    with daemon.client() as http:
        assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_form_of_another_site_cannot_post(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            response = http.post("/api/pull", content=b'{"model": "x"}', headers={"content-type": kind})
            assert response.status_code == 400
            assert "application/json" in response.json()["error"]


def test_there_are_no_cors_headers(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        response = http.get("/v1/models", headers={"origin": "http://evil.example"})
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert http.options("/v1/models", headers={"origin": "http://evil.example"}).status_code == 405


def test_a_body_too_large_is_refused_announced_or_not(daemon: FakeDaemon) -> None:
    large = b'{"model": "' + b"x" * (8 * 1024**2) + b'"}'
    with daemon.client() as http:
        headers = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=large, headers=headers).status_code == 400
        pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
        with contextlib.suppress(*CLOSED):  # while we were still sending
            assert http.post("/v1/completions", content=pieces, headers=headers).status_code == 400
        assert http.get("/health").status_code == 200


def test_headers_are_bounded(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        with contextlib.suppress(*CLOSED):
            assert http.get("/health", headers={"x-long": "x" * 100_000}).status_code in (400, 431)
        assert http.get("/health").status_code == 200


def test_a_draining_daemon_is_not_ready_and_takes_nothing_new(daemon: FakeDaemon) -> None:
    with daemon.client() as http:
        assert http.get("/ready").status_code == 200
        daemon.loop.call_soon_threadsafe(daemon.context.drain.begin)
        while http.get("/ready").status_code == 200:
            pass
        assert http.get("/health").status_code == 200
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
