"""The demo: start the server on the shipped checkpoint, use it as any client would, stop it.

`python -m model1.cli.demo [CHECKPOINT]` prints what was asked and answered, then a table. Exit
code 0 if every answer came; else 1, with the end of the server's log.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai import OpenAI

    from model1.tokenizer import Tokenizer

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
ANSWER_LIMIT_S = 300.0  # a slow machine reads the long prompt for minutes
LOG_LINES = 40
LONG_PROMPT_TOKENS = 8000  # at least, by the server's count
LONG_ANSWER_TOKENS = 32
TABLE_WIDTH = 118
CODE_ENDS = ["\n\n", "```"]  # a completion ends at a blank line, as in an editor

LONG_FILE = Path(threading.__file__)
CODE = """class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):"""
QUESTION = "What does os.path.exists do?"
LONG_QUESTION = "What does Semaphore.acquire do?"
# No prompt ends in a line break: break and indentation are one token, the model's to choose.
TOGETHER = (
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def __len__(self):",
    "import json\n\ndef save_json(path, data):\n    with open(path, 'w') as f:",
    "import json\n\ndef read_json(path):\n    with open(path) as f:\n        return",
    "import logging\n\nlogger =",
    "def __init__(self, name, value):",
    "def squares(n):\n    return [x * x for x in",
    "def is_even(n):\n    return n %",
)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One row of the table."""

    asked: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float
    tokens_per_second: float


def main(arguments: Sequence[str]) -> int:
    """Run the demo; returns the exit code."""
    log: collections.deque[str] = collections.deque(maxlen=LOG_LINES)
    start = time.monotonic()
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        print("error: the demo needs the openai package: pip install openai", file=sys.stderr)
        return 1
    try:
        with server(arguments, log) as url:
            print(f"server ready at {url} after {time.monotonic() - start:.1f} s\n")
            key = "unused"  # the server of the demo asks for none
            limits: dict[str, Any] = {"timeout": ANSWER_LIMIT_S, "max_retries": 0}
            with OpenAI(base_url=url + "/v1", api_key=key, **limits) as client:
                card = client.models.list().data[0]
                prompt = long_prompt(tokenizer_of(arguments))
                answers = ask_everything(client, card.id, prompt)
                kv_bytes = (card.model_extra or {}).get("kv_bytes_per_token")
        print_table(answers, kv_bytes)
    except (DemoError, OpenAIError) as error:
        print(f"error: {error}\nend of the server's log:", *log, sep="\n", file=sys.stderr)
        return 1
    print(f"everything answered, server stopped, {time.monotonic() - start:.0f} s in all")
    return 0


