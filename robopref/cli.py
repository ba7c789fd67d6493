"""The command `robopref`: what one does at a terminal with an installation, a dataset, labels and finished runs.

Only the standard library is imported with this module, so that `robopref --help` answers at once. A user's mistake ends
in one sentence on stderr and exit status 2; `--traceback` shows where it came from.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from robopref.checks import Check
    from robopref.episodes import EpisodeDataset
    from robopref.evaluation import Interval
    from robopref.types import EpisodeSource

STATUS_BAD = 1
"""Something that was looked at is not as it should be."""
STATUS_ERROR = 2
"""The command could not be carried out."""
STATUS_INTERRUPTED = 130

FORMATS = ("robopref", "robomimic", "d4rl", "lerobot")
"""Those of robopref/conversion.py, which takes a moment to import."""

_FORMAT = ", ".join(FORMATS)
_LABEL_FIT = "label fit"
_VALUES = "V of each row of the dataset's observations, as numpy.save writes it"

BEHAVIOURS = {
    "expert": "Expert",
    "offset": "Offset",
    "wronggoal": "WrongGoal",
    "stalling": "Stalling",
    "overshooting": "Overshooting",
    "heldbias": "HeldBias",
}
"""From a name on the command line, which is also what episodes record, to the class in envs/behaviours.py."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Args:
        arguments: as typed after `robopref`; those of this process if None.
    """
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    from robopref.compilation import keep_compiled_programs

    keep_compiled_programs()
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("robopref: interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has had enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STATUS_BAD
    except Exception as error:
        if options.traceback or not _is_for_people(error):
            raise
        print(f"robopref: {_sentence(error)}", file=sys.stderr)
        return STATUS_ERROR


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints fit on one line and name what was probably meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(STATUS_ERROR, f"robopref: {message} (`{self.prog} --help` explains)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(None, f"there is no {action.dest} {value!r}{_nearest(str(value), known)}")


def _joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with `label fit` as one word, as what follows `label` is no command to argparse."""
    return [_LABEL_FIT, *arguments[2:]] if list(arguments[:2]) == _LABEL_FIT.split() else list(arguments)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="after an error, show where in the code it arose")
    parser = _Parser(prog="robopref", description="Teach robots by preference.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", parents=[common], help="say what works on this machine, and what to do")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(run=_doctor)

    data = commands.add_parser("data", help="look at, check, convert, split, film and collect episodes")
    data_commands = data.add_subparsers(dest="data command", metavar="COMMAND", required=True)

    reading = _Parser(add_help=False)
    reading.add_argument("path", type=Path, metavar="PATH", help="a dataset of episodes: a folder, or an HDF5 file")
    reading.add_argument("--from", dest="format", choices=FORMATS, metavar="FORMAT", help=f"{_FORMAT} (default: seen)")
    reading.add_argument("--keys", type=_names, metavar="A[,B...]", help="parts of an observation to join, in order")
    reading.add_argument("--cut-off", type=_positive, metavar="STEPS", help="for D4RL files without timeouts")
    writing = _Parser(add_help=False)
    writing.add_argument(
        "--to", choices=FORMATS, default="robopref", metavar="FORMAT", help=f"{_FORMAT} (default: its own)"
    )
    writing.add_argument("--fps", type=_positive, help="frames per second, which lerobot needs")
    writing.add_argument("--task", help="what the robot is to do, in words, for lerobot (default: the description)")
    writing.add_argument("--without-images", action="store_true", help="leave out what cameras saw")

    info = data_commands.add_parser("info", parents=[common, reading], help="summarise a dataset of episodes")
    info.set_defaults(run=_data_info)

    stats = data_commands.add_parser("stats", parents=[common, reading], help="say how each number is distributed")
    stats.add_argument("--json", action="store_true", help="print the same as JSON")
    stats.set_defaults(run=_data_stats)

    convert = data_commands.add_parser("convert", parents=[common, reading, writing], help="write it in another format")
    convert.add_argument("out", type=Path, metavar="OUT", help="what to write, which must not exist yet")
    convert.add_argument("--split", metavar="NAME", help="only the episodes of this split")
    convert.set_defaults(run=_data_convert)

    split = data_commands.add_parser(
        "split", parents=[common, reading, writing], help="part a dataset, by episodes, into train and held-out"
    )
    split.add_argument("out", type=Path, metavar="OUT", help="the folder for both parts, which must not exist yet")
    split.add_argument("--held-out", type=float, default=0.1, help="share of the episodes (default: %(default)s)")
    split.add_argument("--seed", type=_natural, default=0, help="which episodes it is (default: %(default)s)")
    split.set_defaults(run=_data_split)

    film = data_commands.add_parser("film", parents=[common, reading], help="film an episode")
    film.add_argument("out", type=Path, metavar="OUT", help="the video to write, such as episode.mp4")
    film.add_argument("--episode", type=_natural, default=0, help="which (default: %(default)s)")
    film.add_argument("--camera", metavar="NAME", help="which, where several were recorded (default: the first)")
    film.add_argument("--fps", type=_positive, default=20, help="frames per second (default: %(default)s)")
    film.set_defaults(run=_data_film)

    check = data_commands.add_parser(
        "check", parents=[common, reading], help="find what would spoil training on a dataset"
    )
    check.add_argument("--length", type=_positive, default=64, help="steps of a segment (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print the same as JSON")
    check.set_defaults(run=_data_check)

    collect = data_commands.add_parser("collect", parents=[common], help="roll out a scripted behaviour")
    collect.add_argument("env", metavar="ENV", help="such as metaworld/door-open-v3")
    collect.add_argument("out", type=Path, metavar="OUT", help="the folder to write, which must not exist yet")
    collect.add_argument(
        "--behaviour",
        type=_behaviour_names,
        default=["expert"],
        metavar="NAME[,NAME...]",
        help=f"who acts, one of them drawn per episode: {', '.join(BEHAVIOURS)} (default: expert)",
    )
    collect.add_argument("--noise", type=float, default=0.0, help="deviation added to actions (default: %(default)s)")
    collect.add_argument("--episodes", type=_positive, default=20, help="how many (default: %(default)s)")
    collect.add_argument("--horizon", type=_positive, help="steps after which an episode is cut off")
    collect.add_argument("--seed", type=_natural, default=0, help="of the first episode (default: %(default)s)")
    collect.add_argument("--processes", type=_natural, default=2, help="0 uses none but this (default: %(default)s)")
    collect.add_argument("--keep-states", action="store_true", help="keep simulator states, which exact regret needs")
    collect.set_defaults(run=_data_collect)

    label = commands.add_parser(
        "label",
        parents=[common],
        help="draw queries and have a simulated teacher answer them",
        epilog=f"`robopref {_LABEL_FIT}` fits a teacher to labels; a dataset in a folder called fit is given as ./fit.",
    )
    label.add_argument("dataset", type=Path, metavar="DATASET", help="the folder of a dataset of episodes")
    label.add_argument("out", type=Path, metavar="OUT", help="the preference record to write, such as labels.parquet")
    label.add_argument(
        "--teacher",
        default="oracle",
        help="oracle, mistake, noisy, skip, equal or myopic; or the .json file of a fitted one",
    )
    label.add_argument("--values", type=Path, metavar="FILE", help=f"for a fitted teacher that needs them: {_VALUES}")
    label.add_argument("--threshold", type=float, help="of skip and equal; by default a tenth of an average segment")
    label.add_argument("--queries", type=_positive, default=500, help="how many (default: %(default)s)")
    label.add_argument("--length", type=_positive, default=64, help="steps of a segment (default: %(default)s)")
    label.add_argument("--seed", type=_natural, default=0, help="of queries and answers (default: %(default)s)")
    label.set_defaults(run=_label)

    fit = commands.add_parser(
        _LABEL_FIT, parents=[common], help="fit teachers to labels, and say which one they support"
    )
    fit.add_argument("dataset", type=Path, metavar="DATASET", help="the folder of the dataset of episodes")
    fit.add_argument("records", type=Path, metavar="RECORDS", help="the preference record, such as labels.parquet")
    fit.add_argument("--labeler", metavar="NAME", help="whose labels, where the record holds those of several")
    fit.add_argument("--values", type=Path, metavar="FILE", help=f"which some teachers need: {_VALUES}")
    fit.add_argument("--discount", type=float, default=1.0, help="of these values (default: %(default)s)")
    fit.add_argument("--folds", type=_positive, default=5, help="parts held out in turn (default: %(default)s)")
    fit.add_argument("--seed", type=_natural, default=0, help="of the folds (default: %(default)s)")
    fit.add_argument("--out", type=Path, metavar="FILE", help="write a fitted teacher here, as JSON")
    fit.add_argument(
        "--family", metavar="NAME", help="the one to write (default: that of the best held-out likelihood)"
    )
    fit.set_defaults(run=_label_fit)

    report = commands.add_parser("report", parents=[common], help="write the HTML report of a finished run anew")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of an experiment's run")
    report.set_defaults(run=_report)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from robopref import doctor

    return _show(doctor.run_checks(doctor.installation_checks()), as_json=options.json)


