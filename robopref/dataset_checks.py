"""What in a dataset would spoil training; each check is a small function."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from robopref.checks import Check
from robopref.episodes import EpisodeDataset


def dataset_checks(
    dataset: EpisodeDataset, length: int, timestamps: Mapping[int, np.ndarray] = MappingProxyType({})
) -> list[Check]:
    """What in a dataset would spoil training on segments of `length` steps.

    Args:
        dataset: the episodes.
        length: steps of a segment.
        timestamps: seconds at the rows of those episodes that keep them (`read_timestamps`).
    """
    if length < 1:
        raise ValueError(f"a segment has at least 1 step, not {length}.")
    finite = check_finite(dataset)
    if not finite.ok:
        return [finite, check_ends(dataset), check_lengths(dataset, length)]
    return [
        finite,
        check_action_bounds(dataset),
        check_saturation(dataset),
        check_constant_dimensions(dataset),
        check_normalisation(dataset),
        check_ends(dataset),
        check_lengths(dataset, length),
        check_rewards(dataset),
        *([check_timestamps(timestamps)] if timestamps else []),
    ]


def read_timestamps(dataset: EpisodeDataset) -> dict[int, np.ndarray]:
    """`infos["timestamp"]` of every episode that has it, as recordings of rigs do."""
    return {index: times.astype(np.float64).ravel() for index, times in dataset.info("timestamp").items()}


def dataset_statistics(dataset: EpisodeDataset) -> list[dict[str, str | float]]:
    """Mean, deviation and extremes of each dimension of observations and actions, of rewards, returns and lengths.

    Observations are called by their parts.
    """
    acted = _acted(dataset)
    columns: dict[str, np.ndarray] = {}
    for name, size in dataset.keys.items():
        begin = len(columns)
        for place in range(size):
            columns[f"{name}[{place}]" if size > 1 else name] = dataset.observations[:, begin + place]
    for place in range(dataset.actions.shape[1]):
        columns[f"action[{place}]"] = dataset.actions[acted, place]
    columns |= {"reward": dataset.rewards[acted], "return": dataset.returns, "length": dataset.lengths}
    return [
        {
            "numbers": name,
            "mean": float(np.mean(values, dtype=np.float64)),
            "std": float(np.std(values, dtype=np.float64)),
            "min": float(np.min(values)),
            "max": float(np.max(values)),
        }
        for name, values in columns.items()
    ]


def check_finite(dataset: EpisodeDataset) -> Check:
    """Whether every number is finite."""
    for name in ("observations", "actions", "rewards"):
        array = getattr(dataset, name)
        wrong = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if wrong.any():
            return Check(
                "finite numbers",
                ok=False,
                message=f"{wrong.sum()} rows of {name} hold NaN or infinity, the first in {_place(dataset, wrong)}.",
                remedy="Leave these episodes out, or collect them again.",
            )
    return Check("finite numbers", True, "No NaN and no infinity.")


def check_action_bounds(dataset: EpisodeDataset) -> Check:
    """Whether all actions lie inside the action space."""
    space = dataset.action_space
    outside = _acted(dataset) & ((dataset.actions < space.low) | (dataset.actions > space.high)).any(axis=1)
    if outside.any():
        excess = np.maximum(space.low - dataset.actions, dataset.actions - space.high)[outside].max()
        return Check(
            "action bounds",
            ok=False,
            message=f"{_share(outside, dataset.total_steps)} lie outside the action space, by up to {excess:.3g},"
            f" the first in {_place(dataset, outside)}.",
            remedy="Store actions as the robot executes them: clipped, and in the units of the action space.",
        )
    return Check("action bounds", True, "All actions lie inside the action space.")


def check_saturation(dataset: EpisodeDataset) -> Check:
    """How many actions lie exactly on a bound, where a squashed policy has no finite log-probability."""
    space = dataset.action_space
    at_bound = _acted(dataset) & ((dataset.actions == space.low) | (dataset.actions == space.high)).any(axis=1)
    if at_bound.sum() > 0.2 * dataset.total_steps:
        return Check(
            "saturation",
            ok=False,
            message=f"{_share(at_bound, dataset.total_steps)} have a component exactly on a bound.",
            remedy="A policy squashed by tanh cannot reach a bound: clip actions a little inside, or do not squash.",
            required=False,
        )
    return Check("saturation", True, f"{_share(at_bound, dataset.total_steps)} lie on a bound.", required=False)


def check_constant_dimensions(dataset: EpisodeDataset) -> Check:
    """Which observation dimensions never change."""
    constant = np.flatnonzero(np.ptp(dataset.observations, axis=0) == 0)
    total = dataset.observations.shape[1]
    if constant.size == total:
        return Check("constant dimensions", False, "Every observation is the same.", "Record the observations again.")
    if constant.size:
        return Check(
            "constant dimensions",
            ok=False,
            message=f"{constant.size} of {total} observation dimensions never change: {_listed(constant)}.",
            remedy="Harmless if the task has them so; otherwise a sensor was not recorded.",
            required=False,
        )
    return Check("constant dimensions", True, f"All {total} observation dimensions vary.", required=False)


def check_normalisation(dataset: EpisodeDataset) -> Check:
    """Whether subtracting the mean and dividing by the deviation gives useful numbers in float32."""
    observations = dataset.observations.astype(np.float64)
    mean, deviation = observations.mean(axis=0), observations.std(axis=0)
    varies = np.ptp(dataset.observations, axis=0) > 0
    # float32 resolves about 1e-7 of a number; below ten times that, what is left after the mean is rounding.
    lost = varies & (deviation < 1e-6 * np.abs(mean))
    if lost.any():
        return Check(
            "normalisation",
            ok=False,
            message=f"Observation dimensions {_listed(np.flatnonzero(lost))} vary less than float32 can resolve.",
            remedy="Subtract the offset before storing them, or leave them out.",
        )
    largest = np.abs(observations - mean).max(axis=0) / np.where(varies, deviation, np.inf)
    far = largest > 50
    if far.any():
        return Check(
            "normalisation",
            ok=False,
            message=f"Observation dimensions {_listed(np.flatnonzero(far))} reach {largest.max():.0f} deviations.",
            remedy="Look for faulty readings, or clip these dimensions: after normalising they dwarf all others.",
            required=False,
        )
    return Check("normalisation", True, f"No observation is further than {largest.max():.0f} deviations from the mean.")


def check_ends(dataset: EpisodeDataset) -> Check:
    """Whether `terminated` and `truncated` say plausible things."""
    name = "ends of episodes"
    open_ended = np.flatnonzero(~dataset.terminated & ~dataset.truncated)
    if open_ended.size:
        return Check(
            name,
            ok=False,
            message=f"{open_ended.size} episodes neither terminate nor are truncated: {_listed(open_ended)}.",
            remedy="Set truncated where a recording was stopped, terminated where the task ended by itself.",
        )
    limit = int(dataset.env.get("horizon") or dataset.lengths.max())
    at_limit = dataset.terminated & ~dataset.truncated & (dataset.lengths == limit)
    if at_limit.sum() > 1 and at_limit.sum() > 0.5 * dataset.terminated.sum():
        return Check(
            name,
            ok=False,
            message=f"{at_limit.sum()} of {dataset.terminated.sum()} terminated episodes have exactly {limit} steps,"
            " so a time limit was probably stored as termination.",
            remedy="Store time limits as truncated: values are learned wrongly when a cut-off counts as the end.",
        )
    return Check(name, True, f"{dataset.terminated.sum()} terminated, {dataset.truncated.sum()} truncated.")


def check_lengths(dataset: EpisodeDataset, length: int) -> Check:
    """Whether episodes are long enough for segments of `length` steps."""
    short = np.flatnonzero(dataset.lengths < length)
    if short.size == len(dataset):
        return Check(
            "episode lengths",
            ok=False,
            message=f"Every episode is shorter than {length} steps; the longest has {dataset.lengths.max()}.",
            remedy=f"Use segments of at most {dataset.lengths.max()} steps (--length).",
        )
    if short.size:
        return Check(
            "episode lengths",
            ok=False,
            message=f"{short.size} of {len(dataset)} episodes are shorter than {length} steps: {_listed(short)}.",
            remedy="No segment can be drawn from them; shorter segments (--length) would use them too.",
            required=False,
        )
    return Check("episode lengths", True, f"Every episode holds a segment of {length} steps.")


def check_rewards(dataset: EpisodeDataset) -> Check:
    """Whether rewards differ at all, which simulated teachers rely on."""
    if np.ptp(dataset.rewards[_acted(dataset)]) == 0:
        return Check(
            "rewards",
            ok=False,
            message="The reward is the same at every step, so a simulated teacher would call every query a tie.",
            remedy="Have people label the queries, or collect with a reward.",
            required=False,
        )
    return Check("rewards", True, "Rewards vary.", required=False)


def check_timestamps(timestamps: Mapping[int, np.ndarray]) -> Check:
    """Whether time goes on evenly: a frame that was dropped or came twice makes one step longer or shorter.

    The row after the last action may have been repeated, and its time with it; it does not count.
    """
    name = "time stamps"
    gaps = {index: np.diff(times[:-1]) for index, times in timestamps.items()}
    every = np.concatenate([*gaps.values(), np.zeros(0)])
    known = every[np.isfinite(every)]
    usual = float(np.median(known)) if known.size else 0.0
    # Written so that NaN counts as a jump.
    jumps = {index: np.flatnonzero(~(np.abs(each - usual) < 0.5 * usual)) for index, each in gaps.items()}
    wrong = [(index, int(steps[0])) for index, steps in jumps.items() if steps.size]
    if not wrong:
        return Check(name, True, f"Steps take {usual:.4g} s, every one of them.")
    index, step = wrong[0]
    return Check(
        name,
        ok=False,
        message=f"{sum(steps.size for steps in jumps.values())} steps take more than 1.5 or less than 0.5 times the"
        f" usual {usual:.4g} s, in {len(wrong)} episodes; the first takes {gaps[index][step]:.4g} s, in episode"
        f" {index} at step {step}.",
        remedy="Part the episodes there, or record them again: across a jump, an action did not lead to what follows.",
        required=False,
    )


def _acted(dataset: EpisodeDataset) -> np.ndarray:
    """Which rows have an action: all but the last of each episode, [R]."""
    acted = np.ones(len(dataset.actions), dtype=bool)
    acted[dataset.offsets[1:] - 1] = False
    return acted


def _place(dataset: EpisodeDataset, rows: np.ndarray) -> str:
    row = int(rows.argmax())
    episode = int(dataset.offsets.searchsorted(row, side="right")) - 1
    return f"episode {episode}, step {row - int(dataset.offsets[episode])}"


def _share(steps: np.ndarray, total: int) -> str:
    return f"{int(steps.sum())} of {total} actions ({steps.sum() / total:.1%})"


def _listed(numbers: np.ndarray, most: int = 8) -> str:
    text = ", ".join(str(number) for number in numbers[:most].tolist())
    return text if len(numbers) <= most else f"{text}, …"
