"""The report: rates, waiting times and the merge of workers' reports."""

from precompute.report import Report, SampleCounts, merge


def report(made: int, reused: int, written: int, **seconds: float) -> Report:
    return Report(
        latents=SampleCounts(made, reused), prompts=SampleCounts(1, reused), written_bytes=written, seconds=seconds
    )


def test_rates_and_shares_are_of_the_video_pass() -> None:
    found = report(6, 4, 100, video_pass=3.0, wait_for_decode=1.5, wait_for_write=0.3, load_vae=9.0, total=30.0)
    body = found.as_json()
    assert body["clips_per_second"] == 2.0
    assert body["waited_share"] == {"decode": 0.5, "write": 0.1}
    assert body["latents"] == {"encoded": 6, "reused": 4} and body["prompts"] == {"encoded": 1, "reused": 4}
    assert Report().as_json()["clips_per_second"] == 0 and Report().waited_share("decode") == 0


def test_merged_samples_are_summed_and_times_are_the_slowest() -> None:
    merged = merge([report(4, 6, 10, total=3.0, write=1.0), report(5, 5, 20, total=2.0, load_vae=4.0)])
    assert (merged.latents, merged.prompts) == (SampleCounts(9, 1), SampleCounts(2, 5))
    assert merged.written_bytes == 30
    assert merged.seconds == {"total": 3.0, "write": 1.0, "load_vae": 4.0}
