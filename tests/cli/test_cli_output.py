"""What is beside an output folder, and that nothing of the user's is ever removed."""

from pathlib import Path

import pytest

from structmat.cli.output import Output


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
