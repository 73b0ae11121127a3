"""A folder of concept files and its ledger: who owns which columns of which base model."""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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
    """Who holds an interval: a concept file, or a training that will write one."""

    name: str
    interval: Interval
    in_training: bool = False


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The positions of one base model and side. Every layer has at least `width` of them, where that is known."""

    base_id: str
    base_fingerprint: str
    side: Side
    width: int | None
    owners: tuple[Owner, ...]  # by position

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
    """An interval promised to a running process. It ends when the process does."""

    name: str
    base_id: str
    base_fingerprint: str
    side: Side
    interval: Interval
    host: str
    pid: int
    started: float  # when the process did, in seconds since the epoch: its number may be given out again

    def is_live(self) -> bool:
        if self.host != socket.gethostname():
            return True  # cannot be known from here; `release` ends it
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 5
        except psutil.NoSuchProcess:
            return False


class Library:
    """A folder of concept files, "<name>.safetensors" each. They are the truth; what lies beside them is:

    `.ledger.json`: reservations of running trainings, and the widths of the base models met so far;
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
        self,
        base_fingerprint: str,
        base_id: str,
        side: Side,
        rank: int,
        width: int,
        name: str,
        pinned: Interval | None = None,
    ) -> Interval:
        """Promise an interval to this process, until it writes the concept's file, releases the name, or ends.

        What the name itself owned counts as free: the new file takes its place.

        Args:
            width: columns (FA) or rows (FB) of the narrowest adapted layer.
            pinned: this interval or none, instead of the first that is free.

        Raises:
            SboraError: another process is training this name, nothing is free, the pinned interval is taken or does
                not fit.
        """
        with self._changing_state() as state:
            state.widths[f"{base_fingerprint}/{side}"] = width
            running = next((r for r in state.reservations if r.name == name and not _is_own(r)), None)
            if running is not None:
                raise SboraError(
                    f"{name} is being trained by process {running.pid} on {running.host}",
                    hint=f"Wait for it; if it is long gone: sbora-diffusion remove {name}",
                )
            state.reservations = [r for r in state.reservations if r.name != name]
            owners = _owners(state, self._specs(), base_fingerprint, side)
            others = [owner for owner in owners if owner.name != name]
            if pinned is None:
                interval = first_free([owner.interval for owner in others], rank, width)
            else:
                interval = _check_pinned(pinned, others, rank, width)
            state.reservations.append(
                _Reservation(
                    name=name,
                    base_id=base_id,
                    base_fingerprint=base_fingerprint,
                    side=side,
                    interval=interval,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    started=psutil.Process().create_time(),
                )
            )
        return interval

    def release(self, name: str) -> None:
        """End the reservation of this name, if there is one. A concept's file keeps its columns."""
        with self._changing_state() as state:
            state.reservations = [r for r in state.reservations if r.name != name]

    def remove(self, name: str) -> None:
        """Delete a concept's file, which frees its columns, and end its reservation."""
        path = self.path(name)
        if not path.exists() and all(reservation.name != name for reservation in self._state().reservations):
            raise SboraError(
                f"nothing of the name {name!r} in {self.folder} (there: {', '.join(self.names()) or 'none'})"
            )
        path.unlink(missing_ok=True)
        self.release(name)

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
                width=state.widths.get(f"{fingerprint}/{side}"),
                owners=_owners(state, specs, fingerprint, side),
            )
            for base_id, fingerprint, side in sorted(claims)
        ]

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
    widths: dict[str, int]  # "<base fingerprint>/<side>" -> columns or rows of the narrowest adapted layer

    @classmethod
    def read(cls, path: Path) -> "_State":
        try:
            content = json.loads(path.read_bytes())
            reservations = [
                _Reservation(**{**fields, "interval": Interval.parse(fields["interval"])})
                for fields in content["reservations"]
            ]
            return cls(reservations, {str(key): int(width) for key, width in content["widths"].items()})
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
    owners = [
        Owner(name, interval)
        for name, spec in specs.items()
        if (spec.base_fingerprint, spec.side) == (base_fingerprint, side)
        for interval in spec.intervals
    ]
    owners += [
        Owner(r.name, r.interval, in_training=True)
        for r in state.reservations
        if (r.base_fingerprint, r.side) == (base_fingerprint, side)
    ]
    return tuple(sorted(owners, key=lambda owner: (owner.interval, owner.name)))


def _is_own(reservation: _Reservation) -> bool:
    return (reservation.host, reservation.pid) == (socket.gethostname(), os.getpid())


def _check_pinned(pinned: Interval, others: Sequence[Owner], rank: int, width: int) -> Interval:
    if pinned.rank != rank:
        raise SboraError(f"the interval {pinned} has {pinned.rank} positions, rank {rank} needs {rank}")
    if pinned.stop > width:
        raise SboraError(f"the interval {pinned} does not fit: the narrowest adapted layer has the positions 0:{width}")
    taken = [f"{owner.interval} by {owner.name}" for owner in others if owner.interval.overlaps(pinned)]
    if taken:
        raise SboraError(f"the interval {pinned} is taken ({', '.join(taken)})", hint="See: sbora-diffusion ledger")
    return pinned
