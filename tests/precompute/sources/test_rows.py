"""Sources: the layouts, what is refused and how it is said, and names that try to leave the data root."""

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precompute.sources.rows import MAX_CAPTION_BYTES, Caption, Source, read_sources, resolve_inside
from precompute.sources.tables import MAX_JSON_LINE_BYTES, escaped
from shared.config import Data
from shared.errors import DataError, PrecogError, UsageError

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))
    elif _opened is not None and event in ("os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"):
        _opened.append(event)


sys.addaudithook(_note_opened)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Everything this process opens, lists, runs or connects to during the test."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (folder / name).write_bytes(b"video")
    return folder


def read(root: Path, **settings_: Any) -> list[Source]:
    return read_sources(Data.model_validate({"name": "test", "instance_data_root": root, **settings_}))


def refusal(root: Path, **settings_: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(root, **settings_)
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing that moves the cursor or turns the text"
    return message


def write_table(root: Path, content: str | bytes, name: str = "metadata.csv") -> str:
    table = root.parent / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(table)


def read_table(root: Path, content: str | bytes, name: str = "metadata.csv", **settings_: Any) -> list[Source]:
    return read(root, dataset_name=write_table(root, content, name), **settings_)


def table_refusal(root: Path, content: str | bytes, name: str = "metadata.csv", **settings_: Any) -> str:
    return refusal(root, dataset_name=write_table(root, content, name), **settings_)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(root: Path, columns: dict[str, Any], name: str = "metadata.parquet") -> str:
    pq.write_table(pa.table(columns), root.parent / name)
    return str(root.parent / name)


# Two text files


TEXT_FILES = {"caption_column": "prompts.txt", "video_column": "videos.txt"}


def test_two_text_files_pair_their_lines_with_any_line_ends(root: Path) -> None:
    (root / "prompts.txt").write_bytes("\ufeff  a grey cat \r\n\r\nein Hündchen\r\n".encode())
    (root / "videos.txt").write_bytes(b"a.mp4\n\n\nsub/c.mp4  \n\n")
    assert read(root, **TEXT_FILES) == [
        Source(root / name, name, (Caption(text, 1.0),), None, None, where)
        for name, text, where in (
            ("a.mp4", "a grey cat", "videos.txt line 1, prompts.txt line 1"),
            ("sub/c.mp4", "ein Hündchen", "videos.txt line 4, prompts.txt line 3"),
        )
    ]


def test_missing_text_file_or_line_is_named(root: Path) -> None:
    (root / "prompts.txt").write_text("one\ntwo\nthree\n")
    assert refusal(root, **TEXT_FILES) == "'prompts.txt' is in the data root, 'videos.txt' is not"
    (root / "videos.txt").write_text("a.mp4\nb.mp4\n")
    assert refusal(root, **TEXT_FILES) == (
        "prompts.txt has 3 captions, videos.txt has 2 videos; each must have one line per clip"
    )


def test_a_text_file_that_links_out_of_the_root_is_not_read(root: Path, opened: list[str]) -> None:
    (root.parent / "secret.txt").write_text("secret\n")
    (root / "prompts.txt").symlink_to(root.parent / "secret.txt")
    (root / "videos.txt").write_text("a.mp4\n")
    opened.clear()
    assert refusal(root, **TEXT_FILES) == "path 'prompts.txt' is a link that leaves the data root"
    assert opened == []


def test_the_first_five_problems_are_told_and_the_rest_counted(root: Path) -> None:
    (root / "prompts.txt").write_text("text\n" * 8)
    (root / "videos.txt").write_text("".join(f"no{i}.mp4\n" for i in range(8)))
    message = refusal(root, **TEXT_FILES)
    assert [f"'no{i}.mp4'" in message for i in range(8)] == [True] * 5 + [False] * 3
    assert message.endswith("; and 3 more")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"fine\n\xff\xfebad\n", "prompts.txt line 2: not UTF-8"),
        (b"one\ntwo\nth\x00ree\n", "prompts.txt line 3: a NUL character; is this UTF-8 text?"),
        ("caf\u00e9".encode("latin-1"), "prompts.txt line 1: not UTF-8"),
        ("text\n".encode("utf-16"), "prompts.txt line 1: a NUL character; is this UTF-8 text?"),
        (b"\xed\xa0\x80", "prompts.txt line 1: not UTF-8"),
    ],
)
def test_bad_text_names_the_file_and_line(root: Path, content: bytes, expected: str) -> None:
    (root / "prompts.txt").write_bytes(content)
    (root / "videos.txt").write_text("a.mp4\n")
    assert refusal(root, **TEXT_FILES) == expected


