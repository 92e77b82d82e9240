"""The figures of a report: each from its own numbers."""

import time

from precompute.report import Report, Tally, merge


def report(made: int, reused: int, written: int, **seconds: float) -> Report:
    return Report(latents=Tally(made, reused), prompts=Tally(1, reused), written_bytes=written, seconds=seconds)


def test_rates_and_shares_are_of_the_video_pass_and_of_what_it_encoded() -> None:
    found = report(6, 4, 100, video_pass=3.0, wait_for_decode=1.5, wait_for_write=0.3, load_vae=9.0, total=30.0)
    told = found.as_json()
    assert told["clips_per_second"] == 2.0
    assert told["waited_share"] == {"decode": 0.5, "write": 0.1}
    assert told["latents"] == {"encoded": 6, "reused": 4} and told["prompts"] == {"encoded": 1, "reused": 4}
    assert Report().as_json()["clips_per_second"] == 0 and Report().waited_share("decode") == 0


def test_time_spent_on_one_thing_adds_up() -> None:
    found = Report(seconds={"write": 100.0})
    found.spend("write", time.perf_counter() - 2)
    found.spend("write", time.perf_counter())
    assert 102 <= found.seconds["write"] < 103


def test_workers_figures_are_summed_and_their_times_are_the_slowest_ones() -> None:
    merged = merge([report(4, 6, 10, total=3.0, write=1.0), report(5, 5, 20, total=2.0, load_vae=4.0)])
    assert (merged.latents, merged.prompts) == (Tally(9, 1), Tally(2, 5))
    assert merged.written_bytes == 30
    assert merged.seconds == {"total": 3.0, "write": 1.0, "load_vae": 4.0}
