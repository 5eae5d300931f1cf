"""The command line: its frozen flags, exit codes, and every verb of this package run once."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import openai
import pytest
import torch
import typer.models

from model1.cli import chat, generate, info, serve
from model1.cli.main import VERBS, main
from model1.engine.config import EngineConfig
from model1.serve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 30  # generous: the target on an idle machine is 8

# What people type and paste. A flag that goes or changes its default is an incompatible change.
LOCAL = {
    "--device": "auto",
    "--dtype": "auto",
    "--kv-cache-dtype": "auto",
    "--max-model-len": None,
    "--backend": "auto",
}
SAMPLING = {"--temperature": 0.0, "--top-p": 1.0, "--seed": None}
FLAGS = {
    "serve": {
        "path": None,
        "--host": "127.0.0.1",
        "--port": 8000,
        "--served-model-name": None,
        "--api-key": None,
        "--shutdown-timeout": 30.0,
        "--log-level": "info",
        "--max-num-seqs": 16,
        "--max-num-batched-tokens": None,
        **LOCAL,
    },
    "generate": {
        "prompt": None,
        "--model": None,
        "--max-tokens": 128,
        "--stop": None,
        "--json": False,
        **SAMPLING,
        **LOCAL,
    },
    "chat": {"path": None, "--system": None, "--max-tokens": 256, **SAMPLING, **LOCAL},
    "info": {"path": None, "--json": False},
}
COMMANDS = {
    "serve": serve.serve,
    "generate": generate.generate,
    "chat": chat.chat,
    "info": info.info,
}


def flags_of(command: object) -> dict[str, object]:
    """Flag or argument name -> default."""
    found: dict[str, object] = {}
    assert callable(command)
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        assert get_origin(parameter.annotation) is Annotated, name
        (option,) = get_args(parameter.annotation)[1:]
        flag = name
        if isinstance(option, typer.models.OptionInfo):
            explicit = option.default if isinstance(option.default, str) else None
            flag = explicit or "--" + name.replace("_", "-")
        assert option.help, flag
        found[flag] = parameter.default
    return found


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_the_flags_are_frozen(verb: str) -> None:
    assert flags_of(COMMANDS[verb]) == FLAGS[verb]


def test_every_serve_option_but_the_limits_has_a_flag() -> None:
    fields = set(ServeConfig.__dataclass_fields__) - {"limits"}
    assert fields == set(serve.SERVE_FLAGS)
    assert set(serve.ENGINE_FLAGS) < set(EngineConfig.__dataclass_fields__)


def test_the_overview_lists_every_verb_and_imports_none() -> None:
    code = (
        "import sys; from model1.cli.main import main; rc = main(['--help'])\n"
        "assert not {'torch', 'fastapi', 'pydantic'} & set(sys.modules); sys.exit(rc)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for verb in VERBS:
        assert re.search(rf"^  {verb} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "No such command 'nope'"),
        (["serve", "--max-num-seq", "4"], "No such option"),
        (["serve", "--port", "99999"], "port must be in [0, 65535], got 99999"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs must be a positive integer, got 0"),
        (["serve", "--dtype", "int3"], "'int3'"),
        (["generate", "x", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["generate", "x", "--temperature", "nan"], "temperature must be a finite number"),
        (["chat", "--top-p", "2"], "top_p must be in (0.0, 1.0], got 2.0"),
        (["info", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_exits_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in " ".join(shown.err.split())
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("verb", ["info", "serve", "chat"])
def test_a_missing_checkpoint_is_one_sentence_and_exit_1(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = ["--port", "0"] if verb == "serve" else []
    assert main([verb, str(tmp_path / "none"), *port]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "none" in error


def test_a_port_in_use_is_one_sentence_and_exit_1(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(checkpoint), "--port", port]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: cannot listen on 127.0.0.1 port {port}: address already in use"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_asked_for_and_absent_is_one_sentence_and_exit_1(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--model", str(checkpoint), "--device", "cuda"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: device 'cuda'")


def test_generate_prints_a_continuation_and_repeats_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "def add(", "--model", str(checkpoint), "--max-tokens", "8"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] + "\n" == text
    assert report["completion_tokens"] <= 8
    assert set(report) == {
        "text",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "seconds",
        "tokens_per_second",
    }


def test_generate_reads_standard_input(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", "--model", str(checkpoint), "--max-tokens", "4", "--json"]
    for raw, code in ((b"def add(", 0), (b"\xff\xfe", 1)):
        stdin = io.TextIOWrapper(io.BytesIO(raw))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(arguments) == code
        shown = capsys.readouterr()
        assert ("prompt_tokens" in shown.out) == (code == 0)
        assert ("error: standard input is not UTF-8" in shown.err) == (code == 1)


def test_chat_answers_resets_and_survives_a_question_that_is_too_long(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["hi", "/system be brief", "x" * 3000, "/reset", "/what", "hi", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", str(checkpoint), "--max-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("\n") >= 2
    assert shown.err.count("error: ") == 1
    assert "/reset starts anew" in shown.err


def test_info_counts_parameters_and_cache_bytes(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(checkpoint), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"]["total"] > report["parameters"]["tables"] > 0
    sizes = report["kv_bytes_per_token"]
    assert sizes["fp32"] == 2 * sizes["bf16"] > 2 * sizes["fp8"] > 0
    assert report["config"]["model_type"] == "model1"
    assert report["versions"]["torch"]
    assert main(["info", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert f"total: {report['parameters']['total']:,}" in text


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[str]:
    """`model1 serve` on a real engine; its URL. Ends by SIGTERM with exit code 0."""
    command = [sys.executable, "-m", "model1.cli", "serve", str(checkpoint), "--port", "0"]
    environment = {**os.environ, "MODEL1_API_KEY": "sk-test"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stderr is not None
        start = time.monotonic()
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if "ready on " in line:
                break
        else:
            raise AssertionError("".join(lines))
        assert time.monotonic() - start < START_LIMIT_S
        url = lines[-1].rpartition("ready on ")[2].strip()
        reader = threading.Thread(target=lines.extend, args=(process.stderr,))
        reader.start()
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        reader.join()
        assert not any("ERROR" in line or "sk-test" in line for line in lines), lines


def test_the_served_checkpoint_answers_as_it_does_offline(
    served: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "def add(", "--model", str(checkpoint), "--max-tokens", "8", "--json"]
    assert main(arguments) == 0
    offline = json.loads(capsys.readouterr().out)["text"]
    with openai.OpenAI(base_url=served + "/v1", api_key="sk-test", max_retries=0) as client:
        model = client.models.list().data[0].id
        assert model == "tiny"
        answer = client.completions.create(
            model=model, prompt="def add(", max_tokens=8, temperature=0
        )
        assert answer.choices[0].text == offline
        stream = client.completions.create(
            model=model, prompt="def add(", max_tokens=8, temperature=0, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in stream) == offline


def test_the_server_takes_its_key_from_the_environment(served: str) -> None:
    with (
        openai.OpenAI(base_url=served + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_eight_clients_at_once_get_what_each_gets_alone(served: str) -> None:
    with openai.OpenAI(base_url=served + "/v1", api_key="sk-test", max_retries=0) as client:

        def ask(i: int) -> str:
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "x" * (i + 1)}],
                max_tokens=12,
                temperature=0,
            )
            return answer.choices[0].message.content or ""

        alone = [ask(i) for i in range(8)]
        together: list[str] = [""] * 8

        def store(i: int) -> None:
            together[i] = ask(i)

        threads = [threading.Thread(target=store, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone


SHIPPED = ROOT / "checkpoints" / "code_small"


@pytest.mark.skipif(
    not any(SHIPPED.glob("*.safetensors")), reason="checkpoints/code_small has no weights"
)
def test_the_shipped_checkpoint_completes_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "def add(a, b):\n    return", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
