"""What is beside an output folder, and that nothing of the user's is ever removed."""

import itertools
import warnings
from pathlib import Path

import pytest

from structmat.cli import show
from structmat.cli.output import Output
from support.changes import Killed, stopped


def test_a_folder_of_the_user_in_the_place_of_the_partial_one_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "out.partial" / "thesis"
    own.mkdir(parents=True)
    (own / "chapter.tex").write_text("x")
    output = Output(tmp_path / "out", "compress", {})
    with pytest.raises(FileExistsError, match=r"'.*out\.partial' to be free .* a folder with other things"), output:
        pass
    assert (own / "chapter.tex").read_text() == "x"


def test_a_link_in_the_place_of_the_partial_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "file").write_text("x")
    (tmp_path / "out.partial").symlink_to(tmp_path / "home", target_is_directory=True)
    output = Output(tmp_path / "out", "compress", {})
    with pytest.raises(FileExistsError, match=r"'.*out\.partial' to be free .* a link that structmat"), output:
        pass
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["file"]


@pytest.mark.parametrize("content", ["{", "3", '{"other": 1}'])
def test_options_that_no_command_wrote_mark_a_folder_of_the_user(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "options.json").write_text(content)
    with pytest.raises(FileExistsError, match="a folder with other things"), Output(tmp_path / "out", "compress", {}):
        pass
    assert (tmp_path / "out.partial" / "options.json").read_text() == content


def test_a_file_in_the_place_of_the_partial_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("x")
    with pytest.raises(FileExistsError, match="a file that structmat"), Output(tmp_path / "out", "compress", {}):
        pass


def test_what_a_killed_command_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").touch()
    (tmp_path / "out.partial" / ".options.json.x1").touch()
    with Output(tmp_path / "out", "compress", {}):
        assert (tmp_path / "out.partial" / "options.json").is_file()


def work(folder: Path, text: str, **options: bool) -> None:
    """Do what a command does: keep something for going on, write a model, let it appear."""
    output = Output(folder / "out", "compress", {"text": text}, **options)
    with output:
        (output.partial / "fits").mkdir(exist_ok=True)
        (output.partial / "fits" / "fit").write_text(text)
        (output.new_folder() / "model").write_text(text)
        output.finish({})


def text_of(folder: Path) -> str:
    """The text of a whole output."""
    assert sorted(path.name for path in folder.iterdir()) == ["model", "structmat.json"]
    return (folder / "model").read_text()


def test_warnings_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with show.plain_warnings():
            print(warnings.formatwarning("few vectors", UserWarning, "file.py", 3), end="")
        assert warnings.formatwarning("few vectors", UserWarning, "file.py", 3).startswith("file.py:3: UserWarning")
    assert capsys.readouterr().out == "warning: few vectors\n"


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_a_stop_before_any_change_of_a_file(tmp_path: Path, error: type[BaseException]) -> None:
    between = 0
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        work(folder, "old")
        with stopped(number, error) as stop:
            work(folder, "new", overwrite=True)
        if stop.seen < number:
            break
        if not (folder / "out").exists():
            between += 1
            assert (text_of(folder / "out.partial" / "old"), text_of(folder / "out.partial" / "model")) == (
                "old",
                "new",
            )
        with pytest.raises(FileExistsError, match="was made with other options"):
            work(folder, "other")
        assert text_of(folder / "out") in ("old", "new")
        work(folder, "new", overwrite=True)
        assert text_of(folder / "out") == "new"
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert number > 20
    assert between == (error is Killed)
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_half_an_output_is_never_put_back(tmp_path: Path) -> None:
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        folder.mkdir()
        work(folder, "old")
        with stopped(number, Killed) as stop:
            work(folder, "new", overwrite=True)
        if stop.seen < number:
            break
        if (folder / "out").exists():
            (folder / "out").rename(folder / "taken")  # by the user
        with Output(folder / "out", "compress", {}, overwrite=True):
            assert not (folder / "out").exists() or text_of(folder / "out") == "old"
