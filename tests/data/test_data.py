"""Data: every kind of source gives the same documents, and tokens end up in the right rows."""

import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from structmat.cli.reading import measured_split
from structmat.data import LabelledTexts, read_images, read_labelled_texts, read_texts, token_batches, token_rows
from structmat.data.chats import chat_text
from structmat.data.tokens import encode, language_collator

datasets = pytest.importorskip("datasets")

STORIES = ["One fish.", "Two fish.", "Red fish.", "Blue fish."]


class Letters:
    """A tokenizer: one token per letter, ids from 10."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2, pad: int | None = 0, adds: bool = False) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.adds = bos, eos, pad, adds

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        ids = [ord(letter) - ord("a") + 10 for letter in text[: options.get("max_length")]]
        return {"input_ids": [self.bos_token_id, *ids] if self.adds and self.bos_token_id is not None else ids}


class Processor:
    """An image processor: the mean colour, as one pixel."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": torch.tensor(images.getpixel((0, 0)))[None, :, None, None] / 255}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def stories_file(folder: Path) -> str:
    path = folder / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n", encoding="utf-8")
    return str(path)


def table_file(folder: Path, kind: str, **columns: list[Any]) -> str:
    table = datasets.Dataset.from_dict(columns)
    path = str(folder / f"table.{kind}")
    if kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path)
    return path


# texts


@pytest.mark.parametrize(
    ("part", "expected"),
    [("", STORIES), ("[:2]", STORIES[:2]), ("[1:3]", STORIES[1:3]), ("[-1:]", STORIES[-1:]), ("[ 2 : ]", STORIES[2:])],
)
def test_a_text_file_and_its_parts(tmp_path: Path, part: str, expected: list[str]) -> None:
    assert read_texts(stories_file(tmp_path) + part) == expected


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress])
def test_compressed_text_files(tmp_path: Path, compress: Any) -> None:
    path = tmp_path / ("stories.txt.xz" if compress is lzma.compress else "stories.txt.gz")
    path.write_bytes(compress(Path(stories_file(tmp_path)).read_bytes()))
    assert read_texts(f"{path}[:3]") == STORIES[:3]


def test_a_text_without_separator_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("= Title =\n\nA text.\n", encoding="utf-8")
    assert read_texts(str(path)) == ["= Title =\n\nA text."]
    assert read_texts(str(path), separator="\n\n") == ["= Title =", "A text."]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a[1:2]"
    path.mkdir()
    path = path / "b.txt[:1]"
    path.write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a file ending in \.txt, \.md"):
        read_texts(str(path))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_tables(tmp_path: Path, kind: str) -> None:
    path = table_file(tmp_path, kind, text=STORIES, page=[1, 2, 3, 4])
    assert read_texts(path) == STORIES
    assert read_texts(path + "[1:]") == STORIES[1:]


def test_a_compressed_table(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv.xz"
    path.write_bytes(
        lzma.compress(Path(table_file(tmp_path, "tsv", sentence=STORIES, label=[0, 1, 0, 1])).read_bytes())
    )
    assert read_texts(str(path)) == STORIES


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = table_file(tmp_path, "json", a=STORIES, b=STORIES[::-1], page=[1, 2, 3, 4])
    assert read_texts(path, column="b") == STORIES[::-1]
    with pytest.raises(ValueError, match=r"expected the column of the text of .* to be one of 'a', 'b', got None"):
        read_texts(path)
    with pytest.raises(ValueError, match=r"to be one of 'a', 'b', got 'page'"):
        read_texts(path, column="page")


def test_saved_data_sets_and_splits(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"story": STORIES})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(str(tmp_path / "two"))
    assert read_texts(str(tmp_path / "one")) == STORIES
    assert read_texts(str(tmp_path / "two"), split="test") == STORIES[3:]
    with pytest.raises(ValueError, match=r"expected split to be one of 'train', 'test' of .*, got None"):
        read_texts(str(tmp_path / "two"))


