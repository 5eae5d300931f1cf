"""Train a tokenizer and a tiny Model1 on a folder of Python files, on the CPU, in a minute.

python examples/train_tiny.py FOLDER [OUT [STEPS]]
"""

from __future__ import annotations

import sys
from pathlib import Path

from model1.tokenizer import train_tokenizer
from model1.train.config import load_train_config
from model1.train.documents import read_documents
from model1.train.loop import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"


def main(folder: str, out: str = "runs/train_tiny", steps: str = "20") -> None:
    """Writes OUT/tokenizer and the run in OUT/run, whose final/ holds the model."""
    texts = (document.text for document in read_documents([folder], (".py",)))
    train_tokenizer(texts, vocab_size=512).save(f"{out}/tokenizer")
    config = load_train_config(
        CONFIG,
        [
            f'out_dir="{out}/run"',
            f'data.tokenizer="{out}/tokenizer"',
            f'data.train=["{folder}"]',
            f'data.cache_dir="{out}/cache"',
            f"schedule.max_steps={steps}",
        ],
    )
    Trainer(config).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
