"""What MLflow loads for a registered model: code that reads a checkpoint folder of safetensors; no pickle."""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel


class Assistant(PythonModel):
    """Answers each prompt as one turn of a user; params: lang, max_new_tokens, temperature, seed."""

    def load_context(self, context: Any) -> None:
        from components.release.quantize import load

        self.checkpoint = load(Path(context.artifacts["model"]))

    def predict(self, context: Any, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        from components.data.chat import answer_text, encode_prompt
        from components.data.templates import stop
        from components.model.generate import generate

        model, tokenizer, prompts = self.checkpoint
        lang = "en" if "en" in prompts else min(prompts)
        wanted = {"lang": lang, "max_new_tokens": 64, "temperature": 0.0, "seed": 0, **(params or {})}
        turns = [{"messages": [{"role": "user", "content": text}], "lang": wanted["lang"]} for text in model_input]
        ids = [encode_prompt(tokenizer, turn["messages"], prompts[turn["lang"]]) for turn in turns]
        new = generate(
            model,
            ids,
            max_new_tokens=int(wanted["max_new_tokens"]),
            stop=stop(tokenizer, prompts),
            temperature=float(wanted["temperature"]),
            seed=int(wanted["seed"]),
        )
        return [answer_text(tokenizer, tokens) for tokens in new]


mlflow.models.set_model(Assistant())
