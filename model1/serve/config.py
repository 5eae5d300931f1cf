"""How the server listens and what it allows; the engine has a config of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model1.errors import ConfigError

MIN_BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 16  # of the context: four times the average of text, for JSON's escapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds that keep one client from harming the others."""

    # None = what a prompt as long as the context can take. Parsing holds up every client, at worst
    # 0.3 s per MiB.
    max_body_bytes: int | None = None
    body_timeout_s: float = 10.0  # to send a whole request body
    header_timeout_s: float = 10.0  # to send a whole request head
    max_header_bytes: int = 16 * 1024
    max_connections: int = 1024
    max_active_sequences: int = 256  # running and queued; beyond it the answer is 503
    max_sequences_per_request: int = 128  # prompts times n
    hang_timeout_s: float = 60.0  # a step older than this makes the server not ready

    def body_bytes(self, max_model_len: int) -> int:
        """Most bytes of a request body to a model with a context of `max_model_len` tokens."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * max_model_len)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Options of `model1 serve` that concern HTTP; the field names are its flags."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 = any free one
    served_model_name: str | None = None  # None = the checkpoint folder's name
    api_key: str | None = field(default=None, repr=False)  # None = no key asked for
    shutdown_timeout: float = 30.0  # seconds that running requests get after SIGTERM
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        if not 0.0 <= self.shutdown_timeout <= 3600.0:
            raise ConfigError(
                f"shutdown_timeout must be in [0, 3600] seconds, got {self.shutdown_timeout}"
            )
        name = self.served_model_name
        if name is not None and not 1 <= len(name) <= 256:
            raise ConfigError(f"served_model_name must have 1 to 256 characters, got {len(name)}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("api_key must be printable ASCII")
        if self.api_key == "":
            raise ConfigError("api_key must not be empty; leave it out to ask for no key")
