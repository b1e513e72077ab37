"""How an entrypoint starts and how it fails: a user's mistake is one line, a defect is a traceback."""

import contextlib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from drs.config import unknown_key
from drs.errors import Interrupted, UserError
from drs.interrupts import interrupt_on_termination
from drs.sweeper import register_plugins


def run_entrypoint(main: Callable[[], object]) -> None:
    """Run a ``hydra.main`` function.

    A ``UserError`` or a config that Hydra refuses ends in ``error: <one line>`` and exit status 2, or 1 where jobs of
    a sweep failed; SIGINT in 130 and SIGTERM in 143, without a traceback. Anything else is a defect and keeps its own.
    """
    let_threads_doze()
    forget_empty_folders()
    # With this set Hydra raises what went wrong, rather than printing it over several lines and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_plugins()
    with _mistakes_as_lines("interrupted"):
        main()


def run_script(main: Callable[[], int | None], *, interrupted: str = "interrupted") -> NoReturn:
    """Run a script that has no Hydra config, and exit with the status that it returns.

    It fails as ``run_entrypoint`` says; ``interrupted`` is what is printed where it is asked to end.
    """
    forget_empty_folders()
    with _mistakes_as_lines(interrupted):
        sys.exit(main() or 0)


def forget_empty_folders() -> None:
    """Take a variable for a folder that is set to nothing for one that is not set; nothing is the project's folder."""
    for name in ("DRS_RESULTS", "DRS_CACHE", "DRS_DATA"):
        if os.environ.get(name) == "":
            del os.environ[name]


@contextlib.contextmanager
def _mistakes_as_lines(interrupted: str) -> Iterator[None]:
    """End the program with a line on stderr for a user's mistake, a config that Hydra refuses, SIGINT and SIGTERM."""
    interrupt_on_termination()
    try:
        yield
    except UserError as error:
        fail(str(error), error.exit_status)
    except (HydraException, OmegaConfBaseException) as error:
        fail(_one_line(error))
    except KeyboardInterrupt as interrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT))


def let_threads_doze() -> bool:
    """Have OpenMP's threads fall asleep soon where they wait for work; return whether anything was changed.

    Threads that spin for long stall a training several times over as soon as another program wants a core; threads
    that sleep at once make a training of a small network a third longer on an idle machine. GNU's library, which
    torch has on Linux, takes a number of turns: 3000 cost an idle machine a tenth, and a busy one less than a fifth,
    beside the better setting for each (results/bench has the measurements). Others only know to sleep. It is read
    when torch is first imported, and is left alone where the user has chosen.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return False
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}
    return True


def report_mistakes(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """Decorate a Hydra task: outside a sweep a ``UserError`` ends the program at once.

    Inside a sweep it goes to the sweeper, which lets the other jobs run first.
    """

    @functools.wraps(task)
    def wrapped(config: DictConfig) -> object:
        try:
            return task(config)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            fail(str(error), error.exit_status)

    return wrapped


def fail(message: str, status: int = 2) -> NoReturn:
    """Print ``error: <message>`` on one line and exit with ``status``."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


_OPEN = ("suite.n_samples", "suite.n_decisive", "suite.epsilons", "suite.decisive_epsilons")


def _one_line(error: BaseException) -> str:
    """Join what Hydra says of a bad override with the OmegaConf error behind it, without its advice on internals.

    Of a key that does not exist it says what Hydra does not: which do.
    """
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        key = str(cause.full_key)
        beside = key.rpartition(".")[0]
        names = [str(name) for name in cause.parent_node if name != "hydra"]
        known = [f"{beside}.{name}" if beside else name for name in names]
        if known:
            # What holds a number for each data set or attack takes new ones, with Hydra's sign for that.
            return unknown_key(key, known) + (f"; to add it, write +{key}=VALUE" if beside in _OPEN else "")
    if found := re.match(r"Could not override '([^']+)'\. No match in the defaults list", str(error)):
        return f"unknown key '{found[1]}'; the script has no such group of configs, see its --help"
    lines = str(error).splitlines()
    if error.__cause__ is not None:
        lines += str(error.__cause__).splitlines()
    noise = ("full_key:", "object_type=", "reference_type=", "Config search path", "provider=", "Set hydra.verbose")
    kept = [line.strip() for line in lines if line.strip() and not line.strip().startswith(noise)]
    return "; ".join(dict.fromkeys(kept))
