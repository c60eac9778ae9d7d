"""The benchmark of event streams in a short form: every watcher gets every event."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fanout import measure_large


async def test_many_watchers_of_large_and_small_logs_get_every_event(tmp_path: Path) -> None:
    found = await measure_large(tmp_path / "large", watchers=80, heavy=30, events=14)
    assert (found["complete"], found["heavy_complete"]) == (80, 30)
    assert found["codes"] == {"OK": 80}
    # 30 watchers of 4 MB: a copy for each would be 126 MB, in NATS and in the api.
    assert found["nats_mb"]["peak"] - found["nats_mb"]["before"] < 80
    assert found["api_mb"]["peak"] < 400
