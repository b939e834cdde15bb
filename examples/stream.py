"""Ask several questions at once and print each answer while it is written."""

import asyncio

from flashtensors import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "Name a colour of the rainbow.", "What do bees make?"]


async def answer(llm: LLM, question: str) -> str:
    """Print one answer word by word, and return it."""
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": question}])
    text = ""
    async for output in llm.generate_async(prompt, SamplingParams(temperature=0.0, max_tokens=48)):
        new, text = output.outputs[0].text[len(text) :], output.outputs[0].text
        print(f"{question:32} {new!r}")
    return text


async def main() -> None:
    """Run all questions in one batch."""
    with LLM("smollm2:135m") as llm:
        for question, text in zip(QUESTIONS, await asyncio.gather(*(answer(llm, q) for q in QUESTIONS)), strict=True):
            print(f"\n{question}\n{text}")


if __name__ == "__main__":
    asyncio.run(main())
