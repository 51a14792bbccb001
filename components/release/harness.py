"""A model of forja's as lm-evaluation-harness asks it, with the answers that its own `hf` model gives of the export.

Where the two could differ, lm-eval's way is taken: special tokens written in a text are special, and the windows of a
long text overlap by one token.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer

from components.artifact import ForjaError
from components.data.encode import Encoder
from components.data.templates import ANSWER, spans
from components.model.checkpoint import Checkpoint, marks_of
from components.model.generate import answers
from components.model.losses import by_length
from components.model.reader import reader
from components.release.continuations import Score, scores

PROMPTS_AT_ONCE = 64
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
Told = Callable[[str, int, int], None]  # (what, requests done, of so many)


def _fast(tokenizer: Tokenizer) -> Encoder | None:
    """What encodes texts without special tokens several times as fast, where that is known to give the same."""
    said = json.loads(tokenizer.to_str())
    adds = said["post_processor"] is not None and said["post_processor"]["type"] != "ByteLevel"
    encoder = None if adds else Encoder(Tokenizer.from_str(tokenizer.to_str()), 0)
    return encoder if encoder is not None and encoder.why is None else None


class Adapter(TemplateLM):
    """Log-likelihoods and greedy or sampled text of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, lang: str | None = None, told: Told | None = None) -> None:
        super().__init__()
        self.model, tokenizer, self.prompts = checkpoint
        self.folder, self.lang, self.told = folder, lang, told or (lambda what, done, of: None)
        self.reader = reader(self.model)
        self.marks = marks_of(folder, tokenizer)
        if self.model.config.head != "lm":
            raise ForjaError(f"{folder}: a reward model gives values, not probabilities; name a language model")
        if self.marks.start is None or not self.marks.ends:
            raise ForjaError(f"{folder}: its tokenizer has no mark for a text's end; import it with one")
        if lang is not None and lang not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "no language"
            raise ForjaError(f"--lang {lang}: {folder} has templates for {known}")
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())  # its own: the checkpoint's takes no text for special
        self.tokenizer.encode_special_tokens = False
        self.start = self.tokenizer.decode([self.marks.start], skip_special_tokens=False)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.special = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self.fast = _fast(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.marks.ends[0]

    @property
    def prefix_token_id(self) -> int:
        assert self.marks.start is not None  # noqa: S101
        return self.marks.start

    @property
    def max_length(self) -> int:
        return self.model.config.context

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.encoded([string], add_special_tokens)[string]

    def encoded(self, texts: Iterable[str], add_special: bool | None = None) -> dict[str, list[int]]:
        """The tokens of each text. A text that begins with the start's mark gets no second one."""
        texts = list(dict.fromkeys(texts))
        if self.fast is not None and not any(map(self.special.search, texts)):
            ids, ends = self.fast(texts)
            return (
                {t: part[:-1].tolist() for t, part in zip(texts, np.split(ids, ends[:-1]), strict=True)}
                if texts
                else {}
            )
        kinds: dict[bool, list[str]] = {True: [], False: []}
        for text in texts:
            kinds[not text.startswith(self.start) if add_special is None else add_special].append(text)
        return {
            text: found.ids
            for special, wanted in kinds.items()
            for text, found in zip(
                wanted, self.tokenizer.encode_batch_fast(wanted, add_special_tokens=special), strict=True
            )
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The spaces at a context's end belong to what follows, as tokenizers mostly see it; a continuation's tokens
        are those that it adds to its context's."""
        pairs = []
        for context, continuation in (r.args for r in requests):
            kept = context.rstrip() if context else context
            pairs.append((kept, context[len(kept) :] + continuation))
        behind = self.encoded([text for a, b in pairs if a for text in (a, a + b)])
        first = self.encoded([b for a, b in pairs if not a], add_special=False)
        asked = []
        for a, b in pairs:
            if a:
                asked.append((behind[a], behind[a + b][len(behind[a]) :]))
            elif first[b][0] == self.prefix_token_id:
                asked.append((first[b][:1], first[b][1:]))
            else:
                asked.append(([self.prefix_token_id], first[b]))
        return [tuple(s) for s in self._scores("loglikelihood", asked, requests)]  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood does it all")

    def _scores(
        self, what: str, asked: Sequence[tuple[list[int], list[int]]], requests: Sequence[Instance]
    ) -> list[Score]:
        limit, so_far = self.max_length, 0
        if bad := [(len(c), r) for (_, c), r in zip(asked, requests, strict=True) if not 0 < len(c) <= limit]:
            tasks = ", ".join(sorted({r.task_name or "a task" for _, r in bad}))
            size = max(n for n, _ in bad)
            why = f"has a choice of {size} tokens, and {self.folder} reads 1 to {limit}"
            raise ForjaError(f"--tasks {tasks}: {why}; leave it out, or name another model")

        def done(n: int) -> None:
            nonlocal so_far
            so_far += n
            self.told(what, so_far, len(asked))

        return scores(self.reader, asked, done)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each token once, in windows of the context, each behind the last token of the window before."""
        texts = self.encoded(r.args[0] for r in requests)
        windows, of = [], []
        for i, request in enumerate(requests):
            cut = get_rolling_token_windows(texts[request.args[0]], self.prefix_token_id, self.max_length, 1)
            for context, predicted in map(make_disjoint_window, cut):
                windows.append((context, predicted))
                of.append(i)
        total = [0.0] * len(requests)
        for i, score in zip(of, self._scores("loglikelihood_rolling", windows, [requests[i] for i in of]), strict=True):
            total[i] += score.logprob
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        out = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(i)
        done = 0
        for kind in kinds.values():
            prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in kind]
            wanted = self._wanted(requests[kind[0]].args[1])
            until = wanted.pop("until")
            room = self.max_length - wanted["max_new_tokens"]
            for batch in by_length([len(p) for p in prompts], room * PROMPTS_AT_ONCE):
                seeds = [kind[j] for j in batch]
                for j, answer in zip(
                    batch, answers(self.model, [prompts[j] for j in batch], seeds=seeds, **wanted), strict=True
                ):
                    out[kind[j]] = postprocess_generated_text(answer.text, until, None)
                done += len(batch)
                self.told("generate_until", done, len(requests))
        return out

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation by the model's own template, up to where the answer begins, or goes on.

        A template without a role for the task's description leaves it out, as lm-eval's `hf` does.
        """
        assert self.lang is not None  # noqa: S101
        template = self.prompts[self.lang]
        try:
            found = spans(self.tokenizer, chat_history, template, ask=add_generation_prompt)
        except (ValueError, ForjaError):
            turns = [m for m in chat_history if m["role"] != "system"]
            found = spans(self.tokenizer, turns, template, ask=add_generation_prompt)
        text = "".join(part.text for span in found for part in span.parts)
        if not add_generation_prompt:
            begun = chat_history[-1]["content"]
            return text[: text.rindex(begun) + len(begun)]
        return text + ("" if "jinja" in template else template.get("answer", ANSWER).partition("{content}")[0])

    def _wanted(self, said: dict[str, Any]) -> dict[str, Any]:
        """A task's wishes as ours. At most half of the context is for the answer."""
        kwargs = dict(normalize_gen_kwargs(said, 256))
        until = handle_stop_sequences(kwargs.pop("until", None), None)
        until = [text for text in until if text]
        new = min(int(kwargs.pop("max_gen_toks")), self.max_length // 2)
        sampled = bool(kwargs.pop("do_sample", False))
        if unknown := set(kwargs) - SAMPLING:
            raise ForjaError(f"a task wants {min(unknown)} when it generates, which forja does not have; leave it out")
        how = {k: v for k, v in kwargs.items() if k == "repetition_penalty" or sampled}
        return {
            "until": until,
            "max_new_tokens": new,
            "stop": self.marks.ends,
            "stop_strings": until,
            "decode": lambda ids: self.tokenizer.decode(list(ids), skip_special_tokens=True),
            **({"temperature": 1.0} | how if sampled else how | {"temperature": 0.0}),
        }
