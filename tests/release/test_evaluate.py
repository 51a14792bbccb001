import json
import math
import statistics

import numpy as np
import pytest

from components.data.chat import SEPARATOR, special
from components.log import silent
from components.model import checkpoint
from components.release import evaluate, quantize
from components.release.evaluate import Config, by_prompt, finite, is_right, pick

GATES = [
    {"name": "size", "metric": "int8.bytes_ratio", "at_most": 0.6},
    {"name": "base", "metric": "pretrain.bits_per_byte", "below": "xz.bits_per_byte"},
]


def config(**changes):
    plain = {
        "seed": 1,
        "choice_rows": 8,
        "quality_rows": 4,
        "preference_rows": 12,
        "prompt_rows": 5,
        "answers": 2,
        "max_new_tokens": 12,
        "temperature": 1.0,
        "bootstrap": 200,
        "bias": {"gender": [{"lang": "en", "text": "The {group} came.", "groups": ["man", "woman", "child"]}]},
        "gates": GATES,
    }
    return Config.model_validate({**plain, **changes})


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def write_tables(folder, leak=False):
    folder.mkdir()
    call = {"name": "calculate", "arguments": {"expression": "2 * 3"}}
    # Words apart from row to row, so that only the row that leaks on purpose shares a run of words with another.
    texts = [
        " ".join(f"{word}{i}" for word in ("al", "be", "ga", "de", "it", "is", "so", "an", "th")) for i in range(16)
    ]
    tables = {name: [] for name in ("corpus", "instructions", "preferences", "prompts", "eval")}
    for i, text in enumerate(texts):
        row = {"id": f"row/{i}", "lang": "es" if i % 3 == 0 else "en", "split": "train" if i < 4 else "test"}
        asked = turn("user", f"What is {text}?")
        tables["corpus"].append({**row, "text": texts[5] + " and more" if leak and i == 0 else text})
        answer = [turn("assistant", text)] if i % 2 else [turn("assistant", "", tool_calls=[call])]
        tables["instructions"].append({**row, "messages": [asked, *answer]})
        pair = {"chosen": turn("assistant", text), "rejected": turn("assistant", text[:9]), "kind": "cut"}
        tables["preferences"].append({**row, "messages": [asked], **pair})
        tables["prompts"].append({**row, "messages": [asked]})
        if row["split"] == "test":
            choices = [f"{text} {c}" for c in ("one", "two", "three", "four")]
            tables["eval"].append({**row, "question": f"Which is {text}?", "choices": choices, "answer": i % 4})
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def folders(tmp_path, save_checkpoint, tokenizer):
    """All inputs of the stage: tables, tokens and random models."""
    from components.data.encode import Encoder

    found = {
        "validate": tmp_path / "validate",
        "tokenize": tmp_path / "tokenize",
        "pretrain": save_checkpoint("pretrain", seed=1, prompts=False, context=128),
        "sft": save_checkpoint("sft", seed=2, context=128),
        "reward": save_checkpoint("reward", seed=3, head="scalar", context=128),
        "referee": save_checkpoint("referee", seed=4, head="scalar", context=128),
        "ppo": save_checkpoint("ppo", seed=2, context=128),
        "quantize": tmp_path / "quantize",
    }
    write_tables(found["validate"])
    found["tokenize"].mkdir()
    documents = ["The answer is the answer.", "La respuesta es ésta: la respuesta."]
    np.save(found["tokenize"] / "test.npy", Encoder(tokenizer, special(tokenizer, SEPARATOR))(documents).ids)
    (found["tokenize"] / "test.txt").write_text("\n\n".join(documents), encoding="utf-8")
    quantize.run(quantize.Config(int4_group=16), found["ppo"], found["quantize"], silent)
    return found


def evaluated(folders, out, cfg=None):
    out.mkdir()
    metrics = evaluate.run(cfg or config(), **folders, out=out, log=silent)
    kept = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return metrics, kept, json.loads((out / "gates.json").read_text())


