"""Reservations of several processes: none shares an interval, and a dead one leaves nothing behind."""

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from random import Random

import pytest

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.library.ledger import Owner
from sbora_diffusion.library.library import Library
from sbora_diffusion.utils.errors import SboraError

from .reserving import FORK, reserve, save_adapter


@pytest.fixture
def training_dog(library: Library) -> Iterator[BaseProcess]:
    """Another process, which has reserved 0:8 for dog and keeps running."""
    intervals = FORK.SimpleQueue()

    def work() -> None:
        intervals.put(reserve(library, "dog"))
        signal.pause()

    process = FORK.Process(target=work)
    process.start()
    assert intervals.get() == "0:8"
    yield process
    process.kill()
    process.join()


def test_sixteen_processes_at_once_get_sixteen_intervals(library: Library) -> None:
    together, intervals = FORK.Barrier(16), FORK.SimpleQueue()

    def work(name: str) -> None:
        together.wait()
        intervals.put(reserve(library, name, width=128))
        together.wait()  # a process that ends gives its interval back

    processes = [FORK.Process(target=work, args=(f"concept-{number}",)) for number in range(16)]
    for process in processes:
        process.start()
    got = {intervals.get() for _ in processes}
    for process in processes:
        process.join()
    assert got == {f"{start}:{start + 8}" for start in range(0, 128, 8)}


def test_sixteen_processes_reserve_for_good(library: Library) -> None:
    names = [f"concept-{number}" for number in range(16)]
    processes = [FORK.Process(target=reserve, args=(library, name, 8, 128, None, True)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    owners = library.owners("f00d", "fa")
    assert [str(owner.interval) for owner in owners] == [f"{start}:{start + 8}" for start in range(0, 128, 8)]
    assert {(owner.name, owner.state) for owner in owners} == {(name, "reserved") for name in names}


def test_sixteen_processes_that_come_and_go_never_share(library: Library) -> None:
    together, troubles = FORK.Barrier(16), FORK.SimpleQueue()

    def work(number: int) -> None:
        random, name = Random(number), f"concept-{number}"
        together.wait()
        try:
            for _ in range(5):
                mine = Interval.parse(reserve(library, name, rank=random.choice((2, 4, 8)), width=160))
                others = [owner for owner in library.owners("f00d", "fa") if owner.name != name]
                assert not any(owner.interval.overlaps(mine) for owner in others), (name, mine, others)
                if random.random() < 0.5:
                    save_adapter(library, name, str(mine))
                    library.release(name)
                    library.remove(name)
                else:
                    library.release(name)
            troubles.put("")
        except BaseException as trouble:  # reported in the parent
            troubles.put(repr(trouble))

    processes = [FORK.Process(target=work, args=(number,)) for number in range(16)]
    for process in processes:
        process.start()
    got = [troubles.get() for _ in processes]
    for process in processes:
        process.join()
    assert got == [""] * 16
    assert library.owners("f00d", "fa") == ()


def test_a_reservation_by_hand_lasts_until_the_file_is_there(library: Library) -> None:
    child = FORK.Process(target=reserve, args=(library, "dog"), kwargs={"pinned": "8:16", "lasting": True})
    child.start()
    child.join()
    assert library.owners("f00d", "fa") == (Owner("dog", Interval(8, 8), "reserved"),)
    assert reserve(library, "cat") == "0:8"
    assert reserve(library, "fox") == "16:24"
    assert reserve(library, "dog") == "8:16", "a training of the name gets what was reserved for it"
    assert Owner("dog", Interval(8, 8), "in training") in library.owners("f00d", "fa")
    library.release("dog")
    assert Owner("dog", Interval(8, 8), "reserved") in library.owners("f00d", "fa"), "nothing was trained"
    save_adapter(library, "dog", "8:16")
    library.release("dog")
    assert Owner("dog", Interval(8, 8)) in library.owners("f00d", "fa")
    library.remove("dog")
    assert reserve(library, "owl") == "8:16"


def test_a_name_in_training_is_refused(library: Library, training_dog: BaseProcess) -> None:
    with pytest.raises(SboraError, match=f"dog is being trained by process {training_dog.pid}") as caught:
        reserve(library, "dog")
    assert caught.value.hint is not None
    with pytest.raises(SboraError, match="is being trained"):
        library.check_not_in_training("dog")
    library.check_not_in_training("cat")
    library.release("dog")  # which is this process's own only
    assert reserve(library, "cat") == "8:16"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_dead_process_leaves_nothing_behind(library: Library, training_dog: BaseProcess, how: signal.Signals) -> None:
    assert training_dog.pid is not None
    os.kill(training_dog.pid, how)
    training_dog.join()
    assert library.owners("f00d", "fa") == ()
    assert reserve(library, "dog") == "0:8"


def test_a_zombie_is_dead(library: Library, training_dog: BaseProcess) -> None:
    assert training_dog.pid is not None
    training_dog.kill()
    os.waitid(os.P_PID, training_dog.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert library.owners("f00d", "fa") == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("started", 1.0),  # the clock was set
        ("host", "elsewhere"),  # another machine, on a shared folder
        ("pid", 1),  # another container of the same host name, where process numbers start anew
        ("pid", 2**22),  # no such process here
    ],
)
def test_a_training_keeps_its_columns_wherever_it_runs(
    library: Library, training_dog: BaseProcess, field: str, value: object
) -> None:
    ledger = library.folder / ".ledger.json"
    content = json.loads(ledger.read_text())
    content["reservations"][0][field] = value
    ledger.write_text(json.dumps(content))
    assert reserve(library, "cat") == "8:16"
    with pytest.raises(SboraError, match="dog is being trained by process"):
        library.remove("dog")
    training_dog.kill()
    training_dog.join()
    assert reserve(library, "fox") == "0:8"


@pytest.mark.usefixtures("training_dog")
def test_a_name_in_training_is_neither_removed_nor_released(library: Library) -> None:
    save_adapter(library, "dog", "0:8")  # of an earlier training
    for end in (library.remove, library.cancel):
        with pytest.raises(SboraError, match="dog is being trained") as caught:
            end("dog")
        assert caught.value.hint == "wait for it to end, or stop it"
    assert library.names() == ["dog"]
    assert reserve(library, "cat") == "8:16"
