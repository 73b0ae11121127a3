"""A library: a folder of concept files that assigns columns to new concepts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from sbora_diffusion.adapters.basis import Interval, Side, Spec, check_file_name, first_free, indices
from sbora_diffusion.adapters.file import Adapter, read_spec
from sbora_diffusion.library.ledger import (
    Ledger,
    Owner,
    Reservation,
    Space,
    State,
    check_pinned,
    is_fulfilled,
    owners_of,
)
from sbora_diffusion.library.locks import TrainingLocks
from sbora_diffusion.utils.errors import SboraError

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
LOCK_TIMEOUT = 60  # seconds; the lock is held for milliseconds


class Library:
    """A folder of concept files, "<name>.safetensors" each, from which the ledger is read.

    `.ledger.json` holds reservations of running trainings and by hand, and the layer widths of base models seen here;
    `.ledger.lock` is locked while intervals are assigned. A training holds a lock of the operating system on
    `.training/<name>.lock`, so that its reservation ends with its process, however that ends, on whichever machine or
    container, and whatever the clock says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._locks = TrainingLocks(self.folder / ".training")
        self._held: dict[str, tuple[FileLock, Reservation]] = {}  # of this object's trainings, by name

    def path(self, name: str) -> Path:
        """Return the path of a concept's file, which may not exist."""
        check_file_name(name)
        return self.folder / f"{name}{SUFFIX}"

    def names(self) -> list[str]:
        """List the names of all concept files, valid or not, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))

    def locate(self, name_or_path: str) -> Path:
        """Return the file for a path that exists, or for a name in this folder."""
        if Path(name_or_path).is_file():
            return Path(name_or_path)
        if name_or_path in self.names():
            return self.path(name_or_path)
        known = ", ".join(self.names()) or "none"
        raise SboraError(f"no adapter {name_or_path!r}, neither a file nor in {self.folder} (available: {known})")

    def load(self, name: str) -> Adapter:
        """Read the concept of this name."""
        return Adapter.load(self.locate(name))

    def reserve(
        self, space: Space, rank: int, name: str, pinned: Interval | None = None, *, lasting: bool = False
    ) -> Interval:
        """Reserve an interval for this process, until it writes the concept's file, releases the name, or ends.

        What the name itself owned counts as free, because its file will be replaced. If an interval was reserved for
        the name by hand, that one is used.

        Args:
            pinned: the interval to reserve, instead of the first free one.
            lasting: reserve it for the name instead: until its file exists, or the reservation is cancelled.

        Raises:
            SboraError: another process is training this name, no interval is free, the pinned interval is taken or
                does not fit, other owners use another basis seed, or `lasting` for a name that has an interval.
        """
        with self._changing_state() as state:
            known = state.widths.get(space.key, {})  # others may adapt other layers of the same base
            state.widths[space.key] = known | dict(space.widths)
            self._check_not_in_training(state, name)
            state.drop(name, lasting=False)
            owners = owners_of(state, self._specs(strict=True), space.base_fingerprint, space.side)
            own = [owner for owner in owners if owner.name == name]
            others = [owner for owner in owners if owner.name != name]
            space.check_seed(others)
            if lasting and own:
                raise SboraError(f"{name} has the interval {own[0].interval} already ({own[0].state})")
            reserved = next((owner.interval for owner in own if owner.state == "reserved"), None)
            pinned, width = pinned or reserved, min(space.widths.values())
            if pinned is None:
                interval = first_free([owner.interval for owner in others], rank, width)
            else:
                interval = check_pinned(pinned, others, rank, width)
            reservation = space.reserve(name, interval, lasting)
            if not lasting:
                held = self._held.pop(name, None)
                self._held[name] = held[0] if held else self._locks.acquire(name), reservation
            state.reservations.append(reservation)
        return interval

    def confirm(self, name: str) -> None:
        """Raise SboraError if this training's reservation is no longer in the ledger; to be called before it saves."""
        if (held := self._held.get(name)) and self._state().find(name, lasting=False) != held[1]:
            raise SboraError(
                f"the columns {held[1].interval} of {name} are no longer reserved for this training",
                "somebody has changed the ledger; resume with --interval, or --force, when they are free",
            )

    def release(self, name: str) -> None:
        """End this training's reservation of a name, if any, and one by hand if its file exists by now."""
        with self._changing_state() as state:
            lasting = state.find(name, lasting=True)
            if lasting and is_fulfilled(lasting, self._specs()):
                state.drop(name, lasting=True)
            if held := self._held.pop(name, None):
                if state.find(name, lasting=False) == held[1]:
                    state.drop(name, lasting=False)
                held[0].release()

    def cancel(self, name: str) -> None:
        """End a reservation by hand; a concept's file stays.

        Raises:
            SboraError: there is none, or the name is being trained.
        """
        with self._changing_state() as state:
            self._check_not_in_training(state, name)
            if not state.find(name, lasting=True):
                names = ", ".join(sorted(r.name for r in state.reservations)) or "none"
                raise SboraError(f"nothing is reserved for {name!r} in {self.folder} (reservations: {names})")
            state.drop(name, lasting=True)

    def check_not_in_training(self, name: str) -> None:
        """Raise SboraError if another process is training this name."""
        self._check_not_in_training(self._state(), name)

    def _check_not_in_training(self, state: State, name: str) -> None:
        other = state.find(name, lasting=False)
        if other and name not in self._held:
            raise SboraError(
                f"{name} is being trained by process {other.pid} on {other.host}", "wait for it to end, or stop it"
            )

    def what_is(self, name: str) -> str:
        """Describe what has this name, a concept file or a reservation; raise SboraError if there is neither."""
        path = self.path(name)
        if path.exists():
            return str(path)
        if any(reservation.name == name for reservation in self._state().reservations):
            return f"the reservation of {name}"
        raise SboraError(
            f"no concept or reservation {name!r} in {self.folder} (available: {', '.join(self.names()) or 'none'})"
        )

    def remove(self, name: str) -> tuple[str, ...]:
        """Delete a concept's file and end a reservation of its name by hand.

        Returns:
            Names of others that own some of its columns, such as merges of it, but not its own parents.

        Raises:
            SboraError: there is neither, or the name is being trained.
        """
        self.what_is(name)
        with self._changing_state() as state:
            self._check_not_in_training(state, name)
            specs, also = self._specs(), set[str]()
            if spec := specs.get(name):
                owners = owners_of(state, specs, spec.base_fingerprint, spec.side)
                also = {owner.name for owner in owners if any(map(owner.interval.overlaps, spec.intervals))}
                also -= {name, *spec.parents}
            self.path(name).unlink(missing_ok=True)
            state.drop(name, lasting=True)
        return tuple(sorted(also))

    def owners(self, base_fingerprint: str, side: Side) -> tuple[Owner, ...]:
        """List the owners of one base model and side, by position."""
        return owners_of(self._state(), self._specs(), base_fingerprint, side)

    def ledgers(self) -> list[Ledger]:
        """List the ledgers of all base models and sides with an owner."""
        state, specs = self._state(), self._specs()
        of_sbora = {name: spec for name, spec in specs.items() if spec.intervals or not spec.method}
        claims: set[tuple[str, str, Side]] = {
            (one.base_id, one.base_fingerprint, one.side) for one in (*of_sbora.values(), *state.reservations)
        }
        return [
            Ledger(
                base_id=base_id,
                base_fingerprint=fingerprint,
                side=side,
                width=min(state.widths.get(f"{fingerprint}/{side}", {}).values(), default=None),
                owners=owners_of(state, specs, fingerprint, side),
                unplaced=tuple(
                    name
                    for name, spec in of_sbora.items()
                    if (spec.base_fingerprint, spec.side, spec.intervals) == (fingerprint, side, ())
                ),
            )
            for base_id, fingerprint, side in sorted(claims)
        ]

    def widths(self, base_fingerprint: str, side: Side) -> dict[str, int] | None:
        """Return the columns (FA) or rows (FB) of every adapted layer, if a training or reservation recorded them."""
        return self._state().widths.get(f"{base_fingerprint}/{side}")

    def _specs(self, strict: bool = False) -> dict[str, Spec]:
        """Read the specification of every valid file, by file name.

        Raises:
            SboraError: with `strict`, a file that cannot be read: what it owns is unknown.
        """
        specs = {}
        for name in self.names():
            try:
                specs[name] = read_spec(self.path(name))
            except SboraError as defect:
                if strict:
                    hint = "restore the file, or move it out of the folder if its columns may be given away"
                    raise SboraError(f"{defect}; which columns it owns is unknown", hint) from None
                log.warning("%s; it is skipped", defect)
        return specs

    def _state(self) -> State:
        """Read live reservations. Read them before the files: a training writes its file first, then releases."""
        state = State.read(self.folder / ".ledger.json")
        state.reservations = [
            r for r in state.reservations if r.pid is None or r.name in self._held or self._locks.is_held(r.name)
        ]
        return state

    @contextmanager
    def _changing_state(self) -> Iterator[State]:
        """Yield the state under the lock, and write it back if the block succeeds."""
        with self.locked():
            state = self._state()
            yield state
            state.write(self.folder / ".ledger.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the ledger, for milliseconds only: no other process can reserve columns."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".ledger.lock", timeout=LOCK_TIMEOUT):
                yield
        except Timeout:
            raise SboraError(f"another process has locked {self.folder}/.ledger.lock for {LOCK_TIMEOUT} s") from None
        except OSError as error:
            raise SboraError(f"cannot use the folder {self.folder} ({error.strerror or error})") from None


