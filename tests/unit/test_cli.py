"""The command img2img with a scripted service: requests, files, output and exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_client.cli import main, report
from img2img_client.cli.admin import admin
from img2img_client.cli.progress import LiveDisplay
from img2img_client.convert import event_from
from tests.cli_runs import REQUEST, in_a_folder_with_a_photo, run
from tests.fake_job import NAME, State, events, job
from tests.fake_service import FakeService, last, serving
from tests.golden_file import assert_golden

ADMIN = admin.commands
pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)


def test_generate_as_json_prints_the_golden_file() -> None:
    result = run(FakeService(log=events(samples=2)), *REQUEST, "--output", "new/out.png", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert_golden("cli/generate.json", result.stdout)
    for sample in json.loads(result.stdout)["samples"]:
        data = Path(sample["path"]).read_bytes()
        assert data == b"\x89PNG image of sample %d" % sample["index"]


def test_generate_as_text_prints_the_golden_file() -> None:
    result = run(FakeService(), *REQUEST, "--output", "out.png")
    assert (result.exit_code, result.stderr) == (0, "")
    assert_golden("cli/generate.txt", result.stdout)
    assert Path("out.png").read_bytes() == b"\x89PNG image of sample 0"


def test_every_option_reaches_the_request() -> None:
    service = FakeService()
    words = "--strength 0.5 --seed 7 --samples 2 --width 640 --height 384 --steps 30 --guidance 4.5"
    words += " --negative-prompt dog --scheduler euler --model atelier --preview-every 5 --batch"
    words += " --no-safety-checker --enhance-prompt --temp --base64 --webhook https://example.com/w"
    words += " --track-id t1 --request-id 7f1c --lora ink:-0.5 --lora a:b --true-cfg-scale 2"
    words += " --noise-level --allow-partial --annotation order=7 --annotation note=a=b"
    words += " --output-quality 80 --prompt-weights --clip-skip 2"
    assert run(service, *REQUEST, *words.split()).exit_code == 0
    assert service.requests == [
        service_pb2.GenerateRequest(
            request_id="7f1c",
            spec=job_pb2.JobSpec(
                prompt="p",
                negative_prompt="dog",
                init_image=job_pb2.InitImage(data=b"photo"),
                width=640,
                height=384,
                samples=2,
                strength=0.5,
                seed=7,
                safety_checker=False,
                enhance_prompt=True,
                base64=True,
                temp=True,
                webhook="https://example.com/w",
                track_id="t1",
                model="atelier",
                num_inference_steps=30,
                guidance_scale=4.5,
                scheduler="euler",
                output_format=job_pb2.IMAGE_FORMAT_PNG,
                preview_interval_steps=5,
                lane=job_pb2.LANE_BATCH,
                loras=[
                    job_pb2.Lora(name="ink", scale=-0.5),
                    job_pb2.Lora(name="a:b", scale=1.0),
                ],
                true_cfg_scale=2,
                strength_mode=job_pb2.STRENGTH_MODE_NOISE_LEVEL,
                annotations={"order": "7", "note": "a=b"},
                allow_partial=True,
                output_quality=80,
                prompt_weights=True,
                clip_skip=2,
            ),
        )
    ]
    sent = {field.name for field, _ in service.requests[0].spec.ListFields()}
    assert sent == set(job_pb2.JobSpec.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("words", [("--annotation", "order"), ("--annotation", "a=1") * 2])
def test_a_wrong_annotation_is_a_usage_error(words: tuple[str, ...]) -> None:
    service = FakeService()
    assert run(service, *REQUEST, *words).exit_code == 2
    assert not service.requests


def test_omitted_options_are_not_sent() -> None:
    service = FakeService()
    assert run(service, *REQUEST).exit_code == 0
    assert last(service.requests, service_pb2.GenerateRequest).spec == job_pb2.JobSpec(
        prompt="p",
        init_image=job_pb2.InitImage(data=b"photo"),
        output_format=job_pb2.IMAGE_FORMAT_PNG,
    )
    assert Path("10000001.png").exists()


@pytest.mark.parametrize(
    ("name", "media_type", "wire"),
    [("o.jpg", "image/jpeg", 2), ("o.JPEG", "image/jpeg", 2), ("o.webp", "image/webp", 3)],
)
def test_the_suffix_picks_the_format(name: str, media_type: str, wire: int) -> None:
    service = FakeService(log=events(media_type=media_type))
    assert run(service, *REQUEST, "--output", name).exit_code == 0
    assert last(service.requests, service_pb2.GenerateRequest).spec.output_format == wire
    assert Path(name).exists()


def test_several_samples_are_numbered_and_the_last_preview_is_kept() -> None:
    result = run(FakeService(log=events(samples=2)), *REQUEST, "--output", "out.png")
    assert result.exit_code == 0
    made = sorted(path.name for path in Path().iterdir())
    assert made == ["out-0-preview.jpg", "out-0.png", "out-1.png", "photo.jpg"]


def test_a_url_is_sent_for_the_service_to_download() -> None:
    service = FakeService()
    run(service, "generate", "--prompt", "p", "--init-image", "https://example.com/cat.jpg")
    sent = last(service.requests, service_pb2.GenerateRequest).spec.init_image
    assert sent == job_pb2.InitImage(url="https://example.com/cat.jpg")


@pytest.mark.parametrize("uri", ["data:;base64,AAAA", "HTTPS://example.com/cat.jpg"])
def test_a_data_uri_and_an_upper_case_scheme_are_sent_as_url(uri: str) -> None:
    service = FakeService()
    run(service, "generate", "--prompt", "p", "--init-image", uri)
    sent = last(service.requests, service_pb2.GenerateRequest).spec.init_image
    assert sent == job_pb2.InitImage(url=uri)


def test_get_shows_why_a_webhook_was_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    retried = job(State.STATE_SUCCEEDED)
    retried.webhook_status = "retrying"
    retried.webhook_error = "the server answered 307; redirects are not followed"
    monkeypatch.setattr(FakeService, "_job", lambda _: retried)
    result = " ".join(run(FakeService(), "get", NAME).stdout.split())
    assert "retrying: the server answered 307; redirects are not followed" in result


def test_the_default_key_of_a_local_service_is_the_development_key() -> None:
    service = FakeService()
    run(service, "capabilities")
    run(service, "capabilities", "--api-key", "mine")
    assert service.keys == ["Bearer dev-key", "Bearer mine"]


def test_server_and_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService()
    with serving(service) as port:
        monkeypatch.setenv("IMG2IMG_SERVER", f"127.0.0.1:{port}")
        monkeypatch.setenv("IMG2IMG_API_KEY", "from-env")
        assert CliRunner().invoke(main, ["capabilities"]).exit_code == 0
    assert service.keys == ["Bearer from-env"]


def test_a_service_on_another_machine_needs_a_key() -> None:
    result = CliRunner().invoke(main, ["capabilities", "--server", "img2img.example.com:443"])
    assert result.exit_code == 2
    assert "img2img.example.com:443 needs an API key" in result.stderr


def test_a_detached_job_is_queued_and_named_with_its_warning() -> None:
    service = FakeService(warning="Steps were raised.")
    result = run(service, *REQUEST, "--detach", "--output", "out.jpg")
    assert (result.exit_code, result.stderr) == (0, "")
    follow = "img2img watch 10000001 --output out.jpg"
    assert result.stdout.splitlines() == [
        f"{NAME} is queued; follow it with: {follow}",
        "Warning: Steps were raised.",
    ]
    sent = last(service.requests, service_pb2.CreateJobRequest)
    assert sent.spec.output_format == job_pb2.IMAGE_FORMAT_JPEG
    result = run(FakeService(), *REQUEST, "--detach", "--json")
    assert json.loads(result.stdout)["name"] == NAME


def test_every_command_prints_a_job_in_the_same_form() -> None:
    page = service_pb2.ListJobsResponse(jobs=[job(State.STATE_SUCCEEDED)])
    printed = {}
    for words in (
        REQUEST,
        (*REQUEST, "--detach"),
        ("get", NAME),
        ("watch", NAME),
        ("cancel", NAME),
    ):
        result = run(FakeService(), *words, "--json")
        printed[words] = json.loads(result.stdout)
    printed["list",] = json.loads(run(FakeService(pages={"": page}), "list", "--json").stdout)
    [printed["list",]] = printed["list",]["jobs"]
    keys = {
        words: (list(found), [list(s) for s in found["samples"]])
        for words, found in printed.items()
    }
    assert len({tuple(names) for names, _ in keys.values()}) == 1
    sample = ["index", "seed", "url", "sha256", "size_bytes", "nsfw", "error", "path"]
    sample.append("preview")
    assert {tuple(names) for _, found in keys.values() for names in found} == {tuple(sample)}
    assert printed[REQUEST]["samples"][0]["path"] == "10000001.png"
    assert printed["get", NAME]["error"] is None


def test_watch_saves_the_images_to_the_output() -> None:
    service = FakeService()
    result = run(service, "watch", "10000001", "--after", "1", "--output", "out.png", "--json")
    assert result.exit_code == 0
    assert service.requests == [service_pb2.WatchJobRequest(name=NAME, after_sequence=1)]
    assert json.loads(result.stdout)["samples"][0]["path"] == "out.png"
    assert Path("out.png").exists()


def test_watch_rejects_a_suffix_of_another_format() -> None:
    result = run(FakeService(), "watch", NAME, "--output", "out.jpg")
    assert result.exit_code == 2
    assert "--output must end in .png" in result.stderr


@pytest.mark.parametrize("words", [["get", NAME], ["cancel", NAME], ["capabilities"]])
@pytest.mark.parametrize("form", ["txt", "json"])
def test_a_command_prints_what_is_in_the_golden_file(words: list[str], form: str) -> None:
    extra = ["--json"] if form == "json" else []
    result = run(FakeService(), *words, *extra)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_golden(f"cli/{words[0]}.{form}", result.stdout)


@pytest.mark.parametrize("form", ["txt", "json"])
def test_a_list_prints_what_is_in_the_golden_file(form: str) -> None:
    jobs = [job(State.STATE_SUCCEEDED, samples=2), job(State.STATE_FAILED)]
    jobs[1].spec.prompt = "a very long prompt " * 5
    service = FakeService(pages={"": service_pb2.ListJobsResponse(jobs=jobs, next_page_token="n")})
    extra = ["--json"] if form == "json" else []
    result = run(
        service, "list", "--state", "succeeded", "--state", "failed", "--limit", "2", *extra
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert_golden(f"cli/list.{form}", result.stdout)
    states = [State.STATE_SUCCEEDED, State.STATE_FAILED]
    assert service.requests == [service_pb2.ListJobsRequest(page_size=2, states=states)]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, ["job", "state", "created", "model", "size", "prompt"]),
        (60, ["job", "state", "created", "prompt"]),
        (40, ["job", "state", "prompt"]),
        (24, ["job", "state"]),
        (12, ["job"]),
        (5, ["job"]),
    ],
)
def test_a_list_leaves_out_columns_before_it_cuts_an_id(
    columns: int, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PIPE_COLUMNS", columns)
    page = service_pb2.ListJobsResponse(jobs=[job(State.STATE_SUCCEEDED), job(State.STATE_FAILED)])
    result = run(FakeService(pages={"": page}), "list")
    head, *rows = result.stdout.splitlines()
    assert head.split() == shown
    assert [row.split()[0] for row in rows] == ["10000001", "10000001"]
    if columns >= 12:
        assert all(len(row) <= columns for row in rows)


@pytest.mark.parametrize("columns", [40, 28])
@pytest.mark.parametrize("words", [["get"], ["cancel"], ["watch"], ["redeliver"], ["list"]])
def test_a_narrow_terminal_never_cuts_the_id_of_a_job(
    columns: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PIPE_COLUMNS", columns)
    long_name = f"jobs/{2**63 - 1}"
    found = job(State.STATE_QUEUED)
    found.name, found.id = long_name, 2**63 - 1
    service = FakeService(pages={"": service_pb2.ListJobsResponse(jobs=[found])})
    monkeypatch.setattr(service, "_job", lambda: found)
    service.log[-1].succeeded.job.name = long_name
    result = run(service, *words, *([] if words == ["list"] else [long_name]))
    assert result.exit_code == 0, result.output
    assert str(2**63 - 1) in result.stdout


@pytest.mark.parametrize("columns", [80, 40, 34])
def test_the_live_display_of_a_narrow_terminal_never_cuts_the_id_of_a_job(columns: int) -> None:
    console = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    display = LiveDisplay(console)
    event = event_from(event_pb2.JobEvent(job=f"jobs/{2**63 - 1}", queued=event_pb2.JobQueued()))
    assert event is not None
    display.show(event)
    console.print(display)
    assert isinstance(console.file, io.StringIO)
    assert f"jobs/{2**63 - 1}" in console.file.getvalue()


def test_without_a_terminal_the_reason_why_a_queued_job_waits_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = job(State.STATE_QUEUED)
    waiting.state_reason, waiting.warning = "MODEL_UNSERVED", "No worker serves the model now."
    service = FakeService()
    monkeypatch.setattr(service, "_job", lambda: waiting)
    result = run(service, "watch", NAME)
    expected = f"{NAME} is queued (model unserved). No worker serves the model now.\n"
    assert (result.exit_code, result.stderr) == (0, expected)


def test_an_empty_list_prints_no_jobs() -> None:
    service = FakeService(pages={"": service_pb2.ListJobsResponse()})
    assert run(service, "list").stdout == "no jobs\n"


def test_the_help_of_every_command_is_in_the_golden_file() -> None:
    texts = [
        CliRunner().invoke(main, [*name, "--help"], prog_name="img2img", terminal_width=100).stdout
        for name in ([], *([name] for name in main.commands), *(["admin", each] for each in ADMIN))
    ]
    assert_golden("cli/help.txt", "\n".join(texts))
