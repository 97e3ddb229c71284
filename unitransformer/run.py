"""run(config) -> outcome: the one place where data, network, trainer, clock and record meet."""

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning.pytorch as pl

from unitransformer import measure
from unitransformer.checkpoints import (
    KEY,
    SaveCheckpoints,
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
)
from unitransformer.config import RunConfig, to_dict
from unitransformer.data import DataModule, load_source
from unitransformer.flops import count_parameters
from unitransformer.process import find_device, process_rank, set_up_process
from unitransformer.progress import Bar, LogLines
from unitransformer.recording import (
    History,
    build_record,
    describe_code,
    find_divergence,
    history_now,
)
from unitransformer.records import Record, write_record
from unitransformer.training import TrainingModule, build_trainer
from unitransformer.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run puts what it makes."""

    folder: Path  # logs and figures
    checkpoints: Path
    record: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run leaves in memory; every rank has the network, rank 0 the record."""

    record: Record | None
    network: Transformer  # whole, however its weights were spread while it trained
    config: RunConfig
    data: DataModule


class RunFailed(Exception):
    """Training began and did not end well; its cause is chained, its record written."""


def run(
    config: RunConfig,
    places: Places,
    *,
    command: str,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
    show_bar: bool = False,
) -> Outcome:
    """Train `config` and write its record, whether it ends well or not.

    Args:
        command: what a person types to run this again; goes into the record.
        resume: continue from the newest checkpoint of `places`.
        say: takes each line for people, by default standard output; only rank 0 speaks.
        show_bar: a moving bar in place of the lines during training.

    Raises:
        ValueError: hardware, data or checkpoint that do not fit; nothing has been written.
        RunFailed: from whatever stopped the training, after its record is written.
    """
    started = {
        "command": command,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "code": describe_code(),  # before anybody edits it under a long run
    }
    device = find_device(config.parallel)
    config = replace(config, parallel=config.parallel.resolved(device))
    set_up_process(config.parallel, device)
    is_first = process_rank(config.parallel) == 0
    say = (say or _say_at_once) if is_first else _say_nothing

    checkpoint, history = _find_history(config, places.checkpoints, resume=resume)
    source = load_source(config, show_progress=is_first)
    if checkpoint is not None and history.sha256 != source.sha256:
        raise ValueError(
            f"data {config.data.source} is not what {checkpoint} was trained on: its sha256 is "
            f"{source.sha256} now and was {history.sha256}; start without --resume"
        )
    history.sha256 = source.sha256
    module, data = TrainingModule(config), DataModule(config, source)
    module.first_step = data.start_step = len(history.loss)
    module.validation = list(history.validation)
    clock = measure.StepClock(on_gpu=device == "cuda")
    lines = LogLines(config, clock, _say_nothing if show_bar else say)
    saver = SaveCheckpoints(
        places.checkpoints,
        every=config.checkpoint_every,
        extra=lambda: {
            "config": to_dict(config),
            **asdict(history_now(history, module, clock, is_whole=True)),
        },
    )
    bar = [Bar(config, lines)] if show_bar and is_first else []
    trainer = build_trainer(
        config,
        device=device,
        run_dir=places.folder,
        callbacks=[measure.ClockStops(clock), lines, saver, *bar, measure.ClockStarts(clock)],
        launch=len(history.launches),
    )
    say(f"data    {source.description}")
    say(f"model   {config.recipe} {config.size}, {count_parameters(config.model):,} parameters")
    if checkpoint is not None:
        schedule = config.optimizer.schedule_steps
        say(f"resume  {checkpoint}, after step {len(history.loss)}; cosine to step {schedule}")

    error: BaseException | None = None
    try:
        _fit(trainer, module, data, checkpoint)
    except BaseException as caught:
        error = caught
    if is_first or error is None:
        now = history_now(history, module, clock, is_whole=error is None)
        error = find_divergence(now) or error
        record = build_record(config, module, data, now, lines.lines, error)
        record |= started
    if is_first:
        try:
            write_record(record, places.record)
        except OSError as full:
            told = f"{error}; " if error else ""
            raise RunFailed(f"{told}the record could not be written: {full}") from (error or full)
    if isinstance(error, Exception):
        raise RunFailed(str(error)) from error
    if error is not None:
        raise error
    return Outcome(
        record=record if is_first else None,
        network=module.whole_network().eval(),
        config=config,
        data=data,
    )


def _say_at_once(line: str) -> None:
    """Print without waiting for a full buffer: a pipe or a batch log shows a run as it goes."""
    print(line, flush=True)


def _say_nothing(_: str) -> None:
    """What ranks beside the first say."""


def _find_history(config: RunConfig, folder: Path, *, resume: bool) -> tuple[Path | None, History]:
    if not resume:
        if list_checkpoints(folder) and process_rank(config.parallel) == 0:
            raise ValueError(
                f"checkpoint-dir {folder} holds {newest_checkpoint(folder)}; "
                "add --resume to go on from it, or choose another folder"
            )
        return None, History()
    path = newest_checkpoint(folder)
    if path is None:
        raise ValueError(
            f"checkpoint-dir {folder} holds no checkpoint to resume; run without --resume first"
        )
    saved = dict(load_checkpoint(path)[KEY])
    check_same_run(saved, config, path)
    saved.pop("config")
    return path, History(**saved)


def _fit(
    trainer: pl.Trainer, module: TrainingModule, data: DataModule, checkpoint: Path | None
) -> None:
    trainer.fit(
        module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True
    )
    last = module.validation[-1]["step"] if module.validation else 0
    if last != module.config.max_steps:
        trainer.validate(module, datamodule=data, verbose=False)
