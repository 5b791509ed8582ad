"""``structmat run``: recipes that are checked, resolved, run step by step, and run again with the same bytes."""

import importlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat
from processes import Forks
from structmat.cli import main
from structmat.cli.recipe import FILE, KEYS, Recipe, named_recipes, parsed_yaml, read_recipe, with_settings
from structmat.cli.run import Run
from structmat.cli.steps import KINDS, NOWHERE, Step, parameters, parsed
from structmat.compress.efforts import EFFORTS
from structmat.pretrained import run_recipe
from training import tiny

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its tokenizer under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("run")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    return path


COMPRESS = {"blocks": 2, "keep": 0.6, "layers": [".*q_proj", ".*up_proj"], "effort": "quick", "batch-size": 4}
RETRAIN = {"steps": 4, "save-steps": 2, "batch-size": 4, "device": "cpu", "set": ["disable_tqdm=true"]}


def compressing(folder: Path, **options: Any) -> dict[str, Any]:
    """A recipe with one step that takes no data."""
    return {"model": str(folder / "dense"), "steps": [{"compress": {**COMPRESS, **options}}]}


def of_all_kinds(folder: Path) -> dict[str, Any]:
    """A recipe with four steps."""
    texts = str(folder / "texts.txt")
    return {
        "model": str(folder / "dense"),
        "seed": 3,
        "steps": [
            {"compress": {**COMPRESS, "calibrate": texts}},
            {"retrain": {**RETRAIN, "data": texts, "eval": f"{texts}[-4:]", "teacher": "$model"}},
            {"evaluate": {"model": ["$compress", "$retrain"], "dense": "$model", "data": f"{texts}[-4:]"}},
            "export",
        ],
    }


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


MADE = {"model.safetensors", "config.json", "tokenizer.json", "export.onnx", FILE}
"""The files that tell neither times nor places."""


def made(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.name in MADE}