def _data_info(options: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    with _opened(options) as source, _dataset(options, source) as dataset:
        console.print(_facts(dataset, source, options.path))
        console.print(_behaviours(dataset))
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from robopref.dataset_checks import dataset_checks, read_timestamps

    with _opened(options) as source, _dataset(options, source) as dataset:
        return _show(dataset_checks(dataset, options.length, read_timestamps(dataset)), as_json=options.json)


def _data_stats(options: argparse.Namespace) -> int:
    from rich.console import Console

    from robopref.dataset_checks import dataset_statistics

    with _opened(options) as source, _dataset(options, source) as dataset:
        statistics = dataset_statistics(dataset)
    if options.json:
        print(json.dumps(statistics, indent=2))
    else:
        Console(highlight=False).print(_statistics(statistics))
    return 0


def _data_convert(options: argparse.Namespace) -> int:
    _check_output(options.out)
    with _opened(options) as source:
        chosen = None
        if options.split is not None:
            if options.split not in source.splits:
                known = _nearest(options.split, list(source.splits)) if source.splits else "; it has none"
                raise ValueError(f"{options.path} has no split {options.split!r}{known}")
            chosen = source.splits[options.split]
        _convert(options, source, options.out, chosen)
        print(f"{options.out}: {len(source) if chosen is None else len(chosen)} episodes")
    return 0


def _data_split(options: argparse.Namespace) -> int:
    import numpy as np

    from robopref.files import atomic_folder

    _check_output(options.out)
    with _opened(options) as source:
        held_out = round(options.held_out * len(source))
        if not 0 < held_out < len(source):
            raise ValueError(
                f"--held-out {options.held_out:g} of {len(source)} episodes leaves nothing to one of both parts"
            )
        order = np.random.default_rng(options.seed).permutation(len(source))
        suffix = ".hdf5" if options.to in ("robomimic", "d4rl") else ""
        with atomic_folder(options.out) as folder:
            for name, part in (("held-out", order[:held_out]), ("train", order[held_out:])):
                _convert(options, source, folder / f"{name}{suffix}", np.sort(part))
    for name, count in (("held-out", held_out), ("train", len(order) - held_out)):
        print(f"{options.out / name}{suffix}: {count} episodes")
    return 0


def _convert(options: argparse.Namespace, source: EpisodeSource, out: Path, chosen: Any) -> None:
    from robopref.conversion import convert
    from robopref.progress import progress_bar

    with _for_robomimic(options, source) as own, progress_bar(out.name) as progress:
        convert(
            source,
            out,
            options.to,
            indices=chosen,
            images=not options.without_images,
            fps=options.fps,
            task=options.task,
            progress=progress,
            **own,
        )


@contextmanager
def _for_robomimic(options: argparse.Namespace, source: EpisodeSource) -> Iterator[dict[str, Any]]:
    """What robomimic's own tools need in a file: they make environments, and put states back, in ways of their own."""
    if options.to != "robomimic" or not str(source.env.get("name", "")).startswith("robosuite/"):
        yield {}
        return
    env = _checkout_module("envs").make(source.env)

    def model_of(state: Any) -> str:
        env.set_state(state)
        return str(env.model_xml)

    try:
        env_args = _checkout_module("envs.robosuite").to_env_args(source.env)
        yield {"env": env_args, "models": model_of, "flat_states": env.flat_states}
    finally:
        env.close()


def _data_film(options: argparse.Namespace) -> int:
    from robopref.video import write_video

    _check_output(options.out)
    with _opened(options) as source:
        if not 0 <= options.episode < len(source):
            raise ValueError(f"there is no episode {options.episode}; {options.path} has 0 to {len(source) - 1}")
        if source.cameras:
            camera = options.camera or next(iter(source.cameras))
            if camera not in source.cameras:
                raise ValueError(f"there is no camera {camera!r}{_nearest(camera, list(source.cameras))}")
            frames = list(source.frames(options.episode, camera))
        else:
            frames = _rendered(source, options)
    write_video(options.out, frames, options.fps)
    print(f"{options.out}: {len(frames)} frames of episode {options.episode}")
    return 0


def _rendered(source: EpisodeSource, options: argparse.Namespace) -> list[Any]:
    """What the environment that made the episodes shows of the states of one of them."""
    states = source.episode(options.episode).states
    if states is None:
        raise ValueError(f"{options.path} keeps neither images nor simulator states, so there is nothing to film")
    env = _checkout_module("envs").make(source.env)
    try:
        frames = []
        for state in states:
            env.set_state(state)
            frames.append(env.render())
        return frames
    finally:
        env.close()


def _data_collect(options: argparse.Namespace) -> int:
    _check_output(options.out)
    envs = _checkout_module("envs")

    from robopref.episodes import write_episodes
    from robopref.progress import progress_bar
    from robopref.rollouts import RolloutWorkers

    config: dict[str, Any] = {"name": options.env}
    if options.horizon is not None:
        config["horizon"] = options.horizon
    env = envs.make(config)
    try:
        policy = _scripted(options, env)
        make_env = functools.partial(envs.make, config)
        # One lane: scripts gain nothing from acting in several environments at once, and each takes time to make.
        with (
            RolloutWorkers(make_env, processes=options.processes, lanes=1) as workers,
            progress_bar(options.env) as progress,
        ):
            episodes = workers.run(
                policy,
                range(options.seed, options.seed + options.episodes),
                keep_states=options.keep_states,
                progress=progress,
            )
        write_episodes(
            options.out,
            episodes,
            observation_space=env.observation_space,
            action_space=env.action_space,
            env=env.config,
            description=f"{', '.join(options.behaviour)} in {options.env}",
            keys=getattr(env, "keys", None),
        )
    finally:
        env.close()
    succeeded = sum(episode.succeeded for episode in episodes)
    print(f"{options.out}: {len(episodes)} episodes, {sum(map(len, episodes))} steps, {succeeded} successes")
    return 0


def _scripted(options: argparse.Namespace, env: Any) -> Any:
    """Who acts: the behaviours that were asked for, one of them drawn per episode."""
    family, _, task = options.env.partition("/")
    if family == "robosuite":
        experts = _checkout_module("envs.robosuite_behaviours").EXPERTS
        if task not in experts or options.behaviour != ["expert"]:
            raise ValueError(f"of robosuite's tasks only {' and '.join(experts)} are scripted, and only by an expert")
        return experts[task](keys=tuple(env.keys.items()), noise=options.noise)
    if family != "metaworld":
        raise ValueError(f"scripted behaviours exist for Meta-World and robosuite only, not for {options.env!r}")
    behaviours = _checkout_module("envs.behaviours")
    parts = [getattr(behaviours, BEHAVIOURS[name])(task=task, noise=options.noise) for name in options.behaviour]
    return parts[0] if len(parts) == 1 else behaviours.Mixture(tuple((1.0, part) for part in parts))


def _label(options: argparse.Namespace) -> int:
    _check_output(options.out)
    teachers = _checkout_module("labelers.teachers")
    fitted = None
    if Path(options.teacher).suffix == ".json":
        fitted = _checkout_module("labelers.calibration").load_teacher(options.teacher)
    elif options.teacher not in teachers.PRESETS:
        raise ValueError(f"there is no teacher {options.teacher!r}{_nearest(options.teacher, teachers.PRESETS)}")

    import jax
    import numpy as np

    from robopref.queries import draw_queries, label_statistics
    from robopref.records import write_records

    if options.values is not None and not (fitted and fitted.needs_values):
        raise ValueError(f"the teacher {options.teacher!r} does not look at the values of states; leave out --values")
    dataset = _load(options.dataset)
    values = _values(options.values, dataset)
    with _waiting(f"{options.teacher} answers {options.queries} queries"):
        rng = np.random.default_rng(options.seed)
        queries = draw_queries(dataset, rng, count=options.queries, length=options.length)
        threshold = options.threshold
        if threshold is None and options.teacher in teachers.THRESHOLD_PRESETS:
            threshold = teachers.benchmark_threshold(queries)
        teacher = fitted.teacher(values) if fitted else teachers.preset(options.teacher, threshold=threshold)
        labels = teacher.label(queries, jax.random.key(options.seed))
        write_records(options.out, queries, labels)
    found = label_statistics(queries, labels)
    print(
        f"{options.out}: {len(queries)} queries, {found['answered']:.0%} answered, {found['ties']:.0%} of these ties;"
        f" the better partial return preferred in {found['partial_return_agreement']:.0%} of the decided pairs"
    )
    return 0


def _label_fit(options: argparse.Namespace) -> int:
    if options.out is not None:
        _check_output(options.out)
    calibration = _checkout_module("labelers.calibration")
    if options.family is not None and options.family not in calibration.FAMILIES:
        raise ValueError(f"there is no family {options.family!r}{_nearest(options.family, list(calibration.FAMILIES))}")

    from rich.console import Console

    from robopref.records import read_records

    dataset = _load(options.dataset)
    queries, labels = read_records(options.records, dataset, options.labeler)
    values = _values(options.values, dataset)
    with _waiting(f"fitting teachers to {labels.answered.sum()} labels"):
        comparison = calibration.compare_teachers(
            queries, labels, values=values, discount=options.discount, folds=options.folds, seed=options.seed
        )
    known = {candidate.fitted.family: candidate.fitted for candidate in comparison.candidates}
    chosen = comparison.best.fitted.family if options.family is None else options.family
    if chosen not in known:
        raise ValueError(f"the family {chosen!r} judges by the values of states; give --values")
    console = Console(highlight=False)
    console.print(_families(comparison))
    console.print(_calibration(calibration, comparison))
    console.print(comparison.conclusion, soft_wrap=True)
    if comparison.left_out:
        names = " and ".join(map(repr, comparison.left_out))
        console.print(f"Left out, as they need --values: {names}.", soft_wrap=True)
    if options.out is not None:
        calibration.save_teacher(options.out, known[chosen])
        console.print(f"{options.out}: the fitted teacher {chosen!r}", soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    if not options.run_folder.is_dir():
        raise FileNotFoundError(f"there is no run at {options.run_folder}: no such folder")
    experiment = _checkout_module("experiments.experiment")
    with _waiting("writing the report"):
        written = experiment.rebuild_report(options.run_folder)
    print(written)
    return 0


def _opened(options: argparse.Namespace) -> EpisodeSource:
    with _waiting(f"reading {options.path}"):
        from robopref.conversion import open_episodes

        return open_episodes(options.path, options.format, keys=options.keys, horizon=options.cut_off)


@contextmanager
def _dataset(options: argparse.Namespace, source: EpisodeSource) -> Iterator[EpisodeDataset]:
    """The vectors of a dataset of any format; what comes from elsewhere is converted for as long as it is looked at."""
    from robopref.conversion import StoredEpisodes, convert
    from robopref.episodes import load_episodes

    if isinstance(source, StoredEpisodes):
        yield source.dataset
        return
    with tempfile.TemporaryDirectory() as folder:
        with _waiting(f"reading {options.path}"):
            convert(source, Path(folder) / "episodes", "robopref", images=False)
            dataset = load_episodes(Path(folder) / "episodes")
        yield dataset


def _load(path: Path) -> EpisodeDataset:
    with _waiting(f"reading {path}"):
        from robopref.episodes import load_episodes

        return load_episodes(path)


def _values(path: Path | None, dataset: EpisodeDataset) -> Any:
    """The values of the dataset's states, or None without a path."""
    return None if path is None else _checkout_module("labelers.calibration").read_values(path, dataset)


def _waiting(what: str) -> AbstractContextManager[object]:
    """Shows on a terminal that something is under way, for work too short to count; elsewhere nothing."""
    from rich.console import Console

    return Console(stderr=True).status(f"{what} …")


def _show(found: Iterable[Check], *, as_json: bool) -> int:
    from robopref.checks import checks_as_json, show_checks

    if not as_json:
        return 0 if show_checks(found, sys.stdout) else STATUS_BAD
    checks = list(found)
    print(checks_as_json(checks))
    return STATUS_BAD if any(check.fatal for check in checks) else 0


def _statistics(statistics: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(pad_edge=False)
    table.add_column("numbers")
    names = [name for name in statistics[0] if name != "numbers"]
    for name in names:
        table.add_column(name, justify="right")
    for row in statistics:
        table.add_row(row["numbers"], *(f"{row[name]:.4g}" for name in names))
    return table


def _facts(dataset: EpisodeDataset, source: EpisodeSource, path: Path) -> Any:
    import numpy as np
    from rich.table import Table

    lengths, returns = dataset.lengths, dataset.returns
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    env = dict(dataset.env)
    name = env.pop("name", None) or env.pop("env_name", "unknown")
    foreign = source.cameras or len(source.keys) > 1 or source.splits
    parts = {
        "parts": ", ".join(f"{key} [{size}]" for key, size in source.keys.items()),
        "cameras": ", ".join(f"{camera} {list(shape)}" for camera, shape in source.cameras.items()),
        "splits": ", ".join(f"{split}: {len(members)}" for split, members in source.splits.items()),
    }
    settings = ", ".join(f"{key} {value}" for key, value in env.items())
    for fact, text in {
        "path": str(path),
        "description": dataset.description,
        "env": f"{name} ({settings})" if settings else str(name),
        "episodes": f"{len(dataset)}, of {lengths.min()} to {lengths.max()} steps",
        "steps": str(dataset.total_steps),
        "observations": _space(dataset.observation_space),
        **(parts if foreign else {}),
        "actions": _space(dataset.action_space),
        "states": f"{dataset.state_size} numbers per step" if dataset.state_size else "not kept",
        "returns": "{:.4g} to {:.4g}, quartiles {:.4g}, {:.4g}, {:.4g}".format(
            returns.min(), returns.max(), *np.percentile(returns, [25, 50, 75])
        ),
        "success": _success(dataset.successes),
        "ends": f"{dataset.terminated.sum()} terminated, {dataset.truncated.sum()} truncated",
        "hash": dataset.hash,
    }.items():
        if text:
            table.add_row(fact, text)
    return table


def _behaviours(dataset: EpisodeDataset) -> Any:
    import numpy as np
    from rich.table import Table

    names = np.array([str(origin.get("behaviour", "unknown")) for origin in dataset.origins])
    table = Table(pad_edge=False)
    table.add_column("behaviour")
    for heading in ("episodes", "median return"):
        table.add_column(heading, justify="right")
    table.add_column("success")
    for name in np.unique(names):
        chosen = names == name
        median = f"{np.median(dataset.returns[chosen]):.4g}"
        table.add_row(str(name), str(chosen.sum()), median, _success(dataset.successes[chosen]))
    return table


def _families(comparison: Any) -> Any:
    from rich import box
    from rich.table import Table

    title = f"teachers fitted to {len(comparison.labels)} labels"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("teacher", max_width=14)
    table.add_column("parameters (95% interval)", overflow="fold")
    table.add_column("held out", justify="right")
    table.add_column("less the best\n(95% interval)")
    for candidate in comparison.candidates:
        fitted = candidate.fitted
        names = [name.removesuffix("_weight").replace("_", " ") for name in fitted.parameters]
        parameters = [f"{name} {each}" for name, each in zip(names, fitted.parameters.values(), strict=True)]
        gap = "best"
        if candidate is not comparison.best:
            # The sum has no minus before a zero.
            difference, low, high = (
                f"{round(end, 4) + 0.0:.4f}" for end in (candidate.difference, candidate.low, candidate.high)
            )
            gap = f"{difference}\n({low} to {high})"
        table.add_row(fitted.family, "\n".join(parameters) or "none", f"{fitted.held_out:.4f}", gap, end_section=True)
    table.caption = (
        "held out: log-likelihood per query, in nats; at most, at least, any: the labels give no other bound"
    )
    table.caption_justify = "left"
    return table


def _calibration(calibration: Any, comparison: Any) -> Any:
    from rich import box
    from rich.table import Table

    best = comparison.best
    title = f"predictions of {best.fitted.family!r}, held out"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for heading in ("P(second preferred)", "share of labels", "queries"):
        table.add_column(heading, justify="right")
    for part in calibration.calibration_bins(best.probabilities, comparison.labels):
        table.add_row(f"{part.predicted:.2f}", f"{part.labelled:.2f}", str(part.n))
    return table


def _success(successes: Any) -> str:
    from robopref.evaluation import success_interval

    interval: Interval = success_interval(successes)
    return f"{interval.mean:.1%} (95% interval {interval.low:.1%} to {interval.high:.1%}, n = {interval.n})"


def _space(space: Any) -> str:
    low, high = float(space.low.min()), float(space.high.max())
    return f"{space.shape[0]} numbers ({space.dtype}) between {low:.4g} and {high:.4g}"


def _checkout_module(name: str) -> Any:
    """A module that lives beside the library and is not part of the wheel."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A package that the module needs is another matter than the module itself.
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise RuntimeError(
            f"this command needs `{name.partition('.')[0]}/`, which the installed package does not hold:"
            " run it in a checkout of the robopref repository, after `make install`"
        ) from error


def _check_output(path: Path) -> None:
    """Finds out before the work, not after it, that its result could not be written."""
    if path.exists():
        raise FileExistsError(f"{path} exists already; choose another path, or remove it first")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {nearest} is not a folder that this user may write to")


def _is_for_people(error: Exception) -> bool:
    # Subclasses of RuntimeError, such as those of JAX, speak to programmers.
    return isinstance(error, ValueError | OSError | ModuleNotFoundError) or type(error) is RuntimeError


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; `robopref doctor` says what is missing and how to get it"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _behaviour_names(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name not in BEHAVIOURS:
            raise argparse.ArgumentTypeError(f"there is no behaviour {name!r}{_nearest(name, list(BEHAVIOURS))}")
    return names


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
    return number


if __name__ == "__main__":
    sys.exit(main())