def test_the_stage_measures_all_that_gates_may_name_and_keeps_the_rows(folders, tmp_path):
    metrics, kept, gates = evaluated(folders, tmp_path / "out")
    models = ("pretrain", "sft", "ppo", "int8", "int4", "xz")
    wanted = {f"{m}.bits_per_byte" for m in models} | {"choice.accuracy", "choice.low", "choice.high", "choice.n"}
    wanted |= {f"{m}.{kind}" for m in ("sft", "ppo") for kind in ("rouge1", "rouge2", "rougeL", "bleu")}
    wanted |= {"bias.mean", "bias.max", "bias.std", "reward.accuracy", "reward.low", "reward.high", "reward.n"}
    wanted |= {"ppo.gain", "ppo.gain.low", "ppo.gain.high", "ppo.kl", "contamination.rows"}
    wanted |= {"ppo.referee_gain", "ppo.referee_gain.low", "ppo.referee_gain.high", "referee.accuracy"}
    wanted |= {"referee.correlation", "sft.referee_reward", "sft.length", "ppo.length"}
    wanted |= {f"{m}.{kind}" for m in ("int8", "int4") for kind in ("bytes_ratio", "bits_per_byte_ratio")}
    assert wanted <= set(metrics)
    assert all(math.isfinite(v) for v in metrics.values())

    # PPO and SFT are the same weights here: with the same seeds they say the same, so nothing is gained or drifts.
    assert metrics["ppo.gain"] == metrics["ppo.gain.low"] == metrics["ppo.gain.high"] == 0.0
    assert metrics["ppo.referee_gain"] == metrics["ppo.referee_gain.low"] == 0.0
    assert metrics["ppo.kl"] == 0.0
    assert metrics["ppo.rougeL"] == metrics["sft.rougeL"]
    assert metrics["contamination.rows"] == 0
    assert metrics["int8.bits_per_byte_ratio"] == metrics["int8.bits_per_byte"] / metrics["ppo.bits_per_byte"]
    assert metrics["int8.bits_per_byte_ratio"] == pytest.approx(1.0, abs=0.01)
    assert gates["verdict"] == "promote"
    assert [g["name"] for g in gates["gates"]] == ["size", "base"]

    parts = {part: [row for row in kept if row["part"] == part] for part in {row["part"] for row in kept}}
    counts = {"choice": 8, "quality": 4, "preference": 12, "gain": 5, "bias": 3}
    assert {part: len(rows) for part, rows in parts.items()} == counts
    right = [is_right(row["choice"], row["answer"]) for row in parts["choice"]]
    assert metrics["choice.accuracy"] == sum(right) / 8
    assert metrics["bias.mean"] == pytest.approx(statistics.mean(r["difference"] for r in parts["bias"]), abs=1e-5)
    assert metrics["reward.accuracy"] == statistics.mean(r["chosen"] > r["rejected"] for r in parts["preference"])
    right = [r["referee.chosen"] > r["referee.rejected"] for r in parts["preference"]]
    assert metrics["referee.accuracy"] == statistics.mean(right)


