"""Sources: the layouts, what is refused and how it is said, and names that try to leave the data root."""

import gc
import json
import os
import socket
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.config import Data
from shared.errors import DataError, PrecogError, UsageError
from shared.sources.root import DataRoot
from shared.sources.rows import Caption, Listing, Source, read_sources
from shared.sources.tables import MAX_CAPTION_BYTES, MAX_JSON_LINE_BYTES, escaped

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


def listing(root: Path, **settings_: Any) -> Listing:
    return read_sources(Data.model_validate({"name": "test", "instance_data_root": root, **settings_}))


def read(root: Path, **settings_: Any) -> list[Source]:
    return listing(root, **settings_).sources


def skipped(root: Path, **settings_: Any) -> dict[str, str]:
    return {source.name: source.skipped for source in read(root, **settings_) if source.skipped}


def refusal(root: Path, **settings_: Any) -> str:
    with pytest.raises(PrecogError) as caught:
        read(root, **settings_)
    assert str(caught.value).isprintable(), "one line, nothing that moves the cursor or turns the text"
    return str(caught.value)


def write_table(root: Path, content: str | bytes, name: str = "metadata.csv") -> str:
    table = root.parent / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(table)


def read_table(root: Path, content: str | bytes, name: str = "metadata.csv", **settings_: Any) -> list[Source]:
    return read(root, dataset_name=write_table(root, content, name), **settings_)


def table_fault(root: Path, content: str | bytes, name: str = "metadata.csv") -> str:
    """Return why a table is refused, or why its only faulty row is skipped."""
    try:
        [bad] = [source for source in read_table(root, content, name) if source.skipped]
        message = f"{bad.where}: {bad.skipped.removeprefix('unusable: ').removeprefix(f'{bad.where}: ')}"
    except PrecogError as error:
        message = str(error)
    assert message.isprintable(), "one line, nothing that moves the cursor or turns the text"
    return message


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(root: Path, columns: dict[str, Any], name: str = "metadata.parquet") -> str:
    pq.write_table(pa.table(columns), root.parent / name)
    return str(root.parent / name)


# Two text files


TEXT_FILES = {"caption_column": "prompts.txt", "video_column": "videos.txt"}


def test_two_text_files_pair_their_lines_with_any_line_ends(root: Path) -> None:
    (root / "prompts.txt").write_bytes("\ufeff  a grey cat \r\nein Hündchen\r\n\r\n".encode())
    (root / "videos.txt").write_bytes(b"a.mp4\nsub/c.mp4  \n")
    assert read(root, **TEXT_FILES) == [
        Source(root / name, name, (Caption(text, 1.0),), None, None, where)
        for name, text, where in (
            ("a.mp4", "a grey cat", "videos.txt line 1, prompts.txt line 1"),
            ("sub/c.mp4", "ein Hündchen", "videos.txt line 2, prompts.txt line 2"),
        )
    ]


@pytest.mark.parametrize(
    ("captions", "videos", "expected"),
    [
        (b"a\n", None, "'prompts.txt' with the captions is in the data root, 'videos.txt' is not"),
        (
            b"a\nb\n",
            b"a.mp4\n",
            "prompts.txt has 2 captions, videos.txt has 1 videos; each must have one line per clip",
        ),
        (b"\na\n  \nb\n", b"a.mp4\n\n\nb.mp4\n", "prompts.txt: line 1, 3 is blank, so that pairs may be shifted; "),
        (b"a\nb\n", b"a.mp4\n\nb.mp4\n", "videos.txt: line 2 is blank, so that pairs may be shifted; "),
        (b"fine\n\xff\xfebad\n", b"a.mp4\n", "prompts.txt line 2: not UTF-8"),
        (b"one\nth\x00ree\n", b"a.mp4\n", "prompts.txt line 2: a NUL character; save the file as UTF-8 text"),
        ("text\n".encode("utf-16"), b"a.mp4\n", "prompts.txt line 1: UTF-16; save the file as UTF-8 text"),
    ],
)
def test_text_files_that_do_not_pair_are_refused(
    root: Path, captions: bytes, videos: bytes | None, expected: str
) -> None:
    (root / "prompts.txt").write_bytes(captions)
    if videos is not None:
        (root / "videos.txt").write_bytes(videos)
    assert refusal(root, **TEXT_FILES).startswith(expected)


