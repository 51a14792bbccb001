"""Field names as shapes know them: in lower case, without accents, and those that Spanish tables have in English."""

import unicodedata
from collections.abc import Mapping
from typing import Any

SPANISH = {
    **dict.fromkeys(("texto", "contenido"), "content"),
    **{"documento": "document", "cuerpo": "body", "pregunta": "question", "respuesta": "answer", "consulta": "query"},
    **{"instruccion": "instruction", "entrada": "input", "contexto": "context", "salida": "output"},
    **{"mensajes": "messages", "conversacion": "conversation", "conversaciones": "conversations"},
    **{"instrucciones": "instruction", "respuestas": "answers", "enunciado": "question"},
    **{"dialogo": "dialogue", "rol": "role", "sistema": "system", "historial": "history"},
    **dict.fromkeys(("elegida", "elegido", "respuesta_elegida", "chosen_response"), "chosen"),
    **dict.fromkeys(("rechazada", "rechazado", "respuesta_rechazada", "rejected_response"), "rejected"),
    **{"opciones": "choices", "correcta": "correct", "respuesta_correcta": "correct", "etiqueta": "label"},
}


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The record with each name in lower case and English; the letters of choices stay capitals. Turns within it too.
    Of two names that become one the first counts."""
    found: dict[str, Any] = {}
    for key, held in value.items():
        found.setdefault(_name(str(key)), held)
    return {key: list(map(_turn, held)) if isinstance(held, list) else held for key, held in found.items()}


def _turn(value: Any) -> Any:
    return {_name(str(key)): held for key, held in value.items()} if isinstance(value, dict) else value


def _name(key: str) -> str:
    key = key.strip()
    if len(key) == 1:
        return key.upper()
    parts = unicodedata.normalize("NFKD", key.lower().replace(" ", "_"))
    bare = "".join(c for c in parts if not unicodedata.combining(c))
    return SPANISH.get(bare, bare)
