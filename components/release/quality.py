"""How close answers come to references: ROUGE (Lin, 2004) and BLEU (Papineni et al., 2002) by their own libraries."""

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """ROUGE-1, -2 and -L of each answer as F-measures in [0, 1], words as rouge-score cuts them, not stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    found = [scorer.score(target=r, prediction=a) for a, r in zip(answers, references, strict=True)]
    return [{name: score[name].fmeasure for name in ROUGE} for score in found]


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """The corpus' BLEU in [0, 100] with sacrebleu's default tokenization and smoothing."""
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(list(answers), [list(references)]).score)
