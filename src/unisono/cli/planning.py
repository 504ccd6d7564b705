"""Commands that decide before anything is trained: ``plan`` and ``simulate``."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unisono.cli.options import JsonOption, Overrides, WorkersOption, launcher_here
from unisono.errors import ConfigurationError

if TYPE_CHECKING:
    from unisono.plan.constants import Known
    from unisono.plan.hardware import Cluster
    from unisono.plan.planner import Question
    from unisono.plan.transformer import Transformer

TOKENS = 4096
"""Of a sequence, where nothing is said."""


def plan(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG.yaml, MODEL or predict",
            help="A configuration; or a model: llama3:70b, layers=32,hidden=4096,heads=32,vocab=50000, or the "
            "config.json of Hugging Face Transformers; or predict, with --rows.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="For a model: the devices, COUNTxDEVICE[:OF A NODE][,LINK], 64xH100:8,ib400; or a YAML file."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="For a model: of a sequence; default: 4096, or what it can take."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="For a model: sequences of a step; default: 4 million tokens or more.")
    ] = None,
    framework: Annotated[
        str, typer.Option(help="For a model: whose constants are used: nanotron, llm-foundry, torchtitan, ...")
    ] = "default",
    price: Annotated[
        float | None, typer.Option(min=0, help="For a model: of a device for an hour; says what tokens cost.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="For a model: draw memory and a step's timeline into this file (.png, .svg).")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(help="For predict: a JSON file of runs, in the schema of data/published-runs.json.gz."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A JSON file of a few runs of yours with iter_time_s: times are scaled to them.")
    ] = None,
    with_profile: Annotated[
        bool, typer.Option("--profile", help="Show parameters, operations and activations, module by module.")
    ] = False,
    with_times: Annotated[
        bool,
        typer.Option("--measure", help="For a configuration: measure micro-batches here, and predict every layout."),
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(help="The directory of a run: what is predicted of its layout beside what it took.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose a layout before anything is trained: what fits, how fast, where the time goes, what would help.

    Of a configuration: its layout's stages, how long workers wait, and the memory of each. Of a model by its name or
    numbers, on a --cluster: the best divisions of all; what KEY=VALUE give (tensor, pipeline, data, context, expert,
    zero, shard, micro_batch, micro_batches, sequence, recompute, attention, virtual, schedule, period) stays as given:
    zero 0 to 3, sequence true or false, recompute none, selective or full, attention flash or unfused, schedule 1f1b,
    gpipe, interleaved, zb_h1 or zb_v, numbers from 1 for the others. predict judges runs that are rows of a file.

    Example: unisono plan configs/lm.yaml layout.pipeline=2 layout.data=2 layout.recompute=full --profile

    Example: unisono plan llama3:405b --cluster 16384xH100:8 --tokens 8192

    Example: unisono plan gpt:22b tensor=8 recompute=selective sequence=true --cluster 8xA100-80

    Example: unisono plan predict --rows rows.json --json

    Example: unisono plan configs/lm.yaml --measure
    """
    of_model = {"--cluster": cluster, "--tokens": tokens, "--batch": batch, "--price": price, "--picture": picture}
    of_configuration = {"--workers": workers, "--profile": with_profile or None, "--measure": with_times or None}
    if compare is not None:
        _refuse({**of_model, **of_configuration, "--rows": rows, "CONFIG.yaml": config}, "a plan without --compare")
        _compare(compare, as_json)
        return
    if config is None:
        raise ConfigurationError("plan needs CONFIG.yaml, a model, predict, or --compare RUN_DIR")
    if config == "predict":
        own = framework if framework != "default" else None
        _refuse({**of_model, **of_configuration, "--framework": own}, "a model or a configuration")
        _refuse({word: word for word in overrides or []}, "a model or a configuration")
        _predict(rows, calibrate, as_json)
    elif config.endswith((".yaml", ".yml")):
        _refuse({**of_model, "--rows": rows, "--calibrate": calibrate}, "a model by its name or numbers, or predict")
        if with_times:
            _refuse({"--profile": with_profile or None}, "a plan without --measure")
            _say_of_times(Path(config), overrides or [], workers, as_json)
            return
        _say_of_configuration(Path(config), overrides or [], workers, with_profile, as_json)
    else:
        _refuse({**of_configuration, "--rows": rows}, "a configuration or predict")
        asked = _Asked(cluster, tokens, batch, framework, price, picture, calibrate)
        _say_of_model(config, overrides or [], asked, as_json)


def _refuse(options: dict[str, object], whose: str) -> None:
    if wrong := [name for name, value in options.items() if value is not None]:
        raise ConfigurationError(f"{wrong[0]} is for {whose}; leave it out here")


def _say_of_configuration(
    config: Path, overrides: list[str], workers: int | None, with_profile: bool, as_json: bool
) -> None:
    from unisono.check.plan import plan as make
    from unisono.check.plan import prepared_without_values, profile, profile_as_text
    from unisono.config import load
    from unisono.launch.runs import choose_workers

    settings = load(config, overrides)
    prepared, found = prepared_without_values(settings, choose_workers(settings, workers))
    made = make(prepared, found, settings)
    rows = profile(prepared, found) if with_profile else None
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), **({"profile": rows} if rows is not None else {})}))
        return
    if rows is not None:
        typer.echo(profile_as_text(rows))
    typer.echo(made.as_text())