# A folder


def test_a_folder_pairs_videos_with_text_files_at_any_depth_in_order(root: Path) -> None:
    (root / "b.TXT").write_text("\n two\nlines \r\n")
    (root / "a.txt").write_text("\ufeffone")
    (root / "sub/c.txt").write_text("three")
    (root / "notes.json").write_text("{}")
    (root / "._a.mp4").write_text("a hidden file")
    (root / ".git").mkdir()
    (root / ".git/x.mp4").write_text("a file in a hidden folder")
    sources = read(root)
    assert [(s.name, s.captions[0].text, s.where) for s in sources] == [
        ("a.mp4", "one", "a.mp4"),
        ("b.mp4", "two lines", "b.mp4"),
        ("sub/c.mp4", "three", "sub/c.mp4"),
    ]
    assert [s.path for s in sources] == [root / s.name for s in sources]


def test_a_folder_names_videos_and_texts_without_a_single_partner(root: Path) -> None:
    (root / "a.txt").write_text("one")
    (root / "a.mov").write_text("a second video")
    (root / "sub/c.txt").write_text("  \n\n")
    (root / "sub/README.txt").write_text("no video")
    (root / "a.TXT").write_text("a second text")
    message = refusal(root)
    expected = "expected one video and one .txt of this name, got"
    assert f"a.mov: {expected} 'a.mov', 'a.mp4', 'a.TXT', 'a.txt'" in message
    assert f"b.mp4: {expected} 'b.mp4'" in message
    assert "sub/c.txt: the text file is empty; write a caption" in message
    assert f"sub/README.txt: {expected} 'sub/README.txt'" in message
    assert message.count(";") == 4


def test_a_folder_without_videos_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    message = refusal(tmp_path, **TEXT_FILES)
    assert message.endswith("has neither text files 'prompts.txt' and 'videos.txt' nor videos with a .txt beside each")


def test_a_linked_folder_is_not_silently_left_out(root: Path) -> None:
    (root / "more").symlink_to(root / "sub")
    assert "more: a link to a folder is not followed; " in refusal(root)


def test_a_folders_text_files_obey_the_path_rule_too(root: Path, opened: list[str]) -> None:
    (root.parent / "secret.txt").write_text("secret")
    (root / "a.txt").symlink_to(root.parent / "secret.txt")
    os.mkfifo(root / "b.txt")
    (root / "sub/c.txt").write_bytes(b"x" * 100_000)
    opened.clear()
    message = refusal(root)
    assert "a.txt: path 'a.txt' is a link that leaves the data root" in message
    assert "b.txt: path 'b.txt' is a device, socket or named pipe, not a file" in message
    assert "sub/c.txt: is 100,000 bytes; the limit of a caption is 16,384" in message
    assert all(path == str(root) or path.startswith(f"{root}/sub") for path in opened)


# Tables


