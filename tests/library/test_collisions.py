"""Who shares columns with an adapter: compared by the columns themselves, in files and in reservations."""

from dataclasses import replace

import torch

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter, Factor
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library, collisions

from ..interchange.samples import SHAPES, random_adapter


def put(library: Library, name: str, interval: Interval, **changes: str) -> Adapter:
    adapter = replace(random_adapter(interval=interval, name=name), tokens={})
    adapter = replace(adapter, spec=replace(adapter.spec, **changes))
    adapter.save(library.path(name))
    return adapter


def test_files(library: Library) -> None:
    new = random_adapter(interval=Interval(2, 4), name="new")
    assert collisions(new, library) == []
    put(library, "before", Interval(0, 2))
    put(library, "after", Interval(6, 2))
    put(library, "another-base", Interval(2, 4), base_fingerprint="beef")
    put(library, "new", Interval(2, 4))  # which it replaces
    random_adapter(side="fb", interval=Interval(2, 4), name="rows").save(library.path("rows"))
    library.path("broken").write_text("nothing")
    assert collisions(new, library) == []
    put(library, "overlapping", Interval(5, 3))
    assert collisions(new, library) == ["overlapping: 3 columns in 3 of 3 layers, at most 1 in one"]


def test_columns_of_ones_own_choice(library: Library) -> None:
    old = put(library, "old", Interval(0, 3))
    key = next(iter(SHAPES))
    index = torch.tensor([int(old.factors[key].index[0]), int(old.factors[key].index[1]), 11 - 2])
    factor = Factor(index.unique(), torch.ones(SHAPES[key][0], len(index.unique())))
    new = Adapter(replace(old.spec, name="new", intervals=()), {key: factor}, {})
    shared = len(set(factor.index.tolist()) & set(old.factors[key].index.tolist()))
    assert collisions(new, library) == [f"old: {shared} columns in 1 of 1 layers, at most {shared} in one"]
    assert shared >= 2


def test_reservations(library: Library) -> None:
    widths = {key: in_dim for key, (_, in_dim) in SHAPES.items()}
    space = Space(base_id="tiny", base_fingerprint="f00d", side="fa", seed=0, widths=widths)
    assert str(library.reserve(space, 3, "running")) == "0:3"
    assert str(library.reserve(space, 2, "planned", lasting=True)) == "3:5"
    assert collisions(random_adapter(interval=Interval(5, 3), name="new"), library) == []
    assert collisions(random_adapter(interval=Interval(2, 2), name="new"), library) == [
        "running (in training, 0:3): 3 columns in 3 of 3 layers, at most 1 in one",
        "planned (reserved, 3:5): 3 columns in 3 of 3 layers, at most 1 in one",
    ]
    assert collisions(random_adapter(interval=Interval(3, 2), name="planned"), library) == []


def test_a_reservation_takes_nothing_in_a_layer_that_is_too_narrow_for_it(library: Library) -> None:
    widths = {key: in_dim for key, (_, in_dim) in SHAPES.items()}
    space = Space(base_id="tiny", base_fingerprint="f00d", side="fa", seed=0, widths=widths)
    library.reserve(space, 3, "everywhere", lasting=True)
    [widest, width] = max(widths.items(), key=lambda item: item[1])
    library.reserve(replace(space, widths={widest: width}), 2, "wide", Interval(width - 2, 2), lasting=True)
    columns = collisions(random_adapter(interval=Interval(0, min(widths.values())), name="new"), library)
    assert columns[0].startswith("everywhere (reserved, 0:3): 9 columns in 3 of 3 layers")
    assert len(columns) == 1
