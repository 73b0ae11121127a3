"""The ledger: which columns or rows of a base model belong to concept files, running trainings and reservations."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.adapters.file import Spec
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import read_bytes, write_file
from sbora_diffusion.utils.text import parse_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """An interval reserved for a running process, until it ends, or for a name, permanently."""

    name: str
    base_id: str
    base_fingerprint: str
    side: Side
    seed: int
    interval: Interval
    host: str
    pid: int | None  # for messages; None: made by hand, lasts until its concept file exists or it is released
    started: float  # when it was made, seconds since the epoch: tells two reservations of one name apart


@dataclass
class State:
    """The content of `.ledger.json`."""

    reservations: list[Reservation]
    widths: dict[str, dict[str, int]]  # "<base fingerprint>/<side>" -> layer -> columns or rows

    @classmethod
    def read(cls, path: Path) -> "State":
        """Read a ledger; an empty one if there is no file.

        Raises:
            SboraError: the file cannot be read, or has fields that this version does not know.
        """
        try:
            content = parse_json(read_bytes(path))
            read = [Reservation(**{**r, "interval": Interval.parse(r["interval"])}) for r in content["reservations"]]
            widths = {key: {name: int(width) for name, width in w.items()} for key, w in content["widths"].items()}
            return cls(read, widths)
        except FileNotFoundError:
            return cls([], {})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, SboraError) as error:
            raise SboraError(
                f"cannot read {path} ({error or type(error).__name__}): which columns are reserved is unknown",
                "wait for running trainings to end, then move that file away",
            ) from None

    def write(self, path: Path) -> None:
        reservations = [{**vars(each), "interval": str(each.interval)} for each in self.reservations]
        content = json.dumps({"reservations": reservations, "widths": self.widths}, indent=1)
        write_file(path, content.encode(), overwrite=True)

    def find(self, name: str, lasting: bool) -> Reservation | None:
        """Return the reservation of a name, by hand (lasting) or of a training."""
        return next((r for r in self.reservations if r.name == name and (r.pid is None) == lasting), None)

    def drop(self, name: str, lasting: bool) -> None:
        """Remove a name's reservation by hand (lasting), or of a training."""
        self.reservations = [r for r in self.reservations if r.name != name or (r.pid is None) != lasting]


@dataclass(frozen=True)
class Owner:
    """The owner of an interval: a concept file, a running training, or a name that it is reserved for."""

    name: str
    interval: Interval
    state: Literal["trained", "in training", "reserved"] = "trained"
    seed: int = 0  # of the permutations that positions refer to
    parents: tuple[str, ...] = ()  # the concepts that it was merged from


@dataclass(frozen=True, kw_only=True)
class Space:
    """The adapted layers that concepts of one base model, side and seed share."""

    base_id: str
    base_fingerprint: str
    side: Side
    seed: int
    widths: Mapping[str, int]  # "<component>.<layer>" -> columns (FA) or rows (FB)

    @property
    def key(self) -> str:
        return f"{self.base_fingerprint}/{self.side}"

    def reserve(self, name: str, interval: Interval, lasting: bool) -> Reservation:
        """Return a reservation for this process, or a lasting one for the name."""
        return Reservation(
            **{key: value for key, value in vars(self).items() if key != "widths"},
            name=name,
            interval=interval,
            host=socket.gethostname(),
            pid=None if lasting else os.getpid(),
            started=time.time(),
        )

    def check_seed(self, others: Sequence[Owner]) -> None:
        """Raise SboraError if other owners' positions refer to another seed's permutations."""
        for owner in others:
            if owner.seed != self.seed:
                raise SboraError(
                    f"{owner.name} uses basis_seed {owner.seed}, got {self.seed}: "
                    "intervals of different basis seeds may share columns",
                    hint=f"Set basis_seed={owner.seed}, or use another folder.",
                )


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The positions of one base model and side; every layer has at least `width` of them, None if unknown."""

    base_id: str
    base_fingerprint: str
    side: Side
    width: int | None
    owners: tuple[Owner, ...]  # by position
    unplaced: tuple[str, ...] = ()  # imported concepts without an interval

    @property
    def first_owners(self) -> tuple[Owner, ...]:
        """The owners, without merges whose intervals all belong to concepts that are in the library themselves."""
        own = {(owner.name, owner.interval) for owner in self.owners}
        return tuple(o for o in self.owners if not any((parent, o.interval) in own for parent in o.parents))

    @property
    def only_merged(self) -> tuple[str, ...]:
        """Names of the merges that `first_owners` leaves out."""
        first = {owner.name for owner in self.first_owners}
        return tuple(dict.fromkeys(owner.name for owner in self.owners if owner.name not in first))

    @property
    def gaps(self) -> tuple[Interval, ...]:
        """Free intervals; empty if the width is unknown."""
        if self.width is None:
            return ()
        gaps, start = [], 0
        inside = [owner.interval for owner in self.owners if owner.interval.start < self.width]
        for taken in sorted([*inside, Interval(self.width, 1)]):
            if start < taken.start:
                gaps.append(Interval(start, taken.start - start))
            start = max(start, taken.stop)
        return tuple(gaps)

    def room(self, rank: int) -> int:
        """Return how many more concepts of one rank fit."""
        return sum(gap.rank // rank for gap in self.gaps)


def owners_of(state: State, specs: Mapping[str, Spec], base_fingerprint: str, side: Side) -> tuple[Owner, ...]:
    """List owners by position. Merges own the intervals of their parents, which stay occupied while they exist."""
    here = [r for r in state.reservations if (r.base_fingerprint, r.side) == (base_fingerprint, side)]
    owners = [
        Owner(name, interval, "trained", spec.seed, spec.parents)
        for name, spec in specs.items()
        if (spec.base_fingerprint, spec.side) == (base_fingerprint, side)
        for interval in spec.intervals
    ]
    owners += [Owner(r.name, r.interval, "in training", r.seed) for r in here if r.pid is not None]
    taken = {(owner.name, owner.interval) for owner in owners}
    owners += [
        Owner(r.name, r.interval, "reserved", r.seed)
        for r in here
        if r.pid is None and not is_fulfilled(r, specs) and (r.name, r.interval) not in taken
    ]
    return tuple(sorted(owners, key=lambda owner: (owner.interval, owner.name)))


def is_fulfilled(reservation: Reservation, specs: Mapping[str, Spec]) -> bool:
    """Return whether the reservation's concept file exists."""
    spec = specs.get(reservation.name)
    place = (reservation.base_fingerprint, reservation.side)
    return spec is not None and (spec.base_fingerprint, spec.side) == place


def check_pinned(pinned: Interval, others: Sequence[Owner], rank: int, width: int) -> Interval:
    """Return the pinned interval; raise SboraError if its size is wrong, it does not fit or is taken."""
    if pinned.rank != rank:
        raise SboraError(f"the interval {pinned} has {pinned.rank} positions, rank {rank} needs {rank}")
    if pinned.stop > width:
        raise SboraError(f"the interval {pinned} does not fit: the narrowest adapted layer has the positions 0:{width}")
    taken = [f"{owner.interval} by {owner.name}" for owner in others if owner.interval.overlaps(pinned)]
    if taken:
        raise SboraError(f"the interval {pinned} is taken ({', '.join(taken)})", hint="See: sbora-diffusion ledger")
    return pinned
