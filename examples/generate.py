"""Complete two prompts with the shipped checkpoint, in one batch.

python examples/generate.py
"""

from model1 import LLM, SamplingParams

# No prompt ends in a line break: break and indentation are one token, the model's to choose.
PROMPTS = [
    "def is_even(n):\n    return n %",
    "import json\n\ndef read_json(path):\n    with open(path)",
]


def main() -> None:
    """Load once, generate for all prompts together, print."""
    llm = LLM()
    params = SamplingParams(max_tokens=64, temperature=0.0)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        print(f"{prompt}{completion.text}\n--- {completion.finish_reason}\n")


if __name__ == "__main__":
    main()
