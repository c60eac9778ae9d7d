"""The pages of the documentation: links work, names exist, and generated pages are current."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml

from img2img_server import errors
from img2img_server.compat.modelslab import sentences
from img2img_server.compat.modelslab.errors import ErrorKind
from img2img_server.domain.schedulers import SPELLINGS
from img2img_server.domain.violations import Reason, Violation
from img2img_server.engine.catalogue import read_catalogue
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.gateway.app import create_app
from img2img_server.setting_names import PREFIX
from img2img_server.settings import CLIENT_NAMES, Settings, with_variables
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests import doc_blocks
from tests.http_stack import META_KEYS
from tests.readme import ROOT, blocks, make_words, pages

LINK = re.compile(r"(?<!\\)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
# serve: .venv/.local ## Run the whole service on this machine until Ctrl-C
WORD = re.compile(r"^(?P<word>[a-z-]+):.*?## ", re.MULTILINE)
CONTRACT = "docs/http-contract.md"
PAGES = [page.relative_to(ROOT).as_posix() for page in pages()]


def script(path: str) -> ModuleType:
    """Imports a module that is not part of a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def makefile_words() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return {match["word"] for match in WORD.finditer(makefile)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [match["target"].split("#")[0] for match in LINK.finditer(text)]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page: explicit ones and those of its headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set(re.findall(r'<a id="([^"]+)"></a>', text))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_place_in_a_page_names_an_anchor_of_it(page: str) -> None:
    path = ROOT / page
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = []
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        there = path.parent / target if target else path
        if anchor and there.suffix == ".md" and "://" not in target:
            missing += [match["target"]] if anchor not in anchors(there) else []
    assert missing == []


def test_every_rule_of_the_http_contract_that_a_file_cites_exists() -> None:
    known = anchors(ROOT / CONTRACT)
    folders = ("server", "client", "proto", "tests", "benchmarks", "examples", "helm")
    kinds = {".py", ".proto", ".yaml", ".md", ".js", ".toml"}
    missing = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in kinds and path.is_file():
                cited = re.findall(rf"{CONTRACT}#([\w-]*)", path.read_text(encoding="utf-8"))
                missing += [f"{path.name}: {name}" for name in cited if name not in known]
    assert missing == []


def test_every_anchor_of_the_http_contract_is_there_once() -> None:
    named = re.findall(r'<a id="([^"]+)"></a>', (ROOT / CONTRACT).read_text(encoding="utf-8"))
    assert sorted(named) == sorted(set(named))


def test_the_page_of_the_http_contract_quotes_the_messages_of_its_endpoints() -> None:
    page = (ROOT / CONTRACT).read_text(encoding="utf-8")
    own = {ErrorKind.FIELDS, ErrorKind.FORBIDDEN, ErrorKind.JOB_ENDED, ErrorKind.WRONG_METHOD}
    own |= {ErrorKind.REQUEST_ID_REUSED, ErrorKind.RATE_LIMIT}
    own |= {ErrorKind.UNKNOWN_UPLOAD, ErrorKind.UPLOAD_EXPIRED, ErrorKind.UPLOAD_INCOMPLETE}
    messages = [kind.message for kind in ErrorKind if kind not in own]
    messages.append(sentences.ERRORS["QUEUE_FULL"].format(limit=15))
    values = {"max_megabytes": "20", "max_megapixels": "64"}
    reasons = (Reason.REQUIRED, Reason.DOWNLOAD_FAILED, Reason.INVALID_IMAGE)
    reasons += (Reason.TOO_MANY_BYTES, Reason.TOO_MANY_PIXELS)
    rejected = [Violation("init_image", reason, "", values=values) for reason in reasons]
    messages += map(sentences.field_sentence, rejected)
    assert [message for message in messages if message not in page] == []


def test_the_page_of_the_http_contract_names_every_key_of_meta() -> None:
    page = (ROOT / CONTRACT).read_text(encoding="utf-8")
    table = page.partition('<a id="meta"></a>')[2].partition("<a id=")[0]
    assert {key for key in META_KEYS if f"`{key}`" not in table} == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_make_word_of_a_page_is_one_of_the_makefile(page: str) -> None:
    assert make_words(ROOT / page) - makefile_words() == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_of_a_page_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    used = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]+\b", text))
    known = CLIENT_NAMES | {PREFIX + name.upper() for name in Settings.model_fields}
    assert used - known == set()