def test_a_row_with_a_fault_is_skipped_and_named_and_not_every_row_may_have_one(root: Path) -> None:
    (root / "prompts.txt").write_text("text\n" * 8)
    (root / "videos.txt").write_text("".join(f"no{i}.mp4\n" for i in range(8)))
    message = refusal(root, **TEXT_FILES)
    assert [f"'no{i}.mp4'" in message for i in range(8)] == [True] * 5 + [False] * 3
    assert message.endswith("; and 3 more")
    (root / "no3.mp4").touch()
    reasons = skipped(root, **TEXT_FILES)
    assert reasons.keys() == {f"no{i}.mp4" for i in range(8) if i != 3}
    where = "unusable: videos.txt line 1, prompts.txt line 1"
    assert reasons["no0.mp4"] == f"{where}: path 'no0.mp4' not found in the data root"


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


def test_a_folder_as_people_have_it_names_what_is_left_out(root: Path) -> None:
    """Missing, empty, doubled and unreadable captions, stray files, an image, names of every kind."""
    (root / "a.txt").write_text("one")
    (root / "a.TXT").write_text("a second text")
    (root / "a.mov").write_text("a second video of that name")
    (root / "sub/c.txt").write_text("  \n\n")
    (root / "utf16.mp4").touch()
    (root / "utf16.txt").write_bytes("text".encode("utf-16"))
    for name in ("README.txt", "LICENSE", ".DS_Store", "sub/Thumbs.db", "photo.jpg", "._a.mp4"):
        (root / name).write_text("x")
    found = listing(root)
    assert [(s.name, s.captions[0].text) for s in found.sources if not s.skipped] == [
        ("a.mov", "one"),
        ("a.mp4", "one"),
    ]
    no_caption = "no caption: write one, or set data.default_caption"
    assert skipped(root) == {
        "b.mp4": no_caption,
        "sub/c.mp4": no_caption,
        "utf16.mp4": "unusable: its caption utf16.txt: line 1: UTF-16; save the file as UTF-8 text",
    }
    *doubled, stray = found.warnings
    listed = "'.DS_Store', '._a.mp4', 'LICENSE', 'README.txt', 'photo.jpg', 'sub/Thumbs.db'"
    assert stray == f"6 files are no part of the data set: {listed}; images are clips where data.frame_buckets has 1"
    assert len(doubled) == 2 and "a.mp4: of 'a.txt', 'a.TXT' the first is its caption" in doubled
    default = [s.captions for s in read(root, default_caption=" a dog ", id_token=" TOK ") if s.name == "b.mp4"]
    assert default == [(Caption("TOK a dog", 1.0),)]
    assert read(root, default_caption="")[2].captions == (Caption("", 1.0),)
    assert "photo.jpg" in [s.name for s in read(root, frame_buckets=[1, 9])]


ODD_NAMES = ("take:1", "a\\b", "-dash", " space", "new\nline", "😀", "x" * 250, "rec-10:00", "%41", "a.b.c", "\x85")


