"""The export and import commands end to end on a tiny base model: what they write, say and refuse."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from sbora_diffusion.adapters.basis import Interval
from sbora_diffusion.adapters.file import Adapter
from sbora_diffusion.cli.app import app
from sbora_diffusion.library.ledger import Space
from sbora_diffusion.library.library import Library
from sbora_diffusion.models.base import Base, load_base

from ..interchange.samples import assert_same, random_adapter
from ..tiny_pipeline import save_tiny_pipeline


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(save_tiny_pipeline(tmp_path_factory.mktemp("base") / "tiny")))


@pytest.fixture
def dog(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    """In an empty folder, with this concept in `adapters`."""
    monkeypatch.chdir(tmp_path)
    adapter = concept(base)
    adapter.save("adapters/dog.safetensors")
    return adapter


def concept(base: Base, name: str = "dog", start: int = 0) -> Adapter:
    return random_adapter(
        base.layer_shapes,
        interval=Interval(start, 4),
        seed=start,
        name=name,
        tokens={f"<{name}>": name},
        base_id=base.id,
        base_fingerprint=base.fingerprint,
    )


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def lines(done: Result) -> list[str]:
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("diffusers", ["pytorch_lora_weights.safetensors"]),
        ("kohya", ["dog.safetensors"]),
        ("peft", [f"{part}/adapter_{file}" for part in ("text_encoder", "unet")
                  for file in ("config.json", "model.safetensors")]),
    ],
)  # fmt: skip
def test_there_and_back(dog: Adapter, caplog: pytest.LogCaptureFixture, to: str, files: list[str]) -> None:
    expected = [f"exports/dog-{to}/{file}" for file in (*files, "embeddings/dog.safetensors")]
    assert lines(run("export", "dog", "--to", to)) == expected
    assert caplog.messages[-1].startswith("next: ")
    before = Path("adapters/dog.safetensors").read_bytes()
    assert lines(run("remove", "dog", "--yes")) == []
    assert lines(run("import", f"exports/dog-{to}")) == ["adapters/dog.safetensors"]
    assert Path("adapters/dog.safetensors").read_bytes() == before
    assert "next: sbora-diffusion generate" in caplog.text
    assert_same(Adapter.load("adapters/dog.safetensors"), dog)


@pytest.mark.usefixtures("dog")
def test_where_exports_go() -> None:
    assert lines(run("export", "dog", "--to", "kohya", "--out", "here")) == [
        "here/dog.safetensors",
        "here/embeddings/dog.safetensors",
    ]
    refused = run("export", "dog", "--to", "kohya", "--out", "here")
    assert (refused.exit_code, "here/dog.safetensors exists" in refused.stderr) == (1, True)
    assert lines(run("export", "adapters/dog.safetensors", "--to", "kohya", "--out", "here", "--force"))


@pytest.mark.usefixtures("dog")
def test_a_strangers_file(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    """Without a word from us in it, the token beside it, in columns of its own choice."""
    run("export", "dog", "--to", "kohya")
    tensors = safetensors.torch.load_file("exports/dog-kohya/dog.safetensors")
    moved = {key: value.roll(1, 1).contiguous() if "lora_down" in key else value for key, value in tensors.items()}
    safetensors.torch.save_file(moved, "fox.safetensors")
    safetensors.torch.save_file({"emb_params": torch.ones(1, 32)}, "fox-token.safetensors")
    unnamed = run("import", "fox.safetensors")
    assert (unnamed.exit_code, "does not say what base model it is for" in unnamed.stderr) == (1, True)
    words = ("import", "fox.safetensors", "--base", base.id, "--embedding", "fox-token.safetensors")
    assert lines(run(*words, "--noun", "fox", "--collision", "keep")) == ["adapters/fox.safetensors"]
    spec = Adapter.load("adapters/fox.safetensors").spec
    assert (spec.tokens, spec.intervals, spec.rank) == ({"<fox-token>": "fox"}, (), 4)
    assert (spec.base_id, spec.base_fingerprint) == (base.id, base.fingerprint)
    assert "columns of its own choice" in caplog.text


def test_collisions(dog: Adapter, base: Base, caplog: pytest.LogCaptureFixture) -> None:
    hound, cat = concept(base, "hound", 2), concept(base, "cat", 4)
    for adapter in (hound, cat):
        adapter.save(f"elsewhere/{adapter.spec.name}.safetensors")
    assert lines(run("import", "elsewhere/cat.safetensors")) == ["adapters/cat.safetensors"]
    assert "shares" not in caplog.text
    refused = run("import", "elsewhere/hound.safetensors")
    assert (refused.exit_code, Path("adapters/hound.safetensors").exists()) == (1, False)
    error, hint = refused.stderr.splitlines()
    layers = len(dog.factors)
    shared = f"{2 * layers} columns in {layers} of {layers} layers, at most 2 in one"
    assert error == f"error: hound writes what others own (cat: {shared}; dog: {shared})"
    assert "--collision keep" in hint
    assert "sbora-diffusion train --concept hound" in hint
    assert lines(run("import", "elsewhere/hound.safetensors", "--collision", "keep")) == ["adapters/hound.safetensors"]
    assert f"hound shares weights with dog: {shared}" in caplog.text
    assert_same(Adapter.load("adapters/hound.safetensors"), hound)
    assert lines(run("import", "elsewhere/cat.safetensors", "--collision", "keep", "--name", "kitten"))
    renamed = Adapter.load("adapters/kitten.safetensors")
    assert_same(renamed, replace(cat, spec=replace(cat.spec, name="kitten")))


def test_a_name_that_is_being_trained(dog: Adapter) -> None:
    dog.save("elsewhere.safetensors")
    Path("adapters/dog.safetensors").unlink()
    widths = {"unet.x": 100}
    space = Space(base_id="toy", base_fingerprint="f00d", side="fa", seed=0, widths=widths)
    training = Library("adapters")
    training.reserve(space, 4, "dog")
    done = run("import", "elsewhere.safetensors")
    assert (done.exit_code, Path("adapters/dog.safetensors").exists()) == (1, False)
    assert "dog is being trained by process" in done.stderr
    training.release("dog")


def test_the_base_lies_elsewhere_here(dog: Adapter, base: Base) -> None:
    run("export", "dog", "--to", "kohya", "--out", "exported")
    Path("base").symlink_to(base.id)
    assert lines(run("import", "exported", "--base", "base", "--force"))
    assert_same(Adapter.load("adapters/dog.safetensors"), replace(dog, spec=replace(dog.spec, base_id="base")))


@pytest.mark.usefixtures("dog")
def test_another_basis_seed(base: Base, caplog: pytest.LogCaptureFixture) -> None:
    """It writes the columns that it wrote, but no interval of this folder describes them."""
    cat = concept(base, "cat", 4)
    replace(cat, spec=replace(cat.spec, seed=5)).save("elsewhere/cat.safetensors")
    assert lines(run("import", "elsewhere/cat.safetensors")) == ["adapters/cat.safetensors"]
    assert "cat counts its columns in the order of basis_seed 5, this folder in 0" in caplog.text
    assert_same(Adapter.load("adapters/cat.safetensors"), replace(cat, spec=replace(cat.spec, intervals=())))
    assert lines(run("merge", "dog", "cat"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export nosuch --to peft", "no adapter 'nosuch'"),
        ("export dog --to onnx", "got format 'onnx', expected one of diffusers, kohya, peft"),
        ("export dog --to peft --base OTHER", "was trained for"),
        ("export dog --to peft --base nosuch", "could not load base model"),
        ("import nosuch.safetensors", "nosuch.safetensors: no such file"),
        ("import posing.safetensors", "posing.safetensors: cannot be read as safetensors"),
        ("import empty", "empty: has 0 safetensors files"),
        ("import dense.safetensors --base TINY", "dense.safetensors: is a dense LoRA, not an SBoRA adapter"),
        ("import exported --base OTHER", "was trained for"),
        ("import exported", "adapters/dog.safetensors exists"),
        ("import exported --name a/b", "got the name 'a/b'"),
        ("import exported --collision maybe", "got --collision maybe, expected refuse or keep"),
        ("import exported --embedding posing.safetensors", "posing.safetensors: cannot be read"),
        ("import adapters/dog.safetensors", "adapters/dog.safetensors exists"),
        ("import adapters/dog.safetensors --embedding x.safetensors", "is a concept file, which contains its tokens"),
    ],
)
@pytest.mark.usefixtures("dog")
def test_bad_input(base: Base, tmp_path: Path, command: str, message: str) -> None:
    Path("empty").mkdir()
    Path("posing.safetensors").write_text("two lines\nof text\n")
    dense = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": torch.randn(4, 32)}
    safetensors.torch.save_file(
        {f"{key}.lora_A.weight": value for key, value in dense.items()}
        | {f"{key}.lora_B.weight": value.t().contiguous() for key, value in dense.items()},
        "dense.safetensors",
    )
    run("export", "dog", "--to", "kohya", "--out", "exported")
    other = save_tiny_pipeline(tmp_path / "other", seed=1) if "OTHER" in command else ""
    places = {"TINY": base.id, "OTHER": str(other)}
    before = {path: path.read_bytes() for path in Path().rglob("*.safetensors")}
    done = run(*(places.get(word, word) for word in shlex.split(command)))
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    printed = [line for line in done.stderr.splitlines() if line]
    assert message in printed[0]
    assert [line.split(":")[0] for line in printed] in (["error"], ["error", "hint"])
    assert before == {path: path.read_bytes() for path in Path().rglob("*.safetensors")}


def record_widths(base: Base) -> None:
    """Let the ledger record the base model's widths, by a reservation of 8:12."""
    widths = {key: shape[1] for key, shape in base.layer_shapes.items()}
    space = Space(base_id=base.id, base_fingerprint=base.fingerprint, side="fa", seed=0, widths=widths)
    Library("adapters").reserve(space, 4, "cat", Interval(8, 4))


