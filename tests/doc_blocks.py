"""The code blocks of the documentation and the tests that run or check them.

A block that no test runs has a comment on the line before it, `<!-- not run: REASON -->`. At most
one in ten blocks may have one. tests/unit/test_docs.py checks both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.readme import ROOT, Block, fences, pages

MOST = 0.1  # share of the blocks that no test runs
NOT_RUN = re.compile(r"^\s*<!-- not run: (?P<reason>\S.+) -->$")
PAGES = [*pages(), *sorted(ROOT.glob("helm/img2img/*.md")), ROOT / "client/README.md"]


@dataclass(frozen=True)
class RunBy:
    """Blocks of a page and the test that runs them: those of a language that contain a text, or
    have it as their title. An empty text means all of them.
    """

    page: str
    language: str
    test: str
    text: str = ""

    def has(self, page: str, block: Block) -> bool:
        """Returns whether the test runs this block."""
        found = self.text in block.text or self.text == block.title
        return (page, block.language) == (self.page, self.language) and found


README = "tests/integration/test_readme.py::test_every_way_to_ask_gives_the_same_image"
DESCRIBES = "tests/integration/test_readme.py::test_the_server_describes_itself_and_its_limits"
CLIENT = "tests/unit/test_client_docs.py::test_every_"
FIRST = "tests/integration/test_pages.py::test_"
RUNBOOKS = "tests/integration/test_runbooks.py::test_"
SDK = "tests/contract/test_http_contract_sdk.py::test_the_example"
OPENAI = "tests/contract/test_openai_sdk.py::test_the_"
CHART = "tests/chart/test_chart_readme.py::test_"
INSTALLS = f"{CHART}what_a_page_installs_renders_with_its_own_nats_and_s3"
VALUES = f"{CHART}the_values_of_a_page_render"
SERVE = f"{FIRST}make_serve_starts_the_service_that_these_tests_use"
DRAWN = "tests/unit/test_site.py::test_every_diagram_of_a_page_has_its_image"
DOCKER = "tests/unit/test_docs.py::test_every_docker_build_of_a_page_fits_the_dockerfile"
EXAMPLES = "tests/integration/test_other_languages.py::test_the_code_of_the_page_is_that_of_the"
JSON = "tests/unit/test_docs.py::test_every_json_example_of_a_page_has_fields_of_a_type_of_the_api"
POLICY = "test_the_policy_of_the_operations_page_has_the_permissions_of_its_table"
TESTS = (
    RunBy("README.md", "sh", ".ci/run::make demo", "make demo"),
    RunBy("README.md", "sh", SERVE, "make serve"),
    RunBy("README.md", "sh", README, "img2img generate"),
    RunBy("README.md", "sh", README, "Img2ImgService/Generate"),
    RunBy("README.md", "sh", README, "curl"),
    RunBy("README.md", "sh", DESCRIBES, "GetCapabilities"),
    RunBy("README.md", "sh", INSTALLS, "helm install"),
    RunBy("README.md", "python", README),
    RunBy("README.md", "text", README),
    RunBy("README.md", "mermaid", DRAWN),
    RunBy("client/README.md", "python", f"{FIRST}the_program_of_the_clients_page_runs"),
    RunBy("docs/architecture.md", "mermaid", DRAWN),
    RunBy("docs/client.md", "python", f"{CLIENT}python_block_of_the_page_runs"),
    RunBy("docs/client.md", "sh", f"{CLIENT}command_on_the_page_parses"),
    RunBy(
        "docs/client.md",
        "toml",
        "tests/unit/test_cli_profiles.py::test_the_file_on_the_page_is_a_file_of_profiles",
    ),
    RunBy(
        "docs/client.md",
        "json",
        "tests/unit/test_client_docs.py::test_the_printed_job_on_the_page_has_real_fields",
    ),
    RunBy("docs/compose.md", "sh", "tests/integration/test_compose_runs.py::prepare", ".env"),
    RunBy(
        "docs/compose.md",
        "sh",
        f"{FIRST}the_command_of_the_compose_page_creates_an_image",
        "img2img generate",
    ),
    RunBy("docs/cookbook.md", "sh", "tests/integration/test_pages.py::settings_of", "make serve"),
    RunBy("docs/cookbook.md", "sh", f"{FIRST}the_receiver_prints_each_webhook", "--webhook"),
    RunBy("docs/cookbook.md", "python", f"{FIRST}the_receiver_prints_each", "receiver.py"),
    RunBy("docs/cookbook.md", "html", f"{FIRST}the_page_shows_progress", "page.html"),
    RunBy("docs/cookbook.md", "python", f"{FIRST}a_killed_program_continues", "resume.py"),
    RunBy("docs/cookbook.md", "python", f"{FIRST}images_are_stored_in", "own_bucket.py"),
    RunBy("docs/cookbook.md", "python", f"{FIRST}the_program_with_openais", "openai_sdk.py"),
    RunBy("docs/cookbook.md", "python", f"{FIRST}the_images_of_a_lora_differ", "lora.py"),
    RunBy("docs/deploy-kubernetes.md", "sh", INSTALLS),
    RunBy("docs/deploy-kubernetes.md", "yaml", VALUES),
    RunBy("docs/deploy-minio.md", "yaml", VALUES),
    RunBy("docs/deploy-nats.md", "conf", f"{RUNBOOKS}nats_server_accepts"),
    RunBy("docs/gpus-on-kubernetes.md", "yaml", VALUES, "workers:"),
    RunBy("docs/http-contract.md", "json", JSON),
    RunBy("docs/http-contract.md", "python", f"{SDK}_of_the_contract_runs"),
    RunBy("docs/migrating-from-modelslab.md", "sh", f"{SDK}s_of_the_migration_page_run"),
    RunBy("docs/migrating-from-modelslab.md", "python", f"{SDK}s_of_the_migration_page_run"),
    RunBy(
        "docs/models.md",
        "toml",
        "tests/unit/test_docs.py::test_the_catalogue_of_the_page_about_models_is_a_valid_one",
    ),
    RunBy("docs/openai-api.md", "python", f"{OPENAI}python_and_curl_examples_of_the_page_run"),
    RunBy("docs/openai-api.md", "sh", f"{OPENAI}python_and_curl_examples_of_the_page_run"),
    RunBy("docs/openai-api.md", "js", f"{OPENAI}node_example_of_the_page_runs"),
    RunBy("docs/operations.md", "sh", f"{RUNBOOKS}the_command_for_api_keys", "keys --tenant"),
    RunBy("docs/operations.md", "json", f"tests/unit/test_docs.py::{POLICY}"),
    RunBy(
        "docs/operations.md",
        "toml",
        "tests/unit/test_docs.py::test_the_model_file_of_the_operations_page_is_a_valid_one",
    ),
    RunBy("docs/operations.md", "sh", DOCKER, "docker build "),
    RunBy("docs/other-languages.md", "ts", EXAMPLES),
    RunBy("docs/other-languages.md", "java", EXAMPLES),
    RunBy("docs/releasing.md", "sh", ".ci/run::make dist", "make dist"),
    RunBy("docs/quickstart.md", "sh", ".ci/run::make demo", "make demo"),
    RunBy("docs/quickstart.md", "sh", SERVE, "make serve"),
    RunBy("docs/quickstart.md", "sh", f"{FIRST}the_requests_of_the_quickstart", "generate"),
    RunBy("docs/quickstart.md", "sh", f"{FIRST}the_requests_of_the_quickstart", "curl"),
    RunBy("docs/quickstart.md", "python", f"{FIRST}the_requests_of_the_quickstart"),
    RunBy("docs/runbooks.md", "sh", f"{RUNBOOKS}the_checks_show_readiness"),
    RunBy("docs/runbooks.md", "python", f"{RUNBOOKS}the_program_lists_the_dead_letters"),
    RunBy("docs/v1-api.md", "sh", f"{FIRST}the_commands_of_the_v1_page", "oil painting"),
    RunBy("docs/v1-api.md", "sh", f"{FIRST}the_commands_of_the_v1_page", "oil+painting"),
    RunBy("docs/v1-api.md", "sh", f"{FIRST}the_commands_of_the_v1_page", "/v1/uploads"),
    RunBy("docs/v1-api.md", "sh", f"{FIRST}an_event_source_watches_a_job", ":token"),
    RunBy("docs/v1-api.md", "js", f"{FIRST}an_event_source_watches_a_job"),
    RunBy("docs/v1-api.md", "text", f"{FIRST}an_event_source_watches_a_job"),
    RunBy("docs/v1-api.md", "json", JSON),
    RunBy(
        "docs/v1-api.md",
        "http",
        "tests/unit/test_docs.py::test_the_webhook_of_the_v1_page_has_the_form_of_the_document",
    ),
    RunBy("helm/img2img/README.md", "sh", DOCKER, "docker build "),
    RunBy("helm/img2img/README.md", "sh", INSTALLS, "helm install"),
    RunBy("helm/img2img/README.md", "yaml", VALUES),
)


def name_of(page: Path) -> str:
    """Returns the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def every_block() -> list[tuple[str, Block, str]]:
    """Returns page, block and the reason why no test runs the block, "" if there is none."""
    found = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for block in fences(page):
            mark = NOT_RUN.match(lines[block.line - 2]) if block.line > 1 else None
            found.append((name_of(page), block, mark["reason"] if mark else ""))
    return found
