"""`python -m serve.fake_server PORT STEP_S SHUTDOWN_TIMEOUT`: the real server on a fake engine."""

from __future__ import annotations

import sys

from serve.fakes import MAX_MODEL_LEN, FakeEngine, FakeTokenizer

from model1.serve import log
from model1.serve.config import Limits, ServeConfig
from model1.serve.plan import ServedModel
from model1.serve.server import bind, serve

LIMITS = Limits(max_body_bytes=100_000, header_timeout_s=1.0, max_connections=400)


def run(port: int, step_s: float, shutdown_timeout: float) -> None:
    log.configure("info")
    config = ServeConfig(port=port, shutdown_timeout=shutdown_timeout, limits=LIMITS)
    model = ServedModel("fake", FakeTokenizer(), MAX_MODEL_LEN)
    with bind(config.host, config.port) as sock:
        serve(FakeEngine(step_s=step_s), model, config, sock)


if __name__ == "__main__":
    run(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
