"""Each alarm on a history made by hand: when it rings, when it does not yet, and that a healthy run rings none."""

import pytest

from components.train.alarms import Row, new_alarms, ringing

HEALTHY: Row = {
    **{"reward": 0.5, "reward_deviation": 0.3, "kl": 2.0, "entropy": 1.5, "length": 20.0, "unfinished": 0.1},
    **{"repetition": 0.1, "clip_fraction": 0.1, "explained_variance": 0.4, "first_off": 0.0, "equal_groups": 0.9},
}


def history(*changes: Row) -> list[Row]:
    return [HEALTHY, *(HEALTHY | change for change in changes)]


def test_a_healthy_run_rings_nothing() -> None:
    """As the demo's: untrained value model at first, entropy and reward at rest, KL up to twice its target."""
    rows = history({"explained_variance": -0.9}, *[{"kl": 9.6, "entropy": 0.8, "val_reward": 0.5}] * 30)
    assert all(not ringing(rows[:n], 5.0) for n in range(1, len(rows) + 1))


@pytest.mark.parametrize(
    ("name", "change", "after"),
    [
        ("kl", {"kl": 15.1}, 5),
        ("entropy", {"entropy": 0.29}, 5),
        ("unfinished", {"unfinished": 1.0, "reward_deviation": 0.0}, 3),
        ("equal", {"reward_deviation": 0.0}, 3),
        ("equal", {"equal_groups": 1.0}, 3),
        ("clip", {"clip_fraction": 0.41}, 3),
        ("value", {"explained_variance": -0.1}, 10),
        ("repetition", {"repetition": 0.31}, 5),
        ("first", {"first_off": 0.01}, 1),
    ],
)
def test_an_alarm_rings_once_when_it_has_lasted(name: str, change: Row, after: int) -> None:
    rows = history(*[change] * (after + 2))
    said = [(len(rows[:n]), alarm["alarm"]) for n in range(1, len(rows) + 1) for alarm in new_alarms(rows[:n], 5.0)]
    assert said == [(1 + after, name)]
    mended = [*rows[:after], HEALTHY, change]
    assert after == 1 or not ringing(mended, 5.0)


def test_it_rings_again_after_it_was_over() -> None:
    rows = history(*[{"clip_fraction": 0.5}] * 3, {}, *[{"clip_fraction": 0.5}] * 3)
    assert [n for n in range(1, len(rows) + 1) if new_alarms(rows[:n], None)] == [4, 8]


def test_reward_up_and_held_out_reward_down() -> None:
    """Mean rewards 0.5, (0.9 + 0.3) / 2, (0.3 + 1.1) / 2 up to each evaluation, though those at it go 0.5, 0.3, 1.1."""
    steps: list[Row] = [{"reward": r} | v for r, v in ((0.5, {"val_reward": 0.4}), (0.9, {}))]
    steps += [{"reward": 0.3, "val_reward": 0.3}, {"reward": 0.3}, {"reward": 1.1, "val_reward": 0.2}]
    rows = history(*steps)
    assert not ringing(rows[:5], None)
    assert list(ringing(rows, None)) == ["heldout"]
    assert not ringing([*rows[:5], rows[5] | {"val_reward": 0.35}], None)
    assert not ringing([*rows[:5], rows[5] | {"reward": 0.8}], None)


def test_without_a_target_no_kl_is_too_much() -> None:
    assert not ringing(history(*[{"kl": 1e6}] * 9), None)


def test_what_is_said_has_a_cause_and_a_mend() -> None:
    (alarm,) = new_alarms(history(*[{"kl": 16.0}] * 5), 5.0)
    assert alarm["step"] == 6
    assert alarm["text"].startswith("KL 3 times its target of 5 nats for 5 rollouts")
    assert alarm["text"].endswith("lower lr, or raise kl_coef")


def preferring(*changes: Row) -> list[Row]:
    usual: Row = {"loss": 0.6, "accuracy": 0.7, "margin": 0.2, "chosen_drift": -1.0, "rejected_drift": -3.0}
    return [usual | change for change in changes]


def test_preferences_have_alarms_of_their_own() -> None:
    fallen = {"chosen_drift": -3.1, "rejected_drift": -9.0}
    assert not ringing(preferring(*[{}] * 40), 5.0)
    assert not ringing(preferring({}, *[fallen] * 4), 5.0)
    assert set(ringing(preferring({}, *[fallen] * 5), 5.0)) == {"falling"}
    assert not ringing(preferring({}, *[fallen | {"rejected_drift": 0.1}] * 5), 5.0)  # they were not preferred
    parted = [{"margin": 0.1 * i, "val_reward": 1.0 - 0.1 * i} for i in range(3)]
    assert set(ringing(preferring(*parted), 5.0)) == {"heldout"}
    assert not ringing(preferring(*parted[:2]), 5.0)
    assert not ringing(preferring(*[row | {"val_reward": 1.0} for row in parted]), 5.0)