def test_a_folder_of_text_files_has_a_document_in_each(tmp_path: Path) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "texts" / "b.md").write_text("# Three\n", encoding="utf-8")
    (tmp_path / "texts" / "more" / "c.txt").write_text("four<|endoftext|>five", encoding="utf-8")
    (tmp_path / "texts" / "notes.rst").write_text("no text of ours", encoding="utf-8")
    assert read_texts(str(tmp_path / "texts")) == ["one\n\ntwo", "# Three", "four", "five"]
    assert read_texts(f"{tmp_path}/texts[1:3]") == ["# Three", "four"]
    assert read_texts(f"{tmp_path}/texts/*.txt") == ["one\n\ntwo"]
    assert read_texts(f"{tmp_path}/**/*.txt[1:]") == ["four", "five"]


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<|end_of_text|>", "\n<eos>\n"])
def test_end_of_text_tokens_are_recognised(tmp_path: Path, end: str) -> None:
    path = tmp_path / "stories.md"
    path.write_text("\ufeff" + end.join(STORIES), encoding="utf-8")
    assert read_texts(str(path)) == STORIES
    assert read_texts(f"{path}[1:2]") == STORIES[1:2]


@pytest.mark.parametrize("between", ["\n\n", "\n \n\n", "\n"])
def test_a_slice_of_one_text_counts_its_pieces(tmp_path: Path, between: str) -> None:
    path = tmp_path / "stories.txt"
    path.write_text(between.join(STORIES) + "\n", encoding="utf-8")
    joint = "\n" if between == "\n" else "\n\n"
    assert read_texts(f"{path}[1:3]") == [joint.join(STORIES[1:3])]
    assert read_texts(str(path)) == [between.join(STORIES)]
    assert read_texts(str(path), separator=between) == STORIES
    with pytest.raises(ValueError, match="expected at least one document in"):
        read_texts(f"{path}[9:]")


CHATS = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in STORIES]


class Template(Letters):
    """The tokenizer with a chat template."""

    chat_template = "…"

    def apply_chat_template(self, chat: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        text = "".join(f"<{message['role']}>{message['content']}" for message in chat)
        return text + "<assistant>" * add_generation_prompt


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["messages", "talk"])
def test_chats(tmp_path: Path, kind: str, column: str) -> None:
    path = table_file(tmp_path, kind, source=["a"] * 4, **{column: CHATS})
    assert read_texts(path) == [f"Hi\n\n{text}" for text in STORIES]
    assert read_texts(path, tokenizer=Letters()) == [f"Hi\n\n{text}" for text in STORIES]
    assert read_texts(f"{path}[:1]", tokenizer=Template()) == [f"<user>Hi<assistant>{STORIES[0]}"]


def test_chats_in_other_words(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "image", "text": None}]
    assert chat_text([{"role": "user", "content": parts}], Template(), answering=True) == "<user>Hi<assistant>"
    shared = [{"from": "system", "value": ""}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert chat_text(shared, Template()) == "<user>Hi<assistant>Ho"
    with pytest.raises(ValueError, match="expected messages with 'role' and 'content', got 'speaker'"):
        chat_text([{"speaker": "x"}])


@pytest.mark.parametrize("names", [("instruction", "input", "output"), ("question", "context", "answer")])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_instructions(tmp_path: Path, names: tuple[str, str, str], kind: str) -> None:
    rows = [["Add.", "Say."], ["1 + 1", ""], ["2", "Yes."]]
    path = table_file(tmp_path, kind, **dict(zip(names, rows, strict=True)))
    assert read_texts(path) == ["Add.\n\n1 + 1\n\n2", "Say.\n\nYes."]
    assert read_texts(f"{path}[1:]", tokenizer=Template()) == ["<user>Say.<assistant>Yes."]
    assert read_texts(path, column=names[2]) == ["2", "Yes."]


def test_a_pattern_of_tables(tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.jsonl").write_text(json.dumps({"text": STORIES[k]}) + "\n", encoding="utf-8")
    assert read_texts(f"{tmp_path}/*.jsonl") == STORIES[:2]
    (tmp_path / "2.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match="or files of one such kind, got "):
        read_texts(f"{tmp_path}/*.*")


@pytest.mark.parametrize("name", ["stori.txt", "storeis", "texts/stories", "no/such/folder", "./x", "x.jsonl", "*.txt"])
def test_a_misspelt_path_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # which alone asks the Hub
    (tmp_path / "texts").mkdir()
    (tmp_path / "stories").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no such file or folder here") as told:
        read_texts(name)
    assert ("did you mean 'stories'?" in str(told.value)) == (name == "storeis")
    with pytest.raises(ImportError, match="needs the package datasets"):
        read_texts("somebody/something")


def test_well_known_sets_are_asked_for_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, configuration: str | None, data_files: Any = None) -> Any:
        asked.append((name, configuration, data_files and sorted(data_files)))
        rows = datasets.Dataset.from_dict({"text": [" = One = \n", "", "Two.\n"]})
        return datasets.DatasetDict(train=rows, test=rows.select([2]), validation=rows.select([0]))

    monkeypatch.setattr(datasets, "load_dataset", load)  # there is no Hub in a test
    assert read_texts("wikitext2") == ["= One =\n\nTwo."]
    assert read_texts("wikitext2", split="test") == ["Two."]
    assert read_texts("c4[:2]") == ["= One ="]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", None)] * 2 + [
        ("allenai/c4", None, ["train", "validation"])
    ]
    assert (measured_split("wikitext2[:9]", None), measured_split("wikitext2", "train")) == ("test", "train")
    assert (measured_split("c4", None), measured_split("somebody/something", None)) == ("validation", None)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("{stories}[1]", {}, r"expected a slice such as \[:1500\] or \[-300:\] after the source, got .*\[1\]'"),
        ("[:1]", {}, r"expected a file, a folder, a pattern .*, or the name of a data set on the Hub, got '\[:1\]'"),
        ("{stories}[9:]", {}, "expected at least one document in .*, got none"),
        ("{stories}", {"split": "train"}, "expected no split or column for the text file .*, got 'train'"),
        ("{stories}", {"column": "text"}, "expected no split or column for the text file .*, got 'text'"),
        ("{table}", {"separator": "|"}, r"expected a separator only for a text file, got '\|' for"),
    ],
)
def test_what_does_not_go(tmp_path: Path, source: str, options: dict[str, str], message: str) -> None:
    source = source.format(stories=stories_file(tmp_path), table=table_file(tmp_path, "csv", text=STORIES))
    with pytest.raises(ValueError, match=message):
        read_texts(source, **options)