def test_csv_takes_chosen_columns_quotes_and_seconds(root: Path) -> None:
    content = (
        "\ufefffile,start_seconds,words,other,end_seconds\r\n"
        'a.mp4,,"a ""big"", grey\ncat",1,\r\n'
        "\r\n"
        "sub/c.mp4,0.5,,2,2\r\n"
    )
    sources = read_table(root, content, caption_column="words", video_column="file")
    assert sources == [
        Source(root / "a.mp4", "a.mp4", (Caption('a "big", grey\ncat', 1.0),), None, None, "metadata.csv row 2"),
        Source(root / "sub/c.mp4", "sub/c.mp4", (Caption("", 1.0),), 0.5, 2.0, "metadata.csv row 4"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "metadata.csv is empty; its first line must name the columns"),
        ("video,caption\na.mp4,x\n", "metadata.csv has no column 'text'; there are 'video', 'caption'"),
        ("vidoe,text\na.mp4,x\n", "metadata.csv has no column 'video'; there are 'vidoe', 'text'"),
        ("video;text\na.mp4;x\n", "metadata.csv has no column 'text'; there are 'video;text'"),
        ("video,text,text\na.mp4,x,y\n", "metadata.csv has 2 columns 'text'"),
        ("video,text\na.mp4,x,y\n", "metadata.csv row 2 (line 2): expected 2 fields as in the header, got 3"),
        (
            'video,text\na.mp4,"x\ny"\nb.mp4,"open\na.mp4,z\n',
            "metadata.csv row 3 (line 4): a quote is opened and never closed",
        ),
        ('video,text\na.mp4,"x"y\n', "metadata.csv row 2 (line 2): ',' expected after '\"'"),
        (f"video,text\na.mp4,{'x' * 131_073}\n", "row 2 (line 2): field larger than field limit (131072)"),
        ("video,text\na.mp4,x\nb.mp4,y\0\n", "metadata.csv line 3: a NUL character; is this UTF-8 text?"),
        (b"video,text\na.mp4,x\xc3\n", "metadata.csv line 2: not UTF-8"),
        ("video,text\n,x\n", "metadata.csv row 2: the video's path is empty"),
        (f"video,text\na.mp4,{'x' * 16_385}\n", "row 2: the caption has 16,385 bytes; the limit is 16,384"),
        ("video,text\n", "has no rows"),
        ("video,text,start_seconds\na.mp4,x,soon\n", "row 2: start_seconds is 'soon', not a number"),
        ("video,text,start_seconds\na.mp4,x,nan\n", "metadata.csv row 2: start_seconds is not a finite number"),
        (
            "video,text,start_seconds\na.mp4,x,-1\n",
            "row 2: start_seconds is -1; it counts from the video's first frame",
        ),
        ("video,text,start_seconds,end_seconds\na.mp4,x,2,2\n", "end_seconds is 2; it must be after the start at 2"),
        ("video,text,end_seconds\na.mp4,x,0\n", "row 2: end_seconds is 0; it must be after the start at 0"),
    ],
)
def test_a_bad_csv_names_the_file_and_row(root: Path, content: str | bytes, expected: str) -> None:
    assert table_refusal(root, content).endswith(expected)


def test_a_table_larger_than_any_is_refused_before_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precompute.sources.tables.MAX_TEXT_FILE_BYTES", 20)
    assert table_refusal(root, "video,text\na.mp4,x\n\n\n") == "metadata.csv has more than 20 bytes"


def test_jsonl_takes_weighted_captions_and_seconds(root: Path) -> None:
    content = jsonl(
        {"video": "a.mp4", "text": " plain "},
        {"video": "a.mp4", "text": ["one", "two"], "start_seconds": 1, "end_seconds": 2.5, "more": {"a": [1]}},
    ) + jsonl({"video": "b.mp4", "text": [{"text": "three", "weight": 2}, {"text": "", "weight": 0.5}, "five"]})
    plain, timed, weighted = read_table(root, content.replace("\n", "\r\n\r\n"), "clips.JSONL")
    assert plain.captions == (Caption("plain", 1.0),)
    assert timed.captions == (Caption("one", 1.0), Caption("two", 1.0))
    assert (timed.start_seconds, timed.end_seconds) == (1.0, 2.5)
    assert weighted.captions == (Caption("three", 2.0), Caption("", 0.5), Caption("five", 1.0))
    assert [s.where for s in (plain, timed, weighted)] == [f"clips.JSONL row {row}" for row in (1, 3, 5)]


def test_repeats_and_loss_weight_are_read_from_any_table(root: Path) -> None:
    [weighted] = read_table(root, "video,text,repeats,loss_weight\na.mp4,x,3,0.5\n")
    assert (weighted.repeats, weighted.loss_weight) == (3, 0.5)
    plain, zero = read_table(root, jsonl({"video": "a.mp4", "text": "x"}, ZERO_WEIGHT), "clips.jsonl")
    assert (plain.repeats, plain.loss_weight, zero.loss_weight) == (1, 1.0, 0.0)