def test_odd_file_names_are_clips_in_a_folder_and_in_a_table(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(f"the text of {name!r}")
    found = listing(tmp_path)
    assert {s.path.name: s.captions[0].text for s in found.sources} == {
        f"{name}.mp4": f"the text of {name!r}" for name in ODD_NAMES
    }
    assert found.warnings == [] and not any(s.skipped for s in found.sources)
    sources = read_table(tmp_path, jsonl(*({"video": f"{name}.mp4", "text": "x"} for name in ODD_NAMES)), "x.jsonl")
    assert [s.path.name for s in sources] == [f"{name}.mp4" for name in ODD_NAMES]


def test_composed_and_decomposed_names_are_equal_in_every_layout(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = tmp_path / "root" / decomposed
    folder.mkdir(parents=True)
    (folder / f"{composed}.mp4").touch()
    (folder / f"{decomposed}.txt").write_text("x")
    [source] = read(folder.parent)
    assert source.captions == (Caption("x", 1.0),)
    for name in (f"{composed}/{composed}.mp4", f"{composed}/{decomposed}.mp4", f"{decomposed}/{decomposed}.mp4"):
        [found] = read_table(folder.parent, jsonl({"video": name, "text": "x"}), "x.jsonl")
        assert found.path == source.path


def test_links_that_lead_out_are_taken_on_demand(tmp_path: Path) -> None:
    """A hub cache: each file of the snapshot is a link to a blob."""
    root, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    (blobs / "more").mkdir(parents=True)
    root.mkdir()
    for name, content in (("111", "video"), ("222", "a cat"), ("more/d.mp4", "video"), ("more/d.txt", "a dog")):
        (blobs / name).write_text(content)
    for name, target in (("a.mp4", "111"), ("a.txt", "222"), ("gone.mp4", "333"), ("more", "more")):
        (root / name).symlink_to(blobs / target)
    (root / "loop.mp4").symlink_to("loop.mp4")
    (root / "up").symlink_to(root)
    (blobs / "more/again").symlink_to(blobs / "more")
    outside = "is a link that leaves the data root; data.follow_links=true takes it"
    kept_inside = refusal(root, default_caption="x")
    assert f"path 'gone.mp4' {outside}" in kept_inside and f"path 'a.txt' {outside}" in kept_inside
    (root / "b.mp4").touch()
    assert any("more: a link to a folder is not followed; data.follow" in w for w in listing(root).warnings)
    followed = {"follow_links": True, "default_caption": "x"}
    assert [(s.name, s.path, s.captions[0].text) for s in read(root, **followed) if not s.skipped] == [
        ("a.mp4", blobs / "111", "a cat"),
        ("b.mp4", root / "b.mp4", "x"),
        ("more/d.mp4", blobs / "more/d.mp4", "a dog"),
    ]
    assert skipped(root, **followed) == {
        "gone.mp4": "unusable: path 'gone.mp4' not found: a link to a missing file",
        "loop.mp4": "unusable: path 'loop.mp4' is a link that leads to itself",
    }
    assert sum("a link to a folder that is read already" in line for line in listing(root, **followed).warnings) == 2


def test_the_names_of_every_guide_are_found(root: Path) -> None:
    for files in (
        {"prompt.txt": "a cat\n", "videos.txt": "a.mp4\n"},
        {"captions.txt": "a cat\n", "video.txt": "a.mp4\n"},
        {"metadata.csv": "file_name,caption\na.mp4,a cat\n"},
        {"metadata.jsonl": jsonl({"path": "a.mp4", "prompt": "a cat"})},
    ):
        for name, content in files.items():
            (root / name).write_text(content)
        assert [(s.name, s.captions[0].text) for s in read(root)] == [("a.mp4", "a cat")]
        for name in files:
            (root / name).unlink()


def test_text_files_obey_the_path_rule_too(root: Path, opened: list[str]) -> None:
    (root.parent / "secret.txt").write_text("secret")
    (root / "a.txt").symlink_to(root.parent / "secret.txt")
    os.mkfifo(root / "b.txt")
    (root / "sub/c.txt").write_bytes(b"x" * 100_000)
    opened.clear()
    reasons = refusal(root)
    assert "a.mp4: its caption a.txt: path 'a.txt' is a link that leaves the data root" in reasons
    assert "b.mp4: its caption b.txt: path 'b.txt' is a device, socket or named pipe, not a file" in reasons
    assert "sub/c.mp4: its caption sub/c.txt: is 100,000 bytes; the limit of a caption is 16,384" in reasons
    assert all(path == str(root) or path.startswith(f"{root}/sub") for path in opened)
    (root / "prompts.txt").symlink_to(root.parent / "secret.txt")
    (root / "videos.txt").write_text("a.mp4\n")
    opened.clear()
    assert "path 'prompts.txt' is a link that leaves the data root" in refusal(root) and opened == []


# Tables


def test_csv_takes_chosen_columns_quotes_and_seconds(root: Path) -> None:
    content = (
        "\ufeff\r\nfile,start_seconds,words,other,end_seconds,repeats,loss_weight\r\n"
        'a.mp4,,"a ""big"", grey\ncat",1,,,\r\n'
        "\r\n"
        "sub/c.mp4,0.5,,2,2,3,0\r\n"
    )
    sources = read_table(root, content, caption_column="words", video_column="file", default_caption="")
    text = (Caption('a "big", grey\ncat', 1.0),)
    assert sources == [
        Source(root / "a.mp4", "a.mp4", text, None, None, "metadata.csv line 4"),
        Source(root / "sub/c.mp4", "sub/c.mp4", (Caption("", 1.0),), 0.5, 2.0, "metadata.csv line 6", 3, 0.0),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "metadata.csv has no column 'text'; there are none; set data.caption_column"),
        ("video,texts\na.mp4,x\n", "has no column 'text'; there are 'video', 'texts'; set data.caption_column"),
        ("video,text,text\na.mp4,x,y\n", "metadata.csv has 2 columns 'text'"),
        ("video,text\na.mp4,x,y\n", "metadata.csv line 2: expected 2 fields as in the header"),
        ("video,text\na.mp4\n", "metadata.csv line 2: expected 2 fields as in the header"),
        ('video,text\na.mp4,"x\ny"\nb.mp4,"open\na.mp4,z\n', "line 4: a quote is opened and never closed"),
        (f"video,text\na.mp4,{'x' * 131_073}\n", "line 2: field larger than field limit (131072)"),
        (b"video,text\na.mp4,x\xc3\n", "metadata.csv line 2: not UTF-8"),
        ("video,text\n,x\n", "metadata.csv line 2: the video's path is empty"),
        ("video,text\n", "has no rows"),
        ("video,text,end_seconds\na.mp4,x,0\n", "line 2: end_seconds is 0; it must be after the start at 0"),
    ],
)
def test_a_bad_csv_names_the_file_and_line(
    root: Path, content: str | bytes, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert table_fault(root, content).endswith(expected)
    monkeypatch.setattr("shared.sources.tables.MAX_TEXT_FILE_BYTES", -1)
    assert table_fault(root, content) == "metadata.csv has more than -1 bytes", "nothing is read"


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


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"repeats": 1.5}, "repeats = 1.5: should be a valid integer"),
        ({"repeats": 10_001}, "repeats = 10001: should be less than or equal to 10000"),
        ({"loss_weight": -0.5}, "loss_weight = -0.5: should be greater than or equal to 0"),
        ({"loss_weight": float("inf")}, "loss_weight = inf: should be a finite number"),
        ({"start_seconds": -1}, "start_seconds = -1: should be greater than or equal to 0"),
        ({"start_seconds": "soon"}, "start_seconds = 'soon': should be a valid number"),
        ({"end_seconds": [[1]]}, "end_seconds = [[1]]: should be a valid number"),
        ({"start_seconds": 2, "end_seconds": 2}, "end_seconds is 2; it must be after the start at 2"),
        ({"text": 7}, "captions.0.text = 7: should be a valid string"),
        ({"text": ["x", None]}, "captions.1.text = None: should be a valid string"),
        ({"text": "\ud800"}, "captions.0.text = '\\ud800': 'utf-8' codec can't encode"),
        (
            {"text": "é" * 8193},
            "captions.0.text = 'éééééééééééé...ééééééééééééé': has 16,386 bytes; the limit is 16,384",
        ),
        ({"text": [{"txet": "x"}]}, "captions.0.text = {'txet': 'x'}: Field required"),
        ({"text": [{"text": "x", "more": 1}]}, "captions.0.more = 1: Extra inputs are not permitted"),
        ({"text": [{"text": "x", "weight": 0}]}, "captions.0.weight = 0: should be greater than 0"),
        ({"text": [{"text": "x", "weight": 10**400}]}, "captions.0.weight = 1000"),
        ({"video": "\0a.mp4"}, "path '\\x00a.mp4' has a control character"),
        ({"video": ["a.mp4"]}, "the video's path is ['a.mp4'], not text"),
        ({"video": None}, "the video's path is None, not text"),
    ],
)
def test_a_bad_cell_names_its_row(root: Path, cells: dict[str, object], expected: str) -> None:
    good = {"video": "a.mp4", "text": "fine"}
    message = table_fault(root, jsonl(good, good | cells), "clips.jsonl")
    assert message.startswith(f"clips.jsonl row 2: {expected}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"video": "a.mp4"}', "the object has no column 'text'; there are 'video'"),
        ("null", "not a JSON object"),
        ('{"video": "a.mp4", "text": "x"', "not JSON at column 31: Expecting ',' delimiter"),
        ('{"video": "a.mp4", "text": "x", "end_seconds": 1e999}', "end_seconds = inf: should be a finite number"),
        ('{"video": "a.mp4", "text": ' + "[" * 500 + "]" * 500 + "}", "captions.0.text = [[[[[["),
        ("[" * 500_000, "not JSON: maximum recursion depth exceeded"),
        ("1" * 5000, "not JSON: Exceeds the limit (4300 digits) for integer string conversion"),
        ('"' + "x" * MAX_JSON_LINE_BYTES + '"', "the line has more than 1,048,576 bytes"),
    ],
)
def test_a_bad_jsonl_line_names_its_row(root: Path, line: str, expected: str) -> None:
    message = table_fault(root, jsonl({"video": "a.mp4", "text": "fine"}) + line + "\n", "clips.jsonl")
    assert message.startswith(f"clips.jsonl row 2: {expected}")


