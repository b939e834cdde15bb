"""A small HTTP client of the daemon, for commands and the SDK. Standard library only: it imports in milliseconds."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Generator, Iterator, Mapping

import msgspec

from ..config import Settings
from ..errors import AuthenticationError, DaemonError, FlashError, error_classes
from .launch import DaemonInfo, await_daemon, find_daemon, start_daemon

CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 65536


class DaemonClient:
    """Talks to one daemon; each call is a connection of its own.

    Args:
        info: Where the daemon listens.
        api_key: Sent as a bearer token when set.
    """

    def __init__(self, info: DaemonInfo, api_key: str | None = None) -> None:
        self.info = info
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"

    @classmethod
    def find(cls, settings: Settings) -> DaemonClient | None:
        """A client of the daemon that runs for these settings, or None."""
        info = find_daemon(settings)
        return None if info is None else cls(info, settings.api_key)

    @classmethod
    def connect(cls, settings: Settings) -> DaemonClient:
        """A client of the daemon that runs for these settings; raises `DaemonError` when none does."""
        client = cls.find(settings)
        if client is None:
            raise DaemonError("no daemon runs; start one with flash start")
        return client

    @classmethod
    def connect_or_start(cls, settings: Settings) -> DaemonClient:
        """A client of the daemon that runs for these settings, which is started if need be."""
        client = cls.find(settings)
        if client is not None:
            return client
        try:
            info = start_daemon(settings)
        except DaemonError:
            running = await_daemon(settings)  # another process was quicker to start it
            if running is None:
                raise
            info = running
        return cls(info, settings.api_key)

    def get(self, path: str) -> dict[str, object]:
        """The JSON object at `path`; raises the error that the daemon answers with."""
        return self._whole("GET", path, None)

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        """Send a body and read one JSON object; raises the error that the daemon answers with."""
        return self._whole("POST", path, body)

    def delete(self, path: str, body: Mapping[str, object]) -> dict[str, object]:
        """Like `post`, with DELETE."""
        return self._whole("DELETE", path, body)

    def stream(self, path: str, body: Mapping[str, object]) -> Generator[dict[str, object]]:
        """Send a body and yield each object of an NDJSON answer; close the generator to stop the daemon's work.

        Raises:
            FlashError: What the daemon answers with, before or within the stream.
            DaemonError: The connection broke.
        """
        connection = self._connection()
        try:
            response = self._send(connection, "POST", path, body)
            for line in _lines(response):
                fields = msgspec.json.decode(line, type=dict[str, object])
                if "error" in fields:
                    raise _rebuilt(500, fields)
                yield fields
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()

    def _whole(self, method: str, path: str, body: Mapping[str, object] | None) -> dict[str, object]:
        connection = self._connection()
        try:
            return msgspec.json.decode(self._send(connection, method, path, body).read(), type=dict[str, object])
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        wildcard = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = wildcard.get(self.info.host, self.info.host)
        return http.client.HTTPConnection(host, self.info.port, timeout=CONNECT_TIMEOUT_S)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
    ) -> http.client.HTTPResponse:
        connection.connect()
        connection.sock.settimeout(None)  # an answer may take as long as it takes
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.request(method, path, None if body is None else msgspec.json.encode(body), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise answered_error(response.status, response.read())
        return response

    def _broken(self, error: Exception) -> DaemonError:
        return DaemonError(f"the connection to the daemon at {self.info.url} broke: {error}")


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Whole lines as they come; raises `IncompleteRead` where the answer breaks off, which `readline` does not."""
    rest = b""
    while chunk := response.read1(_READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def answered_error(status: int, body: bytes) -> FlashError:
    """The error that a daemon answered with, as the class its code names."""
    if status == AuthenticationError.http_status:
        return AuthenticationError(
            "the daemon wants another API key; set FLASH_API_KEY, or api_key in the store's config.toml"
        )
    fields: dict[str, object]
    try:
        fields = msgspec.json.decode(body, type=dict[str, object])
    except msgspec.DecodeError:
        fields = {"error": body[:200].decode("utf-8", "replace")}
    return _rebuilt(status, fields)


def _rebuilt(status: int, fields: dict[str, object]) -> FlashError:
    """The error of either shape, as the class its code names."""
    error, code = fields.get("error"), fields.get("code")
    if isinstance(error, dict):
        error, code = error.get("message"), error.get("code")
    return error_classes().get(str(code), FlashError)(str(error) or f"the daemon answered {status}")