ZERO_WEIGHT = {"video": "b.mp4", "text": "x", "loss_weight": 0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"repeats": 1.5}, "repeats is 1.5; it must be a whole number from 1 to 10,000"),
        ({"repeats": -1}, "repeats is -1; it must be a whole number from 1 to 10,000"),
        ({"repeats": 10_001}, "repeats is 10001; it must be a whole number from 1 to 10,000"),
        ({"repeats": "often"}, "repeats is 'often', not a number"),
        ({"loss_weight": -0.5}, "loss_weight is -0.5; it must be 0 or above"),
        ({"loss_weight": math.inf}, "loss_weight is not a finite number"),
        ({"loss_weight": True}, "loss_weight is True, not a number"),
    ],
)
def test_bad_repeats_or_loss_weight_name_their_row(root: Path, values: dict[str, object], expected: str) -> None:
    message = table_refusal(root, jsonl({"video": "a.mp4", "text": "x", **values}), "clips.jsonl")
    assert message == f"clips.jsonl row 1: {expected}"


CAPTION_FAULTS = [
    (None, "the caption is missing, not text"),
    (7, "the caption is of type int, not text"),
    ([], "the list of captions is empty"),
    ([["x"]], "the caption is of type list, not text"),
    ("a\0b", "the caption has a NUL character"),
    ("\ud800", "the caption has half a surrogate pair, which is not Unicode text"),
    ("é" * 8193, "the caption has 16,386 bytes; the limit is 16,384"),
    ([{"txet": "x"}], "a caption has a field 'txet'; expected 'text' and 'weight'"),
    ([{"weight": 1}], "the caption is missing, not text"),
    ([{"text": "x", "weight": 0}], "a caption's weight is 0; it must be above 0"),
    ([{"text": "x", "weight": -1}], "a caption's weight is -1; it must be above 0"),
    ([{"text": "x", "weight": True}], "a caption's weight is True, not a number"),
    ([{"text": "x", "weight": "two"}], "a caption's weight is 'two', not a number"),
    ([{"text": "x", "weight": 10**400}], "a caption's weight is not a finite number"),
]


@pytest.mark.parametrize(("caption", "expected"), CAPTION_FAULTS)
def test_a_bad_caption_names_its_row(root: Path, caption: object, expected: str) -> None:
    good = {"video": "a.mp4", "text": "fine"}
    message = table_refusal(root, jsonl(good, {"video": "a.mp4", "text": caption}), "clips.jsonl")
    assert message == f"clips.jsonl row 2: {expected}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"video": "a.mp4"}', "the object has no column 'text'; there are 'video'"),
        ("{}", "the object has no column 'text'; there are none"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"video": "a.mp4", "text": "x"', "not JSON at column 31: Expecting ',' delimiter"),
        ('{"video": "a.mp4", "text": "x\ty"}', "not JSON at column 30: Invalid control character at"),
        ('{"video": "a.mp4", "text": "x", "end_seconds": NaN}', "end_seconds is not a finite number"),
        ('{"video": "a.mp4", "text": "x", "end_seconds": 1e999}', "end_seconds is not a finite number"),
        ('{"video": "a.mp4", "text": "x", "end_seconds": "two"}', "end_seconds is 'two', not a number"),
        ('{"video": "a.mp4", "text": ' + "[" * 500 + "]" * 500 + "}", "the caption is of type list, not text"),
        ('{"video": "a.mp4", "text": "x", "end_seconds": ' + "[" * 500 + "]" * 500 + "}", "end_seconds is [[[[[["),
        ("[" * 500_000, "not JSON: maximum recursion depth exceeded"),
        ('"' + '\\"' * 400_000 + "[" * 33, "not JSON at column 1: Unterminated string starting at"),
        ("1" * 5000, "not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
        ('"' + "x" * MAX_JSON_LINE_BYTES + '"', "the line has more than 1,048,576 bytes"),
        ('{"video": "\\u0000a.mp4", "text": "x"}', "the video's path has a NUL character"),
        ('{"video": ["a.mp4"], "text": "x"}', "the video's path is of type list, not text"),
        ('{"video": null, "text": "x"}', "the video's path is missing, not text"),
    ],
)
def test_a_bad_jsonl_line_names_its_row(root: Path, line: str, expected: str) -> None:
    message = table_refusal(root, jsonl({"video": "a.mp4", "text": "fine"}) + line + "\n", "clips.jsonl")
    assert message.startswith(f"clips.jsonl row 2: {expected}")