def test_what_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"expected a file, a folder, a pattern .*, or the name of a data set on the Hub, got"
    ):
        read_texts(str(tmp_path / "nothing.txt"))


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_file(tmp_path, "csv", text=STORIES)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs the package datasets; pip install 'structmat\[train\]'"):
        read_texts(path)
    assert read_texts(stories_file(tmp_path)) == STORIES


# tokens


def test_rows_are_cut_and_begin_with_bos() -> None:
    rows = [[1, 10, 11, 12], [1, 10, 11, 12], [1, 13, 14, 15]]
    assert token_rows(Letters(), ["abc", "abcdef"], length=4) == rows
    assert token_rows(Letters(), ["abc", "abcdef", "x"], length=4, most=2) == rows[:2]
    assert token_rows(Letters(), ["abc", "abcdef", "x"], length=4, tokens=4) == rows[:1]
    assert token_rows(Letters(), ["abc", "abcdef", "x"], length=4, tokens=5) == rows[:2]
    assert token_rows(Letters(), ["abc", "abcdef", "x"], length=4, tokens=5, most=1) == rows[:1]
    assert token_rows(Letters(bos=None), ["abcdefg"], length=3) == [[10, 11], [12, 13], [14, 15, 16]]
    assert token_rows(Letters(), ["ab"], length=1) == [[1], [10], [11]]
    assert token_rows(Letters(adds=True), ["", "b"], length=4) == [[1], [1, 11]]
    assert token_rows(Letters(adds=True), ["abc"], length=9) == [[1, 10, 11, 12]]
    assert token_rows(Letters(bos=None), ["abc"], length=9) == [[10, 11, 12]]


def test_packed_rows_hold_everything_in_order() -> None:
    rows = token_rows(Letters(), ["abc", "de", "f"], length=4, packed=True)
    assert rows == [[1, 10, 11, 12], [2, 1, 13, 14], [2, 1, 15, 2]]
    assert token_rows(Letters(), ["abc", "de", "f"], length=4, packed=True, most=1) == rows[:1]
    assert token_rows(Letters(), ["abc", "de", "f"], length=4, packed=True, tokens=4) == rows[:1]
    assert token_rows(Letters(bos=2), ["abc", "de"], length=7, packed=True) == [[2, 10, 11, 12, 2, 13, 14]]


def test_one_bos_token_begins_a_chat() -> None:
    class Adds(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 1, 12]}  # of the template, and of the tokenizer itself

    assert encode(Adds(), "c") == [1, 12]


