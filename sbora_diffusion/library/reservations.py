"""The state of a library besides its concept files: reservations, and the widths of layers."""

import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

from sbora_diffusion.adapters.basis import Interval, Side
from sbora_diffusion.utils.errors import SboraError
from sbora_diffusion.utils.files import write_file

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
    pid: int | None  # None: made by hand, lasts until its concept file exists or it is removed
    started: float  # start of the process, seconds since the epoch: process numbers are reused

    def is_own(self) -> bool:
        """Return whether it was made for this process."""
        return (self.host, self.pid) == (socket.gethostname(), os.getpid())

    def is_live(self) -> bool:
        if self.pid is None:
            return True
        if self.host != socket.gethostname():
            return True  # unknown from here; removing the name ends it
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 5
        except psutil.NoSuchProcess:
            return False


@dataclass
class State:
    """The content of `.ledger.json`."""

    reservations: list[Reservation]
    widths: dict[str, dict[str, int]]  # "<base fingerprint>/<side>" -> layer -> columns or rows

    def width(self, base_fingerprint: str, side: Side) -> int | None:
        """Return the width of the narrowest adapted layer."""
        return min(self.widths.get(f"{base_fingerprint}/{side}", {}).values(), default=None)

    @classmethod
    def read(cls, path: Path) -> "State":
        try:
            content = json.loads(path.read_bytes())
            reservations = [
                Reservation(**{**fields, "interval": Interval.parse(fields["interval"])})
                for fields in content["reservations"]
            ]
            widths = {key: {name: int(width) for name, width in w.items()} for key, w in content["widths"].items()}
            return cls(reservations, widths)
        except FileNotFoundError:
            return cls([], {})
        except (ValueError, TypeError, KeyError, AttributeError, SboraError) as error:
            log.warning("%s is damaged (%s) and is replaced; running trainings are unknown", path, error)
            return cls([], {})

    def write(self, path: Path) -> None:
        reservations = [
            {**vars(reservation), "interval": str(reservation.interval)} for reservation in self.reservations
        ]
        content = json.dumps({"reservations": reservations, "widths": self.widths}, indent=1)
        write_file(path, content.encode(), overwrite=True)


def check_not_in_training(state: State, name: str) -> None:
    """Raise SboraError if another process is training this name."""
    for other in state.reservations:
        if other.name == name and other.pid is not None and not other.is_own():
            raise SboraError(
                f"{name} is being trained by process {other.pid} on {other.host}",
                hint=f"Wait for it; if it no longer runs: sbora-diffusion remove {name}",
            )
