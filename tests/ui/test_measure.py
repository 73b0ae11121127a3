"""What the Measure tab calls its results, and what it tells of them."""

from sbora_diffusion.studio.measure_tab import NONE, result_name


def test_names_of_results() -> None:
    assert result_name(["dog"], "both", 1) == "dog-in-both-x1"
    names = [f"concept-{number}" for number in range(40)]
    merges = [result_name(names, merged, seeds) for merged in (NONE, "+".join(names)) for seeds in (1, 2)]
    assert len(set(merges)) == 4
    assert all(len(name) == 60 and name.startswith("concept-0-concept-1-") and "-of-40-" in name for name in merges)