def test_parquet_takes_texts_lists_and_weighted_structs(root: Path) -> None:
    table = write_parquet(
        root,
        {"video": ["a.mp4", "b.mp4"], "text": ["one", ""], "start_seconds": [None, 0.5], "other": [b"\xff", b""]},
    )
    sources = read(root, dataset_name=table)
    assert [(s.captions[0].text, s.start_seconds, s.where) for s in sources] == [
        ("one", None, "metadata.parquet row 1"),
        ("", 0.5, "metadata.parquet row 2"),
    ]
    table = write_parquet(root, {"video": ["a.mp4"], "text": [["one", "two"]]})
    assert read(root, dataset_name=table)[0].captions == (Caption("one", 1.0), Caption("two", 1.0))
    table = write_parquet(root, {"video": ["a.mp4"], "text": [[{"text": "one", "weight": 3}, {"text": "two"}]]})
    assert read(root, dataset_name=table)[0].captions == (Caption("one", 3.0), Caption("two", 1.0))


def test_a_bad_parquet_names_the_file_and_row(root: Path) -> None:
    assert table_refusal(root, b"PAR1 but not really PAR1", "x.parquet").startswith("x.parquet after row 0: not a rea")
    table = write_parquet(root, {"video": ["a.mp4"], "caption": ["x"]})
    assert refusal(root, dataset_name=table) == ("metadata.parquet has no column 'text'; there are 'video', 'caption'")
    table = write_parquet(root, {"video": ["a.mp4"] * 3, "text": ["x", None, "y"]})
    assert refusal(root, dataset_name=table) == "metadata.parquet row 2: the caption is missing, not text"
    table = write_parquet(root, {"video": ["a.mp4"], "text": [b"x"]})
    assert refusal(root, dataset_name=table) == "metadata.parquet row 1: the caption is of type bytes, not text"
    bad = pa.array([b"fine", b"\xff"]).view(pa.string())
    table = write_parquet(root, {"video": ["a.mp4"] * 2, "text": bad})
    assert refusal(root, dataset_name=table) == "metadata.parquet row 2: not UTF-8"


def test_id_token_stands_before_every_caption_with_one_space(root: Path) -> None:
    content = jsonl({"video": "a.mp4", "text": ["  one", ""]})
    for id_token in ("TOKEN", " TOKEN "):
        [source] = read_table(root, content, "clips.jsonl", id_token=id_token)
        assert [caption.text for caption in source.captions] == ["TOKEN one", "TOKEN"]


def test_a_table_that_is_not_there_or_lies_in_the_root_is_said(root: Path) -> None:
    (root / "metadata.csv").write_text("video,text\n")
    message = refusal(root, dataset_name="metadata.csv")
    assert message == f"dataset_name 'metadata.csv' is not a file; there is '{escaped(str(root / 'metadata.csv'))}'"
    assert refusal(root, dataset_name="other.jsonl") == "dataset_name 'other.jsonl' is not a file"
    assert refusal(root, dataset_name="x" * 300).endswith("cannot be read: File name too long")
    os.mkfifo(root / "pipe.csv")
    assert refusal(root, dataset_name=str(root / "pipe.csv")).endswith("pipe.csv' is not a file")


def test_a_data_set_configuration_is_refused_where_it_means_nothing(root: Path) -> None:
    with pytest.raises(UsageError, match="dataset_config_name"):
        read_table(root, "video,text\na.mp4,x\n", dataset_config_name="en")


# datasets.load_dataset


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    return folder


def test_a_folder_of_tables_goes_through_load_dataset_by_column_names(root: Path, offline_datasets: Path) -> None:
    rows = [{"file": "a.mp4", "words": ["one", "two"], "end_seconds": 2.0}, {"file": "sub/c.mp4", "words": ["three"]}]
    (offline_datasets / "train.jsonl").write_text(jsonl(*rows))
    first, second = read(root, dataset_name=str(offline_datasets), caption_column="words", video_column="file")
    assert first.captions == (Caption("one", 1.0), Caption("two", 1.0))
    assert (first.name, first.end_seconds, first.where) == ("a.mp4", 2.0, "tables row 1")
    assert (second.name, second.end_seconds, second.where) == ("sub/c.mp4", None, "tables row 2")
    assert refusal(root, dataset_name=str(offline_datasets), caption_column="word", video_column="file").endswith(
        "has no column 'word'; there are 'file', 'words', 'end_seconds'"
    )


def test_a_column_of_embedded_videos_is_said_to_be_no_paths(root: Path, offline_datasets: Path) -> None:
    import datasets

    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"video": [{"path": "a.mp4", "bytes": b"x"}], "text": ["x"]}, features=features)
    rows.to_parquet(offline_datasets / "train.parquet")
    assert refusal(root, dataset_name=str(offline_datasets)).endswith(
        "column 'video' holds Video data; it must hold paths relative to instance_data_root"
    )