def test_every_metric_of_the_operations_page_exists_and_none_is_missing() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    sources = sorted((ROOT / "server/img2img_server").rglob("*.py"))
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    made = re.findall(r"\b(?:Counter|Gauge|Histogram)\(\s*\"(img2img_\w+)\"", code)
    assert sorted(re.findall(r"`(img2img_\w+)`", page.split("## Alerts")[0])) == sorted(made)


def test_every_alert_of_the_chart_has_a_section_on_its_page() -> None:
    page = (ROOT / "docs/alerts.md").read_text(encoding="utf-8")
    rules = ROOT / "helm/img2img/templates/monitoring/prometheusrule.yaml"
    raised = re.findall(r"- alert: (\w+)", rules.read_text(encoding="utf-8"))
    assert re.findall(r"^## (Img2Img\w+)$", page, re.MULTILINE) == raised


def test_the_contributing_page_explains_every_make_word() -> None:
    assert makefile_words() - make_words(ROOT / "CONTRIBUTING.md") == {"help"}


def test_the_settings_page_is_the_one_generated_from_the_settings() -> None:
    page = script("docs/generate_settings.py").render(Settings)
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == page


def test_descriptions_of_settings_name_variables_and_not_fields() -> None:
    described = with_variables("Key of `tls_cert_file`; nats_url, x.api_key_file and track_id.")
    assert described == (
        "Key of `IMG2IMG_TLS_CERT_FILE`; `IMG2IMG_NATS_URL`, x.api_key_file and track_id."
    )
    assert with_variables("As IMG2IMG_MODEL and `IMG2IMG_DTYPE`; a plain model.") == (
        "As `IMG2IMG_MODEL` and `IMG2IMG_DTYPE`; a plain model."
    )


def test_the_settings_page_has_every_setting_once() -> None:
    sections = script("docs/generate_settings.py").sections(Settings)
    listed = [name for names in sections.values() for name in names]
    assert sorted(listed) == sorted(Settings.model_fields)


def test_every_python_block_of_the_readme_compiles() -> None:
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets != []
    for number, block in enumerate(snippets):
        compile(block.text, f"README.md block {number}", "exec")


def test_the_model_file_of_the_operations_page_is_a_valid_one(tmp_path: Path) -> None:
    [block] = blocks(ROOT / "docs/operations.md", "toml")
    (tmp_path / "img2img.toml").write_text(block.text, encoding="utf-8")
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8"
    )
    info = read_model_spec(str(tmp_path)).info
    assert (info.name, info.default_num_inference_steps) == ("sd-turbo", 2)


