"""`precog caption`: fill the captions that are empty, through a vision-language model.

Every answer is stored at once in NAME.captions.sqlite, under the clip's bytes and window, the model and the prompt:
a rerun asks only for what is new, and a crash loses one answer. A caption that is not empty is never written over.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from prepare.engines import Ask, NoAnswer
from prepare.table import (
    PrepareReport,
    Row,
    captions_of,
    clip_label,
    lint_rows,
    read_rows,
    table_path,
    video_file,
    write_rows,
)
from prepare.videos import probe, sample_frames
from shared.config import Config
from shared.console import Progress
from shared.errors import DataError
from shared.media.pool import DecodePool, decode_pool
from shared.media.probe import Probed

if TYPE_CHECKING:
    from PIL.Image import Image

DESCRIBE = (
    "These are {frames} pictures of one video clip, in order of time. Describe the clip in one paragraph of 50 to 100 "
    "words for a text-to-video model: the subject, what it does and how it moves, the surroundings, the light, the "
    "style and the camera. Begin with the subject. Do not mention pictures, frames, a video or a clip, and add nothing "
    "that is not visible."
)
REWRITE = (
    "Rewrite this description of a video as one paragraph of 50 to 100 words for a text-to-video model. Keep every "
    "fact, add none, begin with the subject, and answer with the paragraph alone.\n\n{caption}"
)
GIVE_UP_AFTER = 3
"""Clips in a row without an answer for a transient reason; then no further clip is asked about."""

OpenModel = Callable[[str, bool], Ask]
"""Open the model of that name; True asks for one that takes images."""


def caption_table(
    config: Config, open_model: OpenModel, model: str, num_frames: int = 8, rewrite_model: str | None = None
) -> PrepareReport:
    """Fill every empty caption of the config's table with `model`'s description of `num_frames` pictures.

    `rewrite_model`, a text model, rewrites each description. Models are opened when first asked. Raises `UsageError`
    if a model or server cannot be used at all, `DataError` for a table that cannot be read.
    """
    table = table_path(config)
    rows = [row for row in read_rows(table) if not captions_of(row, config.data.caption_column)]
    filled: list[str] = []
    files: dict[str, str] = {}
    unfinished = failures = 0
    with (
        closing(sqlite3.connect(table.with_suffix(".captions.sqlite"))) as store,
        decode_pool(config.precompute) as pool,
        Progress("clips", len(rows)) as bar,
    ):
        answers, probed = Answers(store, open_model), cache(partial(probe, pool))
        for row in rows:
            label = clip_label(row, config)
            try:
                if failures >= GIVE_UP_AFTER:
                    raise NoAnswer(f"not asked: {GIVE_UP_AFTER} clips in a row got no answer", transient=True)
                text = _describe(answers, row, config, model, num_frames, pool, probed)
                if rewrite_model:
                    prompt = REWRITE.format(caption=text)
                    text = answers.get(
                        (rewrite_model, prompt), rewrite_model, prompt, takes_images=rewrite_model == model
                    )
                if _fill(table, row, text, config):
                    filled.append(label)
                failures = 0
            except (NoAnswer, DataError) as error:
                files[label] = str(error)
                transient = isinstance(error, NoAnswer) and error.transient
                unfinished, failures = unfinished + transient, failures + 1 if transient else 0
            bar.advance()
    return PrepareReport(
        config=config.data.name,
        table=str(table),
        summary={"captions written": filled, "answers asked for": answers.asked, "answers reused": answers.reused},
        files=files,
        findings=lint_rows(read_rows(table), config),
        unfinished=unfinished,
    )


class Answers:
    """The answers that are stored, and the models that give further ones."""

    def __init__(self, store: sqlite3.Connection, open_model: OpenModel) -> None:
        self.asked = self.reused = 0
        self._store, self._open_model = store, cache(open_model)
        store.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL)")

    def get(
        self,
        parts: tuple[object, ...],
        model: str,
        prompt: str,
        pictures: Callable[[], list["Image"]] = list,
        *,
        takes_images: bool = True,
    ) -> str:
        """Return the answer stored under `parts`, or ask `model` and store what it says. Raises `NoAnswer`."""
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if found := self._store.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone():
            self.reused += 1
            return str(found[0])
        text = self._open_model(model, takes_images)(pictures(), prompt).checked()
        self.asked += 1
        with self._store:
            self._store.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))
        return text


def _describe(
    answers: Answers,
    row: Row,
    config: Config,
    model: str,
    num_frames: int,
    pool: DecodePool,
    probed: Callable[[Path], Probed],
) -> str:
    """Return a description of the clip. Raises `NoAnswer`, or `DataError` for a video that cannot be read."""
    path, start, end = video_file(row, config), row.get("start_seconds"), row.get("end_seconds")
    prompt, video = DESCRIBE.format(frames=num_frames), probed(path)
    parts = (video.probe.sha256, start, end, model, num_frames, prompt)
    return answers.get(parts, model, prompt, lambda: sample_frames(pool, path, video, num_frames, start, end))


def _fill(table: Path, row: Row, text: str, config: Config) -> bool:
    """Write the caption into the table as it is now; a row that got a caption meanwhile keeps that one."""
    column, names = config.data.caption_column, (config.data.video_column, "start_seconds", "end_seconds")
    rows = read_rows(table)
    clip = [row.get(name) for name in names]
    empty = [found for found in rows if [found.get(name) for name in names] == clip and not captions_of(found, column)]
    for found in empty:
        found[column] = text
    if empty:
        write_rows(table, rows)
    return bool(empty)