@contextlib.contextmanager
def server(arguments: Sequence[str], log: collections.deque[str]) -> Iterator[str]:
    """`model1 serve` on a free port, as a process of its own; yields its URL."""
    command = [sys.executable, "-m", "model1.cli", "serve", *arguments, "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "MODEL1_API_KEY"}
    found: list[str] = []
    ready = threading.Event()

    def read(lines: Iterable[str]) -> None:
        for line in lines:
            log.append(line.rstrip())
            match = re.search(r"ready on (http://\S+)$", log[-1])
            if match:
                found.append(match[1])
                ready.set()
        ready.set()  # the process ended

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        reader = threading.Thread(target=read, args=(process.stderr,))
        reader.start()
        try:
            ready.wait(START_LIMIT_S)
            if not found:
                raise DemoError("the server did not start")
            wait_until_ready(found[0])
            yield found[0]
        finally:
            process.terminate()
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()
    if process.returncode != 0:
        raise DemoError(f"the server ended with exit code {process.returncode}")


def wait_until_ready(url: str) -> None:
    """Poll /health/ready; DemoError when it stays unready."""
    from urllib.error import URLError
    from urllib.request import urlopen

    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(URLError), urlopen(url + "/health/ready", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise DemoError("the server did not become ready")


def ask_everything(client: OpenAI, model: str, long_code: str) -> list[Answer]:
    """All four kinds of requests, one after the other."""
    common: dict[str, Any] = {
        "model": model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }

    ask: Any = client.completions.create
    ask_chat: Any = client.chat.completions.create

    def complete(prompt: str) -> Iterator[Any]:
        return iter(ask(prompt=prompt, max_tokens=64, stop=CODE_ENDS, **common))

    def talk(content: str, max_tokens: int) -> Iterator[Any]:
        messages = [{"role": "user", "content": content}]
        return iter(ask_chat(messages=messages, max_tokens=max_tokens, **common))

    print(f"# a completion\n{CODE}", end="", flush=True)
    answers = [read_stream("complete a method", lambda: complete(CODE), show=True)]
    print(f"\n# a chat\n> {QUESTION}")
    answers.append(read_stream("answer a question", lambda: talk(QUESTION, 96), show=True))
    print(f"\n# a question about {LONG_FILE.name}, {len(long_code)} characters\n> {LONG_QUESTION}")
    content = f"{long_code}\n\n{LONG_QUESTION}"
    about_file = read_stream(
        f"ask about {LONG_FILE.name}", lambda: talk(content, LONG_ANSWER_TOKENS), show=True
    )
    answers.append(about_file)
    if answers[-1].prompt_tokens < LONG_PROMPT_TOKENS:
        raise DemoError(f"the long prompt has only {answers[-1].prompt_tokens} tokens")
    print("\n# 8 requests at once")
    answers.append(ask_together(complete))
    return answers


def read_stream(asked: str, ask: Callable[[], Iterator[Any]], *, show: bool) -> Answer:
    """Ask and read the stream to its end; DemoError for an answer without text or usage."""
    start = time.monotonic()
    first = last = None
    texts: list[str] = []
    usage = None
    for chunk in ask():
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.text if hasattr(choice, "text") else choice.delta.content
            if text:
                last = time.monotonic()
                first = first or last
                texts.append(text)
                print(text if show else "", end="", flush=True)
    if usage is None or first is None or last is None or not "".join(texts).strip():
        raise DemoError(f"no text came back for: {asked}")
    print("\n" if show else "", end="")
    return Answer(
        asked=asked,
        text="".join(texts),
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        first_token_s=first - start,
        total_s=last - start,
        tokens_per_second=(usage.completion_tokens - 1) / max(last - first, 1e-3),
    )


def ask_together(complete: Callable[[str], Iterator[Any]]) -> Answer:
    """Eight prompts in eight threads; the row adds up their tokens."""
    start = time.monotonic()
    with ThreadPoolExecutor(len(TOGETHER)) as pool:
        answers = list(
            pool.map(lambda p: read_stream(p, lambda: complete(p), show=False), TOGETHER)
        )
    seconds = time.monotonic() - start
    for answer in answers:
        print(f"{answer.asked.splitlines()[-1].strip()[:40]:40} -> {one_line(answer.text, 60)}")
    num_generated = sum(answer.completion_tokens for answer in answers)
    return Answer(
        asked=f"{len(answers)} requests at once",
        text=answers[0].text,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        completion_tokens=num_generated,
        first_token_s=max(answer.first_token_s for answer in answers),
        total_s=seconds,
        tokens_per_second=num_generated / seconds,
    )


def tokenizer_of(arguments: Sequence[str]) -> Tokenizer:
    """The tokenizer of the checkpoint that the server was told to load."""
    from model1.tokenizer import Tokenizer
    from model1.weights import default_checkpoint

    named = [argument for argument in arguments[:1] if not argument.startswith("-")]
    return Tokenizer.from_dir(named[0] if named else default_checkpoint())


def long_prompt(tokenizer: Tokenizer) -> str:
    """Whole lines from the start of a long file of this Python's standard library.

    As few as make LONG_PROMPT_TOKENS. Raises DemoError when the file is too short.
    """
    code = LONG_FILE.read_text(encoding="utf-8")
    for match in re.finditer(r"$", code, re.MULTILINE):
        head = code[: match.end()]
        # Code has about four characters per token: shorter heads need not be counted.
        if len(head) > 3 * LONG_PROMPT_TOKENS and len(tokenizer.encode(head)) >= LONG_PROMPT_TOKENS:
            return head
    raise DemoError(f"{LONG_FILE} has fewer than {LONG_PROMPT_TOKENS} tokens")


def print_table(answers: Sequence[Answer], kv_bytes: int | None) -> None:
    """One row per request."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, title="\nwhat was measured", padding=(0, 1))
    for name in ("asked", "first words of the answer"):
        table.add_column(name, no_wrap=True)
    for name in ("prompt", "new", "first token s", "total s", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        table.add_row(
            answer.asked,
            one_line(answer.text, 36),
            str(answer.prompt_tokens),
            str(answer.completion_tokens),
            f"{answer.first_token_s:.2f}",
            f"{answer.total_s:.2f}",
            f"{answer.tokens_per_second:.1f}",
        )
    Console(width=TABLE_WIDTH, markup=False, highlight=False).print(table)
    if kv_bytes is not None:
        print(f"KV cache: {kv_bytes} bytes per token, all layers together")


def one_line(text: str, max_chars: int) -> str:
    """The beginning of a text without line breaks."""
    line = " ".join(text.split())
    return line if len(line) <= max_chars else line[: max_chars - 3] + "..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