def test_batches_are_padded_and_masked() -> None:
    first, second = token_batches(Letters(pad=None), ["abc", "d", "ef"], length=8, batch_size=2)
    assert first["input_ids"].tolist() == [[1, 10, 11, 12], [1, 13, 2, 2]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert second["input_ids"].tolist() == [[1, 14, 15]]


def test_the_collator_labels_what_is_no_padding() -> None:
    batch = language_collator(Letters(pad=None, eos=None))([[1, 2, 0], [3]])
    assert batch["labels"].tolist() == [[1, 2, 0], [3, -100, -100]]
    assert batch["input_ids"].tolist() == [[1, 2, 0], [3, 0, 0]]


@pytest.mark.parametrize(
    ("tokenizer", "texts", "options", "message"),
    [
        (Letters(), ["a"], {"length": 0}, "expected length to be an integer of at least 1, got 0"),
        (Letters(), [], {"length": 4}, "expected at least one document, got none"),
        (Letters(eos=None), ["a"], {"length": 4, "packed": True}, "expected a tokenizer with an EOS token"),
        (Letters(), ["a"], {"length": 4, "packed": True}, "expected texts that fill a row of 4 tokens, got 3"),
    ],
)
def test_what_gives_no_rows(tokenizer: Letters, texts: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_rows(tokenizer, texts, **options)


def test_one_text_is_no_list() -> None:
    with pytest.raises(TypeError, match="expected several texts, got one; put it into a list"):
        token_rows(Letters(), "abc", length=4)


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="expected batch_size to be an integer of at least 1, got 0"):
        token_batches(Letters(), ["a"], length=4, batch_size=0)


# labelled


def test_labelled_texts(tmp_path: Path) -> None:
    path = table_file(tmp_path, "tsv", sentence=["ab", "cde", "f"], label=[1, 0, 1])
    found = read_labelled_texts(path + "[:2]")
    assert found == LabelledTexts(["ab", "cde"], [1, 0], ())
    assert found.examples(Letters(), length=2) == [
        {"input_ids": [10, 11], "labels": 1},
        {"input_ids": [12, 13], "labels": 0},
    ]


def test_named_classes(tmp_path: Path) -> None:
    path = table_file(tmp_path, "json", text=["a", "b", "c"], label=["no", "yes", "no"])
    assert read_labelled_texts(path) == LabelledTexts(["a", "b", "c"], [0, 1, 0], ("no", "yes"))
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "a"]))
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).save_to_disk(str(tmp_path / "saved"))
    assert read_labelled_texts(str(tmp_path / "saved")) == LabelledTexts(["a"], [1], ("z", "a"))


@pytest.mark.parametrize("bad", [-1, 0.5])
def test_classes_that_are_none(tmp_path: Path, bad: float) -> None:
    path = table_file(tmp_path, "json", text=["a", "b"], label=[0, bad])
    with pytest.raises(ValueError, match=r"expected classes from 0 or names of classes in column 'label' of .*, got"):
        read_labelled_texts(path)


def test_no_labelled_text(tmp_path: Path) -> None:
    path = table_file(tmp_path, "json", text=["a"], label=[0])
    with pytest.raises(ValueError, match=r"expected at least one of the 1 entries of .*, got none"):
        read_labelled_texts(path + "[1:]")


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for name, colour in (("green", (0, 255, 0)), ("red", (255, 0, 0))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for k in range(3):
                image.new("RGB", (2, 2), colour).save(folder / f"{k}.png")
    return str(tmp_path / "pictures")


def test_images(pictures: str) -> None:
    found = read_images(pictures, Processor(), split="train")
    assert (len(found), found.classes, found.labels) == (6, ("green", "red"), [0, 0, 0, 1, 1, 1])
    assert found[5]["labels"] == 1
    assert found[5]["pixel_values"].flatten().tolist() == [1, 0, 0]
    blind = read_images(pictures + "[:1]", Processor(), split="test", augment=lambda image: image.point(lambda _: 0))
    assert blind[0]["pixel_values"].any().item() is False


def test_no_images(pictures: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected at least one of the 6 entries of .*, got none"):
        read_images(pictures + "[6:]", Processor(), split="train")
    path = table_file(tmp_path, "json", text=["a"], label=[0])
    with pytest.raises(ValueError, match=r"expected the column of the images of .* to be one of none"):
        read_images(path, Processor())


def test_a_table_as_json_lines_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in STORIES), encoding="utf-8")
    assert read_texts(str(path)) == STORIES