@pytest.mark.parametrize("claim", ["64:68", "0:2", "4:8", "0:1,8:12"])
def test_a_concept_file_cannot_claim_an_interval_of_other_columns(
    base: Base, dog: Adapter, claim: str, caplog: pytest.LogCaptureFixture
) -> None:
    record_widths(base)
    intervals = tuple(map(Interval.parse, claim.split(",")))
    replace(dog, spec=replace(dog.spec, intervals=intervals, name="fox")).save("fox.safetensors")
    lines(run("import", "fox.safetensors", "--collision", "keep"))
    assert "claims the interval" in caplog.text
    assert Adapter.load("adapters/fox.safetensors").spec.intervals == dog.spec.intervals == (Interval(0, 4),)


@pytest.mark.parametrize("claim", [(Interval(0, 4),), (Interval(0, 2), Interval(2, 2)), ()])
def test_a_concept_file_keeps_intervals_that_agree(
    base: Base, dog: Adapter, claim: tuple[Interval, ...], caplog: pytest.LogCaptureFixture
) -> None:
    record_widths(base)
    replace(dog, spec=replace(dog.spec, intervals=claim, name="fox")).save("fox.safetensors")
    lines(run("import", "fox.safetensors", "--collision", "keep"))
    assert "claims" not in caplog.text
    assert Adapter.load("adapters/fox.safetensors").spec.intervals == claim
