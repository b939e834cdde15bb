"""Pull a model once, load it into this process, and complete a few prompts."""

import flashtensors as ft
from flashtensors import SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]


def main() -> None:
    """Print each prompt with its completion."""
    ft.register_model("smollm2:135m")
    with ft.load_model("smollm2:135m") as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24)):
            print(f"{output.prompt!r} → {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
