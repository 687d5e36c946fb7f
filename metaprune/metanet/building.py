"""Builds a zoo: random networks are trained, some also kept from early on or pruned, and all of them measured.

A member depends on the seed and its number only, and appears in the zoo by the renaming of a finished folder. So a
build that dies at any moment loses what is under way, the members and trainings that are not finished; a second one
goes on, and several processes make what one does, to the bit on machines that compute alike.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metaprune.graphs.errors import LoadError, MetapruneError, OptionError
from metaprune.graphs.files import write_atomically
from metaprune.metanet.architectures import FAMILIES
from metaprune.metanet.making import EARLY, PART, PRUNED, TRAINED, Facts, Line, Maker, is_whole, read_facts
from metaprune.metanet.processes import spread
from metaprune.metanet.sources import names_of, source
from metaprune.metanet.zoo import MANIFEST, MEMBERS, SCHEMA, Zoo, is_name, read_manifest
from metaprune.training import Progress

_EVERY = 6  # of so many architectures one also gives an early member, and another a pruned one
_COMPANIONS = {1: EARLY, 4: PRUNED}


def lines(networks: int, data: str, seed: int) -> list[Line]:
    """The architectures of a zoo of so many members; those of a smaller zoo are the first of them.

    Families take turns, in an order that is drawn anew for each round.
    """
    found: list[Line] = []
    while networks > 0:
        number = len(found)
        turn, place = divmod(number, len(FAMILIES))
        order = random.Random(f"{seed}:{turn}").sample(sorted(FAMILIES), len(FAMILIES))
        own = random.Random(f"{seed}:{turn}:{place}")
        companions = (_COMPANIONS[number % _EVERY],) if number % _EVERY in _COMPANIONS else ()
        kinds: tuple[str, ...] = (TRAINED, *companions)[:networks]
        found.append(Line(number, order[place], own.choice(names_of(data)), own.getrandbits(31), kinds))
        networks -= len(kinds)
    return found


def build(
    out: str | Path,
    networks: int = 120,
    data: str = "fashion-mnist",
    seed: int = 0,
    processes: int = 1,
    directory: str | Path | None = None,
    plans: int = 40,
    epochs: int | None = None,
    progress: Progress | None = None,
) -> Zoo:
    """Builds a zoo, or goes on with one.

    Members that are there and whole stay; broken ones are made again. One that can not be made, because its training
    diverges for instance, is left out with its reason in the manifest.

    Args:
        out: Folder of the zoo.
        networks: Members. A zoo can be built larger later on, with the same seed.
        data: `"fashion-mnist"` (14 x 14 pixels), `"digits"` (8 x 8) or `"both"`.
        seed: Of every random choice.
        processes: Of one thread each. With more than one, a program that calls this needs the guard
            `if __name__ == "__main__"`, as for all of Python's spawned processes.
        directory: Folder of Fashion-MNIST's files where it is not that of the Debian package.
        plans: Random allocations that are measured for each member, see `metaprune.metanet.labels.measure`.
        epochs: Passes over the training data; None for what suits each data set.
        progress: Called after each architecture with the members that are done and their number.

    Returns:
        The zoo.

    Raises:
        OptionError: An option has no meaning, the folder holds a zoo of other settings or is in use, or the data are
            not there.
        MetapruneError: The folder can not be written, a process died, or no member could be made.
    """
    for option, value, least in (("networks", networks, 1), ("processes", processes, 1), ("plans", plans, 0)):
        if type(value) is not int or value < least:
            raise OptionError(f"{option}: a whole number of at least {least} is needed, not {value!r}")
    if epochs is not None and (type(epochs) is not int or epochs < 1):
        raise OptionError(f"epochs: at least one pass is needed, not {epochs!r}")
    if type(seed) is not int:
        raise OptionError(f"seed: must be a whole number, not {seed!r}")
    folder, where = Path(out), None if directory is None else str(directory)
    settings = {"data": data, "seed": seed, "plans": plans, "epochs": epochs}
    for name in names_of(data):
        source(name, where)  # what is missing is missed before any work is done
    with _writing(folder), _locked(folder):
        _begin(folder, settings)
        every = lines(networks, data, seed)
        failed: dict[str, str] = {}
        left = [line for line in every if not all(is_whole(folder / MEMBERS / name) for name in line.names)]
        total = sum(len(line.kinds) for line in every)
        done = total - sum(len(line.kinds) for line in left)
        maker = Maker(folder, where, plans, epochs)
        for line, reasons in spread(maker, left, processes):
            failed |= reasons
            done += len(line.kinds)
            _write_manifest(folder, settings, failed)
            if progress is not None:
                progress(done, total)
        _write_manifest(folder, settings, failed)
    return Zoo.open(folder, directory)


def _begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder ready; raises `OptionError` where it holds a zoo of other settings."""
    if (folder / MANIFEST).exists():
        before = read_manifest(folder)["settings"]
        for name in settings:
            if before.get(name) != settings[name]:
                raise OptionError(f"out: {folder} holds a zoo with another {name}, {before.get(name)!r}")
    else:
        _write_manifest(folder, settings, {})
    for part in (folder / MEMBERS).glob(f"{PART}*"):
        shutil.rmtree(part)


def _write_manifest(folder: Path, settings: Mapping[str, Any], failed: Mapping[str, str]) -> None:
    """Writes the manifest anew, from the members' folders."""
    members: dict[str, Facts] = {}
    for path in sorted((folder / MEMBERS).glob("*")):
        if is_name(path.name):
            with contextlib.suppress(LoadError):  # such a member is made again
                members[path.name] = read_facts(path)
    for facts in members.values():
        del facts["seconds"]  # all else is the same whenever the zoo is built
    content = {"schema": SCHEMA, "settings": dict(settings), "failed": dict(sorted(failed.items())), "members": members}
    write_atomically(folder / MANIFEST, json.dumps(content, indent=1).encode())


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns failures to write into errors that name the option."""
    try:
        yield
    except OSError as error:
        raise MetapruneError(f"out: {folder} can not be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other builds out of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(f"out: {folder} is in use by another build") from None
        yield
