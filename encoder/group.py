"""A rank group as one command: torchrun's agent over `encoder.rank`, and the group's hub.

    this process ── agent: starts tp × pp processes, and all of them again when one ends
                 ├─ fork server: has imported everything, so that starting again takes no seconds of it
                 └─ hub thread: hears their beats, ends who hangs (encoder/link.py)

One machine a group; more groups, here or elsewhere, are replicas, and need nothing of each other. A group
serves the weights that it found when it was started: where the files have changed when its processes are
started again, it ends, so that a crash never changes what vectors mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import tempfile
import uuid
from multiprocessing import forkserver
from pathlib import Path

from encoder.families import check_layout
from encoder.link import LINK_VARIABLE, PARENT_VARIABLE, Hub
from encoder.model import INSTALL_HINT, ModelFolder, find_model, quiet_and_offline
from shoal.errors import NotSupported, SettingsError, StartupError
from shoal.settings import EncoderProcess
from shoal.telemetry import logger

__all__ = ["run_group"]

RESTARTS_MAX = 1_000  # then whoever supervises this process decides

_log = logger("encoder")


def run_group(settings: EncoderProcess) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartupError when it cannot start."""
    quiet_and_offline()
    name, _, path = find_model(settings.model)
    folder = ModelFolder.read(path)
    try:
        if settings.tp * settings.pp > 1:
            check_layout(folder.config, tp=settings.tp, pp=settings.pp)
    except NotSupported as error:
        raise SettingsError(error.message) from error
    try:
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from encoder.rank import FINGERPRINT_VARIABLE, SETTINGS_VARIABLE, run_rank
    except ImportError as error:
        raise StartupError(f"The package {error.name!r} is missing; {INSTALL_HINT}") from error
    # A process that ends is told by the hub, in our words; the agent would add its own traceback.
    for name_of_logger in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name_of_logger.startswith("torch.distributed.elastic"):
            logging.getLogger(name_of_logger).setLevel(logging.CRITICAL)
    logging.getLogger("torch.multiprocessing").setLevel(logging.ERROR)
    size = settings.tp * settings.pp
    _log.info("rank_group_starts", model=name, tp=settings.tp, pp=settings.pp)
    try:
        fingerprint = folder.fingerprint()
    except OSError as error:
        raise SettingsError(f"The model in {folder.path} cannot be read: {error}.") from error
    with tempfile.TemporaryDirectory(prefix="shoal-encoder-") as scratch:
        hub = Hub(Path(scratch), size=size)
        os.environ |= {
            LINK_VARIABLE: str(hub.path),
            PARENT_VARIABLE: str(os.getpid()),
            SETTINGS_VARIABLE: settings_json(settings),
            FINGERPRINT_VARIABLE: fingerprint,
            "OMP_NUM_THREADS": str(settings.threads),
        }
        _start_fork_server(folder)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=RESTARTS_MAX,
            monitor_interval=0.1,
            start_method="forkserver",
            shutdown_timeout=int(settings.shutdown_grace_s) + 5,
        )
        try:
            elastic_launch(config, run_rank)()
        except SignalException:
            pass  # the agent has ended the processes in order
        except ChildFailedError as error:
            raise StartupError(
                f"The rank group of {name} broke {RESTARTS_MAX} times; its log says why."
            ) from error
        finally:
            hub.close()
            _end_fork_server()
    if hub.fatal is not None:
        raise StartupError(hub.fatal)


def _start_fork_server(folder: ModelFolder) -> None:
    """The interpreter's own: it has no threads and no connections when it forks. Ctrl-C at a terminal
    goes to every process; this one leaves it to us."""
    forkserver.set_forkserver_preload(["encoder.fork_server", "encoder.rank", *_modules_of(folder)])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it will have it
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _end_fork_server() -> None:
    """Python waits for it at the end, and it may just have begun to import."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _modules_of(folder: ModelFolder) -> list[str]:
    """The code of the model's family, which transformers imports when it is first needed."""
    name = str(folder.config.get("model_type")).replace("-", "_")
    return [f"transformers.models.{name}.modeling_{name}"]


def settings_json(settings: EncoderProcess) -> str:
    """All of them, secrets too: for the environment of our own processes."""
    plain = settings.model_dump(mode="json")
    for name in settings.__class__.model_fields:
        value = getattr(settings, name)
        if hasattr(value, "get_secret_value"):
            plain[name] = value.get_secret_value()

    return json.dumps(plain)
