"""Question and answer pairs made from docstrings, for a first chat tuning.

Every function or class with a docstring gives a few exchanges: what it does, how to call it, a
request to write it. Answers are the docstring's first paragraph, the signature and the source.
Which templates a definition gets depends only on a hash of its name, so the set is deterministic.
Only the assistant's answer and the end-of-turn token are learned.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
import itertools
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from model1.errors import DataError
from model1.tokenizer import Tokenizer
from model1.train.data import Example, TokenCache, cache_key, open_cache, write_cache
from model1.train.documents import Document, read_documents, source_files

MIN_SUMMARY_CHARS, MAX_SUMMARY_CHARS = 20, 600
MAX_SOURCE_CHARS = 1500
CHUNK_DOCUMENTS = 256  # one piece of work for one process
CODE_FENCE = "```"

EXPLAIN_QUESTIONS = (
    "What does {name} do?",
    "What does `{name}` do?",
    "Explain `{name}`.",
    "Explain what {name} does.",
    "What is {name} for?",
    "Describe {name} in Python.",
    "Can you tell me what {name} does?",
)
CALL_QUESTIONS = (
    "How do I call {name}?",
    "How do I use `{name}`?",
    "What arguments does {name} take?",
    "What is the signature of {name}?",
    "Show me the signature of `{name}`.",
)
WRITE_QUESTIONS = (
    "Write a function that does this: {summary}",
    "Write a Python function `{short}`: {summary}",
    "Implement `{short}` in Python. {summary}",
    "Write Python code for this: {summary}",
    "Please write {short}. {summary}",
)


@dataclass(frozen=True, slots=True)
class Definition:
    """A documented function or class of one source file."""

    name: str  # dotted, with the module: json.dumps
    summary: str  # first paragraph of the docstring on one line
    signature: str  # def dumps(obj, *, indent=None)
    source: str  # without the docstring; "" for a class or when it is too long


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question with its answer."""

    question: str
    answer: str


def definitions(document: Document) -> Iterator[Definition]:
    """Documented public functions, methods and classes of a document that parses as Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return  # text that is not Python has no docstrings to offer
    module = module_name(document.path)
    for node in tree.body:
        yield from _from_node(node, module)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                yield from _from_node(child, f"{module}.{node.name}")


def module_name(path: str) -> str:
    """Dotted module of a relative path: "json/__init__.py" -> "json"."""
    parts = list(Path(path).with_suffix("").parts)
    if parts and parts[0] in ("src", "lib", "Lib"):
        parts = parts[1:]
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def _from_node(node: ast.stmt, prefix: str) -> Iterator[Definition]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    docstring = ast.get_docstring(node)
    if node.name.startswith("_") or not docstring:
        return
    summary = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    if not MIN_SUMMARY_CHARS <= len(summary) <= MAX_SUMMARY_CHARS:
        return
    source = ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
    else:
        signature = _signature(node)
        if len(node.body) > 1:
            source = ast.unparse(_without_docstring(node))
    source = source if len(source) <= MAX_SOURCE_CHARS else ""
    yield Definition(f"{prefix}.{node.name}", summary, signature, source)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {node.name}({ast.unparse(node.args)}){returns}"


def _without_docstring(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
) -> ast.FunctionDef | ast.AsyncFunctionDef:
    stripped = copy.copy(node)
    stripped.body, stripped.decorator_list = node.body[1:], []
    return stripped


def exchanges(definition: Definition) -> Iterator[Exchange]:
    """One to three exchanges about a definition, the same ones every time."""
    draw = int.from_bytes(hashlib.sha256(definition.name.encode()).digest()[:8], "big")
    name = definition.name
    if draw % 3 == 0:  # people often leave the module out
        name = name.split(".")[-1]
    short = definition.name.split(".")[-1]
    call = f"{CODE_FENCE}python\n{definition.signature}\n{CODE_FENCE}"
    summary = _sentence(definition.summary)
    words = {"name": name, "short": short, "summary": summary}
    question = EXPLAIN_QUESTIONS[draw // 3 % len(EXPLAIN_QUESTIONS)]
    yield Exchange(question.format(**words), f"{summary}\n\n{call}")
    if draw // 64 % 2 == 0:
        question = CALL_QUESTIONS[draw // 128 % len(CALL_QUESTIONS)]
        yield Exchange(question.format(**words), f"{call}\n\n{summary}")
    if definition.source and draw // 1024 % 2 == 0:
        question = WRITE_QUESTIONS[draw // 2048 % len(WRITE_QUESTIONS)]
        answer = f"{CODE_FENCE}python\n{definition.source}\n{CODE_FENCE}"
        yield Exchange(question.format(**words), answer)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?", ":")) else text + "."


def chat_example(exchange: Exchange, tokenizer: Tokenizer) -> Example:
    """Tokens of an exchange in the chat template, then <|endoftext|>; the answer is the target."""
    user = {"role": "user", "content": exchange.question}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)
    assistant = {"role": "assistant", "content": exchange.answer}
    whole = tokenizer.apply_chat_template([user, assistant], add_generation_prompt=False)
    if whole[: len(prompt)] != prompt:
        raise DataError("the chat template must render a prompt as the start of its dialogue")
    mask = np.ones(len(whole) + 1, np.uint8)
    mask[: len(prompt)] = 0
    mask[-1] = 0  # <|endoftext|> only parts the documents
    return Example(np.array([*whole, tokenizer.eos_token_id]), mask)


class Tuned(NamedTuple):
    """An exchange with its tokens."""

    exchange: Exchange
    example: Example


def chat_examples(
    documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: int
) -> list[Tuned]:
    """Every exchange of the documents that has at most `max_tokens`, in order."""
    found = []
    for document in documents:
        for definition in definitions(document):
            for exchange in exchanges(definition):
                example = chat_example(exchange, tokenizer)
                if len(example.token_ids) <= max_tokens:
                    found.append(Tuned(exchange, example))
    return found


def _chunk_examples(folder: str, max_tokens: int, documents: list[Document]) -> list[Tuned]:
    return chat_examples(documents, Tokenizer.from_dir(folder), max_tokens)


def all_chat_examples(
    documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[Example, int]]:
    """(Example, UTF-8 bytes) of every exchange, repeats left out; large inputs on all cores."""
    chunks = [
        list(documents[i : i + CHUNK_DOCUMENTS]) for i in range(0, len(documents), CHUNK_DOCUMENTS)
    ]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        tokenizer.save(folder)
        work = functools.partial(_chunk_examples, folder, max_tokens)
        if len(chunks) > 1:
            # Not fork: the parent may have threads and a CUDA context.
            pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"))
            found = stack.enter_context(pool).map(work, chunks)
        else:
            found = map(work, chunks)
        seen: set[Exchange] = set()
        for exchange, example in itertools.chain.from_iterable(found):
            if exchange not in seen:
                seen.add(exchange)
                yield example, len((exchange.question + exchange.answer).encode("utf-8"))


def chat_cache(
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    cache_dir: str,
    suffixes: tuple[str, ...],
    max_tokens: int,
) -> TokenCache:
    """Tokenised exchanges of all documents of `sources`, read from the cache or made now.

    Errors: `DataError` if no documented definition gives an exchange of `max_tokens` or less.
    """
    files = [path for source in sources for path in source_files(source, suffixes)]
    folder = Path(cache_dir) / f"chat-{cache_key(tokenizer, files, f'chat {max_tokens}')}"
    if not folder.is_dir():
        documents = list(read_documents(sources, suffixes))
        write_cache(folder, all_chat_examples(documents, tokenizer, max_tokens), tokenizer)
    return open_cache(folder, tokenizer)
