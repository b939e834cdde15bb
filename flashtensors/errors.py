"""Every exception that flashtensors raises on purpose.

    FlashError                      500  internal_error
    ├── ConfigError                 400  invalid_config
    ├── CheckpointError             422  invalid_checkpoint
    │   ├── HeaderError             422  invalid_header          a header that lies, overlaps or does not parse
    │   ├── TruncatedFile           422  truncated_file          fewer bytes than the header promises
    │   ├── DigestMismatch          422  digest_mismatch         the bytes are not those that were pulled
    │   ├── FileChanged             422  file_changed            not the file whose header was read, or none
    │   └── UnsupportedModel        422  unsupported_model       architecture, dtype or quantisation we do not run
    ├── StoreError                  500  store_error
    │   ├── ModelNotFound           404  model_not_found
    │   ├── ObjectNotFound          404  object_not_found        a file or batch that is not there, or has expired
    │   ├── InvalidName             400  invalid_model_name      a name that is not a name, or leaves the store
    │   ├── PullError               502  pull_failed             the source refused, or the link broke
    │   └── DiskFull                507  disk_full
    ├── RequestError                400  invalid_request
    │   ├── UnsupportedField        400  unsupported_field
    │   ├── ContextTooLong          400  context_length_exceeded
    │   └── TemplateError           400  invalid_chat_template
    ├── AuthenticationError         401  invalid_api_key
    ├── CapacityError               503  over_capacity           queue full, or no memory for this model now
    ├── TransferError               500  transfer_failed         a read or copy failed on the way to the device
    ├── WorkerError                 503  worker_failed           the process that held the model died
    ├── DaemonError                 503  daemon_unavailable      no daemon answers, or it could not start
    └── BackendUnavailable          501  backend_unavailable

A message says what, where, what was found, what is allowed and what to do. `http_status` and `code` travel with the
error, so the server translates once; `param` names the offending request field where there is one.
"""

from __future__ import annotations


class FlashError(Exception):
    """Base of every error in this package."""

    http_status: int = 500
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(FlashError):
    """A setting that is unknown, malformed or contradicts another."""

    http_status = 400
    code = "invalid_config"


class CheckpointError(FlashError):
    """The files of a model are not what they claim to be."""

    http_status = 422
    code = "invalid_checkpoint"


class HeaderError(CheckpointError):
    """A safetensors or GGUF header that does not parse, overlaps, or points outside its file."""

    code = "invalid_header"


class TruncatedFile(CheckpointError):
    """A file that ends before the bytes its header promises."""

    code = "truncated_file"


class DigestMismatch(CheckpointError):
    """Bytes whose digest is not the one recorded when the model was pulled."""

    code = "digest_mismatch"


class FileChanged(CheckpointError):
    """A file that is gone, or is not the one whose header was read."""

    code = "file_changed"


class UnsupportedModel(CheckpointError):
    """An architecture, dtype or quantisation that this package does not run."""

    code = "unsupported_model"


class StoreError(FlashError):
    """The store on disk could not do what was asked."""

    code = "store_error"


class ModelNotFound(StoreError):
    """No model of that name is in the store."""

    http_status = 404
    code = "model_not_found"


class ObjectNotFound(StoreError):
    """No file or batch of that id: it never was, was deleted, or has expired."""

    http_status = 404
    code = "object_not_found"


class InvalidName(StoreError):
    """A model name that is empty, malformed, or would leave the store."""

    http_status = 400
    code = "invalid_model_name"


class PullError(StoreError):
    """A source refused the model, or the link to it broke."""

    http_status = 502
    code = "pull_failed"


class DiskFull(StoreError):
    """The store's file system has no room left; nothing half-made was kept."""

    http_status = 507
    code = "disk_full"


class RequestError(FlashError):
    """A request that cannot be served as it stands."""

    http_status = 400
    code = "invalid_request"


class UnsupportedField(RequestError):
    """A field that is valid elsewhere, but that this server does not implement."""

    code = "unsupported_field"


class ContextTooLong(RequestError):
    """Prompt and answer together exceed what the model or its KV cache can hold."""

    code = "context_length_exceeded"


class TemplateError(RequestError):
    """A chat template that is missing, failed, or was refused by the sandbox."""

    code = "invalid_chat_template"


class AuthenticationError(FlashError):
    """A missing or wrong API key."""

    http_status = 401
    code = "invalid_api_key"


class CapacityError(FlashError):
    """No room now: a full queue, or a model that does not fit the device."""

    http_status = 503
    code = "over_capacity"


class TransferError(FlashError):
    """A read or a copy failed between the file and the device."""

    code = "transfer_failed"


class WorkerError(FlashError):
    """The worker process that held the model died or stopped answering."""

    http_status = 503
    code = "worker_failed"


class DaemonError(FlashError):
    """No daemon answers at the configured address, or it could not be started or stopped."""

    http_status = 503
    code = "daemon_unavailable"


class BackendUnavailable(FlashError):
    """A backend that was asked for by name and is not part of this installation."""

    http_status = 501
    code = "backend_unavailable"


def error_classes() -> dict[str, type[FlashError]]:
    """Map every error code to its class, for rebuilding an error that crossed a process boundary."""
    classes: dict[str, type[FlashError]] = {}
    pending: list[type[FlashError]] = [FlashError]
    while pending:
        error_class = pending.pop()
        classes.setdefault(error_class.code, error_class)
        pending.extend(error_class.__subclasses__())
    return classes