def _say_of_times(config: Path, overrides: list[str], workers: int | None, as_json: bool) -> None:
    """What steps take here, in every layout."""
    from unisono.config import load

    settings = load(config, overrides)
    with launcher_here() as launcher:
        from unisono.check.choosing import choose, most_workers

        say = None if as_json else typer.echo
        best, found = choose(launcher, settings, workers or most_workers(settings), say)
    if as_json:
        typer.echo(json.dumps({"best": best.as_dict(), "layouts": [one.as_dict() for one in found]}))
    else:
        typer.echo("\n".join(one.as_text() for one in found))


def _compare(run_dir: Path, as_json: bool) -> None:
    """What is predicted of a run beside what it took."""
    with launcher_here() as launcher:
        from unisono.check.comparing import compare

        found = compare(launcher, run_dir)
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_text())


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked of a model, as it was written."""

    cluster: str | None
    tokens: int | None
    batch: int | None
    framework: str
    price: float | None
    picture: Path | None
    calibrate: Path | None


def _say_of_model(text: str, words: list[str], asked: _Asked, as_json: bool) -> None:
    from unisono.plan.bounds import Bounds
    from unisono.plan.described import read_cluster

    if asked.cluster is None:
        of_devices = {"--batch": asked.batch, "--price": asked.price, "--picture": asked.picture}
        _refuse({**of_devices, "--calibrate": asked.calibrate}, "a --cluster")
        _say_without_devices(text, words, asked.tokens, as_json)
        return
    from unisono.plan.answer import as_dict, as_text
    from unisono.plan.planner import plan as make

    question = _question(
        text, words, read_cluster(asked.cluster), asked.tokens, asked.batch, asked.framework, asked.calibrate
    )
    made, bounds = make(question), Bounds(question.model, question.tokens, question.cluster)
    if asked.picture is not None:
        from unisono.plan.picture import draw

        draw(made, asked.picture)
    if as_json:
        typer.echo(json.dumps({**bounds.as_dict(), **as_dict(made, asked.price)}))
        return
    typer.echo(f"{bounds.as_text()}\n{as_text(made, asked.price)}")
    if asked.picture is not None:
        typer.echo(f"picture: {asked.picture}")


def _say_without_devices(text: str, words: list[str], wanted: int | None, as_json: bool) -> None:
    """What is known of a model, and of a division of it, whatever the devices."""
    from unisono.plan.bounds import Bounds
    from unisono.plan.division import Division
    from unisono.plan.occupancy import Occupancy, occupancy
    from unisono.plan.transformer import transformer

    model = transformer(text)
    tokens = _tokens(model, wanted)
    parts: list[Bounds | Occupancy] = [Bounds(model, tokens, None)]
    parts += [occupancy(model, tokens, Division.read(words))] if words else []
    if as_json:
        typer.echo(json.dumps({key: value for part in parts for key, value in part.as_dict().items()}))
    else:
        typer.echo("\n".join(part.as_text() for part in parts))


def simulate(
    model: Annotated[
        str, typer.Argument(help="As in unisono plan: llama3:70b, numbers, a config.json.", show_default=False)
    ],
    division: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Parts of the division; the best of the rest.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="The devices: 16384xH100:8,ib400; or a YAML file.", show_default=False)
    ] = "",
    tokens: Annotated[int | None, typer.Option(min=1, max=10**9, help="Of a sequence; default: 4096.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step; default: 4 million tokens or more.")
    ] = None,
    framework: Annotated[str, typer.Option(help="Whose constants are used.")] = "default",
    slow: Annotated[
        list[str] | None, typer.Option(help="RANK=FACTOR: that rank computes so many times longer; may be repeated.")
    ] = None,
    jitter: Annotated[
        float, typer.Option(min=0, max=2, help="Deviation of each action's logarithm, 0.05 for 5%.")
    ] = 0.0,
    ports: Annotated[
        int | None, typer.Option(min=1, help="Ports of a node, which its devices share; default: one each.")
    ] = None,
    oversubscribed: Annotated[
        float, typer.Option(min=1, help="How many times less the spine carries than all ports.")
    ] = 1.0,
    weeks: Annotated[
        float | None, typer.Option(min=0, max=1000, help="Simulate so many weeks with failures, too.")
    ] = None,
    mtbf: Annotated[float, typer.Option(help="Of a device, mean hours between failures.")] = 50_000.0,
    every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: as many as cost least.")] = 0,
    checkpoint_s: Annotated[float, typer.Option(min=0, help="Seconds that a checkpoint holds up training.")] = 30.0,
    restart_s: Annotated[float, typer.Option(min=0, help="Seconds from a failure until all compute again.")] = 300.0,
    repair: Annotated[float, typer.Option(min=0, help="Mean hours until a failed device is back.")] = 12.0,
    spares: Annotated[int, typer.Option(min=0, help="Devices that stand by.")] = 0,
    elastic: Annotated[bool, typer.Option("--elastic", help="Go on with the replicas that are whole.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the step into this file, for Perfetto (ui.perfetto.dev).")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the step's timetable into this file (.png, .svg).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of jitter and failures.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Let a step happen on every rank, event by event; and, with --weeks, a run with its failures.

    Example: unisono simulate llama3:405b --cluster 16384xH100:8 --tokens 8192 --slow 17=1.3 --trace trace.json

    Example: unisono simulate llama3:70b tensor=8 pipeline=4 --cluster 512xH100:8 --weeks 8 --spares 8
    """
    from unisono.plan.described import read_cluster
    from unisono.plan.goodput import Campaign
    from unisono.plan.planner import plan as make
    from unisono.plan.simulator import Trouble
    from unisono.plan.staging import wires_of, work_of
    from unisono.plan.telling import Simulated

    if not cluster:
        raise ConfigurationError("simulate needs --cluster: the devices, for example 64xH100:8,ib400")
    if weeks is None and (elastic or spares):
        raise ConfigurationError(f"{'--elastic' if elastic else '--spares'} is for a run of weeks; give --weeks too")
    devices = read_cluster(cluster)
    question = _question(model, division or [], devices, tokens, batch, framework, None)
    chosen = make(question, advised=False).best[0]
    work = work_of(question.model, question.tokens, chosen.division, devices, question.known)
    wires = wires_of(devices, question.known, ports, oversubscribed)
    made = Simulated.of(question, chosen, work, wires, Trouble(_slow(slow or []), jitter, seed))
    if weeks is not None:
        campaign = Campaign(
            devices.devices,
            chosen.division.data,
            made.step.seconds,
            mtbf,
            checkpoint_s,
            every,
            restart_s,
            repair,
            spares,
            elastic,
            weeks,
        )
        made = made.through(campaign, seed)
    if trace is not None:
        from unisono.plan.trace import write

        write(made.step, work, trace)
    if picture is not None:
        from unisono.plan.picture import draw_step

        draw_step(made.step, made.title, picture)
    typer.echo(json.dumps(made.as_dict()) if as_json else made.as_text())
    for what, path in (("trace", trace), ("picture", picture)):
        if path is not None and not as_json:
            typer.echo(f"{what}: {path}")