@pytest.mark.parametrize(
    "name",
    [
        *("http://localhost/x", "hf://datasets/x/y", "/no/such/folder", "../up", "a/b/c", "x y", "~/x", "a\nb"),
        *("csv", "json", "text", "parquet", "videofolder"),  # would read the working directory
    ],
)
def test_what_is_no_hub_name_is_not_looked_up(root: Path, name: str, opened: list[str]) -> None:
    assert refusal(root, dataset_name=name).endswith("a folder or a hub name")
    assert opened == []


def test_what_load_dataset_raises_becomes_one_line(root: Path, offline_datasets: Path) -> None:
    assert "datasets.load_dataset fails: " in refusal(root, dataset_name=str(offline_datasets))
    (offline_datasets / "train.csv").write_text("video,text\na.mp4,None\n")
    assert refusal(root, dataset_name=str(offline_datasets)) == "tables row 1: the caption is missing, not text"
    (offline_datasets / "train-more.csv").write_text("video,words\na.mp4,None\n")
    assert "words: double vs video: large_string text: double" in refusal(root, dataset_name=str(offline_datasets))


# Names that try to leave the root


@pytest.fixture
def trapped(root: Path) -> Iterator[Path]:
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"secret")
    (root / "inside.mp4").symlink_to("a.mp4")
    (root / "inside").symlink_to("sub")
    (root / "absolute.mp4").symlink_to(root / "a.mp4")
    (root / "out.mp4").symlink_to(outside / "secret.mp4")
    (root / "relative-out.mp4").symlink_to("../outside/secret.mp4")
    (root / "out").symlink_to(outside)
    (root / "dangling.mp4").symlink_to("gone.mp4")
    (root / "dangling-out.mp4").symlink_to(outside / "gone.mp4")
    (root / "sibling.mp4").symlink_to(f"{root}-2/a.mp4")
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "zero.mp4").symlink_to("/dev/zero")
    (root / "stdin.mp4").symlink_to("/proc/self/fd/0")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(root)  # a socket's path is short
        listener.bind("socket.mp4")
        os.chdir(here)
        yield root


ATTACKS = {
    "..": "has '..'",
    "../outside/secret.mp4": "has '..'",
    "sub/../../outside/secret.mp4": "has '..'",
    "out/../outside/secret.mp4": "has '..'",
    "/etc/passwd": "absolute",
    "/dev/zero": "absolute",
    "\\\\server\\share\\a.mp4": "backslash",
    "\\\\?\\C:\\a.mp4": "backslash",
    "C:/a.mp4": "drive letter",
    "http://localhost/a.mp4": "URL scheme",
    "pipe:0": "URL scheme",
    "file:///etc/passwd": "URL scheme",
    "concat:a.mp4|b.mp4": "URL scheme",
    "data:video/mp4;base64,AAAA": "URL scheme",
    "subfile,,start,0,end,9,,:/etc/passwd": "not found",
    "~/a.mp4": "not found",
    "$HOME/a.mp4": "not found",
    "%2e%2e/outside/secret.mp4": "not found",
    "‥/outside/secret.mp4": "not found",
    "\uff0e\uff0e/outside/secret.mp4": "not found",
    "*.mp4": "not found",
    "a.mp4/x": "Not a directory",
    "a.mp4\0.jpg": "control character",
    "\x1b[2Ja.mp4": "control character",
    "a\x85.mp4": "control character",
    "\ud800.mp4": "not Unicode",
    "a\u202e4pm.exe": "\\u202e4pm",
    "": "empty",
    " ": "empty",
    ".": "a folder",
    "folder.mp4": "a folder",
    "inside": "a folder",
    "pipe.mp4": "a device, socket or named pipe",
    "socket.mp4": "a device, socket or named pipe",
    "loop.mp4": "leads to itself",
    "out": "leaves the data root",
    "out.mp4": "leaves the data root",
    "out/secret.mp4": "leaves the data root",
    "relative-out.mp4": "leaves the data root",
    "dangling-out.mp4": "leaves the data root",
    "sibling.mp4": "leaves the data root",
    "zero.mp4": "leaves the data root",
    "stdin.mp4": "leaves the data root",
    "dangling.mp4": "not found",
    "x" * 5000: "too long",
}


