"""The library: intervals are assigned once, in the gaps between the files and reservations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.library.ledger import Ledger, Owner
from sbora_diffusion.library.library import Library
from sbora_diffusion.utils.errors import SboraError

from .reserving import reserve, save_adapter, space


def test_first_fit_goes_round_the_files(library: Library) -> None:
    save_adapter(library, "cat", "8:16")
    assert reserve(library, "dog") == "0:8"
    assert reserve(library, "fox") == "16:24"
    assert reserve(library, "owl", rank=4) == "24:28"


def test_a_side_and_a_base_have_ledgers_of_their_own(library: Library) -> None:
    save_adapter(library, "cat", "0:8", side="fb")
    save_adapter(library, "fox", "0:8", base="beef")
    assert reserve(library, "dog") == "0:8"


def test_a_removed_concept_frees_its_columns(library: Library) -> None:
    save_adapter(library, "cat", "0:8")
    save_adapter(library, "dog", "8:16")
    library.remove("cat")
    assert library.names() == ["dog"]
    assert reserve(library, "fox") == "0:8"


def test_a_merge_keeps_the_columns_of_what_was_removed(library: Library) -> None:
    save_adapter(library, "cat+dog", "0:8,8:16", parents=("cat", "dog"))
    assert reserve(library, "fox") == "16:24"


def test_a_merge_is_no_second_owner_of_what_it_was_merged_from(library: Library) -> None:
    save_adapter(library, "cat", "0:8")
    save_adapter(library, "dog", "8:16")
    save_adapter(library, "both", "0:8,8:16", parents=("cat", "dog"))
    (ledger,) = library.ledgers()
    assert [(owner.name, str(owner.interval)) for owner in ledger.first_owners] == [("cat", "0:8"), ("dog", "8:16")]
    assert ledger.only_merged == ("both",)
    assert library.remove("cat") == ("both",)
    (ledger,) = library.ledgers()
    assert [(owner.name, str(owner.interval)) for owner in ledger.first_owners] == [("both", "0:8"), ("dog", "8:16")]
    assert ledger.only_merged == ()
    library.remove("dog")
    save_adapter(library, "dog", "16:24")
    assert library.remove("both") == ()


def test_training_a_name_again_reuses_its_columns(library: Library) -> None:
    save_adapter(library, "dog", "0:8")
    assert reserve(library, "dog") == "0:8"
    assert reserve(library, "dog", rank=4) == "0:4"
    assert reserve(library, "cat") == "8:16", "until the new file is written, the old one counts too"


def test_a_released_reservation_is_free(library: Library) -> None:
    assert reserve(library, "dog") == "0:8"
    library.release("dog")
    assert reserve(library, "cat") == "0:8"


def test_a_pinned_interval(library: Library) -> None:
    save_adapter(library, "cat", "8:16")
    assert reserve(library, "dog", pinned="16:24") == "16:24"


@pytest.mark.parametrize(
    ("pinned", "message"),
    [("12:20", r"12:20 is taken \(8:16 by cat\)"), ("60:68", "positions 0:64"), ("0:4", "rank 8 needs 8")],
)
def test_a_pinned_interval_that_does_not_fit(library: Library, pinned: str, message: str) -> None:
    save_adapter(library, "cat", "8:16")
    with pytest.raises(SboraError, match=message):
        reserve(library, "dog", pinned=pinned)


def test_a_full_ledger(library: Library) -> None:
    save_adapter(library, "cat", "0:60")
    with pytest.raises(SboraError, match=r"no 8 consecutive positions are free \(64 in all\)"):
        reserve(library, "dog")


def test_a_reservation_by_hand_is_given_back(library: Library) -> None:
    assert reserve(library, "dog", lasting=True) == "0:8"
    library.remove("dog")
    assert library.owners("f00d", "fa") == ()


def test_a_cancelled_reservation_is_free_and_a_file_stays(library: Library) -> None:
    save_adapter(library, "cat", "8:16")
    reserve(library, "dog", lasting=True)
    for name in ("cat", "fox"):
        with pytest.raises(SboraError, match=rf"nothing is reserved for '{name}'.*reservations: dog"):
            library.cancel(name)
    library.cancel("dog")
    assert library.names() == ["cat"]
    assert reserve(library, "fox") == "0:8"


def test_a_training_confirms_its_columns_before_it_saves(library: Library) -> None:
    library.confirm("cat")  # of a method that owns no columns
    reserve(library, "dog")
    library.confirm("dog")
    (library.folder / ".ledger.json").unlink()
    other = Library(library.folder)
    with pytest.raises(SboraError, match="dog is being trained by another process"):
        reserve(other, "dog")
    assert reserve(other, "cat") == "0:8"
    with pytest.raises(SboraError, match="the columns 0:8 of dog are no longer reserved for this training"):
        library.confirm("dog")
    library.release("dog")
    assert [owner.name for owner in other.owners("f00d", "fa")] == ["cat"]


def test_a_name_that_has_an_interval_gets_no_other(library: Library) -> None:
    reserve(library, "dog", lasting=True)
    save_adapter(library, "cat", "8:16")
    for name, message in (("dog", r"dog has the interval 0:8 already \(reserved\)"), ("cat", r"8:16 .*\(trained\)")):
        with pytest.raises(SboraError, match=message):
            reserve(library, name, lasting=True)
    with pytest.raises(SboraError, match="the interval 0:8 has 8 positions, rank 4 needs 4"):
        reserve(library, "dog", rank=4)


def test_positions_of_another_seed_are_other_columns(library: Library) -> None:
    save_adapter(library, "cat", "0:8")
    with pytest.raises(SboraError, match="cat uses basis_seed 0, got 1") as caught:
        library.reserve(space(seed=1), 8, "dog")
    assert caught.value.hint == "Set basis_seed=0, or use another folder."
    library.reserve(space(seed=1), 8, "cat")  # takes the file's place


def test_concepts_without_an_interval_are_named(library: Library) -> None:
    save_adapter(library, "foreign", "")
    (ledger,) = library.ledgers()
    assert (ledger.owners, ledger.unplaced, ledger.width) == ((), ("foreign",), None)


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_bytes(path: Path) -> None:
    path.write_text("one line\nand another\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/dog.safetensors")


@pytest.mark.parametrize("damage", [no_bytes, half, other_bytes, a_folder, a_broken_link])
def test_what_an_unreadable_file_owns_is_given_to_nobody(
    library: Library, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(library, "cat", "8:16")
    save_adapter(library, "dog", "0:8")
    damage(library.path("dog"))
    with pytest.raises(SboraError, match=r"dog\.safetensors.*; which columns it owns is unknown"):
        reserve(library, "fox")
    (ledger,) = library.ledgers()
    assert [owner.name for owner in ledger.owners] == ["cat"]
    assert "is skipped" in caplog.text
    library.path("dog").rename(library.folder / "elsewhere")
    assert reserve(library, "fox") == "0:8"


RESERVED = '{"name": "x", "base_id": "toy", "base_fingerprint": "f00d", "side": "fa", "seed": 0, "interval": "0:8"'
WHOLE = RESERVED + ', "host": "here", "pid": null, "started": 1.0'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "\x00",
        "[" * 100_000,
        '{"reservations": [{}], "widths": {}}',
        f'{{"reservations": [{RESERVED}}}], "widths": {{}}}}',
        f'{{"reservations": [{WHOLE}, "of a later version": 1}}], "widths": {{}}}}',
        f'{{"reservations": [{WHOLE}}}], "widths": {{"a": {{"b": "c"}}}}}}',
        f'{{"reservations": [{WHOLE}}}], "widths": {{"a": {{"b": 1e999}}}}}}',
        f'{{"reservations": [{WHOLE}}}], "widths": {{}}',
    ],
)
def test_a_ledger_that_cannot_be_read_is_kept(library: Library, content: str) -> None:
    save_adapter(library, "cat", "0:8")
    file = library.folder / ".ledger.json"
    file.write_text(content)
    for change in (lambda: reserve(library, "dog"), lambda: library.remove("cat"), lambda: library.release("dog")):
        with pytest.raises(SboraError, match=r"cannot read .*\.ledger\.json .*which columns are reserved is unknown"):
            change()
    assert file.read_text() == content
    assert library.names() == ["cat"]
    file.unlink()
    assert reserve(library, "dog") == "8:16"


def test_ledgers(library: Library) -> None:
    save_adapter(library, "cat", "8:16")
    save_adapter(library, "horse", "0:4", side="fb")
    reserve(library, "dog")
    columns, rows = library.ledgers()
    assert columns == Ledger(
        base_id="toy",
        base_fingerprint="f00d",
        side="fa",
        width=64,
        owners=(Owner("dog", Interval(0, 8), "in training"), Owner("cat", Interval(8, 8))),
    )
    assert (rows.owners, rows.width, rows.gaps) == ((Owner("horse", Interval(0, 4)),), None, ())
    assert library.widths("f00d", "fa") == {"unet.narrow": 64, "unet.wide": 128}
    assert library.widths("f00d", "fb") is None


def test_trainings_of_one_base_may_adapt_other_layers(library: Library) -> None:
    reserve(library, "dog")
    only_wide = replace(space(), widths={"unet.wide": 128})
    assert str(library.reserve(only_wide, 8, "cat", Interval(100, 8))) == "100:108"
    assert library.widths("f00d", "fa") == {"unet.narrow": 64, "unet.wide": 128}


def test_room_counts_the_gaps() -> None:
    owners = tuple(Owner("x", Interval.parse(text)) for text in ("4:12", "8:20", "32:40"))
    ledger = Ledger(base_id="toy", base_fingerprint="f00d", side="fa", width=50, owners=owners)
    assert [str(gap) for gap in ledger.gaps] == ["0:4", "20:32", "40:50"]
    assert (ledger.room(4), ledger.room(8)) == (1 + 3 + 2, 0 + 1 + 1)
    beyond = Ledger(base_id="toy", base_fingerprint="f00d", side="fa", width=8, owners=owners)
    assert [str(gap) for gap in beyond.gaps] == ["0:4"]


def test_looking_creates_nothing(library: Library) -> None:
    assert library.names() == []
    assert library.ledgers() == []
    assert not library.folder.exists()


def test_load_by_name_and_by_path(library: Library) -> None:
    save_adapter(library, "cat", "0:8")
    assert library.load("cat").spec == library.load(str(library.path("cat"))).spec
    with pytest.raises(SboraError, match=r"no adapter 'dog'.*available: cat"):
        library.load("dog")


@pytest.mark.parametrize("name", ["", ".hidden", "../dog", "a/b", "a\\b", "a\nb"])
def test_names_that_leave_the_folder(library: Library, name: str) -> None:
    with pytest.raises(SboraError, match="without slashes and leading dots"):
        library.path(name)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SboraError, match="cannot use the folder"):
        reserve(Library(tmp_path / "file" / "adapters"), "dog")
