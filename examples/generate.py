"""Complete two prompts with the shipped checkpoint, in one batch.

python examples/generate.py
"""

from model1 import LLM, SamplingParams

PROMPTS = ["def is_prime(n):\n", "class Stack:\n    def __init__(self):\n"]


def main() -> None:
    """Load once, generate for all prompts together, print."""
    llm = LLM()
    params = SamplingParams(max_tokens=64, temperature=0.0)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        print(f"{prompt}{completion.text}\n--- {completion.finish_reason}\n")


if __name__ == "__main__":
    main()
