"""What `forja run` proposes to ask the model at its end."""

import json
import shlex
from pathlib import Path

import pytest

from pipelines.run import _question


@pytest.mark.parametrize(
    ("source", "langs", "said"),
    [
        ("python-docs", ["en", "es"], ["What does json.dumps do?"]),
        ("mine", ["es"], ["¿Cuánto es 'esto'?", "--lang", "es"]),
        ("mine", ["en", "es"], ["¿Cuánto es 'esto'?"]),
    ],
)
def test_the_question_is_of_the_data_and_in_a_language_of_the_model(
    source: str, langs: list[str], said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "artifacts" / "ppo").mkdir(parents=True)
    rows = [{"prompt": "Una pregunta más larga que la otra"}, {"prompt": "¿Cuánto es 'esto'?"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "artifacts" / "ppo" / "samples.jsonl").write_text(text, encoding="utf-8")
    params = {"ingest": {"sources": [{"source": source}]}, "sft": {"prompts": {lang: {} for lang in langs}}}
    assert shlex.split(_question(tmp_path, params)) == said