def test_parquet_takes_texts_lists_and_weighted_structs(root: Path) -> None:
    table = write_parquet(
        root,
        {"video": ["a.mp4", "b.mp4"], "text": ["one", "two"], "start_seconds": [None, 0.5], "other": [b"\xff", b""]},
    )
    sources = read(root, dataset_name=table)
    assert [(s.captions[0].text, s.start_seconds, s.where) for s in sources] == [
        ("one", None, "metadata.parquet row 1"),
        ("two", 0.5, "metadata.parquet row 2"),
    ]
    table = write_parquet(root, {"video": ["a.mp4"], "text": [["one", "two"]]})
    assert read(root, dataset_name=table)[0].captions == (Caption("one", 1.0), Caption("two", 1.0))
    table = write_parquet(root, {"video": ["a.mp4"], "text": [[{"text": "one", "weight": 3}, {"text": "two"}]]})
    assert read(root, dataset_name=table)[0].captions == (Caption("one", 3.0), Caption("two", 1.0))


def test_a_row_without_a_caption_is_skipped_or_takes_the_default(root: Path) -> None:
    rows = [{"video": "a.mp4", "text": text} for text in ("", "  ", None, [], [""], [{"text": "", "weight": 2}], "x")]
    table = write_table(root, jsonl(*rows, {"video": "b.mp4", "text": "y", "repeats": 0}), "clips.jsonl")
    assert [s.skipped.partition(":")[0] for s in read(root, dataset_name=table)] == [
        *["no caption"] * 6,
        "",
        "repeats is 0",
    ]
    default = read(root, dataset_name=table, default_caption="d")
    assert [s.captions[0].text for s in default] == [*["d"] * 6, "x", "y"]


