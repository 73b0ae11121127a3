"""A folder of concept files and its ledger: who owns which columns of which base model."""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from filelock import FileLock, Timeout

from sbora_diffusion.adapter.basis import Interval, Side, first_free
from sbora_diffusion.adapter.file import Adapter, Spec, read_spec
from sbora_diffusion.errors import SboraError

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LOCK_TIMEOUT = 60  # seconds; the lock is held for milliseconds


@dataclass(frozen=True)
class Owner:
    """Who holds an interval: a concept file, a training that will write one, or a name it was reserved for."""

    name: str
    interval: Interval
    state: Literal["trained", "in training", "reserved"] = "trained"
    seed: int = 0  # of the permutations that give the positions their meaning


@dataclass(frozen=True, kw_only=True)
class Space:
    """What concepts share: the adapted layers of one base model and side, in the order of one seed's permutations."""

    base_id: str
    base_fingerprint: str
    side: Side
    seed: int
    widths: Mapping[str, int]  # "<component>.<layer>" -> columns (FA) or rows (FB)

    @property
    def key(self) -> str:
        return f"{self.base_fingerprint}/{self.side}"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The positions of one base model and side. Every layer has at least `width` of them, where that is known."""

    base_id: str
    base_fingerprint: str
    side: Side
    width: int | None
    owners: tuple[Owner, ...]  # by position
    unplaced: tuple[str, ...] = ()  # concepts without an interval: imported, they write columns of their own choice

    @property
    def gaps(self) -> tuple[Interval, ...]:
        """What nobody owns; empty if the width is not known."""
        gaps, start = [], 0
        end = Interval(self.width, 1) if self.width else Interval(0, 1)
        for taken in sorted([*(owner.interval for owner in self.owners), end]):
            if start < taken.start:
                gaps.append(Interval(start, taken.start - start))
            start = max(start, taken.stop)
        return tuple(gaps)

    def room(self, rank: int) -> int:
        """How many more concepts of one rank fit."""
        return sum(gap.rank // rank for gap in self.gaps)


@dataclass(frozen=True, kw_only=True)
class _Reservation:
    """An interval promised to a running process, which ends when the process does, or to a name, for good."""

    name: str
    base_id: str
    base_fingerprint: str
    side: Side
    seed: int
    interval: Interval
    host: str
    pid: int | None  # None: made by hand, it lasts until its concept's file is there or it is removed
    started: float  # when the process did, in seconds since the epoch: its number may be given out again

    def is_live(self) -> bool:
        if self.pid is None:
            return True
        if self.host != socket.gethostname():
            return True  # cannot be known from here; `release` ends it
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 5
        except psutil.NoSuchProcess:
            return False


class Library:
    """A folder of concept files, "<name>.safetensors" each. They are the truth; what lies beside them is:

    `.ledger.json`: reservations, of running trainings and by hand, and the layers' widths of the base models met here;
    `.ledger.lock`: held while intervals are handed out.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str) -> Path:
        """Where the concept of this name lies, or would."""
        if not name or name.startswith(".") or not name.isprintable() or set(name) & set("/\\"):
            raise SboraError(f"got the name {name!r}, expected one without slashes and leading dots")
        return self.folder / f"{name}{SUFFIX}"

    def names(self) -> list[str]:
        """What lies in the folder, sound or not, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))

    def locate(self, name_or_path: str) -> Path:
        """The file that a user means: a path that exists, or a name in this folder."""
        if Path(name_or_path).is_file():
            return Path(name_or_path)
        if name_or_path in self.names():
            return self.path(name_or_path)
        known = ", ".join(self.names()) or "none"
        raise SboraError(f"no adapter {name_or_path!r}, neither a file nor in {self.folder} (there: {known})")

    def load(self, name: str) -> Adapter:
        """Read the concept of this name."""
        return Adapter.load(self.locate(name))

    def reserve(
        self, space: Space, rank: int, name: str, pinned: Interval | None = None, *, lasting: bool = False
    ) -> Interval:
        """Promise an interval to this process, until it writes the concept's file, releases the name, or ends.

        What the name itself owned counts as free: the new file takes its place. An interval that was reserved for the
        name by hand is the one it gets.

        Args:
            pinned: this interval or none, instead of the first that is free.
            lasting: promise it to the name instead: until its file is there, whoever writes it, or it is removed.

        Raises:
            SboraError: another process is training this name, nothing is free, the pinned interval is taken or does
                not fit, others' positions mean other columns, `lasting` for a name that has an interval.
        """
        with self._changing_state() as state:
            state.widths[space.key] = dict(space.widths)
            _check_not_in_training(state, name)
            state.reservations = [r for r in state.reservations if r.name != name or r.pid is None]
            owners = _owners(state, self._specs(), space.base_fingerprint, space.side)
            own, others = _partition(owners, name)
            _check_seed(space, others)
            if lasting and own:
                raise SboraError(f"{name} has the interval {own[0].interval} already ({own[0].state})")
            reserved = next((owner.interval for owner in own if owner.state == "reserved"), None)
            pinned, width = pinned or reserved, min(space.widths.values())
            if pinned is None:
                interval = first_free([owner.interval for owner in others], rank, width)
            else:
                interval = _check_pinned(pinned, others, rank, width)
            state.reservations.append(_reservation(space, name, interval, lasting))
        return interval

    def release(self, name: str) -> None:
        """End the process's reservation of this name, if there is one, and one by hand if its file is there now."""
        with self._changing_state() as state:
            specs = self._specs()
            state.reservations = [
                r for r in state.reservations if r.name != name or (r.pid is None and not _is_fulfilled(r, specs))
            ]

    def remove(self, name: str) -> None:
        """Delete a concept's file, which frees its columns, and end all reservations of its name."""
        path = self.path(name)
        if not path.exists() and all(reservation.name != name for reservation in self._state().reservations):
            raise SboraError(
                f"nothing of the name {name!r} in {self.folder} (there: {', '.join(self.names()) or 'none'})"
            )
        path.unlink(missing_ok=True)
        with self._changing_state() as state:
            state.reservations = [r for r in state.reservations if r.name != name]

    def owners(self, base_fingerprint: str, side: Side) -> tuple[Owner, ...]:
        """Who owns what of one base model and side, by position."""
        return _owners(self._state(), self._specs(), base_fingerprint, side)

    def ledgers(self) -> list[Ledger]:
        """All bases and sides that have an owner."""
        state, specs = self._state(), self._specs()
        claims: set[tuple[str, str, Side]] = {(s.base_id, s.base_fingerprint, s.side) for s in specs.values()}
        claims |= {(r.base_id, r.base_fingerprint, r.side) for r in state.reservations}
        return [
            Ledger(
                base_id=base_id,
                base_fingerprint=fingerprint,
                side=side,
                width=state.width(fingerprint, side),
                owners=_owners(state, specs, fingerprint, side),
                unplaced=tuple(
                    name
                    for name, spec in specs.items()
                    if (spec.base_fingerprint, spec.side, spec.intervals) == (fingerprint, side, ())
                ),
            )
            for base_id, fingerprint, side in sorted(claims)
        ]

    def widths(self, base_fingerprint: str, side: Side) -> dict[str, int] | None:
        """Columns (FA) or rows (FB) of every adapted layer, if a training or reservation here has met the base."""
        return self._state().widths.get(f"{base_fingerprint}/{side}")

    def _specs(self) -> dict[str, Spec]:
        """What every sound file says of itself, by file name."""
        specs = {}
        for name in self.names():
            try:
                specs[name] = read_spec(self.path(name))
            except SboraError as defect:
                log.warning("%s; left out, its columns count as free", defect)
        return specs

    def _state(self) -> "_State":
        """Reservations that are alive. To be read before the files: a training writes its file, then it releases."""
        state = _State.read(self.folder / ".ledger.json")
        state.reservations = [reservation for reservation in state.reservations if reservation.is_live()]
        return state

    @contextmanager
    def _changing_state(self) -> Iterator["_State"]:
        """The same under the lock; written back when the block succeeds."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".ledger.lock", timeout=LOCK_TIMEOUT):
                state = self._state()
                yield state
                state.write(self.folder / ".ledger.json")
        except Timeout:
            raise SboraError(f"somebody has held {self.folder}/.ledger.lock for {LOCK_TIMEOUT} s") from None
        except OSError as error:
            raise SboraError(f"cannot use the folder {self.folder} ({error.strerror or error})") from None


@dataclass
class _State:
    """What `.ledger.json` holds."""

    reservations: list[_Reservation]
    widths: dict[str, dict[str, int]]  # "<base fingerprint>/<side>" -> layer -> columns or rows

    def width(self, base_fingerprint: str, side: Side) -> int | None:
        """Of the narrowest adapted layer."""
        return min(self.widths.get(f"{base_fingerprint}/{side}", {}).values(), default=None)

    @classmethod
    def read(cls, path: Path) -> "_State":
        try:
            content = json.loads(path.read_bytes())
            reservations = [
                _Reservation(**{**fields, "interval": Interval.parse(fields["interval"])})
                for fields in content["reservations"]
            ]
            widths = {key: {name: int(width) for name, width in w.items()} for key, w in content["widths"].items()}
            return cls(reservations, widths)
        except FileNotFoundError:
            return cls([], {})
        except (ValueError, TypeError, KeyError, AttributeError, SboraError) as error:
            log.warning("%s is damaged (%s) and starts anew; running trainings are not known", path, error)
            return cls([], {})

    def write(self, path: Path) -> None:
        reservations = [
            {**vars(reservation), "interval": str(reservation.interval)} for reservation in self.reservations
        ]
        temporary = path.with_suffix(".tmp")  # one writer at a time: the lock is held
        temporary.write_text(json.dumps({"reservations": reservations, "widths": self.widths}, indent=1))
        temporary.replace(path)


def _owners(state: _State, specs: Mapping[str, Spec], base_fingerprint: str, side: Side) -> tuple[Owner, ...]:
    """By position. Merges own what they were merged from, so that nothing new is put there while they exist."""
    here = [r for r in state.reservations if (r.base_fingerprint, r.side) == (base_fingerprint, side)]
    owners = [
        Owner(name, interval, "trained", spec.seed)
        for name, spec in specs.items()
        if (spec.base_fingerprint, spec.side) == (base_fingerprint, side)
        for interval in spec.intervals
    ]
    owners += [Owner(r.name, r.interval, "in training", r.seed) for r in here if r.pid is not None]
    taken = {(owner.name, owner.interval) for owner in owners}
    owners += [
        Owner(r.name, r.interval, "reserved", r.seed)
        for r in here
        if r.pid is None and not _is_fulfilled(r, specs) and (r.name, r.interval) not in taken
    ]
    return tuple(sorted(owners, key=lambda owner: (owner.interval, owner.name)))


def _is_fulfilled(reservation: _Reservation, specs: Mapping[str, Spec]) -> bool:
    """Whether the concept's file is there."""
    spec = specs.get(reservation.name)
    place = (reservation.base_fingerprint, reservation.side)
    return spec is not None and (spec.base_fingerprint, spec.side) == place