@needs_datasets
def test_all_steps_run_and_a_saved_recipe_makes_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    file = write(tmp_path / "my.yaml", {**of_all_kinds(Path()), "model": "dense"})  # paths that begin here
    out = tmp_path / "out"
    assert main(["run", file, "-o", str(out)]) == 0
    told = capsys.readouterr()
    places = {"compress": "compress", "retrain": "retrain", "evaluate": "evaluate.json", "export": "export.onnx"}
    assert [line for line in told.err.splitlines() if re.match(r"step .*: writing", line)] == [
        f"step {k} of 4, {name}: writing {out / place}" for k, (name, place) in enumerate(places.items(), 1)
    ]
    assert re.search(r"step 2 of 4, retrain: took .*; 2 steps are left\n", told.err)
    assert "checked with onnxruntime" in told.out
    figures = json.loads((out / "evaluate.json").read_text())["models"]
    assert list(figures) == [str(folder / "dense"), str(out / "compress"), str(out / "retrain")]
    assert len(structmat.plan_of(structmat.load_pretrained(out / "retrain"))) == 4
    assert {path.name for path in out.iterdir()} == {*places.values(), FILE, "structmat.json"}

    found = yaml.safe_load((out / FILE).read_text())
    assert [next(iter(step)) for step in found["steps"]] == list(places)
    assert found["model"] == str(folder / "dense")
    section = found["steps"][1]["retrain"]
    assert (section["seed"], section["model"], section["learning-rate"]) == (3, "$compress", 1e-4)
    assert section["data"] == str(folder / "texts.txt")
    assert section["eval"] == str(folder / "texts.txt[-4:]")
    assert found["made-with"]["structmat"] == structmat.__version__
    assert set(found["files"]) == {"model", "compress.calibrate", "retrain.data", "retrain.eval", "evaluate.data"}
    assert yaml.safe_load((out / "compress" / FILE).read_text())["steps"] == found["steps"][:1]

    monkeypatch.chdir(tmp_path)
    assert main(["run", str(out / "retrain" / FILE), "-o", "again"]) == 0
    first, again = made(out), made(tmp_path / "again")
    assert again.pop(FILE) == first["retrain/recipe.yaml"]
    assert again == {name: content for name, content in first.items() if name.startswith(("compress", "retrain"))}

    capsys.readouterr()
    assert main(["run", str(out / FILE), "-o", str(out)]) == 0  # the resolved recipe means the same
    told = capsys.readouterr()
    assert [line for line in told.err.splitlines() if line.startswith("step")] == [
        f"step {k} of 4, {name}: finished already" for k, name in enumerate(places, 1)
    ]
    (out / "export.onnx").unlink()
    before = made(out)
    assert main(["run", str(out / FILE), "-o", str(out), "--dry-run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == list(places)
    assert ["finished" in row for row in rows] == [True, True, True, False]
    assert made(out) == before
    assert main(["run", str(out / FILE), "-o", str(out)]) == 0
    assert made(out) == first


def test_what_a_step_depends_on_decides(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plain = tmp_path / "out", compressing(folder)
    record = run_recipe(plain, out)
    assert record == json.loads((out / "structmat.json").read_text())
    assert record["steps"]["compress"]["finished"]
    before = made(out)
    capsys.readouterr()

    moved = tmp_path / "moved"
    shutil.copytree(folder / "dense", moved)
    assert run_recipe(plain, out, moved) is not None  # the same model in another place
    assert "finished already" in capsys.readouterr().err.splitlines()[0]
    other = {**plain, "steps": [*plain["steps"], {"densify": {}}]}
    assert [name for name, step in run_recipe(other, out)["steps"].items() if step["finished"]] == [
        "compress",
        "densify",
    ]
    assert not structmat.plan_of(structmat.load_pretrained(out / "densify"))

    with pytest.raises(FileExistsError, match=r"made with other options \(keep: 0.6, now 0.5\)"):
        run_recipe(compressing(folder, keep=0.5), out)
    run_recipe(compressing(folder, keep=0.5), out, overwrite=True)
    assert made(out)["compress/model.safetensors"] != before["compress/model.safetensors"]
    run_recipe(plain, out, overwrite=True)
    after = made(out)
    assert {name: after[name] for name in before} == before
    capsys.readouterr()
    run_recipe(plain, out, overwrite=True)  # there is nothing to replace
    assert "step 1 of 1, compress: finished already" in capsys.readouterr().err

    (out / "compress" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="as step compress wrote it, but it changed since; pass --overwrite"):
        run_recipe(plain, out)
    run_recipe(plain, out, overwrite=True)
    assert made(out) == after


def test_files_that_changed_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = shutil.copy(folder / "texts.txt", tmp_path / "texts.txt")
    recipe = Recipe.resolved(compressing(folder, calibrate=str(texts)))
    data = yaml.safe_load(recipe.text())
    assert Recipe.resolved(data) == recipe
    data["made-with"]["torch"] = "1.0"
    Run.of(data, None, tmp_path / "out", overwrite=False)
    told = capsys.readouterr().err
    assert re.search(r"warning: the last bits of weights may differ .*: torch \S+, was 1\.0", told)
    (tmp_path / "texts.txt").write_text("w3 w4<|endoftext|>w5 w6", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"others are there now: compress\.calibrate; put them back, or remove 'files:'"
    ):
        Run.of(data, None, tmp_path / "out", overwrite=False)
    Run.of({**data, "files": {}}, None, tmp_path / "out", overwrite=False)


def test_others_folders_and_processes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match=r"expected a new folder for --out, but .*other' is there"):
        run_recipe(compressing(folder), tmp_path / "other")
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / "lock"),
        pytest.raises(BlockingIOError, match="another process is running a recipe"),
    ):
        run_recipe(compressing(folder), tmp_path / "out")
    recipe = {"model": str(folder / "dense"), "steps": [{"evaluate": {"data": str(folder / "texts.txt[:4]")}}]}
    (tmp_path / "out" / "evaluate.json").touch()
    (tmp_path / "out" / "lock").unlink(missing_ok=True)
    with pytest.raises(FileExistsError, match="expected a new folder for --out"):
        run_recipe(recipe, tmp_path / "out")
    (tmp_path / "out" / "evaluate.json").unlink()
    run_recipe(recipe, tmp_path / "out")
    recipe["steps"][0]["evaluate"]["batch-size"] = 4
    with pytest.raises(FileExistsError, match="as step evaluate wrote it, but it is not of this step"):
        run_recipe(recipe, tmp_path / "out")
    run_recipe(recipe, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "evaluate.json").read_text())["options"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("steps: [compress", "expected YAML, got something else"),
        ("steps:\n- compress: {keep: 0.5, keep: 0.6}", "the key 'keep' comes twice, in line 2"),
        ("[" * 900, "expected YAML, got something else: it is too deep"),
        ("[1, 2]", r"expected a recipe to be an object, got \[1, 2\]"),
        ("stepps: []", r"expected model, seed, .* in a recipe, got 'stepps'; did you mean steps\?"),
        ("steps: []", "expected at least one step, a list of compress, retrain"),
        ("steps: [compres]", r"expected each step to be one of compress, .*, got 'compres'; did you mean compress\?"),
        ("steps: [{compress: {}, retrain: {}}]", "expected each step to be one of"),
        ("steps: [{compress: 3}]", "expected the section of compress to be an object, got 3"),
        ("steps: [compress]", "expected a model, got none; give it behind the recipe"),
        ("model: [a]\nsteps: [compress]", "expected the model to be text or null"),
        ("model: DENSE\nseed: -1\nsteps: [compress]", "expected the seed to be an integer of at least 0, got -1"),
        ("model: DENSE\nsteps: [{compress: {kep: 1}}]", r"step compress: expected .*'kep', .*did you mean keep\?"),
        ("model: DENSE\nsteps: [{compress: {one-sided: true}}]", r"'one-sided', which .*did you mean two-sided\?"),
        ("model: DENSE\nsteps: [{compress: {out: x}}]", "got 'out', which the run sets"),
        ("model: DENSE\nsteps: [{compress: {keep: a}}]", "'step compress': Invalid value for '--keep'"),
        ("model: DENSE\nsteps: [{compress: {keep: true}}]", "step compress: expected a text or a number for keep"),
        ("model: DENSE\nsteps: [{compress: {keep: [1]}}]", r"expected a text or a number for keep, got \[1\]"),
        ("model: DENSE\nsteps: [{compress: {refine: 1}}]", "step compress: expected true or false for refine, got 1"),
        ("model: DENSE\nsteps: [{compress: {refine-steps: 0}}]", "'step compress': expected --refine-steps to"),
        ("model: DENSE\nsteps: [compress, retrain]", "'step retrain': Missing option '--data'"),
        ("model: DENSE\nsteps: [{compress: {model: $later}}]", r"there is by then \(\$model\), got '\$later'"),
        ("model: DENSE\nsteps: [export, {compress: {model: $export}}]", r"got '\$export'"),
        ("model: ./gone\nsteps: [compress]", r"expected a folder with a model, .* got './gone'"),
    ],
)  # fmt: skip
def test_what_is_no_recipe(text: str, error: str, folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "recipe.yaml", text.replace("DENSE", str(folder / "dense")))
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        run_recipe(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_that_are_not_there_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"one of best, default, quick, got 'quik'; did you mean quick\?"):
        read_recipe("quik")
    with pytest.raises(ValueError, match="expected a recipe of at most 256 KiB"):
        read_recipe(write(tmp_path / "large.yaml", "#" * (2**18 + 1)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"recipes need pyyaml: pip install 'structmat\[cli\]'"):
        read_recipe("quick")


def test_the_named_recipes_are_the_efforts() -> None:
    assert set(named_recipes()) == set(EFFORTS)
    for name in named_recipes():
        sections = read_recipe(name)["steps"]
        assert [next(iter(one)) for one in sections] == ["compress"]
        assert sections[0]["compress"]["effort"] == name
    assert read_recipe("best")["steps"][0]["compress"]["refine"] is True


def test_a_named_recipe_takes_model_and_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--set", "keep=0.6", "--set", "blocks=2", "--set", "compress.layers=['.*q_proj']"]
    assert main(["run", "quick", str(folder / "dense"), "--dry-run", *words]) == 0
    assert re.search(r"1 +compress +\$model +quick/compress +about \d+ s", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert main(["run", "quick", str(folder / "dense"), *words]) == 0
    options = json.loads((tmp_path / "quick" / "compress" / "structmat.json").read_text())["options"]
    assert (options["effort"], options["keep"], options["layers"]) == ("quick", 0.6, [".*q_proj"])


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("keep", "expected --set STEP.OPTION=VALUE, got 'keep'"),
        ("=3", "expected --set STEP.OPTION=VALUE, got '=3'"),
        ("dtype=float32", "where OPTION is one of several steps: compress, export"),
        ("kep=3", r"expected an option of a step for --set, got 'kep=3'; did you mean keep\?"),
        ("compres.keep=3", r"expected one of the steps for --set, got 'compres.keep=3'; did you mean compress\?"),
    ],
)
def test_settings_that_mean_nothing(setting: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        with_settings({"steps": ["compress", "export"]}, [setting])


def test_settings_change_one_step() -> None:
    recipe = {"model": "m", "steps": ["compress", {"retrain": {"steps": 3}}, {"retrain": None}]}
    found = with_settings(recipe, ["keep=0.5", "retrain-2.steps=7", "rule=[a=blast, b=low_rank]"])
    rules = ["a=blast", "b=low_rank"]
    steps = [{"compress": {"keep": 0.5, "rule": rules}}, {"retrain": {"steps": 3}}, {"retrain": {"steps": 7}}]
    assert found == {"model": "m", "steps": steps}
    assert recipe["steps"][0] == "compress"


def test_names_and_references_of_steps(folder: Path) -> None:
    recipe = Recipe.resolved(
        {"model": str(folder / "dense"), "steps": ["compress", "export", "densify", {"export": {"to": "executorch"}}]}
    )
    assert [(step.name, step.place, step.references()) for step in recipe.steps] == [
        ("compress", "compress", ["$model"]),
        ("export", "export.onnx", ["$compress"]),
        ("densify", "densify", ["$compress"]),
        ("export-2", "export-2.pte", ["$densify"]),
    ]


VALUES = {
    "keep": st.floats(0.01, 1), "blocks": st.integers(1, 64), "layers": st.lists(st.sampled_from([".*a", "b|c"])),
    "format": st.sampled_from(["blast", "low_rank", "monarch:keep=0.3"]),
    "two-sided": st.sampled_from([None, True, False]),
    "refine": st.booleans(), "refine-rate": st.floats(1e-9, 1),
    "samples": st.one_of(st.none(), st.integers(1, 10**6)),
    "separator": st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\0$"), min_size=1)),
    "effort": st.sampled_from(sorted(EFFORTS)), "seed": st.none(),
}  # fmt: skip


@settings(deadline=None, max_examples=12)
@given(st.fixed_dictionaries({}, optional={name: values for name, values in VALUES.items() if name != "seed"}))
def test_a_resolved_section_is_what_the_command_line_means(section: dict[str, Any]) -> None:
    step = Step.resolved("compress", "compress", section, {"model": "$model"})
    assert set(step.section) == set(parameters("compress"))
    again = yaml.safe_load(yaml.safe_dump(dict(step.section)))
    assert Step.resolved("compress", "compress", again, {}) == step
    assert parsed("compress", "compress", again, NOWHERE) == parsed(
        "compress", "compress", {"model": "$model", **section}, NOWHERE
    )


def test_every_option_is_a_key() -> None:
    commands: Any = structmat_app()
    for name in KINDS:
        options = {
            option[2:] for one in commands.imported(name).params for option in one.opts if option.startswith("--")
        }
        assert options - {"out", "json", "overwrite", "debug"} == set(parameters(name)) - {"model"}


def structmat_app() -> Any:
    app = importlib.import_module("structmat.cli.app")
    return importlib.import_module("typer").main.get_command(app.app)


def test_a_record_that_is_none(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(compressing(folder), out)
    record = json.loads((out / "structmat.json").read_text())
    record["steps"]["compress"]["finished"] = "yes"
    (out / "structmat.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="expected 'finished' of step 'compress' to be true or false, got 'yes'"):
        run_recipe(compressing(folder), out)


def test_yaml_without_surprises() -> None:
    assert parsed_yaml("a: &x [1]\nb: *x") == {"a": [1], "b": [1]}
    assert parsed_yaml("0.8") == 0.8
    assert KEYS[:3] == ("model", "seed", "steps")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@needs_datasets
@pytest.mark.skipif("STRUCTMAT_KILLS" not in os.environ, reason="takes minutes: set STRUCTMAT_KILLS=20")
@pytest.mark.slow
def test_a_killed_run_resumes_in_every_step(folder: Path, tmp_path: Path, forks: Forks) -> None:
    recipe, chance = of_all_kinds(folder), random.Random(0)
    changes = [0]
    for k in range(1, 5):  # how many changes of files there are up to the end of each step
        part = write(tmp_path / f"{k}.yaml", {**recipe, "steps": recipe["steps"][:k]})
        ended = forks.run(["run", part, "-o", str(tmp_path / f"quiet-{k}")])
        assert ended.status == 0, ended.told
        changes.append(ended.events)
    expected = made(tmp_path / "quiet-4")
    for k in range(1, 5):
        for event in chance.sample(range(changes[k - 1] + 1, changes[k] + 1), 3):
            out = tmp_path / f"{k}-{event}"
            killed = forks.run(["run", str(tmp_path / "4.yaml"), "-o", str(out)], signal="SIGKILL", event=event)
            assert killed.status == -signal.SIGKILL, killed.told
            ended = forks.run(["run", str(tmp_path / "4.yaml"), "-o", str(out)])
            assert ended.status == 0, ended.told
            done = [f"step {n} of 4" for n in range(1, k - 1)]
            assert all(f"{one}, " in ended.told and "finished already" in ended.told for one in done)
            assert made(out) == expected
            assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "quiet-4").iterdir()}