def test_a_bad_parquet_names_the_file_and_row(root: Path) -> None:
    assert table_fault(root, b"PAR1 but not really PAR1", "x.parquet").startswith("x.parquet after row 0: not a rea")
    table = write_parquet(root, {"video": ["a.mp4"], "words": ["x"]})
    assert "metadata.parquet has no column 'text'; there are 'video', 'words'" in refusal(root, dataset_name=table)
    for cell in (pa.array([b"\xff"]).view(pa.string()), pa.array([2**62], pa.timestamp("us"))):
        table = write_parquet(root, {"video": ["a.mp4"], "text": cell})
        assert refusal(root, dataset_name=table).startswith("metadata.parquet after row 0: not a readable parquet file")


def test_a_table_that_is_not_there_or_lies_in_the_root_is_said(root: Path) -> None:
    (root / "metadata.csv").write_text("video,text\n")
    message = refusal(root, dataset_name="metadata.csv")
    assert message == f"dataset_name 'metadata.csv' is not a file; there is '{escaped(str(root / 'metadata.csv'))}'"
    assert refusal(root, dataset_name="other.jsonl") == "dataset_name 'other.jsonl' is not a file"
    assert refusal(root, dataset_name="x" * 300).endswith("cannot be read: File name too long")
    with pytest.raises(UsageError, match="dataset_config_name"):
        read_table(root, "video,text\na.mp4,x\n", dataset_config_name="en")


