"""Talk to a running server (`model1 serve`) through the official client, streaming.

python examples/chat.py "What does os.path.join do?" [http://127.0.0.1:8000]
"""

import sys

from openai import OpenAI


def main(question: str, url: str = "http://127.0.0.1:8000") -> None:
    """Ask one question and print the answer as it arrives."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=128,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