def load_adapters(
    adapters: Adapter | str | Path | Sequence[Adapter | str | Path], library: Library | str | Path = "adapters"
) -> list[Adapter]:
    """Return adapters that are given as objects, paths, or names in the library, in a list or as a single one."""
    folder = library if isinstance(library, Library) else Library(library)
    listed = [adapters] if isinstance(adapters, Adapter | str | Path) else adapters
    return [one if isinstance(one, Adapter) else folder.load(str(one)) for one in listed]


def collisions(adapter: Adapter, library: Library) -> list[str]:
    """Describe each concept and reservation of the same base model and side that shares columns with an adapter.

    Columns are compared, not intervals, because imported adapters may have none. Invalid files are skipped.
    """
    spec = adapter.spec
    lines = []
    for name in library.names():
        if name == spec.name:
            continue
        with suppress(SboraError):
            other = Adapter.load(library.path(name))
            if (other.spec.base_fingerprint, other.spec.side) == (spec.base_fingerprint, spec.side):
                lines += _shared(adapter, name, {key: factor.index for key, factor in other.factors.items()})
    widths = library.widths(spec.base_fingerprint, spec.side) or {}
    for owner in library.owners(spec.base_fingerprint, spec.side):
        if owner.name != spec.name and owner.state != "trained":
            taken = {  # layers that are too narrow are not adapted by this owner
                key: indices(key.partition(".")[2], dim, owner.interval, owner.seed)
                for key, dim in widths.items()
                if owner.interval.stop <= dim
            }
            lines += _shared(adapter, f"{owner.name} ({owner.state}, {owner.interval})", taken)
    return lines


def _shared(adapter: Adapter, name: str, taken: Mapping[str, Tensor]) -> Iterator[str]:
    what = "columns" if adapter.spec.side == "fa" else "rows"
    both = [(factor.index, taken[key]) for key, factor in adapter.factors.items() if key in taken]
    counts = [len(set(own.tolist()) & set(others.tolist())) for own, others in both]
    if layers := sum(count > 0 for count in counts):
        yield f"{name}: {sum(counts)} {what} in {layers} of {len(adapter.factors)} layers, at most {max(counts)} in one"