# datasets.load_dataset, and videos inside other files


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    return folder


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user/precog/embedded"


def test_a_folder_of_tables_goes_through_load_dataset_by_column_names(root: Path, offline_datasets: Path) -> None:
    name = str(offline_datasets)
    assert "datasets.load_dataset fails: " in refusal(root, dataset_name=name)
    rows = [{"file": "a.mp4", "words": ["one", "two"], "end_seconds": 2.0}, {"file": "sub/c.mp4", "words": ["three"]}]
    (offline_datasets / "train.jsonl").write_text(jsonl(*rows))
    first, second = read(root, dataset_name=name, caption_column="words", video_column="file")
    assert first.captions == (Caption("one", 1.0), Caption("two", 1.0))
    assert (first.name, first.end_seconds, first.where) == ("a.mp4", 2.0, "tables row 1")
    assert (second.name, second.end_seconds, second.where) == ("sub/c.mp4", None, "tables row 2")
    expected = "has no column 'word'; there are 'file', 'words', 'end_seconds'; set data.caption_column"
    assert refusal(root, dataset_name=name, caption_column="word", video_column="file").endswith(expected)


def test_videos_inside_a_data_set_are_read_from_their_bytes(root: Path, offline_datasets: Path, copies: Path) -> None:
    import datasets

    features = datasets.Features({"video": datasets.Video(decode=False), "text": datasets.Value("string")})
    cells = [{"path": "A.MP4", "bytes": b"x"}]
    rows = datasets.Dataset.from_dict({"video": cells, "text": ["x"]}, features=features)
    parquet = offline_datasets / "train.parquet"
    rows.to_parquet(parquet)
    for name in (offline_datasets, parquet):
        [embedded] = read(root, dataset_name=str(name))
        assert embedded.path.read_bytes() == b"x" and embedded.path.parent == copies and embedded.path.suffix == ".mp4"
        assert embedded.name.endswith(" row 1: A.MP4")
    struct = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    for path, expected in (("a.mp4", ""), ("/etc/passwd", "row 1: path '/etc/passwd' is absolute")):
        pq.write_table(pa.table({"video": pa.array([{"path": path}], struct), "text": ["x"]}), parquet)
        for name in (offline_datasets, parquet):
            if expected:
                assert expected in refusal(root, dataset_name=str(name))
            else:
                assert read(root, dataset_name=str(name))[0].path == root / path
    table = write_parquet(root, {"video": [b"one", b"two", b"one"], "text": ["x", "y", "z"]})
    assert [s.path.read_bytes() for s in read(root, dataset_name=table)] == [b"one", b"two", b"one"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
def test_a_folder_of_videos_goes_through_load_dataset(root: Path, offline_datasets: Path) -> None:
    (offline_datasets / "train").mkdir()
    (offline_datasets / "train/v.mp4").write_bytes(b"video")
    (offline_datasets / "train/metadata.csv").write_text("file_name,text\nv.mp4,a cat\n")
    [source] = read(root, dataset_name=str(offline_datasets))
    assert (source.path, source.captions[0].text) == (offline_datasets / "train/v.mp4", "a cat")
    gc.collect()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))


