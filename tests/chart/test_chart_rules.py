"""Every alert in a real Prometheus: promtool evaluates the rendered rules on series of a healthy
release and of faulty ones.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.chart_render import ROOT, of_kind, render

PROMTOOL = ROOT / ".tools" / "promtool"
SERVICES = [f"demo-img2img-{role}-headless" for role in ("api", "gateway", "worker")]


def series(name: str, **labels: str) -> str:
    pairs = {"namespace": "demo", **labels}
    return f"{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in pairs.items())}}}"


def waits(model: str, le: str) -> str:
    return series("img2img_stage_seconds_bucket", model=model, lane="realtime", stage="wait", le=le)


def queued(model: str, lane: str) -> str:
    return series("img2img_queued_gpu_seconds", model=model, lane=lane, state="waiting")


# The series of a release that works, by minute: `a+bxn` begins with a and adds b n times.
HEALTHY = {
    **{series("up", pod=f"p-{each}", service=each): "1x90" for each in SERVICES},
    series("img2img_rpcs_total", method="CreateJob", code="OK"): "0+600x90",
    series("img2img_rpcs_total", method="CreateJob", code="INTERNAL"): "0x90",
    series("img2img_rpcs_total", method="CreateJob", code="UNAVAILABLE"): "0x90",
    series("img2img_rpcs_total", method="CreateJob", code="RESOURCE_EXHAUSTED"): "0x90",
    series("img2img_webhooks_total", status="success"): "0+60x90",
    series("img2img_webhooks_total", status="failed"): "0x90",
    series("img2img_http_requests_total", code="200"): "0+600x90",
    series("img2img_http_requests_total", code="502"): "0x90",
    waits("fast", "5"): "0+60x90",
    waits("fast", "60"): "0+60x90",
    waits("fast", "+Inf"): "0+60x90",
    series("img2img_jobs_ended_total", model="fast", state="succeeded"): "0+60x90",
    series("img2img_jobs_ended_total", model="fast", state="failed"): "0x90",
    series("img2img_unfinished_jobs", model="fast", lane="realtime"): "5x90",
    series("img2img_unfinished_jobs", model="other", lane="realtime"): "0x90",
    queued("fast", "realtime"): "20x90",
    queued("fast", "batch"): "9000x90",
    queued("other", "realtime"): "0x90",
    series("img2img_workers", model="fast"): "2x90",
    series("img2img_workers", model="other"): "0x90",
    series("img2img_redeliveries_total"): "0x90",
    series("img2img_event_loop_lag_seconds_sum", pod="api-0"): "0+1x90",
    series("img2img_clock_skew_seconds", pod="api-0", against="NATS"): "0.2x90",
    series("img2img_store_calls_total", pod="worker-0", outcome="ok"): "0+60x90",
    series("img2img_store_calls_total", pod="worker-0", outcome="failed"): "0x90",
    series("img2img_nats_calls_total", pod="api-0", outcome="ok"): "0+600x90",
    series("img2img_nats_calls_total", pod="api-0", outcome="failed"): "0x90",
}
# The differences while an alert fires; None: the series is missing. A name begins with its alert.
FAULTS: dict[str, dict[str, str | None]] = {
    "Img2ImgApiErrors": {
        series("img2img_rpcs_total", method="CreateJob", code="INTERNAL"): "0+12x90"
    },
    "Img2ImgApiUnavailable": {
        series("img2img_rpcs_total", method="CreateJob", code="UNAVAILABLE"): "0+60x90"
    },
    "Img2ImgRefusing": {
        series("img2img_rpcs_total", method="CreateJob", code="RESOURCE_EXHAUSTED"): "0+12x90"
    },
    "Img2ImgWebhooksFailing": {series("img2img_webhooks_total", status="failed"): "0+90x90"},
    "Img2ImgHttpErrors": {series("img2img_http_requests_total", code="502"): "0+60x90"},
    "Img2ImgQueueSlow of jobs that end": {
        waits("slow", "5"): "0x90",
        waits("slow", "60"): "0+6x90",
        waits("slow", "+Inf"): "0+6x90",
    },
    # A busy model that is fast must not hide a slow one, of which no job ends.
    "Img2ImgQueueSlow while no job ends": {
        queued("slow", "realtime"): "90x90",
        series("img2img_workers", model="slow"): "1x90",
    },
    "Img2ImgQueueSlow without a worker": {
        queued("other", "realtime"): "2x90",
    },
    "Img2ImgJobsFailing": {
        series("img2img_jobs_ended_total", model="fast", state="failed"): "0+10x90"
    },
    "Img2ImgJobsStuck": {series("img2img_unfinished_jobs", model="other", lane="realtime"): "1x90"},
    "Img2ImgStoreFailing": {
        series("img2img_store_calls_total", pod="worker-0", outcome="failed"): "0+20x90"
    },
    "Img2ImgNatsFailing": {
        series("img2img_nats_calls_total", pod="api-0", outcome="failed"): "0+60x90"
    },
    "Img2ImgRoleMissing": {series("up", pod=f"p-{SERVICES[1]}", service=SERVICES[1]): None},
    "Img2ImgPodDown": {series("up", pod="second", service=SERVICES[0]): "0x90"},
    "Img2ImgWorkersLost": {series("img2img_redeliveries_total"): "0+1x90"},
    "Img2ImgEventLoopLate": {series("img2img_event_loop_lag_seconds_sum", pod="api-0"): "0+30x90"},
    "Img2ImgClockSkew": {
        series("img2img_clock_skew_seconds", pod="api-0", against="NATS"): "-300x90"
    },
}


def firing(folder: Path, cases: dict[str, dict[str, str]]) -> None:
    """Asserts that each case raises the alert that its name begins with, or none."""
    (rule,) = of_kind(render("production"), "PrometheusRule").values()
    (folder / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    tests = []
    for name, series in cases.items():
        alert = name.split()[0]
        wanted = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert != "none" else []
        tests.append(
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "60m",
                        "exp_samples": wanted,
                    }
                ],
            }
        )
    spec = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    (folder / "tests.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run([PROMTOOL, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


needs_promtool = pytest.mark.skipif(
    not PROMTOOL.exists(), reason="promtool is not in .tools/: run `make chart` once, on Debian"
)


@needs_promtool
def test_each_alert_fires_in_its_fault_alone_and_none_in_a_healthy_release(tmp_path: Path) -> None:
    cases = {"none": HEALTHY}
    for name, changes in FAULTS.items():
        series = {**HEALTHY, **changes}
        cases[name] = {key: values for key, values in series.items() if values is not None}
    firing(tmp_path, cases)


def test_every_alert_has_a_fault_in_which_it_fires() -> None:
    (rule,) = of_kind(render("production"), "PrometheusRule").values()
    alerts = {each["alert"] for group in rule["spec"]["groups"] for each in group["rules"]}
    assert {name.split()[0] for name in FAULTS} == alerts
