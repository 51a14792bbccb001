import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_bleu

from components.release.quality import bleu, rouge

ANSWERS = ["the cat sat on the mat", "a dog", "json.dumps: Serialize obj to a str."]
REFERENCES = ["the cat lay on the mat", "a cat", "json.dumps: Serialize obj to a JSON formatted str."]


def test_rouge_by_hand_and_by_the_library():
    found = rouge(ANSWERS, REFERENCES)
    # 5 of 6 words are shared; of 5 pairs of words "the cat", "on the", "the mat"; the longest common run has 5 words.
    assert found[0] == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})
    assert found[1] == pytest.approx({"rouge1": 1 / 2, "rouge2": 0.0, "rougeL": 1 / 2})
    scorer = RougeScorer(["rougeL"])
    assert [f["rougeL"] for f in found] == [
        scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(ANSWERS, REFERENCES, strict=True)
    ]


def test_bleu_of_one_pair_is_the_librarys_and_of_the_references_is_full():
    assert bleu(ANSWERS[2:], REFERENCES[2:]) == pytest.approx(
        sentence_bleu(ANSWERS[2], REFERENCES[2:], use_effective_order=False).score
    )
    assert bleu(REFERENCES, REFERENCES) == pytest.approx(100.0)
    assert bleu(["nothing shared here at all"], ["the cat lay on the mat"]) < 10