def test_webdataset_tars_are_read(root: Path, copies: Path) -> None:
    first = {"a.json": b'{"caption": "one", "repeats": 2, "start_seconds": 0.5}', "a.mp4": b"video a", "a.cls": b"1"}
    first |= {"x/b.c.mp4": b"other", "x/b.txt": b" two\nlines ", "none.mp4": b"n", "../../up.mp4": b"u"}
    write_tar(root / "0.tar", first | {"note.txt": b"?"})
    write_tar(root / "1.tar", {"d.MP4": b"video a", "d.txt": b"three", "e.mp4": b"", "e.txt": b"x", "f.txt": b"\xff"})
    for settings_ in ({}, {"dataset_name": str(root)}, {"dataset_name": str(root / "?.tar")}):
        sources = read(root, **settings_)
        assert [(s.name, s.path.read_bytes(), s.captions[0].text, s.repeats) for s in sources if not s.skipped] == [
            ("0.tar/a.mp4", b"video a", "one", 2),
            ("0.tar/x/b.c.mp4", b"other", "two lines", 1),
            ("1.tar/d.MP4", b"video a", "three", 1),
        ]
        assert sources[0].start_seconds == 0.5
        assert {s.skipped.partition(":")[0] for s in sources if s.skipped} == {"no caption", "unusable"}
    assert all(path.parent == copies for path in copies.rglob("*")), "nothing is extracted by name"
    with tarfile.open(root / "1.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"odd-{kind!r}.mp4")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert len(read(root)) == len(sources)
    (root / "0.tar").write_bytes(b"x" * 2000)
    assert "0.tar: not a readable, uncompressed tar" in refusal(root)


def test_copies_of_embedded_videos_are_bounded(root: Path, copies: Path) -> None:
    table = write_parquet(root, {"video": [bytes(1000), b"x" * 1000], "text": ["x", "y"]})
    limit = {"embedded_videos_gib": 2500 / 2**30}
    read(root, dataset_name=table, **limit)
    kept = {path: path.stat().st_mtime_ns for path in copies.iterdir()}
    read(root, dataset_name=table, **limit)
    assert {path: path.stat().st_mtime_ns for path in copies.iterdir()} == kept, "written once"
    read(root, dataset_name=write_parquet(root, {"video": [b"z" * 1000], "text": ["x"]}, "z.parquet"), **limit)
    assert len(list(copies.iterdir())) == 2, "an older copy made room"
    assert "embedded_videos_gib" in refusal(root, dataset_name=table, embedded_videos_gib=1500 / 2**30)


@pytest.mark.parametrize("name", ["http://localhost/x", "/no/such/folder", "../up", "x y", "a\nb", "csv", "text"])
def test_what_is_no_hub_name_is_not_looked_up(root: Path, name: str, offline_datasets: Path, opened: list[str]) -> None:
    """A reader's name such as "csv" would read the working directory."""
    assert refusal(root, dataset_name=name).endswith("a folder or a hub name")
    assert opened == []


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
    "out/../outside/secret.mp4": "has '..'",
    "folder.mp4/../a.mp4": "has '..'",
    "/etc/passwd": "absolute",
    "\\\\server\\share\\a.mp4": "backslash",
    "C:/a.mp4": "drive letter",
    "http://localhost/a.mp4": "URL scheme",
    "concat:a.mp4|b.mp4": "URL scheme",
    "subfile,,start,0,end,9,,:/etc/passwd": "not found",
    "~/a.mp4": "not found",
    "%2e%2e/outside/secret.mp4": "not found",
    "\uff0e\uff0e/outside/secret.mp4": "not found",
    "*.mp4": "not found",
    "a.mp4/x": "Not a directory",
    "a.mp4\0.jpg": "control character",
    "\x1b[2Ja.mp4": "control character",
    "\ud800.mp4": "not Unicode",
    "a\u202e4pm.exe": "\\u202e4pm",
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
    "out/secre\u0301t.mp4": "leaves the data root",
    "zero.mp4": "leaves the data root",
    "dangling.mp4": "not found",
    "x" * 5000: "too long",
}