def test_the_policy_of_the_operations_page_has_the_permissions_of_its_table() -> None:
    page = ROOT / "docs/operations.md"
    [block] = blocks(page, "json")
    policy = json.loads(block.text)
    granted = {action for statement in policy["Statement"] for action in statement["Action"]}
    text = page.read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(s3:\w+)` \|", text, re.MULTILINE))
    lifecycle = {"s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration"}
    assert granted - lifecycle == listed - {"s3:CreateBucket"}
    [values] = yaml.safe_load_all((ROOT / "helm/examples/minio-values.yaml").read_text())
    statements = values["policies"][0]["statements"]
    assert granted == {action for statement in statements for action in statement["actions"]}


@pytest.mark.parametrize("page", [CONTRACT, "docs/v1-api.md"])
def test_every_json_example_of_a_page_has_fields_of_a_type_of_the_api(page: str) -> None:
    schemas = asyncio.run(openapi())["components"]["schemas"]
    types = [set(schema.get("properties", {})) for schema in schemas.values()]
    for block in blocks(ROOT / page, "json"):
        shown = json.loads(block.text)
        assert any(shown.keys() <= fields for fields in types), (block.line, shown.keys())


async def openapi() -> dict[str, Any]:
    """Returns the OpenAPI document of a gateway; nothing is called."""
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        document: dict[str, Any] = create_app(Settings(), channel, MemoryBlobStore()).openapi()
        return document


def test_every_code_block_is_run_by_a_test_or_says_why_not() -> None:
    unknown = [
        f"{page}:{block.line}: add it to TESTS in tests/doc_blocks.py, or a line above the block: "
        "<!-- not run: REASON -->"
        for page, block, reason in doc_blocks.every_block()
        if not reason and not any(each.has(page, block) for each in doc_blocks.TESTS)
    ]
    assert unknown == []


def test_at_most_one_in_ten_code_blocks_is_not_run() -> None:
    found = doc_blocks.every_block()
    not_run = [f"{page}:{block.line}: {reason}" for page, block, reason in found if reason]
    print(f"{len(not_run)} of {len(found)} blocks are not run:", *not_run, sep="\n")
    assert len(not_run) <= doc_blocks.MOST * len(found)


def test_no_code_block_says_that_it_is_not_run_although_a_test_runs_it() -> None:
    both = [
        f"{page}:{block.line}"
        for page, block, reason in doc_blocks.every_block()
        if reason and any(each.has(page, block) for each in doc_blocks.TESTS)
    ]
    assert both == []


@pytest.mark.parametrize("page", doc_blocks.PAGES, ids=doc_blocks.name_of)
def test_every_mark_of_a_code_block_is_on_the_line_before_it(page: Path) -> None:
    marks = re.findall(r"^ *<!-- not run", page.read_text(encoding="utf-8"), re.MULTILINE)
    own = doc_blocks.name_of(page)
    reasons = [reason for name, _, reason in doc_blocks.every_block() if name == own and reason]
    assert len(marks) == len(reasons)


@pytest.mark.parametrize("number", range(len(doc_blocks.TESTS)))
def test_every_test_of_a_code_block_exists_and_its_block_too(number: int) -> None:
    each = doc_blocks.TESTS[number]
    path, _, name = each.test.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {name}|^{name}\b", text, re.MULTILINE), each
    assert any(each.has(page, block) for page, block, _ in doc_blocks.every_block()), each


def test_every_docker_build_of_a_page_fits_the_dockerfile() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    arguments = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    stages = set(re.findall(r"^FROM .* AS (\S+)$", dockerfile, re.MULTILINE))
    commands = []
    for page in doc_blocks.PAGES:
        for block in blocks(page, "sh"):
            lines = block.text.replace("\\\n", " ").splitlines()
            commands += [line for line in lines if re.match(r"docker (buildx )?build ", line)]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        used = [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"]
        assert {word.split("=")[0] for word in used} <= arguments, command
        assert {words[at + 1] for at, word in enumerate(words) if word == "--target"} <= stages
        assert words[-1] == "."


def test_the_webhook_of_the_v1_page_has_the_form_of_the_document() -> None:
    [block] = blocks(ROOT / "docs/v1-api.md", "http")
    head, _, content = block.text.partition("\n\n")
    names = {line.partition(": ")[0] for line in head.splitlines()[1:]}
    assert names == {"Content-Type", "webhook-id", "webhook-timestamp", "webhook-signature"}
    document = asyncio.run(openapi())
    schema = document["webhooks"]["jobEnded"]["post"]["requestBody"]["content"]["application/json"]
    refs = re.findall(r"#/components/schemas/(\w+)", json.dumps(schema))
    types = [document["components"]["schemas"][name]["properties"].keys() for name in refs]
    assert any(json.loads(content).keys() <= fields for fields in types)


def test_the_catalogue_of_the_page_about_models_is_a_valid_one(tmp_path: Path) -> None:
    [block] = blocks(ROOT / "docs/models.md", "toml")
    file = tmp_path / "models.toml"
    file.write_text(block.text, encoding="utf-8")
    found = read_catalogue(Settings(models_file=file))
    assert [model.name for model in found] == ["photo", "acme/fast"]


def test_the_page_about_models_lists_every_scheduler_with_its_spellings() -> None:
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    for name, spellings in SPELLINGS.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert [text for text in spellings if text not in row] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_source_file_that_a_page_names_exists(page: str) -> None:
    roots = [ROOT, ROOT / "server/img2img_server", ROOT / "client/img2img_client", ROOT / "server"]
    roots += [ROOT / "client", ROOT / "proto/img2img/v1"]
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+\.(?:py|proto))`", text))
    assert [name for name in sorted(named) if not any((r / name).exists() for r in roots)] == []


@pytest.mark.parametrize("page", ["docs/behaviour.md", "proto/img2img/v1/service.proto"])
def test_every_reason_of_a_field_is_documented(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert [reason for reason in Reason if not re.search(rf"\b{reason}\b", text)] == []


def reasons() -> set[str]:
    """Returns the reasons of all errors and of failed jobs."""
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    return {each.reason for each in classes if isinstance(getattr(each, "reason", None), str)}


def test_every_reason_that_a_caller_can_get_is_on_the_behaviour_page() -> None:
    page = (ROOT / "docs/behaviour.md").read_text(encoding="utf-8")
    assert {reason for reason in reasons() if f"`{reason}`" not in page} == set()


def test_every_reason_that_a_caller_can_get_is_in_a_comment_of_the_protocol() -> None:
    files = sorted((ROOT / "proto/img2img/v1").glob("*.proto"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert {reason for reason in reasons() if not re.search(rf"\b{reason}\b", text)} == set()