@pytest.mark.parametrize("name", ATTACKS, ids=lambda name: ascii(name[:40]))
def test_a_name_outside_the_root_is_refused_and_nothing_is_opened(trapped: Path, name: str, opened: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        resolve_inside(trapped, name)
    assert ATTACKS[name] in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    table = write_table(trapped, jsonl({"video": name, "text": "x"}), "clips.jsonl")
    opened.clear()
    assert refusal(trapped, dataset_name=table).startswith("clips.jsonl row 1: ")
    assert opened == [table]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *(("./a.mp4", "a.mp4"), ("sub//c.mp4", "sub/c.mp4"), ("inside.mp4", "a.mp4"), ("absolute.mp4", "a.mp4")),
        *(("inside/c.mp4", "sub/c.mp4"), ("12:30 take.mp4", "12:30 take.mp4"), ("..a.mp4", "..a.mp4")),
        *(("a b.mp4", "a b.mp4"), ("猫 \u200d.mp4", "猫 \u200d.mp4")),
    ],
)
def test_plain_names_and_links_inside_the_root_are_fine(trapped: Path, name: str, target: str) -> None:
    (trapped / target).touch()
    [source] = read_table(trapped, jsonl({"video": name, "text": "x"}), "clips.jsonl")
    assert source.path == trapped / target
    assert not source.path.is_symlink()
    assert source.name == Path(name).as_posix()


def test_a_tilde_is_the_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    write_table(root, "video,text\na.mp4,x\n")
    [source] = read(Path("~/root"), dataset_name="~/metadata.csv")
    assert (source.path, source.name) == (root / "a.mp4", "a.mp4")
    assert "'~nobody-of-this-name/clips' is not a folder" in refusal(Path("~nobody-of-this-name/clips"))


def test_the_root_itself_may_be_a_link_or_relative(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    [source] = read_table(Path("link"), "video,text\na.mp4,x\n")
    assert source.path == root / "a.mp4"


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["..", ".", "", "out", "inside", "sub", "c.mp4", "a.mp4", "~", "\\", "C:", "\0"])))
def test_no_combination_of_parts_leaves_the_root(trapped: Path, parts: list[str]) -> None:
    try:
        path = resolve_inside(trapped, "/".join(parts))
    except DataError:
        return
    assert path in (trapped / "a.mp4", trapped / "sub/c.mp4")


# Malformed input of every kind


def only_project_errors(name: str, content: bytes, **settings_: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        root.mkdir()
        (root / "a.mp4").touch()
        table = Path(folder, name)
        table.write_bytes(content)
        try:
            sources = read(root, dataset_name=str(table), **settings_)
        except PrecogError as error:
            assert str(error).isprintable()
            assert name in str(error)
        else:
            assert all(len(c.text.encode()) <= MAX_CAPTION_BYTES for s in sources for c in s.captions)
            assert {source.path for source in sources} == {root.resolve() / "a.mp4"}


CSV_PARTS = [*("video,text\n", "a.mp4", ",", '"', "\n", "\r\n"), *("\r", "x", "\0", "é", "start_seconds", "1e9", "-1")]


@settings(max_examples=15)
@given(st.lists(st.sampled_from(CSV_PARTS), max_size=30).map("".join), st.binary(max_size=3))
def test_any_csv_gives_sources_or_one_project_error(text: str, tail: bytes) -> None:
    only_project_errors("t.csv", b"video,text,start_seconds\n" + text.encode() + tail)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a.mp4"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "weight", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=15)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["video", "text", "start_seconds", "end_seconds"]), json_values), max_size=3
    )
)
def test_any_jsonl_rows_give_sources_or_one_project_error(rows: list[dict[str, object]]) -> None:
    only_project_errors("t.jsonl", jsonl(*rows).encode())


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4), st.booleans()
)
def test_a_mutated_parquet_gives_sources_or_one_project_error(
    mutations: list[tuple[float, int]], truncate: bool
) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"video": ["a.mp4"] * 50, "text": ["x"] * 50, "start_seconds": [0.5] * 50}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for place, byte in mutations:
        content[int(place * len(content))] = byte
    only_project_errors("t.parquet", bytes(content[: -mutations[0][1]] if truncate else content))