def _slow(words: list[str]) -> dict[int, float]:
    """Ranks and how many times slower they are."""
    found: dict[int, float] = {}
    for word in words:
        rank, _, factor = word.partition("=")
        try:
            found[int(rank)] = float(factor)
        except ValueError:
            raise ConfigurationError(f"--slow is {word!r}; give RANK=FACTOR, for example 17=1.3") from None
    return found


def _question(
    text: str,
    words: list[str],
    devices: "Cluster",
    given_tokens: int | None,
    batch: int | None,
    framework: str,
    own: Path | None,
) -> "Question":
    """What is to be trained, on what."""
    from unisono.plan.constants import calibration, frozen, refuse_unknown
    from unisono.plan.division import given
    from unisono.plan.planner import Question, default_sequences
    from unisono.plan.transformer import transformer

    model = transformer(text)
    tokens = _tokens(model, given_tokens)
    before, after = frozen(), _known(own)
    refuse_unknown(before, framework)
    known, plain = (calibration(which, framework, devices.device.name) for which in (after, before))
    if own is not None and known.scale == plain.scale:
        raise ConfigurationError(
            f"the rows of {own} are not of {plain.name}, whose constants are used; give --framework as they have it"
        )
    return Question(model, tokens, devices, batch or default_sequences(devices, tokens), known, given(words))


def _tokens(model: "Transformer", wanted: int | None) -> int:
    """Of a sequence."""
    tokens = wanted or min(TOKENS, model.positions or TOKENS)
    if model.positions and tokens > model.positions:
        raise ConfigurationError(f"--tokens is {tokens}, and {model.name} has {model.positions} positions; give fewer")
    return tokens


def _known(own: Path | None) -> "Known":
    from unisono.plan.constants import frozen
    from unisono.plan.predict import rescaled

    return frozen() if own is None else rescaled(_rows(own), frozen())


def _rows(path: Path) -> list[Any]:
    """Runs of a file: a list, or a mapping with rows."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = json.loads(content)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"cannot read rows from {path}: {error}") from error
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not rows:
        raise ConfigurationError(f'{path} holds no rows; give a JSON list of objects, or {{"rows": [...]}}')
    return rows


def _predict(rows: Path | None, calibrate: Path | None, as_json: bool) -> None:
    from unisono.plan.predict import as_text, predict

    if rows is None:
        raise ConfigurationError("plan predict needs --rows FILE: a JSON list of runs to judge")
    answers = predict(_rows(rows), _known(calibrate))
    typer.echo(json.dumps({"rows": answers}) if as_json else as_text(answers))