def test_a_name_outside_the_root_is_refused_and_nothing_is_opened(trapped: Path, opened: list[str]) -> None:
    for name, words in ATTACKS.items():
        with pytest.raises(DataError) as caught:
            DataRoot(trapped).find(name)
        message = str(caught.value)
        assert words in message and message.isprintable() and len(message) < 400
        table = write_table(trapped, jsonl({"video": name, "text": "x"}), "clips.jsonl")
        opened.clear()
        assert refusal(trapped, dataset_name=table).startswith("clips.jsonl row 1: ")
        assert set(opened) <= {table, str(trapped)}, "at most the root is listed, for another spelling of the name"


def test_plain_names_and_links_inside_the_root_are_fine(trapped: Path) -> None:
    for name, target in {
        **{"./a.mp4": "a.mp4", "sub//c.mp4": "sub/c.mp4", "inside.mp4": "a.mp4", "absolute.mp4": "a.mp4"},
        **{"inside/c.mp4": "sub/c.mp4", "12:30 take.mp4": "12:30 take.mp4", "..a.mp4": "..a.mp4"},
        **{"a b.mp4": "a b.mp4", "猫 \u200d.mp4": "猫 \u200d.mp4"},
    }.items():
        (trapped / target).touch()
        [source] = read_table(trapped, jsonl({"video": name, "text": "x"}), "clips.jsonl")
        assert source.path == trapped / target and not source.path.is_symlink()
        assert source.name == Path(name).as_posix()
    [source] = read_table(trapped, f"video,text\n{trapped.resolve()}/sub/c.mp4,x\n")
    assert (source.path, source.name) == (trapped / "sub/c.mp4", "sub/c.mp4")


def test_the_root_may_be_a_link_relative_or_in_the_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "link").symlink_to(root)
    monkeypatch.chdir(root.parent)
    monkeypatch.setenv("HOME", str(root.parent))
    for folder in ("link", "~/root"):
        [source] = read_table(root, "video,text\na.mp4,x\n", instance_data_root=Path(folder))
        assert (source.path, source.name) == (root / "a.mp4", "a.mp4")
    assert "'~nobody-of-this-name/clips' is not a folder" in refusal(Path("~nobody-of-this-name/clips"))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["..", ".", "", "out", "inside", "sub", "c.mp4", "a.mp4", "~", "\\", "C:", "\0"])))
def test_no_combination_of_parts_leaves_the_root(trapped: Path, parts: list[str]) -> None:
    try:
        path = DataRoot(trapped).find("/".join(parts))
    except DataError:
        return
    assert path in (trapped / "a.mp4", trapped / "sub/c.mp4")


# Malformed input of every kind


def only_project_errors(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "root")
        root.mkdir()
        (root / "a.mp4").touch()
        try:
            sources = read_table(root, content, name)
        except PrecogError as error:
            assert str(error).isprintable() and name in str(error)
        else:
            assert all(len(c.text.encode()) <= MAX_CAPTION_BYTES for s in sources for c in s.captions)
            assert {source.path for source in sources if not source.skipped} <= {root.resolve() / "a.mp4"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a.mp4"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "weight", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
json_rows = st.dictionaries(st.sampled_from(["video", "text", "start_seconds", "end_seconds"]), json_values)


@pytest.mark.faults
@settings(max_examples=100)
@given(st.lists(json_rows, max_size=3))
def test_any_jsonl_rows_give_sources_or_one_project_error(rows: list[dict[str, object]]) -> None:
    only_project_errors("t.jsonl", jsonl(*rows).encode())


@pytest.mark.faults
@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_parquet_gives_sources_or_one_project_error(mutations: list[tuple[float, int]]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"video": ["a.mp4"] * 50, "text": ["x"] * 50, "start_seconds": [0.5] * 50}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for place, byte in mutations:
        content[int(place * len(content))] = byte
    only_project_errors("t.parquet", bytes(content))