def test_the_stage_is_deterministic(folders, tmp_path):
    first, second = (evaluated(folders, tmp_path / name)[0] for name in "ab")
    assert first == second
    for name in ("rows.jsonl", "gates.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_ppo_is_judged_by_prompt_against_sft(folders, tmp_path, save_checkpoint):
    other = {**folders, "ppo": save_checkpoint("other", seed=9, context=128)}
    metrics, kept, _ = evaluated(other, tmp_path / "out")
    rows = [row for row in kept if row["part"] == "gain"]
    won = [row["ppo.reward"] - row["sft.reward"] for row in rows]
    assert metrics["ppo.gain"] == pytest.approx(statistics.mean(won), abs=1e-5)
    assert metrics["ppo.gain.low"] < metrics["ppo.gain"] < metrics["ppo.gain.high"]
    assert metrics["ppo.kl"] == pytest.approx(statistics.mean(row["kl"] for row in rows), abs=1e-5)
    assert metrics["ppo.kl"] > 1.0
    won = [row["ppo.referee_reward"] - row["sft.referee_reward"] for row in rows]
    assert metrics["ppo.referee_gain"] == pytest.approx(statistics.mean(won), abs=1e-5)
    assert metrics["ppo.referee_gain"] != metrics["ppo.gain"]


def test_the_referee_agrees_with_itself_and_not_with_its_opposite(folders, tmp_path, save_checkpoint):
    """A referee that is the reward model sees the same gain; one with the head turned round sees as great a loss."""
    folders["ppo"] = save_checkpoint("other", seed=9, context=128)
    opposite = checkpoint.load(folders["reward"], device="cpu").model
    for weight in opposite.head.parameters():
        weight.data.neg_()
    templates = evaluate.load(folders["sft"]).prompts
    checkpoint.save(opposite, tmp_path / "opposite", folders["sft"] / "tokenizer.json", templates)
    for name, folder, sign in (("a", folders["reward"], 1), ("b", tmp_path / "opposite", -1)):
        metrics, _, _ = evaluated({**folders, "referee": folder}, tmp_path / name)
        assert metrics["ppo.referee_gain"] == pytest.approx(sign * metrics["ppo.gain"], abs=1e-6)
        assert metrics["referee.correlation"] == pytest.approx(sign, abs=1e-6)


def test_a_training_row_that_holds_a_test_row_is_counted_and_named(folders, tmp_path):
    folders["validate"] = tmp_path / "leaking"
    write_tables(folders["validate"], leak=True)
    gates = [{"name": "no-contamination", "metric": "contamination.rows", "at_most": 0}]
    metrics, kept, verdict = evaluated(folders, tmp_path / "out", config(gates=gates))
    assert metrics["contamination.rows"] == 1
    (hit,) = [r for r in kept if r["part"] == "contamination"]
    assert (hit["table"], hit["id"], hit["held"]) == ("corpus", "row/0", "row/5")
    assert verdict["verdict"] == "hold"
    assert verdict["gates"][0]["margin"] == -1


def test_what_has_no_test_rows_has_no_metric_and_its_gate_holds(folders, tmp_path):
    for name in ("eval", "instructions", "preferences", "prompts"):
        (folders["validate"] / f"{name}.jsonl").write_text("")
    gates = [{"name": name, "metric": name, "above": 0} for name in ("ppo.gain.low", "reward.accuracy", "ppo.rougeL")]
    metrics, _, verdict = evaluated(folders, tmp_path / "out", config(gates=gates, bias={}))
    missing = {"choice.accuracy", "ppo.gain", "ppo.referee_gain", "reward.accuracy", "referee.accuracy", "bias.mean"}
    assert not missing & set(metrics)
    assert [g["reason"] for g in verdict["gates"]] == [
        "ppo.gain.low: no metric ppo.gain.low",
        "reward.accuracy: no metric reward.accuracy",
        "ppo.rougeL: no metric ppo.rougeL",
    ]


def test_a_tie_of_the_reward_model_counts_one_half(folders, tmp_path):
    judge = checkpoint.load(folders["reward"], device="cpu").model
    judge.head.weight.data.zero_()
    checkpoint.save(judge, folders["reward"], folders["sft"] / "tokenizer.json", evaluate.load(folders["sft"]).prompts)
    metrics, _, _ = evaluated(folders, tmp_path / "out")
    assert metrics["reward.accuracy"] == 0.5


def test_rows_are_picked_from_the_test_split_by_their_ids_and_not_by_their_order(tmp_path):
    rows = [{"id": str(i), "split": "test" if i % 2 else "train"} for i in range(40)]
    found = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in order))
        found.append([r["id"] for r in pick(tmp_path / name, 6)])
    assert found[0] == found[1]
    assert len(found[0]) == 6 and all(int(i) % 2 for i in found[0])


def test_the_right_choice_must_be_alone_at_the_top():
    assert is_right([-1.0, -0.5, -2.0, -3.0], 1)
    assert not is_right([-0.5, -0.5, -2.0, -3.0], 1)
    assert not is_right([-1.0, math.nan, -2.0, -3.0], 1)


def test_metrics_that_are_no_numbers_are_left_out():
    assert finite({"a": 1.0, "b": math.nan, "c": math.inf}) == {"a": 1.0}


def test_answers_are_averaged_by_prompt():
    """Two answers to each of three prompts, all prompts once and then once more."""
    assert by_prompt([1.0, 2.0, 3.0, 3.0, 4.0, 8.0], 3) == [2.0, 3.0, 5.5]
