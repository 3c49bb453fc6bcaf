"""A start of a run before anything is computed: what is asked for, what it meets and resumes."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from l1_jax.checkpoint.resuming import Resumed, find_resumed
from l1_jax.checkpoint.run_directory import RunDirectory
from l1_jax.config.resolve import Facts
from l1_jax.config.schema import Config
from l1_jax.data.store import FOR_TRAINING, Prepared
from l1_jax.devices.compiled import keep_compiled
from l1_jax.devices.processes import together
from l1_jax.devices.select import keep_freed_memory, make_deterministic, select_devices
from l1_jax.errors import UserError
from l1_jax.parallel.mesh import create_mesh
from l1_jax.run.tracking import check_wandb
from l1_jax.storage.remote import is_url

# What decides `training.batch_size: auto`: from a config, what it meets, the mesh and the bytes
# that may be used of a device, to a config with a number.
BatchSizeChooser = Callable[[Config, Facts, Mesh, int], Config]


class Request(NamedTuple):
    """What a caller of `train` asks for; its words are explained there."""

    config: Config
    resume: bool = False
    resume_from: str | None = None
    overwrite: bool = False
    allow_change: Collection[str] = ()
    choose_batch_size: BatchSizeChooser | None = None


class Start(NamedTuple):
    """A start of a run, as far as it is known before anything is written."""

    request: Request
    prepared: Prepared
    mesh: Mesh
    home: RunDirectory
    resumed: Resumed = Resumed()


def check_request(request: Request) -> None:
    """Checks that the words of a call go together.

    Raises:
        UserError: they do not, or one is of another type.
    """
    if not isinstance(request.config, Config):
        what = f"the config is {request.config!r}"
        raise UserError(what, "Give what l1_jax.load_config returns")

    if not isinstance(request.resume, bool):
        raise UserError(f"`resume` is {request.resume!r}", "Give a path as `resume_from`")

    if request.resume_from == "":
        raise UserError("`resume_from` is empty", "Give a checkpoint or a run, or leave it out")

    if request.resume and request.overwrite:
        raise UserError("`resume` and `overwrite` contradict each other", "Give one of them")


def look_around(request: Request) -> Start:
    """Refuses what can be refused before the model is built, and finds what is resumed.

    Writes nothing but the names that a kill took from checkpoints.

    Raises:
        UserError: the directory, the data or the devices do not allow the run.
        BusyError: another run is under way in the directory.
    """
    config = request.config
    training = config.training

    with together():
        if training.deterministic:
            make_deterministic()

        home = RunDirectory(training.output_dir)
        home.check_files(resume=request.resume)

        if not request.resume:
            home.check_free(overwrite=request.overwrite)

        check_wandb(training)
        prepared = Prepared.open(config.data.path)
        mesh = open_mesh(config)
        check_data(prepared, config.data.path)

        if home.mirror and jax.process_count() > 1 and training.on_spike == "rewind":
            what = "training.on_spike is rewind, which several processes cannot do"
            remedy = "Set it to skip, or training.output_dir to a directory that all share"
            raise UserError(f"{what} with a run in object storage", remedy)

        home.look()

    resumed = Resumed()
    if request.resume:
        home.recover()
        resumed = find_resumed(home, request.resume_from)

    return Start(request, prepared, mesh, home, resumed)


def open_mesh(config: Config) -> Mesh:
    """The mesh of a run, on devices that are set up for it."""
    if config.training.device in ("auto", "cpu"):
        keep_freed_memory()

    devices = select_devices(config.training.device)
    mesh = create_mesh(config.parallelism, devices)
    keep_compiled(devices)
    return mesh


def check_data(prepared: Prepared, path: str) -> None:
    """Checks by their hashes that the prepared data are what they were.

    On a common disk each process hashes a share; from object storage each has a copy of its own.

    Raises:
        UserError: they are not.
    """
    share = (jax.process_index(), jax.process_count())
    if is_url(path):
        share = (0, 1)

    prepared.check(FOR_TRAINING, share)
