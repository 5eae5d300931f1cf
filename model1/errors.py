"""Every error a user of Model1 can meet, and what each one means.

    Model1Error
    ├── ConfigError         a configuration value, key or file is wrong (also a ValueError)
    ├── CheckpointError     a checkpoint is missing, truncated, altered or does not fit (ValueError)
    ├── DataError           training or evaluation text cannot be used (ValueError)
    ├── TokenizerError      a tokenizer file, a chat template or its input is wrong (ValueError)
    ├── RequestError        a generation request breaks a rule; `param` names the field (ValueError)
    ├── DeviceError         the device asked for is absent or too small (RuntimeError)
    ├── BackendUnavailable  the operator backend asked for cannot run here (RuntimeError)
    └── EngineError         the engine failed while serving a request (RuntimeError)

Messages name the value and the rule, in one sentence. `AssertionError` marks our own bugs.
"""

from __future__ import annotations


class Model1Error(Exception):
    """Base of every error raised on purpose."""


class ConfigError(Model1Error, ValueError):
    """A configuration value, key or file is wrong."""


class CheckpointError(Model1Error, ValueError):
    """A checkpoint is missing, truncated, altered or does not fit the model."""


class DataError(Model1Error, ValueError):
    """Training or evaluation text cannot be used."""


class TokenizerError(Model1Error, ValueError):
    """A tokenizer file, a chat template or the text given to it is wrong."""


class RequestError(Model1Error, ValueError):
    """A generation request breaks a rule.

    `param` is the name of the offending field, as the OpenAI error body reports it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class DeviceError(Model1Error, RuntimeError):
    """The device asked for is absent or too small."""


class BackendUnavailable(Model1Error, RuntimeError):
    """The operator backend asked for cannot run here."""


class EngineError(Model1Error, RuntimeError):
    """The engine failed while serving a request."""