def _partition(owners: Sequence[Owner], name: str) -> tuple[list[Owner], list[Owner]]:
    """What a name owns, and what others do."""
    own = [owner for owner in owners if owner.name == name]
    return own, [owner for owner in owners if owner.name != name]


def _reservation(space: Space, name: str, interval: Interval, lasting: bool) -> _Reservation:
    return _Reservation(
        name=name,
        base_id=space.base_id,
        base_fingerprint=space.base_fingerprint,
        side=space.side,
        seed=space.seed,
        interval=interval,
        host=socket.gethostname(),
        pid=None if lasting else os.getpid(),
        started=psutil.Process().create_time(),
    )


def _check_not_in_training(state: _State, name: str) -> None:
    own = (socket.gethostname(), os.getpid())
    for other in state.reservations:
        if other.name == name and other.pid is not None and (other.host, other.pid) != own:
            raise SboraError(
                f"{name} is being trained by process {other.pid} on {other.host}",
                hint=f"Wait for it; if it is long gone: sbora-diffusion remove {name}",
            )


def _check_seed(space: Space, others: Sequence[Owner]) -> None:
    for owner in others:
        if owner.seed != space.seed:
            raise SboraError(
                f"{owner.name} has its columns in the order of basis_seed {owner.seed}, got {space.seed}: "
                "intervals of different orders may share columns",
                hint=f"Set basis_seed={owner.seed}, or use another folder.",
            )


def _check_pinned(pinned: Interval, others: Sequence[Owner], rank: int, width: int) -> Interval:
    if pinned.rank != rank:
        raise SboraError(f"the interval {pinned} has {pinned.rank} positions, rank {rank} needs {rank}")
    if pinned.stop > width:
        raise SboraError(f"the interval {pinned} does not fit: the narrowest adapted layer has the positions 0:{width}")
    taken = [f"{owner.interval} by {owner.name}" for owner in others if owner.interval.overlaps(pinned)]
    if taken:
        raise SboraError(f"the interval {pinned} is taken ({', '.join(taken)})", hint="See: sbora-diffusion ledger")
    return pinned
